"""Find and remove the POSIX shared-memory segments that a failed run leaves in /dev/shm.

Two kinds are left behind when processes die before they unlink them:
- `verl_weights_<uuid>`, as large as a weight bucket, made by the actor worker for each weight sync
  (BucketedWeightSender._init_buffer, verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py:193);
- `psm_<hex>`, Python's own name, made by vLLM's message queue (vllm/distributed/device_communicators/
  shm_broadcast.py:321).

Neither name tells whose it is. So a segment counts as left over only if it has such a name, was not there
when the run started, belongs to this user, and no live process has it open or mapped. Segments of other runs,
live ones included, stay. (Processes of another container that shares /dev/shm cannot be seen; do not use this
there.)

    before = segments()
    ...                                   # the run
    remove_segments(leftover_segments(before))
"""

import fnmatch
import os
import stat
from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PATTERNS = ("psm_*", "verl_weights_*")


def segments(directory: Path = SHARED_MEMORY) -> set[str]:
    """Names of all segments of the two kinds, whoever owns them: the snapshot to take before a run."""
    if not directory.is_dir():
        return set()
    return {name for name in os.listdir(directory) if _has_our_kind_of_name(name)}


def leftover_segments(before: set[str], directory: Path = SHARED_MEMORY) -> list[Path]:
    """Segments of this user that were made since the snapshot `before` and that no live process uses."""
    return _unused(directory / name for name in sorted(segments(directory) - before))


def remove_segments(leftover: Iterable[Path]) -> list[Path]:
    """Unlink what `leftover_segments` found, asking again whether it is unused; return what was removed."""
    removed = []
    for path in _unused(leftover):
        try:
            path.unlink()
        except FileNotFoundError:  # Python's resource tracker was faster
            continue
        removed.append(path)
    return removed


def _unused(candidates: Iterable[Path]) -> list[Path]:
    mine = [path for path in candidates if _has_our_kind_of_name(path.name) and _is_private_file_of_this_user(path)]
    in_use = _files_in_use() if mine else set()
    if in_use is None:
        return []
    return [path for path in mine if os.path.realpath(path) not in in_use]


def _has_our_kind_of_name(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def _is_private_file_of_this_user(path: Path) -> bool:
    """Python gives segments mode 0600: nobody but this user and root can be using them."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _files_in_use() -> set[str] | None:
    """All files that live processes have open or mapped; None if a process of this user will not tell.

    Process 1 may keep silent: the supervisor of a container often does, even to root, and trains nothing.
    """
    files: set[str] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            files.update(_mapped_files(process))
            files.update(_open_files(process))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
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
