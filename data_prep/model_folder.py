"""A model's folder in the cache: made once, whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


class ModelError(RuntimeError):
    """A model cannot be made or is not as it should be; the message is one line with the fix."""


def make_once(out: Path, fill: Callable[[Path], None], disk_bytes: int) -> Path:
    """Make the model in `out` and return `out`; a finished one is reused at once.

    Concurrent processes wait for one another.

    Args:
        out: the folder, which appears by a rename, so that an existing one is good.
        fill: writes into the empty folder that it is given.
        disk_bytes: free space needed.

    Raises:
        ModelError: the disk is full, or `out` is something else.
    """
    if _finished(out):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f".{out.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _finished(out):  # made by another process while this one waited
            return out
        partial = out.parent / f".{out.name}.partial"
        # Whoever holds the lock is alone: a partial folder was left by a killed process.
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(out.parent).free
        if free < disk_bytes:
            raise ModelError(
                f"{out}: {disk_bytes / 1e9:.1f} GB of disk needed, {free / 1e9:.1f} GB free; free some or change --out"
            )
        partial.mkdir()
        try:
            fill(partial)
            for file in partial.iterdir():
                # safetensors writes 0600 whatever the umask says, but a model cache may be shared
                shutil.copymode(partial / "config.json", file)
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _finished(out: Path) -> bool:
    """Tell whether `out` is a finished model; raises ModelError if it is something else."""
    if (out / "config.json").is_file():
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: exists but is not a checkpoint (no config.json in it); move it away or change --out")
    return False
