"""Work on a stranger's template or tokenizer in a forked child, within bounds of time and memory.

A chat template is a program, and jinja's sandbox bounds neither its time nor its memory; a tokenizer's normaliser can
make megabytes of a letter.  The child is a fork: it has everything imported, starts in milliseconds, and ends alone.
"""

import json
import mmap
import multiprocessing
import os
import resource
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_MEMORY = 2 * 2**30
"""Bytes that the child may take beyond what it begins with."""

LOAD_SECONDS, PROMPT_SECONDS = 300.0, 20.0
"""Limits for loading a tokenizer, from the hub too, and for rendering and tokenising one prompt."""

_PAGE = struct.Struct("d")


class Stopped(RuntimeError):
    """The child was stopped; the message says what it exceeded, and ``at`` where it was."""

    def __init__(self, message: str, at: str) -> None:
        super().__init__(message)
        self.at = at


class Place:
    """Where the child is and when it must be elsewhere, in memory that both processes see."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 4096)
        self.move("the start", 60)

    def move(self, at: str, seconds: float) -> None:
        """Note that work at another place begins, for at most these seconds."""
        text = at.encode("utf-8", "replace")[-4000:]
        self._shared[_PAGE.size :] = text.ljust(4096 - _PAGE.size, b"\0")
        self._shared[: _PAGE.size] = _PAGE.pack(time.monotonic() + seconds)

    @property
    def at(self) -> str:
        """The place that was noted last."""
        return self._shared[_PAGE.size :].rstrip(b"\0").decode("utf-8", "replace")

    def left(self) -> float:
        """Return the seconds left at this place."""
        return float(_PAGE.unpack(self._shared[: _PAGE.size])[0]) - time.monotonic()


def in_child(work: Callable[[Place], Any], errors: tuple[type[Exception], ...]) -> Any:
    """Run ``work`` in a forked child and return its result, which JSON must hold.

    Args:
        work: given the place that it must move along.
        errors: exceptions of the work that are raised here with their message; they take nothing else.

    Raises:
        Stopped: the work took more time at one place, or more memory, than it may, or the child died.
        RuntimeError: another exception of the work.
    """
    context, place = multiprocessing.get_context("fork"), Place()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(work, place, sender), daemon=True)
    child.start()
    sender.close()
    try:
        # The time that is left changes when the child moves on.
        while not receiver.poll(min(1.0, max(0.05, place.left()))):
            if place.left() < 0:
                raise Stopped("takes too long", place.at)
        try:
            kind, value = json.loads(receiver.recv_bytes())
        except EOFError:
            child.join()
            raise Stopped(f"ended its process (exit code {child.exitcode})", place.at) from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if kind == "":
        return value
    if kind == "MemoryError":
        raise Stopped(f"takes more than {_MEMORY // 2**30} GiB of memory", place.at)
    for error in errors:
        if error.__name__ == kind:
            raise error(value)
    raise RuntimeError(f"{kind}: {value}")


def _run(work: Callable[[Place], Any], place: Place, sender: Connection) -> None:
    # What libraries print while they fail is not for the user, who gets one sentence.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * mmap.PAGESIZE + _MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        answer = json.dumps(["", work(place)])
    except Exception as error:  # a process border
        answer = json.dumps([type(error).__name__, str(error)])
    sender.send_bytes(answer.encode())
