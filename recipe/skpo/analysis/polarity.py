"""Find which tokens expand the policy's entropy, and compare the predicted with the measured change of one update.

A model answers problems, G responses each.  Every token gets its advantage A (GRPO's), the slope T of its state's
entropy and the polarity P = A T (docs/method.md, section 17).  Then the model makes one real update, a step of AdamW on
the mean of -A log pi, and the entropies of the same states are computed again.

    python -m recipe.skpo.analysis.polarity --model FOLDER --data FILE.parquet --out DIR
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_prep.untrusted import one_line
from recipe.skpo.analysis.common import sampling_command, with_weights, write_results
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.engine import FREE, EngineConfig
from recipe.skpo.evaluation.options import (
    JUDGING,
    ModelSettings,
    check_options,
    option,
    require,
)
from recipe.skpo.evaluation.problems import Judge, Reward, prompts_of, read_problems
from recipe.skpo.evaluation.results import check_same_config
from recipe.skpo.evaluation.sampling import Request, Sampler, draw_stored, opened_by_first_draw, request_seed
from recipe.skpo.task.model_files import load_tokenizer

DRAWS = "draws.jsonl"
SHOWN = 12
"""Words of each branch in the picture and in the summary."""
COMMON = 5
"""Occurrences from which a word is ranked."""
BINS = 20


@dataclass(frozen=True, kw_only=True)
class PolarityConfig:
    """What is drawn and updated; each option's help says what it is."""

    model: str = option(help="Hugging Face folder or name; that of a run after `python -m recipe.skpo.export`")
    data: Path = option(help="parquet file (data_prep.schema)")
    problems: int = option(32, "take the first so many", least=1)
    group_size: int = option(8, "G, responses per problem", least=2)
    temperature: float = option(1.0, "above 0; of the sampling, the slopes and the entropies")
    max_tokens: int = option(1024, "longest response", least=1)
    lr: float = option(1e-6, "learning rate of the update")
    seed: int = option(1, "of every draw", least=0)
    engine: EngineConfig
    asked: ModelSettings = field(default_factory=ModelSettings)

    def __post_init__(self) -> None:
        for options in (self, self.engine):
            check_options(options)
        require(self.temperature > 0, f"--temperature: must be > 0 to draw different responses, got {self.temperature}")
        require(0 < self.lr < 1, f"--lr: must be inside (0, 1), got {self.lr}")


@dataclass(frozen=True)
class Row:
    """One response with GRPO's advantage."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    advantage: float


def rows_of(config: PolarityConfig, out: Path, open_sampler: Callable[[], Sampler]) -> list[Row]:
    """Draw and judge the responses; those of an interrupted run with the same config are used.

    Raises:
        ConfigError: all groups have equal rewards, so that no token has an advantage.
    """
    import torch

    from recipe.skpo.method.advantage import group_relative_advantage

    where = f"--data {config.data}"
    problems = read_problems(config.data, "--data", config.problems)
    tokenizer = load_tokenizer(config.model, config.asked.chat)
    prompts = prompts_of(problems, tokenizer, where)
    judge = Judge(Reward(config.asked.reward), tokenizer)
    judge.reward.check_truths(problems, where)
    check_same_config(out, with_weights(config, {"model": config.model}), (*FREE, *JUDGING, "lr"))
    requests = [
        Request(
            problem.id,
            prompt,
            config.max_tokens,
            request_seed(config.seed, problem.id, config.group_size),
            config.group_size,
            config.temperature,
            1.0,
        )
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    with opened_by_first_draw(open_sampler) as sample:
        drawn = draw_stored(requests, out / DRAWS, sample, config.engine.prompts_per_call)
    found = [
        (number, prompt, item.token_ids, judge(problem, prompt, item.token_ids)[1].score)
        for number, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
        for item in drawn[problem.id]
    ]
    groups, rewards = (torch.tensor([row[place] for row in found]) for place in (0, 3))
    advantages = group_relative_advantage(rewards.double(), groups).tolist()
    require(any(advantages), f"{where}: all responses to a problem have equal rewards; take other or more problems")
    pairs = zip(found, advantages, strict=True)
    return [Row(prompt, response, advantage) for (_, prompt, response, _), advantage in pairs]


# ---------------------------------------------------------------- the update


def measure(config: PolarityConfig, rows: Sequence[Row]) -> pd.DataFrame:
    """Compute slopes and entropies, make the update, and compute the entropies again.

    Returns:
        One row per token of a response: ``token``, ``advantage``, ``probability``, ``entropy`` and ``slope`` before the
        update, ``polarity`` = advantage * slope, and the measured ``change`` of the entropy, in nats.

    Raises:
        ConfigError: transformers cannot load the model.
    """
    import torch

    torch.manual_seed(config.seed)
    model = _loaded(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    advantages = np.repeat([row.advantage for row in rows], [len(row.response) for row in rows])
    tokens = len(advantages)
    parts = []
    for row in rows:
        values, entropies, slopes = _scores(model, row, config.temperature)
        parts.append(torch.stack([values, entropies, slopes]).detach())
        # The sum over all rows is the mean over tokens.
        (-row.advantage * values.sum() / tokens).backward()
    optimizer.step()
    with torch.no_grad():
        after = torch.cat([_scores(model, row, config.temperature)[1] for row in rows])
    values, entropies, slopes = torch.cat(parts, dim=1).double().numpy()
    return pd.DataFrame(
        {
            "token": np.concatenate([row.response for row in rows]),
            "advantage": advantages,
            "probability": np.exp(values),
            "entropy": entropies,
            "slope": slopes,
            "polarity": advantages * slopes,
            "change": after.double().numpy() - entropies,
        }
    )


def _loaded(model: str) -> Any:
    """Return the model in float32, on a GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model: {model} cannot be loaded ({one_line(error)}); give a Hugging Face folder"
        ) from None
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _scores(model: Any, row: Row, temperature: float) -> Any:
    """Return log-probs, entropies and slopes of a response's tokens, float32 (tokens,) each."""
    import torch

    from recipe.skpo.engine.log_probs import log_probs

    ids = torch.tensor([[*row.prompt, *row.response]], device=model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, len(row.prompt) - 1 : -1]
    head, labels = model.get_output_embeddings(), ids[0, len(row.prompt) :]
    return tuple(values.cpu() for values in log_probs(head, hidden, labels, temperature, with_slopes=True))


