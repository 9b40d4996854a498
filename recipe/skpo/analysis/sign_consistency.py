"""Simulate whether Monte-Carlo advantages have the right sign: the paper's figures 1, 5, 6 and 8.

    prompt     value mu ~ Beta(a, b); concentration c, log-uniform: how much its segments differ
    segment    p ~ Beta(mu c, (1 - mu) c), G per prompt: true success probability, mean mu
    class      number of correct among G outcomes, one Bernoulli(p) per segment
    MC         Binomial(K, p) / K, then group-relative over the G segments, as from the true p
    SKPO       one segment per visit: R_I of K = 8 responses minus the tracker's value, against the true p - mu

A sign is right if it is that of the true advantage; an estimate of exactly 0 counts as not right.

    python -m recipe.skpo.analysis.sign_consistency --out DIR
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recipe.skpo.analysis.common import add_out, parser_of, write_results
from recipe.skpo.evaluation.options import add_flags, check_options, option, read_flags, require
from recipe.skpo.evaluation.results import run_cli
from recipe.skpo.method.advantage import group_relative_advantage, single_stream_advantage
from recipe.skpo.method.tracker import PromptTable

ZERO = 1e-9
"""Below it an advantage is a rounding error of 0."""


@dataclass(frozen=True)
class SignConfig:
    """What is simulated; each option's help says what it is."""

    prompts: int = option(20_000, "number of prompts", least=1)
    group_size: int = option(8, "G, segments per prompt; also the outcomes of the correctness class", least=2)
    samples: tuple[int, ...] = option(
        tuple(2**power for power in range(3, 14)), "values of K, Monte-Carlo samples per segment", least=1
    )
    difficulty_alpha: float = option(1.0, "a of the Beta that prompt values are drawn from")
    difficulty_beta: float = option(1.0, "b of it")
    concentration_low: float = option(5.0, "smallest c; large means that a prompt's segments are alike")
    concentration_high: float = option(100.0, "largest c")
    spread_edges: tuple[float, ...] = option(
        (0.0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5),
        "edges of the bins of the true probabilities' population std within a group",
    )
    visits: int = option(12, "of every prompt under SKPO", least=1)
    responses: int = option(8, "K of SKPO, downstream responses per visit", least=1)
    value_trends: tuple[float, ...] = option(
        (0.0, 0.25), "logits by which prompt values rise from visit to visit, one SKPO simulation each"
    )
    drift: float = option(
        136.0,
        "D between two visits, in steps; the paper's 17,398 prompts at 128 per step come back after 136",
        least=0,
    )
    batch: int = option(128, "prompts over which SKPO's advantage is normalised", least=1)
    seed: int = option(1, "of every draw", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        require(
            min(self.difficulty_alpha, self.difficulty_beta) > 0,
            f"--difficulty-alpha, --difficulty-beta: must be > 0, got {self.difficulty_alpha}, {self.difficulty_beta}",
        )
        require(
            0 < self.concentration_low <= self.concentration_high,
            "--concentration-low, --concentration-high: need 0 < low <= high, got "
            f"{self.concentration_low}, {self.concentration_high}",
        )
        require(
            len(self.spread_edges) >= 2 and list(self.spread_edges) == sorted(set(self.spread_edges)),
            f"--spread-edges: must be two or more rising numbers, got {self.spread_edges}",
        )


@dataclass(frozen=True)
class Prompts:
    """Simulated prompts.

    Attributes:
        value: mu, (prompts,), in (0, 1).
        concentration: c, (prompts,).
        segments: true success probabilities, (prompts, G).
        correct: number of correct ones among G outcomes, int (prompts,).
    """

    value: np.ndarray
    concentration: np.ndarray
    segments: np.ndarray
    correct: np.ndarray

    @property
    def spread(self) -> np.ndarray:
        """Population std of the true probabilities of each group, (prompts,)."""
        return self.segments.std(axis=1)


def draw_prompts(config: SignConfig, rng: np.random.Generator) -> Prompts:
    """Draw prompts, their segments and one outcome per segment."""
    value = rng.beta(config.difficulty_alpha, config.difficulty_beta, config.prompts)
    low, high = np.log(config.concentration_low), np.log(config.concentration_high)
    concentration = np.exp(rng.uniform(low, high, config.prompts))
    segments = draw_segments(value, concentration, config.group_size, rng)
    return Prompts(value, concentration, segments, rng.binomial(1, segments).sum(axis=1))


def draw_segments(value: np.ndarray, concentration: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw true success probabilities of ``count`` segments per prompt, (prompts, count)."""
    # Beta takes no parameter of 0; 1e-6 of a success is as good.
    alpha, beta = (np.maximum(part * concentration, 1e-6)[:, None] for part in (value, 1 - value))
    return rng.beta(alpha, beta, (len(value), count))


def group_relative(values: np.ndarray) -> np.ndarray:
    """Compute training's group-relative advantage of each column among its row, (prompts, G) float64."""
    groups = np.repeat(np.arange(values.shape[0]), values.shape[1])
    flat = group_relative_advantage(torch.from_numpy(values.astype(np.float64).ravel()), torch.from_numpy(groups))
    return flat.numpy().reshape(values.shape)


def signs(advantages: np.ndarray) -> np.ndarray:
    """Return -1, 0 or +1; values below ``ZERO`` are 0."""
    return np.where(np.abs(advantages) < ZERO, 0.0, np.sign(advantages))


@dataclass(frozen=True)
class Scores:
    """Per estimate: how it compares with the truth.  All are float arrays of one shape; NaN is left out.

    Attributes:
        right: 1 where the sign is the true one, 0 where not; NaN where the true advantage is 0.
        zero: 1 where the estimate is 0.
        error: absolute difference of the normalised advantages.
        normalised_right: as ``right``, for the batch-normalised advantage that SKPO trains with; NaN elsewhere.
        prompt_right: as ``right``, against the sign of p - mu instead of p - (mean of the group).
    """

    right: np.ndarray
    zero: np.ndarray
    error: np.ndarray
    normalised_right: np.ndarray
    prompt_right: np.ndarray


def _right(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    true_sign = signs(truth)
    return np.where(true_sign == 0, np.nan, (signs(estimate) == true_sign).astype(np.float64))


def monte_carlo_scores(prompts: Prompts, samples: int, rng: np.random.Generator) -> Scores:
    """Score Monte-Carlo group-relative advantages with K = ``samples`` per segment, arrays (prompts, G)."""
    estimate = group_relative(rng.binomial(samples, prompts.segments) / samples)
    truth = group_relative(prompts.segments)
    return Scores(
        right=_right(estimate, truth),
        zero=(signs(estimate) == 0).astype(np.float64),
        error=np.abs(estimate - truth),
        normalised_right=np.full(truth.shape, np.nan),
        prompt_right=_right(estimate, prompts.segments - prompts.value[:, None]),
    )


def batch_normalised(rewards: np.ndarray, baselines: np.ndarray, batch: int) -> np.ndarray:
    """Compute training's single-stream advantage, batch by batch in order, (prompts,)."""
    parts = [
        single_stream_advantage(
            torch.from_numpy(rewards[start : start + batch]), torch.from_numpy(baselines[start : start + batch])
        ).numpy()
        for start in range(0, len(rewards), batch)
    ]
    return np.concatenate(parts)


def upstream_scores(
    config: SignConfig, prompts: Prompts, trend: float, rng: np.random.Generator
) -> Iterator[tuple[str, int, Scores]]:
    """Score SKPO's upstream estimator, visit by visit.

    Every visit draws a fresh segment, except the last one of a policy that does not change: that takes the first
    segment of the prompt's simulated group, so that classes and spreads are those of the Monte-Carlo groups.

    Yields:
        Estimator (``skpo``: tracked baseline; ``skpo_exact_baseline``: the true value instead), number of
        earlier visits, and its scores, arrays (prompts,).
    """
    tracker = PromptTable()
    keys = [str(index) for index in range(config.prompts)]
    logit = np.log(np.clip(prompts.value, 1e-9, 1 - 1e-9)) - np.log(np.clip(1 - prompts.value, 1e-9, 1 - 1e-9))
    for visit in range(config.visits):
        value = prompts.value if trend == 0 else 1 / (1 + np.exp(-(logit + trend * visit)))
        if trend == 0 and visit == config.visits - 1:
            segment = prompts.segments[:, 0]
        else:
            segment = draw_segments(value, prompts.concentration, 1, rng)[:, 0]
        reward = 2 * rng.binomial(config.responses, segment) / config.responses - 1
        tracked = np.array([2 * tracker.value(key) - 1 for key in keys])
        exact = 2 * value - 1
        truth = 2 * segment - 1 - exact
        true_normalised = batch_normalised(2 * segment - 1, exact, config.batch)
        for estimator, baseline in (("skpo", tracked), ("skpo_exact_baseline", exact)):
            difference = reward - baseline
            normalised = batch_normalised(reward, baseline, config.batch)
            right = _right(difference, truth)
            scores = Scores(
                right=right,
                zero=(signs(difference) == 0).astype(np.float64),
                error=np.abs(normalised - true_normalised),
                normalised_right=_right(normalised, truth),
                prompt_right=right,
            )
            yield estimator, visit, scores
        for key, observed in zip(keys, reward, strict=True):
            tracker.visit(key, (observed + 1) / 2, 1.0, config.drift)


def spread_bins(spread: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Find each prompt's bin, (prompts,), -1 for none; a bin holds its upper edge, the first its lower one too."""
    bins = np.searchsorted(np.asarray(edges), spread, side="left") - 1
    bins[spread == edges[0]] = 0
    return np.where(bins < len(edges) - 1, bins, -1)


def _summary_row(scores: Scores, rows: np.ndarray) -> dict[str, float]:
    def mean(values: np.ndarray) -> float:
        kept = values[rows]
        kept = kept[~np.isnan(kept)]
        return float(kept.mean()) if kept.size else float("nan")

    return {
        "sign_accuracy": mean(scores.right),
        "sign_accuracy_of_nonzero": mean(np.where(scores.zero == 1, np.nan, scores.right)),
        "sign_accuracy_normalised": mean(scores.normalised_right),
        "sign_accuracy_to_prompt_value": mean(scores.prompt_right),
        "mae": mean(scores.error),
        "zero_share": mean(scores.zero),
        "estimates": int(scores.right[rows].size),
    }


def simulate(config: SignConfig) -> pd.DataFrame:
    """Simulate everything.

    Returns:
        One row per estimator (``monte_carlo``, ``skpo``, ``skpo_exact_baseline``), ``trend`` of the values, ``samples``
        per segment, ``visit`` (SKPO: earlier visits), ``by`` (``all``, ``correct``, ``spread``) and ``group`` (number
        of correct outcomes, or the bin's upper edge), with sign accuracies and shares in [0, 1], the mean absolute
        error of normalised advantages, and the number of estimates.  SKPO is grouped at its last visit without trend
        only.
    """
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(config.seed).spawn(3)]
    prompts = draw_prompts(config, streams[0])
    bins = spread_bins(prompts.spread, config.spread_edges)
    groups: dict[tuple[str, float], np.ndarray] = {("all", float("nan")): np.ones(config.prompts, dtype=bool)}
    groups |= {("correct", float(c)): prompts.correct == c for c in range(config.group_size + 1)}
    groups |= {("spread", edge): bins == number for number, edge in enumerate(config.spread_edges[1:])}

    rows: list[dict[str, Any]] = []

    def add(scores: Scores, grouped: bool, **keys: Any) -> None:
        for (by, group), mask in groups.items():
            if by == "all" or grouped:
                rows.append({**keys, "by": by, "group": group, **_summary_row(scores, mask)})

    for samples in config.samples:
        scores = monte_carlo_scores(prompts, samples, streams[1])
        add(scores, True, estimator="monte_carlo", trend=0.0, samples=samples, visit=0)
    for trend in config.value_trends:
        for estimator, visit, scores in upstream_scores(config, prompts, trend, streams[2]):
            last = trend == 0 and visit == config.visits - 1
            add(scores, last, estimator=estimator, trend=trend, samples=config.responses, visit=visit)
    return pd.DataFrame(rows)


def summary(config: SignConfig, table: pd.DataFrame) -> dict[str, Any]:
    """Collect the headline numbers over all prompts."""
    overall = table[table["by"] == "all"].set_index(["estimator", "trend", "samples", "visit"])
    names = ["sign_accuracy", "sign_accuracy_of_nonzero", "sign_accuracy_to_prompt_value", "mae", "zero_share"]
    result: dict[str, Any] = {
        f"monte_carlo K={samples}": dict(overall.loc[("monte_carlo", 0.0, samples, 0), names])
        | {"samples_per_prompt": samples * config.group_size}
        for samples in config.samples
    }
    for trend in config.value_trends:
        for visit in sorted({0, 1, 3, config.visits - 1} & set(range(config.visits))):
            row = overall.loc[("skpo", trend, config.responses, visit)]
            result[f"skpo trend={trend} visits before={visit}"] = {
                name: row[name] for name in [*names, "sign_accuracy_normalised"]
            } | {"samples_per_prompt": config.responses}
    return result


def run(config: SignConfig, out: Path) -> list[Path]:
    """Simulate, draw the picture, write; returns the files."""
    from recipe.skpo.analysis.drawing import draw_sign_consistency

    table = simulate(config)
    headline = summary(config, table)
    for name, values in headline.items():
        print(f"{name:<36} sign accuracy {values['sign_accuracy']:.3f}   MAE {values['mae']:.3f}")
    figure = draw_sign_consistency(table)
    return write_results(out, "sign_consistency", config, headline, {"sign_accuracy": table}, figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = parser_of("sign_consistency", __doc__)
    add_out(parser)
    add_flags(parser, SignConfig)
    flags = parser.parse_args(argv)
    return run_cli(lambda: run(read_flags(SignConfig, flags), flags.out))


if __name__ == "__main__":
    sys.exit(main())
