"""Evaluate a checkpoint on benchmarks with plain pi(.|q), no split and no skip (docs/evaluation.md).

    python -m recipe.skpo.evaluation checkpoint=outputs/<run> benchmarks=[aime24,math500] [key=value ...]

Draws k responses per problem with vLLM, checks them with the training's reward, and writes tables of avg@k and pass@k
and every response.  ``config/evaluate.yaml`` has all keys.  A checkpoint of verl's FSDP is merged by verl's own merger
first.  The same command again goes on where a kill stopped it; a finished one scores its stored responses anew.

The paper gives k but no evaluation temperature.  0.6 with top-p 0.95 is the usual choice for avg@k of reasoning models;
``temperature=0 k.default=1`` is greedy and is what the trainer's validation does.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.benchmarks import BENCHMARKS
from data_prep.schema import DataError, check_parquet
from data_prep.untrusted import UntrustedError, one_line, read_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.adapters import META, has_adapter
from recipe.skpo.evaluation.options import FREE, EngineConfig
from recipe.skpo.evaluation.output import AnalysisError, claim, guarded, plain, write_atomic
from recipe.skpo.evaluation.problems import load_tokenizer
from recipe.skpo.evaluation.sampling import (
    SEED_BOUND,
    Completion,
    Request,
    Sampler,
    SamplingError,
    detected_platform,
    draw_stored,
)
from recipe.skpo.evaluation.scores import Answered, Score, markdown, score
from recipe.skpo.isolation.child import PROMPT_SECONDS, Place, Stopped, in_child
from recipe.skpo.isolation.pickles import check_pickles
from recipe.skpo.output.redaction import reject_secret_overrides, reject_secrets
from recipe.skpo.task.prompts import problem_tokens
from recipe.skpo.task.rewards import RewardCall, RewardError
from recipe.skpo.task.run_settings import Chat, run_settings
from recipe.skpo.task.thoughts import ThoughtReader, configured_marks

ACCEPTED = (
    "give a Hugging Face folder or name, a verl FSDP checkpoint (.../global_step_N) or the folder of a run that has one"
)

# ---------------------------------------------------------------- config


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True)
class RewardFunction:
    """The reward, as the trainer's ``reward.custom_reward_function``.

    Attributes:
        path: ``pkg://<module>`` or a Python file.
        name: of the function in it.
        reward_kwargs: passed along with every call, over those of the run if it has this function.
    """

    path: str
    name: str
    reward_kwargs: dict[str, Any]


@dataclass(frozen=True)
class EvaluationConfig:
    """``config/evaluate.yaml``, typed and checked.

    Attributes:
        checkpoint: what to evaluate; see ``find_checkpoint``.
        benchmarks: names or parquet files.
        data_dir: folder of the named ones.
        output_dir: None takes a folder named after the checkpoint.
        k: responses per problem, by benchmark and ``default``.
        temperature, top_p: of the sampler; temperature 0 is greedy.
        max_prompt_length, max_response_length: in tokens.
        chat_template_kwargs, custom_chat_template: options of the chat template, and another template than the
            tokenizer's; None takes the run's.
        seed: of responses and bootstrap.
        resamples: of the bootstrap.
        reward: checks the responses.
        trusted_globals: what a checkpoint's pickles may name beyond what verl saves.
        engine: how vLLM serves the model.

    Raises:
        ConfigError: naming the key and what it must be.
    """

    checkpoint: str
    benchmarks: list[str]
    data_dir: str
    output_dir: str | None
    k: dict[str, int]
    temperature: float
    top_p: float
    max_prompt_length: int
    max_response_length: int
    chat_template_kwargs: dict[str, Any] | None
    custom_chat_template: str | None
    seed: int
    resamples: int
    reward: RewardFunction
    trusted_globals: list[str]
    engine: EngineConfig

    def __post_init__(self) -> None:
        _require(bool(self.benchmarks), f"benchmarks: is empty; name any of {', '.join(BENCHMARKS)}, or parquet files")
        _require(self.temperature >= 0, f"temperature: must be >= 0, got {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p: must be in (0, 1], got {self.top_p}")
        _require("default" in self.k, "k.default: is not set")
        for name, value in (
            *((f"k.{name}", value) for name, value in self.k.items()),
            ("max_prompt_length", self.max_prompt_length),
            ("max_response_length", self.max_response_length),
            ("resamples", self.resamples),
            ("engine.prompts_per_call", self.engine.prompts_per_call),
        ):
            _require(value >= 1, f"{name}: must be >= 1, got {value}")
        _require(self.seed >= 0, f"seed: must be >= 0, got {self.seed}")
        _require(
            self.engine.platform in ("cpu", "gpu"), f"engine.platform: must be cpu or gpu, got {self.engine.platform}"
        )
        needed, context = self.max_prompt_length + self.max_response_length, self.engine.max_model_len
        _require(
            context == 0 or context >= needed,
            f"engine.max_model_len: {context} is below the {needed} tokens of max_prompt_length and "
            f"max_response_length together; raise it, or leave it at 0",
        )

    def responses(self, benchmark: str) -> int:
        """k of one benchmark.

        Raises:
            ConfigError: more than one greedy response.
        """
        key = benchmark if benchmark in self.k else "default"
        _require(
            self.temperature > 0 or self.k[key] == 1,
            f"k.{key}: is {self.k[key]}, but with temperature=0 all responses are the same; give k.{key}=1",
        )
        return self.k[key]

    @classmethod
    def from_config(cls, config: DictConfig) -> "EvaluationConfig":
        """The typed config.

        Raises:
            ConfigError: an unknown key, a missing one, one of another type or one out of range.
        """
        for key, what in (("checkpoint", ACCEPTED), ("benchmarks", f"name any of {', '.join(BENCHMARKS)}, or files")):
            _require(config.get(key) is not None, f"{key}: is not set; {what}")
        try:
            # A frozen record of a config: types are OmegaConf's to convert and to refuse.
            schema = OmegaConf.structured(cls)
            # OmegaConf takes frozen for read-only, and merging lifts that from the outermost record alone.
            OmegaConf.set_readonly(schema, False)
            for name, record in (("reward", RewardFunction), ("engine", EngineConfig)):
                schema[name] = OmegaConf.structured(record)
                OmegaConf.set_readonly(schema[name], False)
            typed: Any = OmegaConf.to_object(OmegaConf.merge(schema, config))
        except OmegaConfBaseException as error:
            where = f"{error.full_key}: " if error.full_key else ""
            raise ConfigError(where + str(error).splitlines()[0]) from None
        return typed


# ---------------------------------------------------------------- checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found.

    Attributes:
        label: short name for files and tables.
        model: Hugging Face folder or name; of an FSDP checkpoint the one with its config and tokenizer.
        shards: FSDP checkpoint folder that has to be merged, else None.
        identity: differs when the weights do: digest of names, sizes and times of their files, or the hub's name.
    """

    label: str
    model: str
    shards: Path | None
    identity: str


