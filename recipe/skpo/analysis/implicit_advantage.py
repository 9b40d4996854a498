"""Where in a correct response does one method's lead arise?  The paper's figure 4.

Correct responses of several methods (checkpoints) are cut at N relative positions; from each an evaluator that is none
of them continues K times. With the reward in {-1, +1}:

    value(m, i)       mean over problems, and over a problem's responses, of the mean reward of the K continuations
                      of the first i / N of a response of method m                            i = 0 .. N - 1
    advantage(m, i)   value(m, i) - mean over methods of value(., i)

Only problems that every method has a correct response to count, so that no method is credited for easier problems.
A cut never falls inside a word. States that are the same text of the same problem are continued once and share their
continuations: at i = 0 all methods have the same value, and the advantage there is exactly 0.

    python -m recipe.skpo.analysis.implicit_advantage sample  --method NAME=FOLDER ... --data FILE.parquet --out DIR
    python -m recipe.skpo.analysis.implicit_advantage measure --responses DIR/responses.jsonl --model FOLDER --out DIR
    python -m recipe.skpo.analysis.implicit_advantage measure --responses ... --base-url URL --evaluator NAME --out DIR
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_prep.schema import prompt_id
from data_prep.untrusted import one_line, parse_json
from recipe.skpo.analysis import endpoint
from recipe.skpo.analysis.endpoint import ChatRequest, EndpointConfig, Estimate, ask_stored
from recipe.skpo.evaluation import options
from recipe.skpo.evaluation.options import (
    EngineConfig,
    ModelSettings,
    add_engine_flags,
    add_model_flags,
    engine_config,
    model_settings,
)
from recipe.skpo.evaluation.output import AnalysisError, claim, guarded, require, write_atomic, write_results
from recipe.skpo.evaluation.problems import Problem, check_answers, load_tokenizer, read_problems
from recipe.skpo.evaluation.sampling import SEED_BOUND, Completion, Request, Sampler, draw_stored
from recipe.skpo.task.prompts import problem_tokens
from recipe.skpo.task.thoughts import ThoughtReader
from reward_fns.thoughts import read_marks

CONTINUATIONS = "continuations.jsonl"
# A word: letters and digits, with a backslash in front (\frac) and decimals behind (3.5, 1,200).  Else a run of signs.
_PIECES = re.compile(r"\s*(?:\\?\w+(?:[.,]\d\w*)*|(?:(?!\\\w)[^\w\s])+)")


@dataclass(frozen=True)
class Response:
    """One correct response of a method."""

    method: str
    problem: Problem
    text: str


@dataclass(frozen=True)
class SampleConfig:
    """What ``sample`` draws.

    Attributes:
        methods: name and Hugging Face folder of each checkpoint.
        data: parquet file in the schema of ``data_prep.schema``.
        problems: the first so many of the file.
        responses: drawn per problem.
        keep: correct ones kept per problem, the first ones.
        temperature, top_p, max_tokens, seed: of the sampler.
        engine: how the models are served, one after the other.
        asked: per method how its model is asked and judged.
    """

    methods: dict[str, str]
    data: Path
    engine: EngineConfig
    problems: int = 64
    responses: int = 8
    keep: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 1
    asked: dict[str, ModelSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.methods), "--method: is missing; give NAME=FOLDER")
        for name in ("problems", "responses", "keep", "max_tokens"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}: must be >= 1, got {getattr(self, name)}")
        require(
            self.temperature > 0 or (self.temperature == 0 and self.responses == 1),
            f"--temperature: must be > 0, or 0 with --responses 1, got {self.temperature}",
        )
        require(self.seed >= 0, f"--seed: must be >= 0, got {self.seed}")


@dataclass(frozen=True)
class MeasureConfig:
    """What ``measure`` does.

    Attributes:
        responses: files of correct responses, JSON lines or parquet.
        positions: N.
        samples: K, continuations per state.
        temperature, top_p, max_tokens, seed: of the evaluator.
        data_source: answer check of responses that do not name one.
        model: Hugging Face folder or name of a local evaluator; None with an endpoint.
        engine: how the local evaluator is served; None with an endpoint.
        endpoint: None with a local evaluator.
        asked: how the local evaluator is asked; the answer format is that of all responses.
    """

    responses: tuple[Path, ...]
    positions: int = 100
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 1
    data_source: str | None = None
    model: str | None = None
    engine: EngineConfig | None = None
    endpoint: EndpointConfig | None = None
    asked: ModelSettings = field(default_factory=ModelSettings)

    def __post_init__(self) -> None:
        for name in ("positions", "samples", "max_tokens"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}: must be >= 1, got {getattr(self, name)}")
        require(
            self.temperature > 0 or (self.temperature == 0 and self.samples == 1),
            f"--temperature: must be > 0, or 0 with --samples 1, got {self.temperature}",
        )
        require(self.seed >= 0, f"--seed: must be >= 0, got {self.seed}")
        require(
            (self.model is None) != (self.endpoint is None),
            "--model, --base-url: give one of them, a local evaluator or an endpoint",
        )


# ---------------------------------------------------------------- correct responses


def sample_responses(
    config: SampleConfig, out: Path, open_sampler: Callable[[str], Sampler] | None = None
) -> list[Response]:
    """Draw from each checkpoint and keep correct responses; draws are stored per method.

    Args:
        config: what to draw.
        out: folder of the stores.
        open_sampler: makes a sampler of a checkpoint folder; None starts vLLM.
    """
    kept: list[Response] = []
    for method, folder in config.methods.items():
        asked = config.asked.get(method, ModelSettings())
        problems = read_problems(config.data, config.problems, asked.answer_format)
        tokenizer = load_tokenizer(folder, asked.chat)
        requests = [
            Request(
                problem.id,
                tuple(problem_tokens(tokenizer, problem.messages)),
                config.max_tokens,
                _seed(config.seed, f"{method}/{problem.id}", config.responses),
            )
            for problem in problems
        ]
        opened: list[Sampler] = []

        def sampler(folder: str = folder, opened: list[Sampler] = opened) -> Sampler:
            opened.append((open_sampler or config.engine.open)(folder))
            return opened[0]

        try:
            drawn = draw_stored(
                requests,
                out / f"draws-{method}.jsonl",
                sampler,
                n=config.responses,
                temperature=config.temperature,
                top_p=config.top_p,
                prompts_per_call=config.engine.prompts_per_call,
            )
        finally:
            for used in opened:
                used.close()
        before = len(kept)
        thoughts = ThoughtReader(tokenizer, read_marks())
        for problem, request in zip(problems, requests, strict=True):
            right = [
                item.text
                for item in drawn[problem.id]
                if problem.check(item.text, thoughts.extra_info(None, request.prompt_ids, item.token_ids)).reward > 0
            ]
            kept += [Response(method, problem, text) for text in right[: config.keep]]
        solved = len({response.problem.id for response in kept[before:]})
        print(f"{method}: correct responses to {solved} of {len(problems)} problems")
    return kept


def write_responses(path: Path, responses: Sequence[Response]) -> None:
    """Write correct responses as JSON lines, the format that ``read_responses`` takes."""
    lines = [
        {
            "method": response.method,
            "id": response.problem.id,
            "data_source": response.problem.data_source,
            "problem": response.problem.text,
            "answer": response.problem.answer,
            "prompt": list(response.problem.messages),
            "response": response.text,
        }
        for response in responses
    ]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_responses(path: Path, data_source: str | None = None, answer_format: str = "any") -> list[Response]:
    """Correct responses of a JSON-lines or parquet file; incorrect ones are left out, with a note.

    Columns: ``method``, ``problem``, ``answer``, ``response``; optional ``data_source`` (else the argument), ``id``
    (else made of source and problem), ``prompt`` (else one user message with the problem).

    Raises:
        AnalysisError: naming file, row and column.
    """
    where = f"--responses {path}"
    require(path.is_file(), f"{where}: file not found; write it with the command `sample`")
    rows = _read_rows(path, where)
    responses = []
    for number, row in enumerate(rows):
        for column in ("method", "problem", "answer", "response"):
            value = row.get(column)
            require(
                isinstance(value, str) and bool(value),
                f"{where}: row {number}: column {column!r} is {value!r}; it must be a text that is not empty",
            )
        source = row.get("data_source") or data_source
        require(bool(source), f"{where}: row {number}: has no data_source; add the column or give --data-source")
        messages = row.get("prompt")
        chat = [{"role": "user", "content": row["problem"]}] if messages is None else list(messages)
        require(
            bool(chat) and all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in chat),
            f"{where}: row {number}: column 'prompt' must be a list of {{role, content}}",
        )
        problem = Problem(
            id=str(row.get("id") or prompt_id(str(source), row["problem"])),
            data_source=str(source),
            messages=tuple({"role": str(item["role"]), "content": str(item["content"])} for item in chat),
            answer=row["answer"],
            answer_format=answer_format,
        )
        responses.append(Response(row["method"], problem, row["response"]))
    check_answers([response.problem for response in responses], where)
    correct = [response for response in responses if response.problem.check(response.text).reward > 0]
    if len(correct) < len(responses):
        print(f"note: {path}: {len(responses) - len(correct)} of {len(responses)} responses are not correct, left out")
    return correct


def _read_rows(path: Path, where: str) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise AnalysisError(f"{where}: cannot be read ({one_line(error)})") from None
    for number, row in enumerate(rows):
        require(isinstance(row, dict), f"{where}: row {number}: is no object")
    return rows


def shared_problems(responses: Sequence[Response]) -> list[Response]:
    """Responses to problems that every method has one to.

    Raises:
        AnalysisError: there is no such problem.
    """
    methods = {response.method for response in responses}
    solved = {method: {item.problem.id for item in responses if item.method == method} for method in methods}
    common = set.intersection(*solved.values()) if solved else set()
    require(
        bool(common),
        f"--responses: no problem has a correct response of every method ({', '.join(sorted(methods)) or 'none'}); "
        f"sample more problems or responses",
    )
    return [response for response in responses if response.problem.id in common]


# ---------------------------------------------------------------- states


def cut_lengths(text: str, positions: int) -> list[int]:
    """Characters kept at each position i of N: the whole words within the first i / N of the text's words.

    A word is a run of letters and digits (a number with its decimals, a LaTeX command with its backslash) or a run of
    other signs, with the blanks before it: the first half of a mark such as "####" is no place that a response passes.
    """
    ends = [0, *(match.end() for match in _PIECES.finditer(text))]
    return [ends[(len(ends) - 1) * index // positions] for index in range(positions)]


@dataclass(frozen=True)
class State:
    """A problem with the beginning of a response to it."""

    problem: Problem
    partial: str
    remaining: int

    @property
    def key(self) -> str:
        """Stable, the same for the same text of the same problem."""
        content = json.dumps([self.problem.id, self.problem.messages, self.partial])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def states_of(response: Response, positions: int) -> list[State]:
    """The states along one response, one per position."""
    text = response.text
    return [State(response.problem, text[:end], len(text) - end) for end in cut_lengths(text, positions)]


def _seed(seed: int, name: str, count: int) -> int:
    """A request's seed; ``count`` consecutive ones belong to it."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
    return drawn % (SEED_BOUND - count)


