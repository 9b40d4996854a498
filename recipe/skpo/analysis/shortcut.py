"""Does a model copy its answer from a segment it is given?  The paper's figure 3.

For each problem q: G plain responses, their mean length L.  At six positions t from L/6 to L/2 one segment s is taken
from them as training takes it (cut at t, median deviation), and G responses are drawn in each mode:

    unconditional   q                          the plain responses themselves; s plays no part
    continual       q, s as the beginning of the response
    skip            [s, q]                     SKPO's skip prompt by concatenation
    quote           q with s quoted in front of the question inside the user turn (only if asked for)

Per group of G: distinct answers (all responses without a well-formed answer count as one), whether all rewards are
equal, mean response length in tokens, accuracy.  A continual response is s and what follows, for answer and length.
The means over problems come with their standard error.  Where t would be 0 it is 1.

    python -m recipe.skpo.analysis.shortcut --model FOLDER --data FILE.parquet --out DIR
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recipe.skpo.evaluation.options import (
    FREE,
    EngineConfig,
    ModelSettings,
    add_engine_flags,
    add_model_flags,
    engine_config,
    model_settings,
)
from recipe.skpo.evaluation.output import AnalysisError, claim, guarded, require, write_results
from recipe.skpo.evaluation.problems import Problem, load_tokenizer, read_problems
from recipe.skpo.evaluation.sampling import SEED_BOUND, Completion, Request, Sampler, draw_stored
from recipe.skpo.method.segments import Segment, cut_segment, select_segment, skip_prompt
from recipe.skpo.task.prompts import automatic_bos, problem_tokens
from recipe.skpo.task.thoughts import ThoughtReader
from reward_fns.thoughts import read_marks

MODES = ("unconditional", "continual", "skip", "quote")
MEASURES = ("distinct", "all_equal", "length", "accuracy", "well_formed")
QUOTE = 'Here is the beginning of an attempt:\n"""\n{segment}\n"""\n\n{question}'
DRAWS = "draws.jsonl"


@dataclass(frozen=True)
class ShortcutConfig:
    """What is drawn.

    Attributes:
        model: Hugging Face folder or name.
        data: parquet file in the schema of ``data_prep.schema``.
        problems: the first so many of the file.
        group_size: G, responses per problem, position and mode.
        positions: number of split positions, evenly from ``split_low`` to ``split_high``.
        split_low, split_high: as shares of the problem's mean plain response length.
        modes: of ``MODES``; ``unconditional`` is always drawn, because the segments come from it.
        temperature, top_p: of the sampler.
        max_tokens: longest response.
        seed: of everything.
        engine: how the model is served.
        asked: how it is asked and judged.
    """

    model: str
    data: Path
    engine: EngineConfig
    problems: int = 32
    group_size: int = 8
    positions: int = 6
    split_low: float = 1 / 6
    split_high: float = 1 / 2
    modes: tuple[str, ...] = ("unconditional", "continual", "skip")
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 1
    asked: ModelSettings = field(default_factory=ModelSettings)

    def __post_init__(self) -> None:
        require(self.problems >= 1, f"--problems: must be >= 1, got {self.problems}")
        require(self.group_size >= 2, f"--group-size: must be >= 2, got {self.group_size}")
        require(self.positions >= 1, f"--positions: must be >= 1, got {self.positions}")
        require(
            0 < self.split_low <= self.split_high < 1,
            f"--split-low, --split-high: need 0 < low <= high < 1, got {self.split_low}, {self.split_high}",
        )
        unknown = set(self.modes) - set(MODES)
        require(not unknown, f"--modes: {', '.join(sorted(unknown))} is none of {', '.join(MODES)}")
        require("unconditional" in self.modes, "--modes: unconditional is missing; the segments come from it")
        require(self.temperature > 0, f"--temperature: must be > 0 to draw different responses, got {self.temperature}")
        require(0 < self.top_p <= 1, f"--top-p: must be in (0, 1], got {self.top_p}")
        require(self.max_tokens >= 2, f"--max-tokens: must be >= 2, got {self.max_tokens}")
        require(self.seed >= 0, f"--seed: must be >= 0, got {self.seed}")

    @property
    def shares(self) -> list[float]:
        """The split positions as shares of L, rising."""
        return [float(share) for share in np.linspace(self.split_low, self.split_high, self.positions)]


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
        """The numbers of ``MEASURES``."""
        return {
            "distinct": float(len(set(self.answers))),
            "all_equal": float(len(set(self.rewards)) == 1),
            "length": float(np.mean(self.lengths)),
            "accuracy": float(np.mean([reward > 0 for reward in self.rewards])),
            "well_formed": float(np.mean([bool(answer) for answer in self.answers])),
        }


def take_segment(plain: Sequence[Completion], split: int) -> Segment:
    """The segment training would keep of these responses at split position ``split``."""
    candidates = [
        cut_segment(response.token_ids, response.logprobs, split, response.finish_reason == "stop")
        for response in plain
    ]
    return candidates[select_segment([candidate.deviation for candidate in candidates])]


def split_position(share: float, plain: Sequence[Completion]) -> int:
    """t for a share of the mean length of the plain responses, in tokens, at least 1."""
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
    """Turns problems and plain responses into requests; holds tokenizer and config, changes nothing.

    Args:
        config: of the analysis.
        tokenizer: of the model.
    """

    def __init__(self, config: ShortcutConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.bos = automatic_bos(tokenizer)
        self.thoughts = ThoughtReader(tokenizer, read_marks())

    def seed(self, *place: int) -> int:
        """Of the request at this place, from the config's seed; G seeds from there on belong to its completions."""
        drawn = np.random.SeedSequence([self.config.seed, *place]).generate_state(1, np.uint32)[0]
        return int(drawn) % (SEED_BOUND - self.config.group_size)

    def plain(self, problems: Sequence[Problem]) -> list[Request]:
        """One request per problem for its plain responses."""
        return [
            Request(
                f"{problem.id}/unconditional",
                tuple(problem_tokens(self.tokenizer, problem.messages)),
                self.config.max_tokens,
                self.seed(0, number),
            )
            for number, problem in enumerate(problems)
        ]

    def conditional(self, problems: Sequence[Problem], plain: Mapping[str, Sequence[Completion]]) -> list[Planned]:
        """The requests of all conditional modes."""
        planned = []
        for number, problem in enumerate(problems):
            responses = plain[f"{problem.id}/unconditional"]
            problem_ids = problem_tokens(self.tokenizer, problem.messages)
            for position, share in enumerate(self.config.shares):
                split = split_position(share, responses)
                segment = take_segment(responses, split)
                for mode in self.config.modes:
                    if mode != "unconditional":
                        prompt, limit = self.prompt(mode, problem, problem_ids, segment)
                        request = Request(
                            f"{problem.id}/{mode}/{position}",
                            tuple(prompt),
                            limit,
                            self.seed(1 + MODES.index(mode), number, position),
                        )
                        planned.append(Planned(request, problem, mode, position, split, segment))
        return planned

    def prompt(
        self, mode: str, problem: Problem, problem_ids: Sequence[int], segment: Segment
    ) -> tuple[list[int], int]:
        """Prompt tokens and longest completion of one mode."""
        limit, ids = self.config.max_tokens, list(segment.token_ids)
        if mode == "skip":
            return skip_prompt(ids, problem_ids, self.bos), limit
        if mode == "continual":
            # The whole response, s included, has the budget of a plain one.
            return list(problem_ids) + ids, max(1, limit - len(ids))
        text = QUOTE.format(segment=self.decode(ids), question=problem.text)
        messages = [*problem.messages[:-1], {"role": problem.messages[-1]["role"], "content": text}]
        return problem_tokens(self.tokenizer, messages), limit

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens, as the reward sees it."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

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
        prompt = problem_tokens(self.tokenizer, problem.messages)
        checked = [problem.check(self.decode(ids), self.thoughts.extra_info(None, prompt, ids)) for ids in whole]
        return Group(
            problem_id=problem.id,
            mode=mode,
            position=position,
            split=split,
            answers=tuple(item.answer for item in checked),
            rewards=tuple(item.reward for item in checked),
            lengths=tuple(len(ids) for ids in whole),
        )


