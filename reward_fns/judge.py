"""Client of `math_worker`: one worker per process, started at first use, shared by all threads.

The kernel stops the worker after `SECONDS` of wall-clock time per comparison, or at `MEMORY` bytes. If even that fails,
the worker is killed after `GRACE` more seconds and restarted. Threads take turns: the bound holds from the moment a
comparison starts. A stopped pair is remembered and not tried again. A worker that cannot be started is a fault of the
installation and raises; a comparison never raises.
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
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS = 1.2
GRACE = 5.0
MEMORY = 512 * 2**20
"""Address space in bytes; a fresh worker takes 65 MiB."""
START_SECONDS = 60.0
WORKER = Path(__file__).with_name("math_worker.py")
MOST_STOPPED = 4096
"""Stopped pairs to remember; the oldest is dropped first."""
KEPT_VARIABLES = ("PATH", "LANG", "LANGUAGE", "LD_LIBRARY_PATH")
"""Environment variables passed to the worker, besides LC_*; keys and tokens are not passed."""

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """Comparisons of this process that ended without a regular verdict.

    Attributes:
        stopped: comparisons that ran out of time or memory, remembered ones included.
        failed: comparisons that ended in an exception.
        refused: comparisons in which the worker's guard refused an operation; sympy may have read that as "not equal".
    """

    stopped: int = 0
    failed: int = 0
    refused: int = 0


class Judge:
    """A worker process, its connection, and the lock that serialises requests."""

    def __init__(self) -> None:
        """Start without a worker."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._number = 0
        self._stopped: OrderedDict[frozenset[str], None] = OrderedDict()
        self.counts = Counts()

    def equal(self, answer: str, truth: str) -> bool | None:
        """Return whether two tidy answers are equal; None if the comparison was stopped, now or earlier."""
        # The comparison is symmetric.
        pair = frozenset((answer, truth))
        with self._lock:
            # Inside the lock, so that threads waiting with the same pair see the result of the first.
            if pair in self._stopped:
                self.counts.stopped += 1
                return None
            verdict = self._ask_twice(answer, truth)
            if verdict is None:
                self.counts.stopped += 1
                self._stopped[pair] = None
                if len(self._stopped) > MOST_STOPPED:
                    self._stopped.popitem(last=False)
                logger.warning("judging %.80r against %.40r was stopped: it counts as wrong", answer, truth)
            return verdict

    def _ask_twice(self, answer: str, truth: str) -> bool | None:
        for _ in range(2):  # a worker that died, for example killed from outside, is replaced once
            try:
                return self._ask(answer, truth)
            except (EOFError, OSError):
                self._stop()
        return None

    def close(self) -> None:
        """Stop the worker."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, None if there is none."""
        return self._process.pid if self._process else None

    def _ask(self, answer: str, truth: str) -> bool | None:
        connection = self._connection or self._start()
        self._number += 1
        connection.send_bytes(json.dumps([self._number, answer, truth]).encode())
        deadline = time.monotonic() + SECONDS + GRACE
        while connection.poll(max(0.0, deadline - time.monotonic())):
            number, verdict, trouble, refusals = json.loads(connection.recv_bytes())
            if number == self._number:
                self._report(answer, truth, trouble, refusals)
                return verdict
        self._stop()
        return None

    def _report(self, answer: str, truth: str, trouble: str, refusals: str) -> None:
        if trouble:
            self.counts.failed += 1
            logger.warning("judging %.80r against %.40r %s: it counts as wrong", answer, truth, trouble)
        if refusals:
            self.counts.refused += 1
            logger.warning(
                "judging %.80r against %.40r: the guard of %s refused %s, so the verdict may be wrong; report it",
                answer,
                truth,
                WORKER.name,
                refusals,
            )

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # -P: this folder's modules must not hide anyone else's.
                [sys.executable, "-P", str(WORKER), str(theirs.fileno()), str(SECONDS), str(MEMORY), *_import_path()],
                env=kept_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = ours
        try:
            said = ours.recv_bytes().decode() if ours.poll(START_SECONDS) else ""
        except (EOFError, OSError):
            said = ""
        if said != "ready":
            self._stop()
            raise RuntimeError(said or f"{WORKER.name} does not start; `python -c 'import math_verify'` may say why")
        return ours

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has already ended
            self._process.wait()
        self._connection = self._process = None


def kept_environment() -> dict[str, str]:
    """Return the environment of a process that reads answers of a model."""
    return {name: text for name, text in os.environ.items() if name in KEPT_VARIABLES or name.startswith("LC_")}


def _import_path() -> list[str]:
    """Return the folder of this package and this process's path, so that the worker finds the same packages."""
    return [str(Path(__file__).parents[1]), *(entry for entry in sys.path if entry)]


_judge = Judge()


def _forget_worker() -> None:
    """Drop the worker in a fork of this process: worker and lock belong to the parent."""
    global _judge
    _judge = Judge()


os.register_at_fork(after_in_child=_forget_worker)
atexit.register(lambda: _judge.close())


def worker_pid() -> int | None:
    """Return the process id of this process's worker, None before the first comparison."""
    return _judge.pid


def close() -> None:
    """Stop this process's worker; the next comparison starts another."""
    _judge.close()


def counts() -> Counts:
    """Return the counts of this process."""
    return _judge.counts


def equal(answer: str, truth: str) -> bool:
    """Return whether two tidy answers are equal; False, and counted, if that cannot be decided. Never raises."""
    return bool(_equal(answer, truth))


# Siblings often give the same answer.
@lru_cache(maxsize=4096)
def _equal(answer: str, truth: str) -> bool | None:
    return _judge.equal(answer, truth)