def continue_locally(
    config: MeasureConfig, states: Sequence[State], store: Path, open_sampler: Callable[[str], Sampler] | None = None
) -> dict[str, list[Completion]]:
    """K continuations per state from a model of our own; the partial response is a hard prefix."""
    assert config.model is not None and config.engine is not None
    engine, model = config.engine, config.model
    tokenizer = load_tokenizer(model, config.asked.chat)
    requests = [
        Request(
            state.key,
            (
                *problem_tokens(tokenizer, state.problem.messages),
                *tokenizer(state.partial, add_special_tokens=False)["input_ids"],
            ),
            config.max_tokens,
            _seed(config.seed, state.key, config.samples),
        )
        for state in states
    ]
    opened: list[Sampler] = []

    def sampler() -> Sampler:
        opened.append((open_sampler or engine.open)(model))
        return opened[0]

    try:
        return draw_stored(
            requests,
            store,
            sampler,
            n=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            prompts_per_call=engine.prompts_per_call,
        )
    finally:
        for used in opened:
            used.close()


def continue_remotely(
    config: MeasureConfig, states: Sequence[State], store: Path, confirm: Callable[[Estimate], None]
) -> dict[str, list[Completion]]:
    """K continuations per state from an endpoint."""
    assert config.endpoint is not None
    requests = [
        ChatRequest(
            state.key,
            state.problem.messages,
            state.partial,
            state.remaining,
            _seed(config.seed, state.key, config.samples),
        )
        for state in states
    ]
    return ask_stored(
        config.endpoint,
        requests,
        store,
        samples=config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        confirm=confirm,
    )