def find_checkpoint(given: str, trusted: Sequence[str] = ()) -> Checkpoint:
    """The model at a path or of a name.

    Args:
        given: a Hugging Face folder or name; a verl FSDP checkpoint, ``global_step_N`` or its ``actor``; a run's
            folder or its ``checkpoints``, for the latest one.
        trusted: what an FSDP checkpoint may name beyond what verl saves.

    Raises:
        ConfigError: it is none of these, not whole, or would run more than verl saves; naming the place.
    """
    folder = Path(given).expanduser()
    if not folder.exists():
        hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given)
        _require(hub is not None, f"checkpoint: {given} does not exist; {ACCEPTED}")
        return Checkpoint(label=given.rsplit("/", 1)[1], model=given, shards=None, identity=given)
    folder = _latest(folder)
    if (folder / "actor").is_dir():
        folder = folder / "actor"
    if (folder / "fsdp_config.json").is_file():
        return _fsdp_checkpoint(folder, trusted)
    _require((folder / "config.json").is_file(), f"checkpoint: {folder} holds no model; {ACCEPTED}")
    return _whole_model(folder)


def _latest(folder: Path) -> Path:
    """The latest checkpoint below a run's folder; any other folder is returned as it is."""
    for root in (folder, folder / "checkpoints"):
        marker = root / "latest_checkpointed_iteration.txt"
        if marker.is_file():
            step = root / f"global_step_{marker.read_text(encoding='utf-8').strip()}"
            _require(step.is_dir(), f"checkpoint: {marker} names {step.name}, which is not there; name another one")
            return step
    return folder


