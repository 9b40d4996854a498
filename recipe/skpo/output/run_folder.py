"""The checkpoints in a run's folder, by verl's names."""

import re
from pathlib import Path

from recipe.skpo.errors import ConfigError

MARKER = "latest_checkpointed_iteration.txt"
"""verl's file with the number of the checkpoint that counts."""


def stored_checkpoints(folder: Path) -> dict[int, Path]:
    """Map step to folder of all checkpoints, whole or not, in the order of steps."""
    found = {}
    for path in folder.glob("global_step_*"):
        if (match := re.fullmatch(r"global_step_(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


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