# ---------------------------------------------------------------- numbers


def state_values(states: Sequence[State], continuations: dict[str, list[Completion]]) -> dict[str, float]:
    """Mean reward of the continuations of each state, by key; the partial response counts as part of each."""
    return {
        state.key: float(
            np.mean([state.problem.check(state.partial + item.text).reward for item in continuations[state.key]])
        )
        for state in states
    }


def tabulate(responses: Sequence[Response], positions: int, values: dict[str, float]) -> pd.DataFrame:
    """Value and inter-method advantage by position.

    Returns:
        One row per method and position: ``position`` (i / N), ``value`` and ``advantage`` in reward units, their
        standard errors over problems (``value_se``, ``advantage_se``; that of the advantage is paired), ``problems``.
    """
    rows = [
        (response.method, response.problem.id, index / positions, values[state.key])
        for response in responses
        for index, state in enumerate(states_of(response, positions))
    ]
    frame = pd.DataFrame(rows, columns=["method", "problem", "position", "value"])
    # A problem counts once per method, however many responses it has.
    by_problem = frame.groupby(["method", "problem", "position"], sort=False)["value"].mean().reset_index()
    centre = by_problem.groupby(["problem", "position"])["value"].transform("mean")
    by_problem["advantage"] = by_problem["value"] - centre
    grouped = by_problem.groupby(["method", "position"], sort=False)
    table = grouped[["value", "advantage"]].mean()
    table[["value_se", "advantage_se"]] = grouped[["value", "advantage"]].sem(ddof=1)
    table["problems"] = grouped.size()
    return table.reset_index()