def _fsdp_checkpoint(actor: Path, trusted: Sequence[str]) -> Checkpoint:
    try:
        world_size = read_json(actor / "fsdp_config.json")["world_size"]
    except (UntrustedError, KeyError, TypeError):
        raise ConfigError(f"checkpoint: {actor / 'fsdp_config.json'} has no world_size; {ACCEPTED}") from None
    _require(
        type(world_size) is int and world_size >= 1,
        f"checkpoint: {actor / 'fsdp_config.json'} has world_size={one_line(world_size, 40)}; {ACCEPTED}",
    )
    described = actor / "huggingface"
    _require((described / "config.json").is_file(), f"checkpoint: {described} has no config.json; {ACCEPTED}")
    adapter = has_adapter(actor)
    if any(described.glob("*.safetensors")) and not adapter:  # saved with save_contents=[..., hf_model]
        return _whole_model(described)
    shards = []
    # One by one, so that no more names are made than there are files.
    for rank in range(world_size):
        shard = actor / f"model_world_size_{world_size}_rank_{rank}.pt"
        # torch.save writes a zip archive, whose directory is its end.
        _require(
            shard.is_file() and zipfile.is_zipfile(shard),
            f"checkpoint: {shard} is missing or cut short; name a checkpoint that was saved to its end",
        )
        shards.append(shard)
    check_pickles(shards, trusted)
    return Checkpoint(_label(actor), str(described), actor, _files_digest([*shards, *actor.glob(META)]))


def _whole_model(folder: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open
    from verl.model_merger.output_validation import validate_hf_model_output

    try:
        validate_hf_model_output(folder)
    except RuntimeError as error:
        raise ConfigError(f"checkpoint: {error}") from None
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    for file in weights:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "numpy"):
                    pass
            except SafetensorError as error:
                raise ConfigError(f"checkpoint: {file} is cut short or no safetensors file ({error})") from None
    return Checkpoint(_label(folder), str(folder), None, _files_digest(weights))


def _label(folder: Path) -> str:
    """The last part of a path that says something, and the run's before ``global_step_N``."""
    parts = [part for part in folder.resolve().parts if part not in ("checkpoints", "actor", "huggingface")]
    return "-".join(parts[-2:]) if parts[-1].startswith("global_step_") else parts[-1]


