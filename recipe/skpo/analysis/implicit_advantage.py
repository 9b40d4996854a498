"""Find where in a correct response one method's lead arises: the paper's figure 4.

Correct responses of several methods (checkpoints) are cut at N relative positions, at ends of words; from each another
model continues K times:

    value(m, i)       mean over problems and responses of the mean reward after the first i / N        i = 0 .. N - 1
    advantage(m, i)   value(m, i) - mean over methods of value(., i)

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_prep.schema import prompt_id
from data_prep.untrusted import one_line, parse_json
from recipe.skpo.analysis import endpoint
from recipe.skpo.analysis.common import add_out, parser_of, with_weights, write_results
from recipe.skpo.analysis.endpoint import ChatRequest, EndpointConfig, ask_stored
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation import engine as engines
from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.options import (
    JUDGING,
    ModelSettings,
    add_flags,
    add_model_flags,
    check_options,
    model_settings,
    option,
    read_flags,
    require,
)
from recipe.skpo.evaluation.problems import Judge, Problem, Reward, prompts_of, read_problems
from recipe.skpo.evaluation.results import check_same_config, run_cli
from recipe.skpo.evaluation.sampling import (
    Completion,
    Request,
    Sampler,
    draw_stored,
    opened_by_first_draw,
    request_seed,
)
from recipe.skpo.output.files import write_atomic
from recipe.skpo.task.model_files import load_tokenizer

CONTINUATIONS = "continuations.jsonl"
# A word: letters and digits, with a backslash in front (\frac) and decimals behind (3.5, 1,200).  Else a run of signs.
_PIECES = re.compile(r"\s*(?:\\?\w+(?:[.,]\d\w*)*|(?:(?!\\\w)[^\w\s])+)")


@dataclass(frozen=True)
class Response:
    """One correct response of a method."""

    method: str
    problem: Problem
    text: str


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How completions are drawn; each option's help says what it is."""

    temperature: float = option(1.0, "0 is greedy", least=0)
    top_p: float = option(1.0, "share of the probability mass that is sampled from")
    max_tokens: int = option(1024, "longest completion", least=1)
    seed: int = option(1, "of every draw", least=0)

    def check(self, flag: str, count: int) -> None:
        """Check the values.

        Raises:
            ConfigError: one is out of bounds, or several completions (``count``, of ``--flag``) would be greedy.
        """
        check_options(self)
        require(
            self.temperature > 0 or count == 1,
            f"--temperature: must be > 0, or 0 with --{flag} 1, got {self.temperature}",
        )

    def request(self, key: str, prompt: tuple[int, ...], name: str, count: int) -> Request:
        """Make a request for ``count`` completions, seeded by ``name``."""
        seed = request_seed(self.seed, name, count)
        return Request(key, prompt, self.max_tokens, seed, count, self.temperature, self.top_p)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Draws):
    """What ``sample`` draws; ``methods`` and ``asked`` are by name of the method, which is a checkpoint folder."""

    methods: dict[str, str]
    data: Path = option(help="parquet file (data_prep.schema)")
    problems: int = option(64, "take the first so many", least=1)
    responses: int = option(8, "drawn per problem", least=1)
    keep: int = option(1, "correct ones kept per problem, the first ones", least=1)
    engine: EngineConfig
    asked: dict[str, ModelSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check("responses", self.responses)
        check_options(self.engine)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(Draws):
    """What ``measure`` does, by a local evaluator (``model``, ``engine``) or by an endpoint."""

    responses: tuple[Path, ...]
    positions: int = option(100, "N, positions per response", least=1)
    samples: int = option(8, "K, continuations per state", least=1)
    data_source: str | None = option(None, "answer check of responses that do not name one")
    model: str | None = option(None, "local evaluator: Hugging Face folder or name")
    engine: EngineConfig | None = None
    endpoint: EndpointConfig | None = None
    asked: ModelSettings = field(default_factory=ModelSettings)

    def __post_init__(self) -> None:
        self.check("samples", self.samples)
        require(
            (self.model is None) != (self.endpoint is None),
            "--model, --base-url: give one of them, a local evaluator or an endpoint",
        )
        require(
            self.endpoint is None or self.asked.chat.custom_chat_template is None,
            "--custom-chat-template: an endpoint has a template of its own; leave it out",
        )
        if self.engine is not None:
            check_options(self.engine)


# ---------------------------------------------------------------- correct responses


def sample(config: SampleConfig, out: Path, open_sampler: Callable[[str], Sampler] | None = None) -> list[Path]:
    """Draw from each checkpoint, and write the correct responses as ``read_responses`` reads them; returns the file.

    Draws are stored per method.  ``open_sampler`` makes a sampler of a checkpoint folder; None starts vLLM.
    """
    judging = [name.replace("asked.", f"asked.{method}.") for name in JUDGING for method in config.asked]
    asked = {method: config.asked.get(method, ModelSettings()) for method in config.methods}
    tokenizers = {method: load_tokenizer(folder, asked[method].chat) for method, folder in config.methods.items()}
    check_same_config(out, with_weights(config, config.methods), (*engines.FREE, *judging))
    problems, where = read_problems(config.data, "--data", config.problems), f"--data {config.data}"
    rows: list[dict[str, Any]] = []
    for method, folder in config.methods.items():
        tokenizer = tokenizers[method]
        judge = Judge(Reward(asked[method].reward), tokenizer)
        judge.reward.check_truths(problems, where)
        prompts = prompts_of(problems, tokenizer, where)
        requests = [
            config.request(problem.id, prompt, f"{method}/{problem.id}", config.responses)
            for problem, prompt in zip(problems, prompts, strict=True)
        ]
        with opened_by_first_draw(partial(open_sampler or config.engine.open, folder)) as draw:
            drawn = draw_stored(requests, out / f"draws-{method}.jsonl", draw, config.engine.prompts_per_call)
        solved = 0
        for problem, request in zip(problems, requests, strict=True):
            checked = [judge(problem, request.prompt_ids, item.token_ids) for item in drawn[problem.id]]
            right = [text for text, verdict in checked if verdict.score > 0]
            solved += bool(right)
            fields = {
                "method": method,
                "id": problem.id,
                "data_source": problem.data_source,
                "problem": problem.text,
                "answer": str(problem.ground_truth),
                "prompt": problem.messages,
            }
            rows += [fields | {"response": text} for text in right[: config.keep]]
        print(f"{method}: correct responses to {solved} of {len(problems)} problems")
    path = out / "responses.jsonl"
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return [path]


def read_responses(path: Path, reward: Reward, data_source: str | None = None) -> list[Response]:
    """Read the correct responses of a JSON-lines or parquet file; incorrect ones are left out, with a note.

    Columns: ``method``, ``problem``, ``answer``, ``response``; optional ``data_source`` (else the argument), ``id``
    (else made of source and problem), ``prompt`` (else one user message with the problem).

    Raises:
        ConfigError: naming file, row and column.
        DataError: naming the row whose answer cannot be checked.
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
            ground_truth=row["answer"],
        )
        responses.append(Response(row["method"], problem, row["response"]))
    reward.check_truths([response.problem for response in responses], where)
    correct = [response for response in responses if reward(response.problem, response.text).score > 0]
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
        raise ConfigError(f"{where}: cannot be read ({one_line(error)})") from None
    for number, row in enumerate(rows):
        require(isinstance(row, dict), f"{where}: row {number}: is not an object")
    return rows


def shared_problems(responses: Sequence[Response]) -> list[Response]:
    """Keep the responses to problems that every method has one to.

    Raises:
        ConfigError: there is no such problem.
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
    """Return the characters kept at each position i of N: the whole words within the first i / N of the text's words.

    A word is a run of letters and digits (a number with its decimals, a LaTeX command with its backslash) or a run of
    other signs, with the blanks before it: no response stops inside a mark such as "####".
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
        """Stable key, the same for the same text of the same problem."""
        content = json.dumps([self.problem.id, self.problem.messages, self.partial])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def states_of(response: Response, positions: int) -> list[State]:
    """Return the states along one response, one per position."""
    text = response.text
    return [State(response.problem, text[:end], len(text) - end) for end in cut_lengths(text, positions)]


def continue_locally(
    config: MeasureConfig,
    states: Sequence[State],
    tokenizer: Any,
    store: Path,
    open_sampler: Callable[[str], Sampler] | None = None,
) -> dict[str, list[Completion]]:
    """Draw K continuations per state from a model on this machine; the partial response is a hard prefix."""
    assert config.model is not None and config.engine is not None
    engine, model = config.engine, config.model
    problems = {state.problem.chat: state.problem for state in states}
    prompts = dict(zip(problems, prompts_of(list(problems.values()), tokenizer, "--responses"), strict=True))
    requests = []
    for state in states:
        partial_ids = tokenizer(state.partial, add_special_tokens=False)["input_ids"]
        prompt = (*prompts[state.problem.chat], *partial_ids)
        requests.append(config.request(state.key, prompt, state.key, config.samples))
    with opened_by_first_draw(partial(open_sampler or engine.open, model)) as draw:
        return draw_stored(requests, store, draw, engine.prompts_per_call)


def continue_remotely(
    config: MeasureConfig, states: Sequence[State], store: Path, confirm: Callable[[str], None]
) -> dict[str, list[Completion]]:
    """Ask an endpoint for K continuations per state."""
    assert config.endpoint is not None
    requests = [
        ChatRequest(
            state.key,
            state.problem.messages,
            state.partial,
            state.remaining,
            request_seed(config.seed, state.key, config.samples),
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
        template_options=config.asked.chat.chat_template_kwargs,
    )


# ---------------------------------------------------------------- numbers


def state_values(
    states: Sequence[State], continuations: dict[str, list[Completion]], reward: Reward
) -> dict[str, float]:
    """Average the rewards of each state's continuations, by key; the partial response counts as part of each."""

    def value(state: State) -> float:
        texts = [state.partial + item.text for item in continuations[state.key]]
        return float(np.mean([reward(state.problem, text).score for text in texts]))

    return {state.key: value(state) for state in states}


def tabulate(responses: Sequence[Response], positions: int, values: dict[str, float]) -> pd.DataFrame:
    """Tabulate value and inter-method advantage by position.

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
    """Average value and advantage per method, and the advantage in each quarter of the response."""
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


def ask_user(yes: bool) -> Callable[[str], None]:
    """Return a ``confirm`` that prints the estimate and continues only with ``--yes`` or a typed y."""

    def confirm(expected: str) -> None:
        print(f"estimate: {expected}")
        if yes:
            return
        require(sys.stdin.isatty(), "--yes: is needed to send these requests when nobody can be asked")
        answer = input("send them? [y/N] ")
        require(answer.strip().lower() in ("y", "yes"), "stopped; nothing was sent")

    return confirm


def measure(
    config: MeasureConfig,
    out: Path,
    confirm: Callable[[str], None],
    open_sampler: Callable[[str], Sampler] | None = None,
) -> list[Path]:
    """Continue, value, write; returns the files.

    Continuations of an interrupted run with the same config are used.  ``confirm`` is that of ``endpoint.ask_stored``;
    ``open_sampler`` makes the local evaluator of its folder, None starts vLLM.
    """
    from recipe.skpo.analysis.drawing import draw_implicit_advantage

    reward = Reward(config.asked.reward)
    responses = [item for path in config.responses for item in read_responses(path, reward, config.data_source)]
    shared = shared_problems(responses)
    distinct = {state.key: state for response in shared for state in states_of(response, config.positions)}
    states = list(distinct.values())
    kept, everything = ({item.problem.id for item in items} for items in (shared, responses))
    print(
        f"{len(kept)} of {len(everything)} problems have a correct response of every method; "
        f"{len(states)} distinct states of {len(shared) * config.positions}"
    )
    local = {} if config.model is None else {"model": config.model}
    tokenizer = load_tokenizer(config.model, config.asked.chat) if config.model is not None else None
    drawn_with = with_weights(config, local)
    # Continuations are found again by what they continue, whatever file and position it comes from.
    free = (*engines.FREE, *endpoint.FREE, *JUDGING, "responses", "positions", "data_source")
    check_same_config(out, drawn_with, free)
    if config.endpoint is not None:
        continuations = continue_remotely(config, states, out / CONTINUATIONS, confirm)
    else:
        continuations = continue_locally(config, states, tokenizer, out / CONTINUATIONS, open_sampler)
    table = tabulate(shared, config.positions, state_values(states, continuations, reward))
    figure, found = draw_implicit_advantage(table), summary(table, len(states))
    for method in dict.fromkeys(response.method for response in shared):
        numbers = found[method]
        quarters = "  ".join(f"{advantage:+.3f}" for advantage in numbers["advantage_by_quarter"])
        print(
            f"{method:<14} value {numbers['value']:+.3f}   advantage {numbers['advantage']:+.3f}, by quarter {quarters}"
        )
    return write_results(out, "implicit_advantage", drawn_with, found, {"by_position": table}, figure)


def _named(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not (sign and folder and re.fullmatch(r"[\w.-]+", name)):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a name of letters, digits, '.', '_', '-'")
    return name, folder


def parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    flags = parser_of("implicit_advantage", __doc__)
    commands = flags.add_subparsers(dest="command", required=True)

    drawing = commands.add_parser("sample", help="correct responses of checkpoints")
    drawing.add_argument("--method", type=_named, action="append", required=True, help="NAME=FOLDER, repeatable")
    add_out(drawing, "folder for draws and responses.jsonl")
    add_flags(drawing, SampleConfig)

    measuring = commands.add_parser("measure", help="values along responses")
    measuring.add_argument("--responses", type=Path, nargs="+", required=True, help="JSON lines or parquet")
    add_out(measuring, "folder for continuations, picture, numbers, config")
    add_flags(measuring, MeasureConfig)
    remote = "any OpenAI-compatible chat endpoint instead of --model"
    measuring.add_argument("--base-url", help=f"{remote}, such as https://host/v1")
    measuring.add_argument("--evaluator", default="", help="name of the model at the endpoint")
    measuring.add_argument("--yes", action="store_true", help="send the requests without asking")
    add_flags(measuring, EndpointConfig, f"endpoint: {remote}")
    for command in (drawing, measuring):
        add_model_flags(command)
        add_flags(command, EngineConfig, "vLLM")
    return flags


def _measure_config(flags: argparse.Namespace) -> MeasureConfig:
    remote = None
    if flags.base_url:
        remote = read_flags(EndpointConfig, flags, base_url=flags.base_url, model=flags.evaluator)
    return read_flags(
        MeasureConfig,
        flags,
        responses=tuple(flags.responses),
        engine=read_flags(EngineConfig, flags) if flags.model else None,
        endpoint=remote,
        asked=model_settings(flags, flags.model or ""),
    )


def _sample_config(flags: argparse.Namespace) -> SampleConfig:
    require(len(dict(flags.method)) == len(flags.method), "--method: a name is there twice")
    return read_flags(
        SampleConfig,
        flags,
        methods=dict(flags.method),
        engine=read_flags(EngineConfig, flags),
        asked={method: model_settings(flags, folder) for method, folder in flags.method},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    flags = parser().parse_args(argv)
    if flags.command == "sample":
        return run_cli(lambda: sample(_sample_config(flags), flags.out))
    return run_cli(lambda: measure(_measure_config(flags), flags.out, ask_user(flags.yes)))


if __name__ == "__main__":
    sys.exit(main())