def summary(table: pd.DataFrame, states: int) -> dict[str, Any]:
    """Mean value and advantage per method, and in which quarter of the response the advantage is largest."""
    result: dict[str, Any] = {"problems": int(table["problems"].min()), "states": states}
    for method, rows in table.groupby("method", sort=False):
        quarters = rows.groupby(np.minimum(3, np.floor(rows["position"] * 4)).astype(int))["advantage"].mean()
        result[str(method)] = {
            "value": rows["value"].mean(),
            "advantage": rows["advantage"].mean(),
            "advantage_by_quarter": [float(quarters.get(quarter, float("nan"))) for quarter in range(4)],
        }
    return result


# ---------------------------------------------------------------- commands


def ask_user(yes: bool) -> Callable[[Estimate], None]:
    """A ``confirm`` that prints the estimate and goes on only with ``--yes`` or a typed y."""

    def confirm(expected: Estimate) -> None:
        print(f"estimate: {expected}")
        if yes:
            return
        require(sys.stdin.isatty(), "--yes: is needed to send these requests where nobody can be asked")
        answer = input("send them? [y/N] ")
        require(answer.strip().lower() in ("y", "yes"), "stopped; nothing was sent")

    return confirm


def measure(
    config: MeasureConfig,
    out: Path,
    confirm: Callable[[Estimate], None],
    open_sampler: Callable[[str], Sampler] | None = None,
) -> list[Path]:
    """Continue, value, write; returns the files.

    Args:
        config: what to measure.
        out: folder; continuations of an interrupted run with the same config are used.
        confirm: see ``endpoint.ask_stored``.
        open_sampler: makes the local evaluator of its folder; None starts vLLM.
    """
    from recipe.skpo.analysis.drawing import draw_implicit_advantage

    answer_format = config.asked.answer_format
    responses = [item for path in config.responses for item in read_responses(path, config.data_source, answer_format)]
    shared = shared_problems(responses)
    distinct: dict[str, State] = {}
    for response in shared:
        for state in states_of(response, config.positions):
            distinct.setdefault(state.key, state)
    states = list(distinct.values())
    kept, everything = ({item.problem.id for item in items} for items in (shared, responses))
    print(
        f"{len(kept)} of {len(everything)} problems have a correct response of every method; "
        f"{len(states)} distinct states of {len(shared) * config.positions}"
    )
    # Continuations are found again by what they continue, whatever file and position it comes from.
    claim(out, config, (*options.FREE, *endpoint.FREE, "responses", "positions", "data_source"))
    if config.endpoint is not None:
        continuations = continue_remotely(config, states, out / CONTINUATIONS, confirm)
    else:
        continuations = continue_locally(config, states, out / CONTINUATIONS, open_sampler)
    table = tabulate(shared, config.positions, state_values(states, continuations))
    numbers = summary(table, len(states))
    return write_results(
        out, "implicit_advantage", config, numbers, {"by_position": table}, draw_implicit_advantage(table)
    )


def sample(config: SampleConfig, out: Path, open_sampler: Callable[[str], Sampler] | None = None) -> list[Path]:
    """Draw correct responses and write ``responses.jsonl``; returns the file."""
    claim(out, config, options.FREE)
    path = out / "responses.jsonl"
    write_responses(path, sample_responses(config, out, open_sampler))
    return [path]


