"""Measure whether a model copies its answer from a segment it is given: the paper's figure 3.

    unconditional   q                                      plain responses, of mean length L
    continual       q, s as the beginning of the response
    skip            [s, q]                                 SKPO's skip prompt by concatenation
    quote           q with s quoted in front of the question inside the user turn (not by default)

At each position t (at least 1) one segment s is taken from a problem's plain responses as training takes it, and G
responses are drawn in each mode.  A continual response counts with its segment.  docs/analysis.md has the measures.

    python -m recipe.skpo.analysis.shortcut --model FOLDER --data FILE.parquet --out DIR
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recipe.skpo.analysis.common import sampling_command, with_weights, write_results
from recipe.skpo.evaluation.engine import FREE, EngineConfig
from recipe.skpo.evaluation.options import (
    JUDGING,
    ModelSettings,
    check_options,
    option,
    require,
)
from recipe.skpo.evaluation.problems import Judge, Problem, Reward, prompts_of, read_problems
from recipe.skpo.evaluation.results import check_same_config
from recipe.skpo.evaluation.sampling import (
    SEED_BOUND,
    Completion,
    Draw,
    Request,
    Sampler,
    draw_stored,
    opened_by_first_draw,
)
from recipe.skpo.method.segments import Segment, cut_segment, select_segment
from recipe.skpo.task.model_files import load_tokenizer
from recipe.skpo.task.prompts import segment_prompt

MODES = ("unconditional", "continual", "skip", "quote")
MEASURES = ("distinct", "all_equal", "length", "accuracy", "well_formed")
QUOTE = 'Here is the beginning of an attempt:\n"""\n{segment}\n"""\n\n{problem}'
DRAWS = "draws.jsonl"


@dataclass(frozen=True, kw_only=True)
class ShortcutConfig:
    """What is drawn; each option's help says what it is."""

    model: str = option(help="Hugging Face folder or name")
    data: Path = option(help="parquet file (data_prep.schema)")
    problems: int = option(32, "take the first so many", least=1)
    group_size: int = option(8, "G, responses per problem, position and mode", least=2)
    positions: int = option(6, "split positions, evenly from the lowest to the highest", least=1)
    split_low: float = option(1 / 6, "lowest split position, as a share of the problem's mean plain length")
    split_high: float = option(1 / 2, "highest split position")
    modes: tuple[str, ...] = option(MODES[:3], f"of {','.join(MODES)}; the segments come from unconditional")
    temperature: float = option(1.0, "above 0, for different responses")
    top_p: float = option(1.0, "in (0, 1]")
    max_tokens: int = option(1024, "longest response", least=2)
    seed: int = option(1, "of every draw", least=0)
    engine: EngineConfig
    asked: ModelSettings = field(default_factory=ModelSettings)

    def __post_init__(self) -> None:
        for options in (self, self.engine):
            check_options(options)
        require(
            0 < self.split_low <= self.split_high < 1,
            f"--split-low, --split-high: need 0 < low <= high < 1, got {self.split_low}, {self.split_high}",
        )
        unknown = set(self.modes) - set(MODES)
        require(not unknown, f"--modes: {', '.join(sorted(unknown))} is none of {', '.join(MODES)}")
        require("unconditional" in self.modes, "--modes: unconditional is missing; the segments come from it")
        require(self.temperature > 0, f"--temperature: must be > 0 to draw different responses, got {self.temperature}")
        require(0 < self.top_p <= 1, f"--top-p: must be in (0, 1], got {self.top_p}")

    @property
    def shares(self) -> list[float]:
        """Split positions as shares of L, rising."""
        return [float(share) for share in np.linspace(self.split_low, self.split_high, self.positions)]


def canonical(answer: str) -> str:
    """Make answers that are the same number the same text: 5, 5.0 and +5 are "5"."""
    stripped = answer.strip()
    try:
        number = Decimal(stripped)
    except InvalidOperation:
        return stripped
    # "NaN" and "Infinity" are decimals too, but words here.
    return format(number.normalize() + 0, "f") if number.is_finite() else stripped