# ---------------------------------------------------------------- numbers


def words_of(tokens: pd.DataFrame, text: Callable[[int], str]) -> pd.DataFrame:
    """Tabulate the vocabulary's entries that were written, by falling mean polarity.

    Returns:
        ``token``, its ``text``, ``count``, the shares of its occurrences that are ``expanding`` and ``contracting``,
        and means of ``probability``, ``slope``, ``polarity`` and ``change``.
    """
    marked = tokens.assign(expanding=tokens["polarity"] > 0, contracting=tokens["polarity"] < 0)
    grouped = marked.groupby("token")
    columns = ["expanding", "contracting", "probability", "slope", "polarity", "change"]
    table = grouped[columns].mean().assign(count=grouped.size()).reset_index()
    table.insert(1, "text", [text(int(token)) for token in table["token"]])
    return table.sort_values(["polarity", "token"], ascending=[False, True]).reset_index(drop=True)


def binned(tokens: pd.DataFrame) -> pd.DataFrame:
    """Average predicted and measured changes over bins of equally many tokens whose polarity is not 0.

    Returns:
        By rising polarity: mean ``polarity`` and ``change``, standard error of the latter (``change_se``), ``count``.
    """
    moved = tokens[tokens["polarity"] != 0].sort_values("polarity", kind="stable")
    bins = np.arange(len(moved)) * min(BINS, len(moved)) // max(1, len(moved))
    grouped = moved.groupby(bins)
    table = grouped[["polarity", "change"]].mean()
    table["change_se"], table["count"] = grouped["change"].sem(ddof=1), grouped.size()
    return table.reset_index(drop=True)


def summary(tokens: pd.DataFrame, words: pd.DataFrame, bins: pd.DataFrame) -> dict[str, Any]:
    """Collect the headline numbers."""
    total = max(tokens["advantage"].abs().sum(), 1e-30)
    moved = tokens[tokens["polarity"] != 0]
    common = words[words["count"] >= COMMON]
    found: dict[str, Any] = {
        "tokens": len(tokens),
        "entropy": tokens["entropy"].mean(),
        "entropy_change": tokens["change"].mean(),
        "mean_polarity": tokens["polarity"].mean(),
        "correlation_of_tokens": moved["polarity"].corr(moved["change"]),
        "correlation_of_bins": bins["polarity"].corr(bins["change"]),
        "same_sign_share": (np.sign(moved["polarity"]) == np.sign(moved["change"])).mean(),
    }
    for name, branch in (("expanding", tokens["polarity"] > 0), ("contracting", tokens["polarity"] < 0)):
        rows = tokens[branch]
        found[name] = {
            "token_share": branch.mean(),
            "advantage_share": rows["advantage"].abs().sum() / total,
            "entropy_change": rows["change"].mean(),
        }
    found["expanding"]["words"] = common[common["polarity"] > 0]["text"].head(SHOWN).tolist()
    found["contracting"]["words"] = common[common["polarity"] < 0]["text"].tail(SHOWN).tolist()[::-1]
    return found


def run(config: PolarityConfig, out: Path, open_sampler: Callable[[], Sampler] | None = None) -> list[Path]:
    """Draw, update, tabulate, write; returns the files.  ``open_sampler`` None starts vLLM."""
    from recipe.skpo.analysis.drawing import draw_polarity

    rows = rows_of(config, out, open_sampler or partial(config.engine.open, config.model))
    tokenizer = load_tokenizer(config.model, config.asked.chat)
    tokens = measure(config, rows)
    words, bins = words_of(tokens, lambda token: str(tokenizer.decode([token]))), binned(tokens)
    found = summary(tokens, words, bins)
    for name in ("expanding", "contracting"):
        part = found[name]
        print(
            f"{name:<12} {part['token_share']:.1%} of tokens, {part['advantage_share']:.1%} of |A|, measured change "
            f"{part['entropy_change']:+.2e} nats: {' '.join(map(repr, part['words'][:6]))}"
        )
    print(
        f"predicted against measured: correlation {found['correlation_of_tokens']:.3f} over tokens, "
        f"{found['correlation_of_bins']:.3f} over bins; same sign in {found['same_sign_share']:.1%}"
    )
    tables = {"bins": bins, "words": words}
    figure = draw_polarity(words[words["count"] >= COMMON], bins)
    return write_results(out, "polarity", with_weights(config, {"model": config.model}), found, tables, figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return sampling_command("polarity", __doc__, PolarityConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
