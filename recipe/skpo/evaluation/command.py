"""Evaluate a checkpoint on benchmarks with plain pi(.|q), no split and no skip.

    python -m recipe.skpo.evaluation checkpoint=outputs/<run> benchmarks=[aime24,math500] [key=value ...]

Draws k responses per problem with vLLM, checks them with the training's reward, and writes tables of avg@k and pass@k
and every response.  A killed evaluation resumes; a finished one scores its
stored responses again.  The paper gives k but no temperature: 0.6 with top-p 0.95 is usual for reasoning models;
``temperature=0 k.default=1`` is greedy, as the trainer's validation.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.benchmarks import BENCHMARKS
from data_prep.schema import DataError
from recipe.skpo.evaluation.config import CONFIG, EvaluationConfig, read_config
from recipe.skpo.evaluation.engine import FREE, detected_platform
from recipe.skpo.evaluation.models import Checkpoint, find_checkpoint, merged_model
from recipe.skpo.evaluation.options import chat_of, require
from recipe.skpo.evaluation.problems import Judge, Problem, Reward, prompts_of, read_problems
from recipe.skpo.evaluation.results import Parser, check_same_config, json_bytes, run_cli
from recipe.skpo.evaluation.sampling import (
    Completion,
    Request,
    Sampler,
    draw_stored,
    opened_by_first_draw,
    request_seed,
)
from recipe.skpo.evaluation.scores import Answered, markdown, score
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.redaction import reject_secret_overrides
from recipe.skpo.task.digests import model_digest
from recipe.skpo.task.model_files import load_tokenizer
from recipe.skpo.task.run_settings import Chat, RunSettings, run_settings

# ---------------------------------------------------------------- benchmarks


@dataclass(frozen=True)
class Benchmark:
    """A file's problems and their tokens; ``digest`` differs when the file's bytes do."""

    name: str
    problems: list[Problem]
    prompts: list[tuple[int, ...]]
    digest: str


def benchmark_files(config: EvaluationConfig) -> dict[str, Path]:
    """Map names to parquet files.

    A file of the user's own is named after itself, and after its folder too if it is a ``train``, ``val`` or ``test``.

    Raises:
        ConfigError: unknown name, missing file with the command that makes it, or two of one name.
    """
    files: dict[str, Path] = {}
    known = f"known are {', '.join(BENCHMARKS)}, and paths of .parquet files"
    for given in config.benchmarks:
        if given in BENCHMARKS:
            name, path = given, Path(config.data_dir) / f"{given}.parquet"
            make = f"make it with `python -m data_prep.benchmarks --names {given} --out {config.data_dir}`"
        else:
            path, make = Path(given), known
            require(path.suffix == ".parquet", f"benchmarks: {given!r} is unknown; {known}")
            stem = path.stem
            name = f"{path.resolve().parent.name}-{stem}" if stem in ("train", "val", "test") else stem
        require(path.exists(), f"benchmarks: {path} does not exist; {make}")
        require(name not in files, f"benchmarks: {given} and {files.get(name)} are both called {name}; rename one")
        files[name] = path
    return files


def read_benchmark(name: str, path: Path, tokenizer: Any, limit: int) -> Benchmark:
    """Read a benchmark's problems with their tokens under the tokenizer's chat template, each at most ``limit``.

    Raises:
        DataError: naming file, row or column, and the fix.
    """
    problems = read_problems(path, "benchmarks:")
    prompts = prompts_of(problems, tokenizer, f"benchmarks: {path}")
    for row, prompt in enumerate(prompts):
        if len(prompt) > limit:
            raise DataError(
                f"benchmarks: {path}: row {row}: the prompt has {len(prompt)} tokens, max_prompt_length is {limit}; "
                f"raise it"
            )
    return Benchmark(name, problems, prompts, hashlib.sha256(path.read_bytes()).hexdigest()[:16])


# ---------------------------------------------------------------- draw, check, write


def as_trained(config: EvaluationConfig, run: RunSettings | None) -> EvaluationConfig:
    """Fill in what the config leaves to the run: template, its options, arguments of the reward function."""
    reward = config.reward
    chat = chat_of(run, config.custom_chat_template, config.chat_template_kwargs)
    same = run is not None and (run.reward_path, run.reward_name) == (reward.path, reward.name)
    if run is not None and not same:
        print(
            f"note: the run was trained with the reward {run.reward_name} of {run.reward_path}, responses are checked "
            f"with {reward.name} of {reward.path}; reward.path and reward.name choose another"
        )
    kwargs = (run.reward_kwargs if run is not None and same else {}) | reward.reward_kwargs
    return replace(config, **asdict(chat), reward=replace(reward, reward_kwargs=kwargs))


def title(config: EvaluationConfig, checkpoint: Checkpoint) -> str:
    """Say in one line what the table is of."""
    how = "greedy" if config.temperature == 0 else f"temperature {config.temperature:g}, top-p {config.top_p:g}"
    return (
        f"{checkpoint.label}: plain responses, {how}, at most {config.max_response_length} tokens, seed {config.seed}"
    )


def answered(benchmark: Benchmark, drawn: Mapping[str, Sequence[Completion]], judge: Judge) -> list[Answered]:
    """Check every problem's responses."""
    pairs = list(zip(benchmark.problems, benchmark.prompts, strict=True))
    judged = judge.many((problem, prompt, item.token_ids) for problem, prompt in pairs for item in drawn[problem.id])
    result = []
    for problem, _ in pairs:
        completions = drawn[problem.id]
        texts, checked = zip(*islice(judged, len(completions)), strict=True)
        result.append(
            Answered(
                id=problem.id,
                question=problem.extra_info.get("question") or problem.text,
                ground_truth=str(problem.ground_truth),
                responses=texts,
                preds=tuple(item.pred for item in checked),
                right=tuple(item.right for item in checked),
                well_formed=tuple(item.well_formed for item in checked),
                lengths=tuple(len(item.token_ids) for item in completions),
                cut=tuple(item.finish_reason == "length" for item in completions),
            )
        )
    return result