def _named(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not (sign and folder and re.fullmatch(r"[\w.-]+", name)):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a name of letters, digits, '.', '_', '-'")
    return name, folder


def _draw_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--temperature", type=float, default=1.0, help="default 1.0")
    flags.add_argument("--top-p", type=float, default=1.0, help="default 1.0")
    flags.add_argument("--max-tokens", type=int, default=1024, help="longest completion (default 1024)")
    flags.add_argument("--seed", type=int, default=1, help="default 1")


def parser() -> argparse.ArgumentParser:
    """Flags of both commands."""
    flags = argparse.ArgumentParser(prog="python -m recipe.skpo.analysis.implicit_advantage", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = flags.add_subparsers(dest="command", required=True)

    drawing = commands.add_parser("sample", help="correct responses of checkpoints")
    drawing.add_argument("--method", type=_named, action="append", required=True, help="NAME=FOLDER, repeatable")
    drawing.add_argument("--data", type=Path, required=True, help="parquet file (data_prep.schema)")
    drawing.add_argument("--out", type=Path, required=True, help="folder for draws and responses.jsonl")
    drawing.add_argument("--problems", type=int, default=64, help="the first so many (default 64)")
    drawing.add_argument("--responses", type=int, default=8, help="drawn per problem (default 8)")
    drawing.add_argument("--keep", type=int, default=1, help="correct ones kept per problem (default 1)")
    _draw_flags(drawing)
    add_model_flags(drawing)
    add_engine_flags(drawing)

    measuring = commands.add_parser("measure", help="values along responses")
    measuring.add_argument("--responses", type=Path, nargs="+", required=True, help="JSON lines or parquet")
    measuring.add_argument("--out", type=Path, required=True, help="folder for continuations, picture, numbers, config")
    measuring.add_argument("--positions", type=int, default=100, help="N (default 100)")
    measuring.add_argument("--samples", type=int, default=8, help="K (default 8)")
    measuring.add_argument("--data-source", help="answer check of responses that do not name one")
    measuring.add_argument("--model", help="local evaluator: Hugging Face folder or name")
    _draw_flags(measuring)
    add_model_flags(measuring)
    add_engine_flags(measuring)
    remote = measuring.add_argument_group("endpoint", "any OpenAI-compatible chat endpoint in place of --model")
    remote.add_argument("--base-url", help="such as https://host/v1")
    remote.add_argument("--evaluator", default="", help="name of the model at the endpoint")
    remote.add_argument("--yes", action="store_true", help="send the requests without asking")
    for item in fields(EndpointConfig):
        if item.name not in ("base_url", "model"):
            default: Any = item.default
            remote.add_argument(
                f"--{item.name.replace('_', '-')}",
                type=float if default is None else type(default),
                default=default,
                help=f"default {default}",
            )
    return flags


def _measure_config(flags: argparse.Namespace) -> MeasureConfig:
    remote = None
    if flags.base_url:
        names = [item.name for item in fields(EndpointConfig) if item.name != "model"]
        remote = EndpointConfig(model=flags.evaluator, **{name: getattr(flags, name) for name in names})
    apart = ("responses", "engine", "endpoint", "asked")
    own = [item.name for item in fields(MeasureConfig) if item.name not in apart]
    return MeasureConfig(
        responses=tuple(flags.responses),
        engine=engine_config(flags) if flags.model else None,
        endpoint=remote,
        asked=model_settings(flags, flags.model or ""),
        **{name: getattr(flags, name) for name in own},
    )


def _sample_config(flags: argparse.Namespace) -> SampleConfig:
    own = [item.name for item in fields(SampleConfig) if item.name not in ("methods", "engine", "asked")]
    require(len(dict(flags.method)) == len(flags.method), "--method: a name is there twice")
    return SampleConfig(
        methods=dict(flags.method),
        engine=engine_config(flags),
        asked={method: model_settings(flags, folder) for method, folder in flags.method},
        **{name: getattr(flags, name) for name in own},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The commands; returns the exit code."""
    flags = parser().parse_args(argv)
    if flags.command == "sample":
        return guarded(lambda: sample(_sample_config(flags), flags.out))
    return guarded(lambda: measure(_measure_config(flags), flags.out, ask_user(flags.yes)))


if __name__ == "__main__":
    sys.exit(main())
