"""The folder of a run: its owner, links out of it, and the lock that lets one command at a time use it."""

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from data_prep.untrusted import parse_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.output.files import write_atomic

LOCK = ".lock"
"""File that a command locks for as long as it lives; it stays in the folder, unlocked."""

HELD = ".lock.held"
"""File that stands for the lock on file systems that have none."""

LINKS = ("checkpoints", "trees", "tensorboard", "logs")
"""Folders in a run folder into which a run writes and in which it removes files."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """The command that uses a folder.

    Attributes:
        host: its machine's name.
        pid: its process.
        started: when that process began, in seconds since 1970.
    """

    host: str
    pid: int
    started: float

    @classmethod
    def here(cls) -> "Holder":
        """Describe this process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Read what a holder wrote, None if it is not readable (yet)."""
        try:
            given = parse_json(path.read_bytes()[:4096])
            return cls(str(given["host"]), int(given["pid"]), float(given["started"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def is_over(self) -> bool:
        """Return whether the process is known to have ended; False if it ran on another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            # Numbers of processes are used again.
            return abs(psutil.Process(self.pid).create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        """Name process, machine and start."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"the command with process {self.pid} on {self.host}, started {since}"


_descriptors: set[int] = set()
"""Locks of this process.  A forked child would keep them locked after the death of the command."""


def _forget_locks() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _refuse(folder: Path, holder: Holder | None, more: str = "") -> ConfigError:
    who = holder or "another command"
    return ConfigError(f"output_dir: {folder} is in use by {who}; wait for it, end it, or give another folder{more}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other command out of ``folder``, which exists, until the block ends or this process does.

    The kernel drops the lock with the process, however it ends; started processes do not inherit it.
    """
    path = folder / LOCK
    while True:
        # Not inherited by programs that are started (O_CLOEXEC is Python's default).
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise _refuse(folder, Holder.read(path)) from None
            if error.errno not in _NO_LOCKS:
                raise
            with _held_by_file(folder):
                yield
            return
        # A command that ends may have removed the file with an empty folder after it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
        folder.mkdir(parents=True, exist_ok=True)
    _descriptors.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(asdict(Holder.here())).encode())
        yield
    finally:
        _descriptors.discard(descriptor)
        os.close(descriptor)


@contextmanager
def _held_by_file(folder: Path) -> Iterator[None]:
    path = folder / HELD
    holder = Holder.read(path)
    if path.exists() and not (holder and holder.is_over()):
        raise _refuse(folder, holder, f"; if that command is over, remove {path}")
    write_atomic(path, json.dumps(asdict(Holder.here())))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def check_owner(folder: Path) -> None:
    """Refuse an existing run folder that belongs to somebody else, whose checkpoints would be loaded as code."""
    # Some file systems map users, so the owner of a new file tells who this process is there.
    with tempfile.TemporaryFile(dir=folder) as probe:
        me = os.fstat(probe.fileno()).st_uid
    if (owner := folder.stat().st_uid) != me:
        raise ConfigError(
            f"output_dir: {folder} belongs to user {owner}, this command runs as user {me}, and a run loads what its "
            f"folder holds; give a folder of your own, such as a new one below it"
        )


def check_links(output_dir: Path) -> None:
    """Refuse symbolic links through which the run would write into, or remove files from, another folder."""
    instead = {"checkpoints": "trainer.default_local_dir=", "tensorboard": "TENSORBOARD_DIR="}
    for path in (output_dir / name for name in LINKS):
        if path.is_symlink():
            option = instead.get(path.name)
            way = f"give {option}{path.resolve()}" if option else "make a folder of that name"
            raise ConfigError(
                f"output_dir: {path} is a symbolic link to {path.readlink()}, and no run writes through a link in its "
                f"folder; remove the link and {way}"
            )


@contextmanager
def run_folders(output_dir: Path, checkpoints: Path) -> Iterator[None]:
    """Make, check and lock the folders of a run for the block; what is still empty after it is removed again.

    Args:
        output_dir: of the run.
        checkpoints: its ``trainer.default_local_dir``, which may lie elsewhere.
    """
    folders = [output_dir] if checkpoints.is_relative_to(output_dir) else [output_dir, checkpoints]
    made: list[Path] = []
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        check_links(output_dir)
        for folder in folders:
            made += [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            check_owner(folder)
            stack.enter_context(locked(folder))
        yield


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        # Another command may have come in by now.
        with suppress(OSError):
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