@dataclass(frozen=True)
class Group:
    """G responses of one problem in one mode at one position.

    Attributes:
        problem_id, mode: which.
        position: number of the split position from 0; None for plain responses, which have none.
        split: t in tokens; 0 for plain responses.
        answers: extracted answers, "" for none.
        rewards: -1 or +1.
        lengths: tokens of the whole responses.
    """

    problem_id: str
    mode: str
    position: int | None
    split: int
    answers: tuple[str, ...]
    rewards: tuple[float, ...]
    lengths: tuple[int, ...]

    def measures(self) -> dict[str, float]:
        """Compute the numbers of ``MEASURES``."""
        return {
            "distinct": float(len(set(self.answers))),
            "all_equal": float(len(set(self.rewards)) == 1),
            "length": float(np.mean(self.lengths)),
            "accuracy": float(np.mean([reward > 0 for reward in self.rewards])),
            "well_formed": float(np.mean([bool(answer) for answer in self.answers])),
        }


def take_segment(plain: Sequence[Completion], split: int) -> Segment:
    """Return the segment that training would keep of these responses at split position ``split``."""
    candidates = [
        cut_segment(response.token_ids, response.logprobs, split, response.finish_reason == "stop")
        for response in plain
    ]
    return candidates[select_segment([candidate.deviation for candidate in candidates])]


def split_position(share: float, plain: Sequence[Completion]) -> int:
    """Return t for a share of the plain responses' mean length, in tokens, at least 1."""
    return max(1, math.floor(share * float(np.mean([len(response.token_ids) for response in plain]))))


@dataclass(frozen=True)
class Planned:
    """A request of a conditional mode with what it is about."""

    request: Request
    problem: Problem
    mode: str
    position: int
    split: int
    segment: Segment


class Plan:
    """Turns problems and plain responses into requests, and completions into groups."""

    def __init__(
        self, config: ShortcutConfig, tokenizer: Any, problems: Sequence[Problem], prompts: Sequence[tuple[int, ...]]
    ) -> None:
        self.config, self.tokenizer, self.problems = config, tokenizer, problems
        self.prompts = {problem.id: prompt for problem, prompt in zip(problems, prompts, strict=True)}
        self.judge = Judge(Reward(config.asked.reward), tokenizer)
        self.request = partial(Request, n=config.group_size, temperature=config.temperature, top_p=config.top_p)

    def seed(self, *place: int) -> int:
        """Return the seed of the request at this place; the next G - 1 belong to its other completions."""
        drawn = np.random.SeedSequence([self.config.seed, *place]).generate_state(1, np.uint32)[0]
        return int(drawn) % (SEED_BOUND - self.config.group_size)

    def plain(self) -> list[Request]:
        """Return one request per problem for its plain responses."""
        return [
            self.request(f"{id}/unconditional", prompt, self.config.max_tokens, self.seed(0, number))
            for number, (id, prompt) in enumerate(self.prompts.items())
        ]

    def conditional(self, plain: Mapping[str, Sequence[Completion]]) -> list[Planned]:
        """Return the requests of all conditional modes."""
        planned = []
        for number, problem in enumerate(self.problems):
            responses = plain[f"{problem.id}/unconditional"]
            for position, share in enumerate(self.config.shares):
                split = split_position(share, responses)
                segment = take_segment(responses, split)
                for mode in self.config.modes:
                    if mode != "unconditional":
                        prompt, limit = self.prompt(mode, problem, segment)
                        seed = self.seed(1 + MODES.index(mode), number, position)
                        request = self.request(f"{problem.id}/{mode}/{position}", tuple(prompt), limit, seed)
                        planned.append(Planned(request, problem, mode, position, split, segment))
        return planned

    def prompt(self, mode: str, problem: Problem, segment: Segment) -> tuple[list[int], int]:
        """Return prompt tokens and longest completion of one mode."""
        question, skip = self.prompts[problem.id], {"skip": "concat", "quote": "chat"}.get(mode, mode)
        prompt = segment_prompt(skip, segment.token_ids, question, problem.messages, self.tokenizer, QUOTE)
        limit = self.config.max_tokens
        # A whole continual response, s included, has the budget of a plain one.
        return prompt, max(1, limit - len(segment.token_ids)) if mode == "continual" else limit

    def group(
        self,
        problem: Problem,
        completions: Sequence[Completion],
        mode: str = "unconditional",
        position: int | None = None,
        split: int = 0,
        before: Sequence[int] = (),
    ) -> Group:
        """Check one group; ``before`` are tokens that begin each response."""
        whole = [[*before, *completion.token_ids] for completion in completions]
        # Every mode's prompt ends as the problem's does.
        checked = [self.judge(problem, self.prompts[problem.id], ids)[1] for ids in whole]
        return Group(
            problem_id=problem.id,
            mode=mode,
            position=position,
            split=split,
            answers=tuple(canonical(item.pred) for item in checked),
            rewards=tuple(item.score for item in checked),
            lengths=tuple(len(ids) for ids in whole),
        )


