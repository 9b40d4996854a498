"""The simulation of Monte-Carlo signs, against enumeration and closed forms."""

import json
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.skpo.analysis.sign_consistency import (
    Prompts,
    SignConfig,
    draw_prompts,
    draw_segments,
    group_relative,
    main,
    monte_carlo_scores,
    signs,
    simulate,
    spread_bins,
    summary,
    upstream_scores,
)
from recipe.skpo.method.tracker import PromptTable


def binomial(k: int, n: int, p: float) -> float:
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def same_prompts(segments: list[float], count: int, value: float | None = None) -> Prompts:
    """``count`` prompts with the same segments."""
    rows = np.tile(np.array(segments), (count, 1))
    mean = np.full(count, np.mean(segments) if value is None else value)
    return Prompts(mean, np.full(count, 10.0), rows, np.zeros(count, dtype=int))


# ---------------------------------------------------------------- Monte Carlo


@pytest.mark.parametrize(
    ("true", "samples"),
    [([0.3, 0.5], 1), ([0.3, 0.5], 3), ([0.6, 0.65], 8), ([0.02, 0.1], 4), ([0.2, 0.5, 0.6], 2)],
)
def test_scores_agree_with_enumeration(true: list[float], samples: int) -> None:
    """Brute force over how many of its samples each segment wins."""

    def normalised(values: np.ndarray) -> np.ndarray:
        return np.zeros(len(values)) if np.ptp(values) < 1e-9 else (values - values.mean()) / values.std()

    exact = normalised(np.array(true))
    right = zero = error = 0.0
    for wins in product(range(samples + 1), repeat=len(true)):
        weight = np.prod([binomial(k, samples, p) for k, p in zip(wins, true, strict=True)])
        estimate = normalised(np.array(wins) / samples)
        estimate[np.abs(estimate) < 1e-9] = 0
        right += weight * np.mean(np.sign(estimate) == np.sign(exact))
        zero += weight * np.mean(estimate == 0)
        error += weight * np.mean(np.abs(estimate - exact))
    scores = monte_carlo_scores(same_prompts(true, 20_000), samples, np.random.default_rng(3))
    found = [scores.right.mean(), scores.zero.mean(), scores.error.mean() / 2]
    # Four standard deviations of a mean of 20,000 values in [0, 1], or nearly.
    assert found == pytest.approx([right, zero, error / 2], abs=4 * 0.5 / np.sqrt(20_000))


def test_signs_against_the_prompts_value_differ_from_those_against_the_group() -> None:
    # Both segments are better than the prompt: certain, but below the group's mean is the first one.
    scores = monte_carlo_scores(same_prompts([0.6, 0.9], 5_000, value=0.1), 4096, np.random.default_rng(0))
    assert scores.right.mean() == 1.0
    assert scores.prompt_right[:, 0].mean() == 0.0
    assert scores.prompt_right[:, 1].mean() == 1.0


def test_equal_true_probabilities_have_no_sign_to_get_right() -> None:
    scores = monte_carlo_scores(same_prompts([0.5, 0.5, 0.5], 10), 8, np.random.default_rng(0))
    assert np.isnan(scores.right).all()


def test_rounding_is_no_sign() -> None:
    assert np.array_equal(signs(np.array([1e-17, -1e-12, 0.0, 1e-3, -1e-3])), [0, 0, 0, 1, -1])
    thirds = np.array([[1 / 3, 2 / 3, 3 / 3]])
    assert signs(group_relative(thirds)).tolist() == [[-1, 0, 1]]


# ---------------------------------------------------------------- generative model


def test_segments_have_the_beta_moments() -> None:
    value, concentration = np.full(40_000, 0.3), np.full(40_000, 9.0)
    segments = draw_segments(value, concentration, 2, np.random.default_rng(1))
    assert segments.mean() == pytest.approx(0.3, abs=0.003)
    assert segments.var() == pytest.approx(0.3 * 0.7 / 10, rel=0.03)


def test_prompts_follow_the_config() -> None:
    config = SignConfig(
        prompts=20_000, difficulty_alpha=2.0, difficulty_beta=6.0, concentration_low=3.0, concentration_high=30.0
    )
    prompts = draw_prompts(config, np.random.default_rng(0))
    assert prompts.value.mean() == pytest.approx(0.25, abs=0.005)
    assert 3 <= prompts.concentration.min() < 3.1 and 29 < prompts.concentration.max() <= 30
    assert np.log(prompts.concentration).mean() == pytest.approx(np.log(90) / 2, abs=0.02)
    assert prompts.segments.shape == (20_000, 8)
    # Outcomes are those of the segments: on average G times the value.
    assert prompts.correct.mean() == pytest.approx(8 * 0.25, abs=0.05)
    assert set(np.unique(prompts.correct)) <= set(range(9))
    assert np.corrcoef(prompts.correct, prompts.segments.mean(axis=1))[0, 1] > 0.7


def test_spread_bins_hold_their_upper_edge_and_the_first_its_lower_one() -> None:
    assert spread_bins(np.array([0.0, 0.05, 0.1, 0.11, 0.5, 0.6]), (0.0, 0.1, 0.5)).tolist() == [0, 0, 0, 1, 1, -1]


# ---------------------------------------------------------------- SKPO's estimator


def small(**changes: Any) -> SignConfig:
    # No very hard or very easy prompts: all of their segments can be equal, and then there is no sign.
    values: dict[str, Any] = {"prompts": 400, "samples": (8, 64), "visits": 3, "batch": 50}
    values |= {"difficulty_alpha": 3.0, "difficulty_beta": 3.0}
    return SignConfig(**(values | changes))


