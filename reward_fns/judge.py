"""This side of `math_worker`: one worker per process, started when first needed, asked by any thread.

The kernel stops the worker after `SECONDS` of wall-clock time per comparison or at `MEMORY` bytes; should even that
fail, it is killed after `GRACE` more and started anew. Threads wait for each other: the bound holds from the
moment it is this comparison's turn. A worker that cannot be started is a fault of the installation and raises;
nothing that is compared ever does.
"""

import atexit
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS = 1.2
GRACE = 5.0
MEMORY = 512 * 2**20
"""Of address space; a worker that has just started takes 65 MiB."""
START_SECONDS = 60.0
WORKER = Path(__file__).with_name("math_worker.py")

logger = logging.getLogger(__name__)


class Unjudged(Exception):
    """The comparison was stopped; never leaves this module, and is not cached."""


class Judge:
    """A worker process and the lock around the conversation with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._number = 0

    def equal(self, answer: str, truth: str) -> bool | None:
        """Whether the two LaTeX answers are equal; None if the comparison had to be stopped."""
        with self._lock:
            try:
                return self._ask(answer, truth)
            except (EOFError, OSError):
                # The worker had gone, killed from outside for instance: a new one gets the question, once.
                self._stop()
            try:
                return self._ask(answer, truth)
            except (EOFError, OSError):
                self._stop()
                return None

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """Of the worker that runs, None if there is none."""
        return self._process.pid if self._process else None

    def _ask(self, answer: str, truth: str) -> bool | None:
        connection = self._connection or self._start()
        self._number += 1
        connection.send_bytes(json.dumps([self._number, answer, truth]).encode())
        deadline = time.monotonic() + SECONDS + GRACE
        while connection.poll(max(0.0, deadline - time.monotonic())):
            number, verdict = json.loads(connection.recv_bytes())
            if number == self._number:
                return verdict
        self._stop()
        return None

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # -P: this folder's modules must not hide anyone else's.
                [sys.executable, "-P", str(WORKER), str(theirs.fileno()), str(SECONDS), str(MEMORY)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = ours
        try:
            ready = ours.poll(START_SECONDS) and ours.recv_bytes() == b"ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            self._stop()
            raise RuntimeError(f"{WORKER.name} does not start; `python -c 'import math_verify'` may say why")
        return ours

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has gone already
            self._process.wait()
        self._connection = self._process = None


_judge = Judge()


def _forget_worker() -> None:
    """In a fork of this process: the worker, and perhaps the lock, belong to the other one."""
    global _judge
    _judge = Judge()


os.register_at_fork(after_in_child=_forget_worker)
atexit.register(lambda: _judge.close())


def worker_pid() -> int | None:
    """The process id of this process's worker, None before the first comparison."""
    return _judge.pid


def close() -> None:
    """End this process's worker; the next comparison starts another."""
    _judge.close()


def equal(answer: str, truth: str) -> bool:
    """Whether math-verify finds the two LaTeX answers equal; False if it had to be stopped. Never raises."""
    try:
        return _equal(answer, truth)
    except Unjudged:
        logger.warning("judging %.80r against %.40r was stopped: it counts as wrong", answer, truth)
        return False


# Siblings often give the same answer.
@lru_cache(maxsize=4096)
def _equal(answer: str, truth: str) -> bool:
    verdict = _judge.equal(answer, truth)
    if verdict is None:
        raise Unjudged
    return verdict