def write_problems(path: Path, problems: Sequence[Answered]) -> None:
    """Write per-problem results: the fields of ``Answered``, ``k`` and ``n_right``."""
    rows = [asdict(problem) | {"k": len(problem.right), "n_right": sum(problem.right)} for problem in problems]
    write_atomic(path, pd.DataFrame(rows).to_parquet(index=False))


def run(config: EvaluationConfig, open_sampler: Callable[[str], Sampler] | None = None) -> list[Path]:
    """Check, draw, score, write; returns the files, the table first.  ``open_sampler`` None starts vLLM."""
    files = benchmark_files(config)
    counts = {name: config.responses(name) for name in files}
    checkpoint = find_checkpoint(config.checkpoint, config.trusted_globals, config.step)
    # By the name given: the checkpoints may lie elsewhere than the run's folder.
    settings = run_settings(config.checkpoint)
    config = as_trained(config, settings)
    chat = Chat(config.custom_chat_template, dict(config.chat_template_kwargs or {}))
    tokenizer = load_tokenizer(checkpoint.model, chat)
    benchmarks = [read_benchmark(name, path, tokenizer, config.max_prompt_length) for name, path in files.items()]
    reward = Reward(config.reward)
    for benchmark in benchmarks:
        reward.check_truths(benchmark.problems, f"benchmarks: {benchmark.name}")
    out = Path(config.output_dir or f"outputs/evaluation/{checkpoint.label}")
    for benchmark in benchmarks:
        # What the draws depend on: a benchmark more, or another reward, can use the same folder.
        names = ("temperature", "top_p", "max_response_length", "seed", "chat_template_kwargs", "custom_chat_template")
        drawn_with = {name: getattr(config, name) for name in names} | {
            "weights": checkpoint.identity or model_digest(checkpoint.model),
            "data": benchmark.digest,
            "k": counts[benchmark.name],
            "engine": config.engine,
        }
        check_same_config(out / benchmark.name, drawn_with, FREE)
    if checkpoint.shards is not None and config.engine.dtype != "bfloat16":
        print(
            f"note: verl's merger rounds weights to bfloat16, so engine.dtype={config.engine.dtype} computes with those"
        )
    needed = config.max_prompt_length + config.max_response_length
    engine = replace(config.engine, max_model_len=config.engine.max_model_len or needed)
    judge = Judge(reward, tokenizer)
    length, temperature, top_p = config.max_response_length, config.temperature, config.top_p
    scores, written = [], []
    with opened_by_first_draw(lambda: (open_sampler or engine.open)(merged_model(checkpoint, out, settings))) as sample:
        for benchmark in benchmarks:
            name, k = benchmark.name, counts[benchmark.name]
            requests = [
                Request(problem.id, prompt, length, request_seed(config.seed, problem.id, k), k, temperature, top_p)
                for problem, prompt in zip(benchmark.problems, benchmark.prompts, strict=True)
            ]
            report = partial(print, f"{name}/", sep="", flush=True)
            drawn = draw_stored(requests, out / name / "draws.jsonl", sample, engine.prompts_per_call, report)
            problems = answered(benchmark, drawn, judge)
            written.append(out / name / "problems.parquet")
            write_problems(written[-1], problems)
            scores.append(score(name, problems, seed=config.seed, resamples=config.resamples))
    heading = title(config, checkpoint)
    table = f"{heading}\n\n{markdown(scores)}"
    print(f"\n{table}")
    contents = {
        "table.md": table.encode(),
        "table.json": json_bytes({"title": heading, "benchmarks": scores}),
        "config.json": json_bytes(config),
    }
    for name, content in contents.items():
        write_atomic(out / name, content)
    return [*(out / name for name in contents), *written]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    # The comments of the config say what each key is; above them is what Hydra alone reads.
    keys = CONFIG.read_text(encoding="utf-8").partition("- _self_\n\n")[2]
    parser = Parser(
        prog="python -m recipe.skpo.evaluation", description=__doc__, epilog=f"keys and defaults:\n\n{keys}"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any of the keys below, as Hydra reads them")
    overrides = parser.parse_args(argv).overrides
    os.environ.setdefault("SKPO_PLATFORM", detected_platform())

    def command() -> list[Path]:
        reject_secret_overrides(overrides)
        config = read_config(overrides)
        # Before rewards and the merger's process import verl.
        config.engine.apply_platform()
        return run(config)

    return run_cli(command)