@pytest.mark.parametrize(
    ("estimator", "responses", "right", "zero"),
    [
        # The first visit's baseline is 0: A = R_I is positive with 2 or 3 of 3 right.
        ("skpo", 3, [2, 3], []),
        # Against the value 0.5 the sign is right with more than 4 of 8, and 0 with exactly 4.
        ("skpo_exact_baseline", 8, [5, 6, 7, 8], [4]),
    ],
)
def test_a_visit_agrees_with_enumeration(estimator: str, responses: int, right: list[int], zero: list[int]) -> None:
    config = small(prompts=10_000, visits=1, responses=responses)
    prompts = same_prompts([0.7, 0.7], 10_000, value=0.5)
    found = {name: scores for name, _, scores in upstream_scores(config, prompts, 0.0, np.random.default_rng(0))}
    for values, counts in ((found[estimator].right, right), (found[estimator].zero, zero)):
        assert values.mean() == pytest.approx(sum(binomial(k, responses, 0.7) for k in counts), abs=0.02)


def test_later_visits_read_the_tracker_before_it_moves() -> None:
    """Segments that always succeed: after one visit the baseline is 1, so A is exactly 0, and not before."""
    config = small(prompts=20, visits=2)
    prompts = Prompts(np.full(20, 1.0), np.full(20, 10.0), np.ones((20, 8)), np.full(20, 8))
    shares = [
        float(scores.zero.mean())
        for name, _, scores in upstream_scores(config, prompts, 0.0, np.random.default_rng(0))
        if name == "skpo"
    ]
    assert shares == [0.0, 1.0]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Observation and drift of every update of a tracker."""
    seen: list[tuple[float, float]] = []
    original = PromptTable.visit

    def visit(self: PromptTable, key: str, value: float, length: float, drift: float | None = None) -> float:
        assert drift is not None
        seen.append((value, drift))
        return original(self, key, value, length, drift)

    monkeypatch.setattr(PromptTable, "visit", visit)
    return seen


def test_drift_of_the_config_reaches_the_tracker(updates: list[tuple[float, float]]) -> None:
    config = small(prompts=30, drift=17.0)
    prompts = draw_prompts(config, np.random.default_rng(0))
    list(upstream_scores(config, prompts, 0.0, np.random.default_rng(0)))
    assert len(updates) == 90
    assert {drift for _, drift in updates} == {17.0}
    assert all(0 <= observation <= 1 for observation, _ in updates)


def test_a_trend_moves_the_values_from_visit_to_visit(updates: list[tuple[float, float]]) -> None:
    config = small(prompts=4_000, visits=3, difficulty_alpha=5.0, difficulty_beta=5.0)
    prompts = draw_prompts(config, np.random.default_rng(0))
    list(upstream_scores(config, prompts, 1.5, np.random.default_rng(0)))
    means = np.array([observation for observation, _ in updates]).reshape(3, 4_000).mean(axis=1)
    logits = np.log(prompts.value / (1 - prompts.value))
    assert means == pytest.approx([(1 / (1 + np.exp(-(logits + 1.5 * visit)))).mean() for visit in range(3)], abs=0.02)


# ---------------------------------------------------------------- table and command


def test_table_has_every_group_and_the_groups_add_up() -> None:
    config = small(value_trends=(0.0, 0.5))
    table = simulate(config)
    monte_carlo = table[(table["estimator"] == "monte_carlo") & (table["samples"] == 8)]
    assert monte_carlo["by"].value_counts().to_dict() == {"all": 1, "correct": 9, "spread": 7}
    for by in ("correct", "spread"):
        rows = monte_carlo[monte_carlo["by"] == by]
        assert rows["estimates"].sum() == 400 * 8
        whole = np.average(rows["sign_accuracy"].fillna(0), weights=rows["estimates"])
        assert whole == pytest.approx(monte_carlo.iloc[0]["sign_accuracy"], abs=1e-9)
    skpo = table[table["estimator"] == "skpo"]
    grouped = skpo[skpo["by"] != "all"]
    assert set(grouped["visit"]) == {2} and set(grouped["trend"]) == {0.0}
    assert len(skpo[skpo["by"] == "all"]) == 2 * 3
    first = table.iloc[0]
    # An estimate of 0 is never right, so leaving them out divides by what is left.
    assert first["sign_accuracy_of_nonzero"] == pytest.approx(first["sign_accuracy"] / (1 - first["zero_share"]))
    headline = summary(config, table)
    assert headline["monte_carlo K=8"]["samples_per_prompt"] == 64
    assert headline["skpo trend=0.0 visits before=2"]["samples_per_prompt"] == 8


def test_command_writes_picture_numbers_and_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", "200", "--samples", "8,32", "--visits", "2", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert main([*arguments, str(tmp_path / "b")]) == 0
    names = {
        "sign_consistency.png",
        "sign_consistency.svg",
        "sign_consistency.json",
        "sign_accuracy.csv",
        "config.json",
    }
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert json.loads((tmp_path / "a/config.json").read_text())["samples"] == [8, 32]
    assert (tmp_path / "a/sign_consistency.png").read_bytes().startswith(b"\x89PNG")
    assert "monte_carlo K=32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--prompts", "0"], "--prompts"),
        (["--group-size", "1"], "--group-size"),
        (["--samples", "8,0"], "--samples"),
        (["--concentration-low", "9", "--concentration-high", "3"], "--concentration-low"),
        (["--spread-edges", "0.5,0.1"], "--spread-edges"),
        (["--difficulty-alpha", "0"], "--difficulty-alpha"),
        (["--drift", "-1"], "--drift"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_bad_settings_are_refused_in_one_line(refusal: Any, arguments: list[str], flag: str) -> None:
    assert refusal(main, arguments).startswith(flag)
