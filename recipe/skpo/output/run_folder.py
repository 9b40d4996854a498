"""The checkpoints of a run, by verl's names."""

import re
from pathlib import Path

from data_prep.untrusted import UntrustedError, read_yaml
from recipe.skpo.errors import ConfigError

MARKER = "latest_checkpointed_iteration.txt"
"""verl's file with the number of the checkpoint that counts."""

FOLDER_NOTE = "SKPO_FOLDER_NOTE"
"""Variable of the environment with a file into which a training writes its folder, once nothing is refused any more."""


def by_step(folder: Path, pattern: str) -> dict[int, Path]:
    """Map step to path, in the order of steps, of what is in a folder; the first group of the names' pattern."""
    steps = {int(match[1]): path for path in folder.glob("*") if (match := re.fullmatch(pattern, path.name))}
    return dict(sorted(steps.items()))


def log_file(output_dir: str | Path) -> Path:
    """Return where all that a run's processes print is kept."""
    return Path(output_dir) / "logs" / "run.log"


def checkpoints_of(run: Path) -> Path:
    """Return where the checkpoints of a run are: in its folder, unless ``trainer.default_local_dir`` is elsewhere."""
    try:
        config = read_yaml(run / "config.yaml")
        output_dir, place = Path(config["output_dir"]), Path(config["trainer"]["default_local_dir"])
    except (UntrustedError, OSError, KeyError, TypeError):
        return run / "checkpoints"
    if place.is_relative_to(output_dir):
        return run / place.relative_to(output_dir)  # the run may have been moved since
    # A model that was merged from a checkpoint has a copy of the config, and is not the run.
    return run / "checkpoints" if (run / "config.json").is_file() else place


def stored_checkpoints(folder: Path) -> dict[int, Path]:
    """Map step to folder of all checkpoints, whole or not, in the order of steps."""
    return {step: path for step, path in by_step(folder, r"global_step_(\d+)").items() if path.is_dir()}


def marked_step(folder: Path) -> int | None:
    """Return the step that the marker names, None without a marker.

    Raises:
        ConfigError: the marker holds no step.
    """
    marker = folder / MARKER
    if not marker.is_file():
        return None
    text = marker.read_text(errors="replace", encoding="utf-8").strip()
    if not text.isdecimal():
        raise ConfigError(
            f"{marker}: holds {text[:40]!r} and no step; write the number of the last whole global_step_<N> into it"
        )
    return int(text)