def collect(
    config: ShortcutConfig,
    problems: Sequence[Problem],
    tokenizer: Any,
    out: Path,
    open_sampler: Callable[[], Sampler],
) -> list[Group]:
    """Draw all groups, reading back from ``out`` what was drawn before; plain groups first."""
    plan = Plan(config, tokenizer)
    opened: list[Sampler] = []

    def sampler() -> Sampler:
        if not opened:
            opened.append(open_sampler())
        return opened[0]

    def draw(requests: Sequence[Request]) -> dict[str, list[Completion]]:
        return draw_stored(
            requests,
            out / DRAWS,
            sampler,
            n=config.group_size,
            temperature=config.temperature,
            top_p=config.top_p,
            prompts_per_call=config.engine.prompts_per_call,
        )

    try:
        plain = draw(plan.plain(problems))
        planned = plan.conditional(problems, plain)
        drawn = draw([item.request for item in planned])
    finally:
        for used in opened:
            used.close()
    groups = [plan.group(problem, plain[f"{problem.id}/unconditional"]) for problem in problems]
    for item in planned:
        before = item.segment.token_ids if item.mode == "continual" else ()
        completions = drawn[item.request.key]
        groups.append(plan.group(item.problem, completions, item.mode, item.position, item.split, before))
    return groups


