"""Which model is evaluated: a Hugging Face folder or name, or a checkpoint of verl's FSDP, which is merged into one."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.untrusted import UntrustedError, one_line, read_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.adapters import META, has_adapter, keep_adapter
from recipe.skpo.evaluation.options import require
from recipe.skpo.isolation.pickles import check_pickles
from recipe.skpo.output.best import kept_best
from recipe.skpo.output.run_folder import MARKER, checkpoints_of, marked_step, stored_checkpoints
from recipe.skpo.task.model_files import count_parameters
from recipe.skpo.task.run_settings import RunSettings

ACCEPTED = (
    "give a Hugging Face folder or name, a verl FSDP checkpoint (.../global_step_N) or the folder of a run that has one"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found.

    Attributes:
        label: short name for files and tables.
        model: Hugging Face folder or name; of an FSDP checkpoint the one with its config and tokenizer.
        shards: FSDP checkpoint folder that has to be merged, else None.
        identity: differs when the weights do: digest of names, sizes and times of their files; empty for a hub's name.
    """

    label: str
    model: str
    shards: Path | None
    identity: str


def find_checkpoint(given: str, trusted: Sequence[str] = (), step: str | None = None) -> Checkpoint:
    """Find the model at a path or of a name.

    Args:
        given: a Hugging Face folder or name; a verl FSDP checkpoint, ``global_step_N`` or its ``actor``; a run's
            folder or its ``checkpoints``, for the latest one.
        trusted: names that an FSDP checkpoint may import beyond those that verl saves.
        step: of a run's checkpoints the one of this number, or ``best``; None is the latest one.

    Raises:
        ConfigError: it is none of these, not whole, or would run more than verl saves; naming the place.
    """
    place = Path(given).expanduser()
    folder = place if step is None else _checkpoint_of_step(place, step)
    if not folder.exists():
        hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given)
        require(hub is not None, f"checkpoint: {given} does not exist; {ACCEPTED}")
        return Checkpoint(label=given.rsplit("/", 1)[1], model=given, shards=None, identity="")
    if step is None:
        folder = _latest(place)
    if not folder.is_relative_to(place):
        print(f"note: {place} has its checkpoints in {one_line(folder.parent)}")
    if (folder / "actor").is_dir():
        folder = folder / "actor"
    if (folder / "fsdp_config.json").is_file():
        return _fsdp_checkpoint(folder, trusted)
    require((folder / "config.json").is_file(), f"checkpoint: {folder} holds no model; {ACCEPTED}")
    return _whole_model(folder)


def _checkpoint_of_step(folder: Path, step: str) -> Path:
    """Return a checkpoint below a run's folder by its number or as ``best``.

    Raises:
        ConfigError: naming the checkpoints that are there.
    """
    place = checkpoints_of(folder)
    there = stored_checkpoints(folder) or stored_checkpoints(place)
    none = f"{folder} has no checkpoints in {one_line(place)}; give the folder of a run"
    require(bool(there), f"step: is {one_line(step)}, but {none}")
    if step == "best":
        kept = kept_best(folder.parent if folder.name == "checkpoints" else folder)
        number = kept[1] if kept else None
        why = f"{folder} keeps no best checkpoint, as a run does that is trained with trainer.keep_best and validated"
    else:
        number = int(step) if step.isdecimal() else None
        why = f"{folder} has no checkpoint {one_line(step)}"
    require(number in there, f"step: {why}; give one of {', '.join(map(str, there))}")
    return there[number]  # type: ignore[index]  # required


def _latest(folder: Path) -> Path:
    """Return the latest checkpoint below a run's folder; any other folder as it is."""
    for root in (folder, checkpoints_of(folder)):
        step = marked_step(root)
        if step is not None:
            path = root / f"global_step_{step}"
            marker = f"checkpoint: {one_line(root / MARKER)}"
            require(path.is_dir(), f"{marker} names {path.name}, which is not there; name another one")
            return path
    return folder


