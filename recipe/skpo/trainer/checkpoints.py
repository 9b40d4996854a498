"""The checkpoints of a run: which one counts, whether it is whole, which ones are removed.

verl writes ``global_step_N/actor`` and ``data.pt`` and last the marker file with N; ``state`` writes our file before
all of them.  A kill may come between any two of them, or in the middle of one.  So a checkpoint counts only if the
marker names it, the marker is only ever moved to a whole one, and an older checkpoint is removed only while the marker
names a newer one (verl's own removal does not look at the marker and does not know our file).
"""

import re
import shutil
import zipfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.skpo.errors import ConfigError, RunError
from recipe.skpo.output.best import Validations
from recipe.skpo.output.console import say
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.run_folder import MARKER, stored_checkpoints
from recipe.skpo.task.model_files import count_parameters
from recipe.skpo.trainer.fingerprint import FILE_NAME as FINGERPRINT
from recipe.skpo.trainer.state import FILE_NAME

DATA_FILE = "data.pt"
"""verl's file with the position in the training data, the last one before the marker."""

METRICS_FILE = "step_metrics.json"
"""Ours, with the metrics of the step that was saved, as far as they were known."""

ACTOR_FILES = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
"""``checkpoint.load_contents`` to how verl's FSDP engine begins the name of a rank's file."""


def mark(folder: Path, step: int | None) -> None:
    """Make the checkpoint of ``step`` the one that counts, None for no one, as a whole."""
    marker = folder / MARKER
    if step is None:
        marker.unlink(missing_ok=True)
        return
    write_atomic(marker, str(step))


def missing_piece(folder: Path, config: DictConfig) -> str | None:
    """Return the piece of verl's part of a checkpoint that a resume would miss, None if all are there.

    A file that was cut off counts as missing: torch writes zip archives, whose directory comes last.  The actor's files
    are checked where FSDP wrote them.
    """
    if not zipfile.is_zipfile(folder / DATA_FILE):
        return f"{DATA_FILE} is missing or cut off"
    actor = config.actor_rollout_ref.actor
    if actor.strategy not in ("fsdp", "fsdp2"):
        return None if (folder / "actor").is_dir() else "actor/ is missing"
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    for content, start in ACTOR_FILES.items():
        if content not in actor.checkpoint.load_contents:
            continue
        for rank in range(ranks):
            name = f"{start}_world_size_{ranks}_rank_{rank}.pt"
            if zipfile.is_zipfile(folder / "actor" / name):
                continue
            others = {
                match[1]
                for path in (folder / "actor").glob(f"{start}_world_size_*")
                if (match := re.search(r"_world_size_(\d+)_rank_", path.name))
            } - {str(ranks)}
            if others:
                return (
                    f"actor/ was saved by {' or '.join(sorted(others))} rank(s), this run has {ranks} "
                    f"(trainer.nnodes * trainer.n_gpus_per_node)"
                )
            return f"actor/{name} is missing or cut off"
    return None


def newest_whole(folder: Path, config: DictConfig) -> int | None:
    """Return the last step whose checkpoint has every piece, None if there is none."""
    whole = [
        step
        for step, path in stored_checkpoints(folder).items()
        if (path / FILE_NAME).is_file() and missing_piece(path, config) is None
    ]
    return whole[-1] if whole else None


def repair_marker(config: DictConfig) -> int | None:
    """Fill in a marker that a kill left empty; returns its step, None if there was nothing to repair.

    verl opens the marker, which empties it, after everything else of the checkpoint is written.
    """
    folder = Path(config.trainer.default_local_dir)
    marker = folder / MARKER
    # After a power cut it may be as long as it should be, and full of zeros.
    if config.trainer.resume_mode != "auto" or not marker.is_file() or marker.read_bytes().strip(b"\0 \n"):
        return None
    step = newest_whole(folder, config)
    if step is not None:
        mark(folder, step)
    return step


def check_saving(config: DictConfig) -> None:
    """Refuse settings of verl with which a checkpoint could not be resumed from.

    Raises:
        ConfigError: naming the setting and the fix.
    """
    if config.trainer.get("remove_previous_ckpt_in_save"):
        raise ConfigError(
            "trainer.remove_previous_ckpt_in_save: is true; give trainer.max_actor_ckpt_to_keep=1 instead"
        )
    for name in ("save_contents", "load_contents"):
        lacking = [content for content in ACTOR_FILES if content not in config.actor_rollout_ref.actor.checkpoint[name]]
        if lacking:
            raise ConfigError(
                f"actor_rollout_ref.actor.checkpoint.{name}: lacks {', '.join(lacking)}, without which a resumed run "
                f"is another run; add it"
            )
    _check_best(config.trainer)