def tabulate(groups: Sequence[Group], shares: Sequence[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Per group, and per mode and position.

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
    """Mean of each measure per mode over all positions, and the length as a share of the plain one's."""
    means = rows.groupby("mode", sort=False)[list(MEASURES)].mean()
    means["length_share"] = means["length"] / means.loc["unconditional", "length"]
    return {str(mode): {name: float(row[name]) for name in means.columns} for mode, row in means.iterrows()}


def run(config: ShortcutConfig, out: Path, open_sampler: Callable[[], Sampler] | None = None) -> list[Path]:
    """Draw, count, write; returns the files.

    Args:
        config: what to draw.
        out: folder; draws of an interrupted run with the same config are used.
        open_sampler: makes the sampler; None starts vLLM.
    """
    from recipe.skpo.analysis.drawing import draw_shortcut

    problems = read_problems(config.data, config.problems, config.asked.answer_format)
    tokenizer = load_tokenizer(config.model, config.asked.chat)
    longest = max(len(problem_tokens(tokenizer, problem.messages)) for problem in problems)
    context = config.engine.max_model_len
    needed = longest + math.floor(config.split_high * config.max_tokens) + config.max_tokens
    if "quote" in config.modes:
        needed += len(tokenizer(QUOTE).input_ids)
    if context and context < needed:
        raise AnalysisError(
            f"--max-model-len: {context} is below the {needed} tokens of the longest problem ({longest}), segment and "
            f"response; raise it or lower --max-tokens"
        )
    claim(out, config, FREE)
    groups = collect(config, problems, tokenizer, out, open_sampler or (lambda: config.engine.open(config.model)))
    rows, means = tabulate(groups, config.shares)
    numbers = summary(rows)
    for mode, values in numbers.items():
        print(
            f"{mode:<14} distinct {values['distinct']:.2f}   all equal {values['all_equal']:.2f}   "
            f"length {values['length']:.1f}   accuracy {values['accuracy']:.3f}"
        )
    return write_results(out, "shortcut", config, numbers, {"means": means, "groups": rows}, draw_shortcut(means))


def parser() -> argparse.ArgumentParser:
    """Flags of ``ShortcutConfig`` and of the engine."""
    flags = argparse.ArgumentParser(prog="python -m recipe.skpo.analysis.shortcut", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--model", required=True, help="Hugging Face folder or name")
    flags.add_argument("--data", type=Path, required=True, help="parquet file (data_prep.schema)")
    flags.add_argument("--out", type=Path, required=True, help="folder for draws, picture, numbers and config")
    flags.add_argument("--problems", type=int, default=32, help="the first so many (default 32)")
    flags.add_argument("--group-size", type=int, default=8, help="G (default 8)")
    flags.add_argument("--positions", type=int, default=6, help="split positions (default 6)")
    flags.add_argument("--split-low", type=float, default=1 / 6, help="of the mean length (default 1/6)")
    flags.add_argument("--split-high", type=float, default=1 / 2, help="of the mean length (default 1/2)")
    flags.add_argument(
        "--modes", type=lambda text: tuple(text.split(",")), default=MODES[:3], help=f"of {','.join(MODES)}"
    )
    flags.add_argument("--temperature", type=float, default=1.0, help="default 1.0")
    flags.add_argument("--top-p", type=float, default=1.0, help="default 1.0")
    flags.add_argument("--max-tokens", type=int, default=1024, help="longest response (default 1024)")
    flags.add_argument("--seed", type=int, default=1, help="default 1")
    add_model_flags(flags)
    add_engine_flags(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    flags = parser().parse_args(argv)
    own = [item.name for item in fields(ShortcutConfig) if item.name not in ("engine", "asked")]

    def command() -> list[Path]:
        config = ShortcutConfig(
            engine=engine_config(flags),
            asked=model_settings(flags, flags.model),
            **{name: getattr(flags, name) for name in own},
        )
        return run(config, flags.out)

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