def _fsdp_checkpoint(actor: Path, trusted: Sequence[str]) -> Checkpoint:
    try:
        world_size = read_json(actor / "fsdp_config.json")["world_size"]
    except (UntrustedError, KeyError, TypeError):
        raise ConfigError(f"checkpoint: {actor / 'fsdp_config.json'} has no world_size; {ACCEPTED}") from None
    require(
        type(world_size) is int and world_size >= 1,
        f"checkpoint: {actor / 'fsdp_config.json'} has world_size={one_line(world_size, 40)}; {ACCEPTED}",
    )
    described = actor / "huggingface"
    require((described / "config.json").is_file(), f"checkpoint: {described} has no config.json; {ACCEPTED}")
    adapter = has_adapter(actor)
    if any(described.glob("*.safetensors")) and not adapter:  # saved with save_contents=[..., hf_model]
        return _whole_model(described)
    shards = []
    # One by one, so that no more names are made than there are files.
    for rank in range(world_size):
        shard = actor / f"model_world_size_{world_size}_rank_{rank}.pt"
        # torch.save writes a zip archive, whose directory is its end.
        require(
            shard.is_file() and zipfile.is_zipfile(shard),
            f"checkpoint: {shard} is missing or cut short; name a checkpoint that was saved to its end",
        )
        shards.append(shard)
    check_pickles(shards, trusted)
    return Checkpoint(_label(actor), str(described), actor, _files_digest([*shards, *actor.glob(META)]))


def _whole_model(folder: Path) -> Checkpoint:
    from verl.model_merger.output_validation import validate_hf_model_output

    try:
        validate_hf_model_output(folder)
    except RuntimeError as error:
        raise ConfigError(f"checkpoint: {error}") from None
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    count_parameters((file for file in weights if file.suffix == ".safetensors"), where="checkpoint: ")
    return Checkpoint(_label(folder), str(folder), None, _files_digest(weights))


def _label(folder: Path) -> str:
    """Return the last part of a path that says something, and the run's before ``global_step_N``."""
    parts = [part for part in folder.resolve().parts if part not in ("checkpoints", "actor", "huggingface")]
    return "-".join(parts[-2:]) if parts[-1].startswith("global_step_") else parts[-1]


def _files_digest(files: Sequence[Path]) -> str:
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def merged_model(checkpoint: Checkpoint, beside: Path, run: RunSettings | None = None) -> str:
    """Return the Hugging Face folder of a checkpoint; an FSDP checkpoint is merged unless that was done before.

    The merged model goes into ``merged`` beside the folder ``beside``, under the checkpoint's label and identity, and
    the config of its ``run`` with it.

    Raises:
        ConfigError: verl's merger cannot read the checkpoint.
    """
    if checkpoint.shards is None:
        return checkpoint.model
    target = beside.parent / "merged" / f"{checkpoint.label}-{checkpoint.identity}"
    if target.is_dir():
        return str(target)
    print(f"merging {checkpoint.shards} into {target}", flush=True)
    with filled(target) as partial_target:
        write_model(checkpoint, partial_target)
        if run is not None:
            # Whoever is given the merged folder asks the model as the run did.
            shutil.copyfile(run.config, partial_target / run.config.name)
    return str(target)


@contextmanager
def filled(target: Path) -> Iterator[Path]:
    """Make a folder that becomes ``target`` at the end of the block; an exception leaves nothing.

    ``target`` is not there yet, or an empty folder.
    """
    partial_target = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial_target, ignore_errors=True)
    partial_target.mkdir(parents=True)
    try:
        yield partial_target
        # A rename is atomic: a folder of this name is whole.
        partial_target.rename(target)
    finally:
        shutil.rmtree(partial_target, ignore_errors=True)


def write_model(checkpoint: Checkpoint, target: Path, adapter: bool = False) -> None:
    """Convert a checkpoint with shards into ``target``, an empty folder: weights, config and tokenizer.

    verl's merger runs in a process of its own, so that its memory is free again when vLLM starts.  It writes bfloat16,
    which is what verl's weight sync gives to a vLLM of that dtype.  Another process merges a LoRA adapter in, unless
    the ``adapter`` itself is wanted.

    Raises:
        ConfigError: verl's merger cannot read the checkpoint.
    """
    assert checkpoint.shards is not None
    merger = ["verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(checkpoint.shards)]
    commands = [[*merger, "--target_dir", str(target)]]
    if has_adapter(checkpoint.shards) and not adapter:
        commands.append(["recipe.skpo.evaluation.adapters", str(target)])
    for module in commands:
        command = [sys.executable, "-m", *module]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            known = reason.startswith("checkpoint: ")
            raise ConfigError(
                reason if known else f"checkpoint: verl's merger cannot read {checkpoint.shards} ({reason})"
            )
    if adapter:
        keep_adapter(target)
    for weights in target.glob("*.safetensors"):
        # The library makes its files readable by their owner only; a new file gets the umask's mode.
        copy = weights.with_name(f".{weights.name}")
        shutil.copyfile(weights, copy)
        copy.replace(weights)