def collect(plan: Plan, store: Path, sample: Draw) -> list[Group]:
    """Draw all groups, stored ones from the store; plain groups first."""
    draw = partial(draw_stored, store=store, sample=sample, prompts_per_call=plan.config.engine.prompts_per_call)
    plain = draw(plan.plain())
    planned = plan.conditional(plain)
    drawn = draw([item.request for item in planned])
    groups = [plan.group(problem, plain[f"{problem.id}/unconditional"]) for problem in plan.problems]
    for item in planned:
        before = item.segment.token_ids if item.mode == "continual" else ()
        completions = drawn[item.request.key]
        groups.append(plan.group(item.problem, completions, item.mode, item.position, item.split, before))
    return groups


def tabulate(groups: Sequence[Group], shares: Sequence[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the measures per group, and per mode and position.

    Returns:
        ``groups``: one row per group with its measures.  ``means``: per mode and ``share`` of L the mean of each
        measure over problems, its standard error (``<measure>_se``) and the number of problems; plain responses once,
        with an empty share.
    """
    rows = pd.DataFrame(
        [
            {
                "problem": group.problem_id,
                "mode": group.mode,
                "share": float("nan") if group.position is None else shares[group.position],
                "split": group.split,
                **group.measures(),
            }
            for group in groups
        ]
    )
    grouped = rows.groupby(["mode", "share"], dropna=False, sort=False)[list(MEASURES)]
    means = grouped.mean()
    errors = grouped.sem(ddof=1).add_suffix("_se")
    return rows, pd.concat([means, errors, grouped.size().rename("problems")], axis=1).reset_index()


def summary(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Average each measure per mode over all positions, and the length as a share of the plain one's."""
    means = rows.groupby("mode", sort=False)[list(MEASURES)].mean()
    means["length_share"] = means["length"] / means.loc["unconditional", "length"]
    return means.to_dict("index")


def run(config: ShortcutConfig, out: Path, open_sampler: Callable[[], Sampler] | None = None) -> list[Path]:
    """Draw, count, write; returns the files.

    Draws of an interrupted run with the same config are used.  ``open_sampler`` None starts vLLM.
    """
    from recipe.skpo.analysis.drawing import draw_shortcut

    where = f"--data {config.data}"
    problems = read_problems(config.data, "--data", config.problems)
    tokenizer = load_tokenizer(config.model, config.asked.chat)
    prompts = prompts_of(problems, tokenizer, where)
    plan = Plan(config, tokenizer, problems, prompts)
    plan.judge.reward.check_truths(problems, where)
    longest, context = max(map(len, prompts)), config.engine.max_model_len
    needed = longest + math.floor(config.split_high * config.max_tokens) + config.max_tokens
    if "quote" in config.modes:
        needed += len(tokenizer(QUOTE).input_ids)
    require(
        context == 0 or context >= needed,
        f"--max-model-len: {context} is below the {needed} tokens of the longest problem ({longest}), segment and "
        f"response; raise it or lower --max-tokens",
    )
    drawn_with = with_weights(config, {"model": config.model})
    check_same_config(out, drawn_with, (*FREE, *JUDGING))
    with opened_by_first_draw(open_sampler or (lambda: config.engine.open(config.model))) as sample:
        groups = collect(plan, out / DRAWS, sample)
    rows, means = tabulate(groups, config.shares)
    averages = summary(rows)
    for mode, values in averages.items():
        print(
            f"{mode:<14} distinct {values['distinct']:.2f}   all equal {values['all_equal']:.2f}   "
            f"length {values['length']:.1f}   accuracy {values['accuracy']:.3f}"
        )
    return write_results(out, "shortcut", drawn_with, averages, {"means": means, "groups": rows}, draw_shortcut(means))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return sampling_command("shortcut", __doc__, ShortcutConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
