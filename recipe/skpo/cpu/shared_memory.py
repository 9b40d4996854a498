"""Find and remove POSIX shared-memory segments that a failed run left in /dev/shm.

Two kinds remain when processes die before they unlink them:
- `verl_weights_<uuid>`, as large as a weight bucket, made by the actor worker for each weight sync
  (BucketedWeightSender._init_buffer, verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py:193);
- `psm_<hex>`, Python's own name, made by vLLM's message queue (vllm/distributed/device_communicators/
  shm_broadcast.py:321).

Neither name says which run made it. So a segment is a leftover only if it has such a name, did not exist when the run
started, belongs to this user, and no live process has it open or mapped. Processes of another container that shares
/dev/shm cannot be seen: do not use this there.
"""

import fnmatch
import os
import stat
from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PATTERNS = ("psm_*", "verl_weights_*")


def segments(directory: Path = SHARED_MEMORY) -> set[str]:
    """Return the names of all segments of both kinds, of any owner: the snapshot to take before a run."""
    if not directory.is_dir():
        return set()
    return set(filter(_is_named, os.listdir(directory)))


def leftover_segments(before: set[str], directory: Path = SHARED_MEMORY) -> list[Path]:
    """Return segments of this user, made since the snapshot `before`, that no live process uses."""
    return _unused(directory / name for name in sorted(segments(directory) - before))


def remove_segments(leftover: Iterable[Path]) -> list[Path]:
    """Unlink leftovers that are still unused; return the removed ones."""
    removed = []
    for path in _unused(leftover):
        try:
            path.unlink()
        except FileNotFoundError:  # Python's resource tracker was faster
            continue
        removed.append(path)
    return removed


def _unused(candidates: Iterable[Path]) -> list[Path]:
    mine = [path for path in candidates if _is_named(path.name) and _is_private_file_of_this_user(path)]
    in_use = _files_in_use() if mine else set()
    if in_use is None:
        return []
    return [path for path in mine if os.path.realpath(path) not in in_use]


def _is_named(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def _is_private_file_of_this_user(path: Path) -> bool:
    """Check for mode 0600, Python's mode for segments: only this user and root can use the file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _files_in_use() -> set[str] | None:
    """Return all files that live processes have open or mapped; None if a process of this user cannot be read.

    Process 1 may be unreadable: the supervisor of a container often is, even to root, and does not train.
    """
    files: set[str] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            files.update(_mapped_files(process))
            files.update(_open_files(process))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except PermissionError:
            if process.name != "1" and _belongs_to_this_user(process):
                return None
    return files


def _mapped_files(process: Path) -> set[str]:
    lines = (process / "maps").read_text(errors="surrogateescape", encoding="utf-8").splitlines()
    fields = [line.split(maxsplit=5) for line in lines]
    return {field[5] for field in fields if len(field) == 6 and field[5].startswith("/")}


def _open_files(process: Path) -> set[str]:
    files = set()
    for descriptor in (process / "fd").iterdir():
        try:
            files.add(os.readlink(descriptor))
        except FileNotFoundError:  # closed meanwhile
            continue
    return files


def _belongs_to_this_user(process: Path) -> bool:
    try:
        return process.stat().st_uid == os.getuid()
    except (FileNotFoundError, ProcessLookupError):
        return False