def _files_digest(files: Sequence[Path]) -> str:
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def merged_model(checkpoint: Checkpoint, beside: Path) -> str:
    """The Hugging Face folder of a checkpoint; an FSDP checkpoint is merged unless that was done before.

    verl's merger runs in a process of its own, so that its memory is free again when vLLM starts.  It writes bfloat16,
    which is what verl's weight sync gives to a vLLM of that dtype.  A LoRA adapter is merged in by another process.

    Args:
        checkpoint: from ``find_checkpoint``.
        beside: the merged model goes into ``merged`` beside this folder, under the checkpoint's label and identity.

    Raises:
        ConfigError: verl's merger cannot read the checkpoint.
    """
    if checkpoint.shards is None:
        return checkpoint.model
    target = beside.parent / "merged" / f"{checkpoint.label}-{checkpoint.identity}"
    if target.is_dir():
        return str(target)
    partial_target = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial_target, ignore_errors=True)
    partial_target.mkdir(parents=True)
    merger = ["verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(checkpoint.shards)]
    commands = [[*merger, "--target_dir", str(partial_target)]]
    if has_adapter(checkpoint.shards):
        commands.append(["recipe.skpo.evaluation.adapters", str(partial_target)])
    print(f"merging {checkpoint.shards} into {target}", flush=True)
    try:
        for module in commands:
            command = [sys.executable, "-m", *module]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                known = reason.startswith("checkpoint: ")
                raise ConfigError(
                    reason if known else f"checkpoint: verl's merger cannot read {checkpoint.shards} ({reason})"
                )
        run = run_settings(checkpoint.shards)
        if run is not None:
            # Whoever is given the merged folder asks the model as the run did.
            shutil.copyfile(run.config, partial_target / run.config.name)
        # A rename is atomic: a folder of this name is whole.
        partial_target.rename(target)
    finally:
        shutil.rmtree(partial_target, ignore_errors=True)
    return str(target)


# ---------------------------------------------------------------- benchmarks and rewards


@dataclass(frozen=True)
class Problem:
    """One row of a benchmark's file; ``prompt_ids`` are its templated tokens, ``extra_info`` is the reward's."""

    id: str
    data_source: str
    prompt_ids: tuple[int, ...]
    question: str
    ground_truth: Any
    extra_info: dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A file's problems; ``digest`` differs when its bytes do."""

    name: str
    problems: list[Problem]
    digest: str


def benchmark_files(config: EvaluationConfig) -> dict[str, Path]:
    """Name to parquet file.

    A file of one's own is called after itself, and after its folder too if it is a ``train``, ``val`` or ``test``.

    Raises:
        ConfigError: unknown name, missing file with the command that makes it, or two of one name.
    """
    files: dict[str, Path] = {}
    for given in config.benchmarks:
        if given in BENCHMARKS:
            name, path = given, Path(config.data_dir) / f"{given}.parquet"
            make = f"make it with `python -m data_prep.benchmarks --names {given} --out {config.data_dir}`"
        else:
            path = Path(given)
            _require(path.suffix == ".parquet", f"benchmarks: {given!r} is unknown; {_known()}")
            stem = path.stem
            name = f"{path.resolve().parent.name}-{stem}" if stem in ("train", "val", "test") else stem
            make = _known()
        _require(path.exists(), f"benchmarks: {path} does not exist; {make}")
        _require(name not in files, f"benchmarks: {given} and {files.get(name)} are both called {name}; rename one")
        files[name] = path
    return files


def _known() -> str:
    return f"known are {', '.join(BENCHMARKS)}, and paths of .parquet files"


def read_benchmark(name: str, path: Path, tokenizer: Any, limit: int) -> Benchmark:
    """A benchmark's problems with their tokens.

    Args:
        name: of the benchmark.
        path: parquet file (``data_prep.schema``).
        tokenizer: of the model, with its chat template.
        limit: longest prompt, in tokens.

    Raises:
        DataError: naming file, row or column, and the fix.
    """
    try:
        rows = check_parquet(path, role="val").to_pylist()
    except DataError as error:
        raise DataError(str(error).replace("data.val_files:", "benchmarks:", 1)) from None
    known = "extra_info" in pq.read_schema(path).names
    extras = pq.read_table(path, columns=["extra_info"])["extra_info"].to_pylist() if known else [None] * len(rows)

    def tokens(place: Place) -> list[list[int]]:
        found = []
        for number, row in enumerate(rows):
            place.move(f"row {number}", PROMPT_SECONDS)
            found.append(problem_tokens(tokenizer, row["prompt"]))
        return found

    try:
        prompts = in_child(tokens, ())
    except Stopped as error:
        raise DataError(
            f"benchmarks: {path}: {error.at}: the model's chat template or tokenizer {error}; take a model whose "
            f"origin you trust"
        ) from None
    except RuntimeError as error:
        raise DataError(
            f"benchmarks: {path}: the model's chat template fails ({one_line(error)}); change the prompts' roles, or "
            f"take another model"
        ) from None
    problems = []
    for number, (row, extra, prompt_ids) in enumerate(zip(rows, extras, prompts, strict=True)):
        if len(prompt_ids) > limit:
            raise DataError(
                f"benchmarks: {path}: row {number}: the prompt has {len(prompt_ids)} tokens, max_prompt_length is "
                f"{limit}; raise it"
            )
        info = dict(extra or {})
        problems.append(
            Problem(
                id=row["id"],
                data_source=row["data_source"],
                prompt_ids=tuple(prompt_ids),
                question=info.get("question") or row["prompt"][-1]["content"],
                ground_truth=row["reward_model"]["ground_truth"],
                extra_info=info,
            )
        )
    return Benchmark(name, problems, hashlib.sha256(path.read_bytes()).hexdigest()[:16])


@dataclass(frozen=True)
class Checked:
    """What the reward says of a response; ``well_formed`` is None where it does not say."""

    right: bool
    pred: str
    well_formed: bool | None


class Reward:
    """The reward function, called as the trainer does.

    Raises:
        ConfigError: no such module, file or function, or it does not take the arguments.
    """

    def __init__(self, function: RewardFunction) -> None:
        try:
            self._call = RewardCall(function.path, function.name, function.reward_kwargs)
            self._call.check_signature()
        except RewardError as error:
            raise ConfigError(f"reward: {error}") from None
        self.name = self._call.label
        self.marks = configured_marks(function.path, function.reward_kwargs)

    def __call__(self, problem: Problem, response: str, extra_info: Mapping[str, Any] | None = None) -> Checked:
        """Check a response; a result without ``acc`` is right where its score is positive.

        Args:
            problem: what was asked.
            response: its text without special tokens, as the trainer's reward sees it.
            extra_info: passed along instead of the problem's own.
        """
        info = problem.extra_info if extra_info is None else extra_info
        try:
            verdict = self._call(problem.data_source, response, problem.ground_truth, info)
        except RewardError as error:
            raise ConfigError(f"reward: {self.name}: {error}, for problem {problem.id}") from None
        record = verdict.record
        accuracy = record["acc"] if record.get("acc") is not None else float(verdict.score > 0)
        _require(
            accuracy in (0, 1),
            f"reward: its acc is {accuracy}; right responses are counted, so give 0 or 1",
        )
        pred, formed = record.get("pred"), record.get("well_formed")
        return Checked(bool(accuracy), "" if pred is None else str(pred), None if formed is None else bool(formed))


def check_truths(benchmark: Benchmark, reward: Reward) -> None:
    """See that every answer can be checked, before anything is drawn.

    Raises:
        DataError: naming the row and what the reward says.
        ConfigError: the reward function does not take what it is given.
    """
    for number, problem in enumerate(benchmark.problems):
        try:
            reward(problem, "")
        except ValueError as error:
            raise DataError(f"benchmarks: {benchmark.name}: row {number}: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"reward: {reward.name} fails on row {number} of {benchmark.name} ({type(error).__name__}: {error})"
            ) from None


# ---------------------------------------------------------------- draw, check, write


def request_seed(seed: int, problem_id: str, k: int) -> int:
    """Of a problem's first response, whatever else is evaluated with it; k seeds from there on are its own."""
    digest = hashlib.sha256(f"{seed}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8]) % (SEED_BOUND - k)


def answered(
    benchmark: Benchmark, drawn: Mapping[str, Sequence[Completion]], tokenizer: Any, reward: Reward
) -> list[Answered]:
    """Every problem with its checked responses; text is decoded as the trainer's reward sees it."""
    result = []
    thoughts = ThoughtReader(tokenizer, reward.marks)
    for problem in benchmark.problems:
        completions = drawn[problem.id]
        texts = [str(tokenizer.decode(item.token_ids, skip_special_tokens=True)) for item in completions]
        checked = [
            reward(problem, text, thoughts.extra_info(problem.extra_info, problem.prompt_ids, item.token_ids))
            for text, item in zip(texts, completions, strict=True)
        ]
        result.append(
            Answered(
                id=problem.id,
                question=problem.question,
                ground_truth=str(problem.ground_truth),
                responses=tuple(texts),
                preds=tuple(item.pred for item in checked),
                right=tuple(item.right for item in checked),
                well_formed=tuple(item.well_formed for item in checked),
                lengths=tuple(len(item.token_ids) for item in completions),
                cut=tuple(item.finish_reason == "length" for item in completions),
            )
        )
    return result


def write_problems(path: Path, problems: Sequence[Answered]) -> None:
    """Per-problem results: the fields of ``Answered``, ``k`` and ``n_right``."""
    rows = [asdict(problem) | {"k": len(problem.right), "n_right": sum(problem.right)} for problem in problems]
    buffer = BytesIO()
    pd.DataFrame(rows).to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n").encode())


def title(config: EvaluationConfig, checkpoint: Checkpoint) -> str:
    """What the table is of, in one line."""
    how = "greedy" if config.temperature == 0 else f"temperature {config.temperature:g}, top-p {config.top_p:g}"
    return (
        f"{checkpoint.label}: plain responses, {how}, at most {config.max_response_length} tokens, seed {config.seed}"
    )


def as_trained(config: EvaluationConfig, checkpoint: Checkpoint) -> EvaluationConfig:
    """The config with what it leaves to the run: template, its options, arguments of the reward function.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    run, reward = run_settings(checkpoint.shards or checkpoint.model), config.reward
    chat = run.chat if run is not None else Chat()
    same = run is not None and (run.reward_path, run.reward_name) == (reward.path, reward.name)
    if run is not None and not same:
        print(
            f"note: the run was trained with the reward {run.reward_name} of {run.reward_path}, responses are checked "
            f"with {reward.name} of {reward.path}; reward.path and reward.name choose another"
        )
    kwargs = (run.reward_kwargs if run is not None and same else {}) | reward.reward_kwargs
    given, template = config.chat_template_kwargs, config.custom_chat_template
    return replace(
        config,
        chat_template_kwargs=chat.chat_template_kwargs if given is None else given,
        custom_chat_template=chat.custom_chat_template if template is None else template,
        reward=replace(reward, reward_kwargs=kwargs),
    )


def run(config: EvaluationConfig, open_sampler: Callable[[str], Sampler] | None = None) -> list[Path]:
    """Check, draw, score, write; returns the files, the table first.

    Args:
        config: what to evaluate.
        open_sampler: makes the sampler of a model; None starts vLLM.
    """
    files = benchmark_files(config)
    counts = {name: config.responses(name) for name in files}
    checkpoint = find_checkpoint(config.checkpoint, config.trusted_globals)
    config = as_trained(config, checkpoint)
    tokenizer = load_tokenizer(
        checkpoint.model, Chat(config.custom_chat_template, dict(config.chat_template_kwargs or {}))
    )
    benchmarks = [read_benchmark(name, path, tokenizer, config.max_prompt_length) for name, path in files.items()]
    reward = Reward(config.reward)
    for benchmark in benchmarks:
        check_truths(benchmark, reward)
    out = Path(config.output_dir or f"outputs/evaluation/{checkpoint.label}")
    needed = config.max_prompt_length + config.max_response_length
    engine = replace(config.engine, max_model_len=config.engine.max_model_len or needed)
    for benchmark in benchmarks:
        # What the draws depend on: a benchmark more, or another reward, can use the same folder.
        drawn_with = {
            "weights": checkpoint.identity,
            "data": benchmark.digest,
            "k": counts[benchmark.name],
            **{name: getattr(config, name) for name in ("temperature", "top_p", "max_response_length", "seed")},
            **{name: getattr(config, name) for name in ("chat_template_kwargs", "custom_chat_template")},
            "engine": config.engine,
        }
        claim(out / benchmark.name, drawn_with, FREE)
    if checkpoint.shards is not None and config.engine.dtype != "bfloat16":
        print(
            f"note: verl's merger rounds weights to bfloat16, so engine.dtype={config.engine.dtype} computes with those"
        )

    opened: list[Sampler] = []

    def sampler() -> Sampler:
        if not opened:
            opened.append((open_sampler or engine.open)(merged_model(checkpoint, out)))
        return opened[0]

    scores: list[Score] = []
    written: list[Path] = []
    try:
        for benchmark in benchmarks:
            k = counts[benchmark.name]
            requests = [
                Request(
                    problem.id, problem.prompt_ids, config.max_response_length, request_seed(config.seed, problem.id, k)
                )
                for problem in benchmark.problems
            ]
            drawn = draw_stored(
                requests,
                out / benchmark.name / "draws.jsonl",
                sampler,
                n=k,
                temperature=config.temperature,
                top_p=config.top_p,
                prompts_per_call=engine.prompts_per_call,
                report=lambda line, name=benchmark.name: print(f"{name}/{line}", flush=True),  # type: ignore[misc]
            )
            problems = answered(benchmark, drawn, tokenizer, reward)
            written.append(out / benchmark.name / "problems.parquet")
            write_problems(written[-1], problems)
            scores.append(score(benchmark.name, problems, seed=config.seed, resamples=config.resamples))
    finally:
        for used in opened:
            used.close()
    heading = title(config, checkpoint)
    table = f"{heading}\n\n{markdown(scores)}"
    print(f"\n{table}")
    write_atomic(out / "table.md", table.encode())
    _write_json(out / "table.json", {"title": heading, "benchmarks": scores})
    _write_json(out / "config.json", config)
    return [out / "table.md", out / "table.json", out / "config.json", *written]


# ---------------------------------------------------------------- command


def read_config(overrides: Sequence[str]) -> EvaluationConfig:
    """``config/evaluate.yaml`` under Hydra overrides.

    Raises:
        ConfigError: an override that Hydra or the record refuses.
    """
    try:
        with initialize_config_dir(str(Path(__file__).parents[1] / "config"), version_base=None):
            config = compose("evaluate", overrides=list(overrides))
        OmegaConf.resolve(config)
        reject_secrets(OmegaConf.to_container(config))
    except (HydraException, OmegaConfBaseException) as error:
        # Hydra spreads its message over lines and causes.
        text = "\n".join(str(cause) for cause in (error, error.__cause__) if cause)
        lines = [line for line in text.splitlines() if line.strip()]
        raise ConfigError("; ".join(dict.fromkeys(lines[:2]))) from None
    return EvaluationConfig.from_config(config)


def apply_platform(engine: EngineConfig) -> None:
    """Set the platform's variables before verl is imported, which is for rewards and for the merger's process."""
    if engine.platform == "cpu":
        from recipe.skpo import cpu

        cpu.apply_environment(cpu.environment(engine.num_threads, engine.kv_cache_gib))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipe.skpo.evaluation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of config/evaluate.yaml, as Hydra reads them"
    )
    overrides = parser.parse_args(argv).overrides
    os.environ.setdefault("SKPO_PLATFORM", detected_platform())

    def command() -> list[Path]:
        try:
            reject_secret_overrides(overrides)
            config = read_config(overrides)
            apply_platform(config.engine)
            return run(config)
        except (AnalysisError, SamplingError) as error:
            raise ConfigError(str(error).replace("another --out", "another output_dir")) from None

    return guarded(command)