def _check_best(trainer: DictConfig) -> None:
    metric = trainer.keep_best
    if metric is None:
        if trainer.stop_after_no_gain is not None:
            raise ConfigError(
                f"trainer.stop_after_no_gain: is {trainer.stop_after_no_gain} without a metric that could gain; name "
                f"it by trainer.keep_best"
            )
        return
    if not isinstance(metric, str) or not re.fullmatch(r"-?val-\S+", metric):
        raise ConfigError(
            f"trainer.keep_best: is {metric!r}, must be a metric of validation, such as "
            f"val-core/<data source>/acc/mean@1, with - in front if lower is better"
        )
    if trainer.test_freq <= 0:
        raise ConfigError(
            f"trainer.keep_best: is set, but trainer.test_freq={trainer.test_freq} means no validation during "
            f"training; give trainer.test_freq=<steps>"
        )


# ---------------------------------------------------------------- room on the disk


class SaveError(RunError):
    """A checkpoint that could not be saved; the message names the folder and the bytes that are free and needed."""


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a checkpoint folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def expected_bytes(config: DictConfig) -> int | None:
    """Bytes of the next checkpoint: those of the newest one, else the weights and Adam's two moments of each.

    Returns:
        None where neither a checkpoint nor the headers of safetensors files tell.
    """
    whole = [path for path in stored_checkpoints(Path(config.trainer.default_local_dir)).values() if is_whole(path)]
    if whole:
        return stored_bytes(whole[-1])
    try:
        weights = count_parameters(Path(config.actor_rollout_ref.model.path).glob("*.safetensors"))
    except ConfigError:  # what is wrong with it is said by the model's own check
        return None
    if not weights:
        return None
    dtype = OmegaConf.select(config, "actor_rollout_ref.actor.fsdp_config.model_dtype")
    # Of an adapter the optimizer holds next to nothing.
    tensors = 1 if config.actor_rollout_ref.model.get("lora_rank", 0) else 3
    return weights * tensors * (2 if dtype in ("bf16", "bfloat16", "fp16", "float16") else 4)


def is_whole(folder: Path) -> bool:
    """Whether the last file of a checkpoint was written to its end."""
    return zipfile.is_zipfile(folder / DATA_FILE)


def free_bytes(folder: Path) -> int:
    """Bytes that are free where the folder is, or will be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def check_room(config: DictConfig) -> None:
    """Refuse a run whose first checkpoint has no room on the disk, and say so where only later ones have none.

    Raises:
        ConfigError: naming the folder, how much is free and how much is needed.
    """
    trainer = config.trainer
    folder = Path(trainer.default_local_dir)
    keep = max(2, trainer.max_actor_ckpt_to_keep) if trainer.max_actor_ckpt_to_keep else None
    best = trainer.get("keep_best") is not None
    if keep is not None:
        keep += best
    there = sum(map(is_whole, stored_checkpoints(folder).values()))
    # As many as are kept already: each new one takes the place of an old one.
    if (trainer.save_freq <= 0 and not best) or (keep is not None and there >= keep):
        return
    size, free = expected_bytes(config), free_bytes(folder)
    if size is None:
        return
    room = f"{folder} has {free:,} bytes free, a checkpoint takes about {size:,}"
    if free < size:
        raise ConfigError(
            f"trainer.default_local_dir: {room}; make room, give another output_dir, or save none with "
            f"trainer.save_freq=-1"
        )
    if keep is not None and free < size * (keep - there):
        say(f"note: {room} and {keep} are kept; a save without room will end the run")


def remove_older(folder: Path, newest: int, keep: int | None, validations: Validations | None = None) -> None:
    """Remove checkpoints up to step ``newest`` except the last ``keep`` whole ones and the best; None keeps all.

    What a killed save left, recognised by its missing ``data.pt``, is removed with them.  Steps after ``newest`` are
    left alone: they belong to a history that this run is not on.
    """
    if keep is None:
        return
    past = {step: path for step, path in stored_checkpoints(folder).items() if step <= newest}
    whole = [step for step, path in past.items() if (path / DATA_FILE).is_file()]
    best = validations.best(whole) if validations else None
    for step, path in past.items():
        if step not in whole[-keep:] and step != best:
            remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove what verl and we wrote into a checkpoint folder, and the folder if nothing else is in it."""
    # What a link leads to belongs to somebody else.
    for link in (folder, folder / "actor"):
        if link.is_symlink():
            link.unlink()
    # First what makes it whole: a kill in between leaves something that is recognised as a left-over.
    (folder / DATA_FILE).unlink(missing_ok=True)
    own = (FILE_NAME, METRICS_FILE, FINGERPRINT)
    for path in [*(folder / name for name in own), *(left for name in own for left in folder.glob(f".{name}.*"))]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "actor", ignore_errors=True)
    try:
        folder.rmdir()
    except OSError:
        pass  # somebody keeps files of their own there, or the folder was never made
