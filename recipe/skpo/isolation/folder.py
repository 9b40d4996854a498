"""One folder per run for its sockets, Ray's session and temporary files, open to its owner alone (0700).

Its name is random, so two runs never share a socket.  Every process of a run holds a shared lock on the file ``lock``
inside, which the kernel releases when the process ends, however it ends.  A folder whose lock is free is abandoned.
"""

import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from recipe.skpo.errors import ConfigError

VARIABLE = "SKPO_RUN_FOLDER"
"""Names the folder to every process of the run."""

SOCKET_LIMIT = 107
"""Characters that a Unix socket's path may have on Linux."""

_SOCKETS = {
    True: "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store",
    False: "/rl-colocate-zmq-ffffffff-replica-9999-rank-99.sock",
}
"""The longest socket below the folder, by whether Ray's session is in it."""

_NAME = re.compile(r"skpo-[a-z0-9_]{8}")
_STRAY_SOCKET = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LOCK = "lock"
_END_S = 10.0
"""Seconds in which the last processes of a run end."""
_YOUNG_S = 60.0
"""Nothing younger is removed: its owner may be about to lock or to listen."""

_locks: dict[Path, int] = {}


class FolderError(ConfigError):
    """There is no folder in which a run's sockets could be; one line that says what to do."""


def make(holds_ray: bool, bases: list[str] | None = None) -> Path:
    """Make and lock the folder of a new run, in the first of ``bases`` that will do.

    Args:
        holds_ray: whether Ray's session, whose sockets have the longest names, will be in it.
        bases: folders to try; TMPDIR and /tmp if None.

    Raises:
        FolderError: every base has too long a path or cannot be written.
    """
    bases = [tempfile.gettempdir(), "/tmp"] if bases is None else bases
    room = SOCKET_LIMIT - len(_SOCKETS[holds_ray]) - len("/skpo-12345678")
    for base in bases:
        if len(base) <= room and os.access(base, os.W_OK | os.X_OK):
            folder = Path(tempfile.mkdtemp(prefix="skpo-", dir=base))
            _lock(folder)
            return folder
    raise FolderError(
        f"TMPDIR: no folder for this run's sockets, since {' and '.join(dict.fromkeys(bases))} cannot be written or "
        f"are longer than {room} characters; set TMPDIR to a short folder that you can write"
    )


def enter() -> Path:
    """Lock the run's folder for this process; on another node than the command's, the first process makes it.

    Raises:
        FolderError: the variable is not set, or the folder is not this user's alone.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        raise FolderError(f"{VARIABLE}: is not set in this process; start the run by recipe.skpo.main")
    folder = Path(name)
    if folder in _locks:
        return folder
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    else:
        sweep([str(folder.parent)])
    if not _is_own(folder, stat.S_ISDIR):
        raise FolderError(f"{folder}: is not a folder that only this user can enter; start the run again")
    _lock(folder)
    return folder


def remove(folder: Path) -> None:
    """Remove a run's folder with all that is in it, and release this process's lock.

    Processes that are about to end may still write there, so it is tried for a few seconds.  The lock goes last: what
    cannot be removed now is found by ``sweep``.
    """
    deadline = time.monotonic() + _END_S
    while True:
        if not _remove_all_but_lock(folder):
            with suppress(OSError):  # something came in the meantime
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()
        if not folder.exists() or time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    if folder in _locks:
        os.close(_locks.pop(folder))


def _remove_all_but_lock(folder: Path) -> bool:
    """Remove everything else; return whether something is left, or came in the meantime."""
    for entry in _entries(str(folder)):
        path = Path(entry)
        if path.name != _LOCK:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return len(_entries(str(folder))) > 1


def socket_address(address: str) -> str:
    """Move one of verl's ZeroMQ addresses, such as ``ipc:///tmp/<name>.sock``, into the run's folder."""
    return f"ipc://{enter() / Path(address.removeprefix('ipc://')).name}"


def sweep(bases: list[str]) -> list[Path]:
    """Remove what killed runs of this user left in ``bases``: folders without a process, sockets without a listener."""
    removed = []
    for entry in [entry for base in dict.fromkeys(bases) for entry in _entries(base)]:
        path = Path(entry)
        try:
            if time.time() - path.lstat().st_mtime < _YOUNG_S:
                continue
            if _NAME.fullmatch(path.name) and _is_own(path, stat.S_ISDIR) and _is_abandoned(path):
                shutil.rmtree(path)
            elif _STRAY_SOCKET.fullmatch(path.name) and _is_own(path, stat.S_ISSOCK) and not _listens(path):
                path.unlink()
            else:
                continue
        except OSError:  # it went meanwhile, or a process still writes there
            continue
        removed.append(path)
    return removed


def _entries(base: str) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(base)]
    except OSError:
        return []


def _lock(folder: Path) -> None:
    """Hold a shared lock until this process ends; processes that it forks hold it too."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _locks[folder] = descriptor


def _is_abandoned(folder: Path) -> bool:
    """Return whether no process holds the folder's lock; a folder without one was not made here."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Return whether this user has made the path, which is of this kind; nobody else may enter a folder."""
    status = path.lstat()
    open_to_others = stat.S_ISDIR(status.st_mode) and status.st_mode & 0o077
    return is_kind(status.st_mode) and status.st_uid == os.getuid() and not open_to_others


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
