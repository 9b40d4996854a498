"""This side of `math_worker`: one worker per process, started when first needed, asked by any thread.

The kernel stops the worker after `SECONDS` of wall-clock time per comparison or at `MEMORY` bytes; should even that
fail, it is killed after `GRACE` more and started again. Threads wait for each other: the bound holds from the
moment it is this comparison's turn. A stopped pair is remembered and not tried again. A worker that cannot be started
is a fault of the installation and raises; a comparison never does.
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
"""Of address space; a worker that has just started takes 65 MiB."""
START_SECONDS = 60.0
WORKER = Path(__file__).with_name("math_worker.py")
MOST_STOPPED = 4096
"""Stopped pairs that are remembered; the oldest is forgotten first."""
KEPT_VARIABLES = ("PATH", "LANG", "LANGUAGE", "LD_LIBRARY_PATH")
"""What the worker gets of the environment, and the names that start with LC_; keys and tokens stay here."""

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What happened to the comparisons of this process that ended without a verdict of their own.

    stopped: comparisons that ran out of time or memory, those remembered from before included.
    failed: comparisons that ended in an exception.
    refused: comparisons in which the worker's guard refused something, which sympy may have taken for "not equal".
    """

    stopped: int = 0
    failed: int = 0
    refused: int = 0


class Judge:
    """A worker process and the lock around the conversation with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._number = 0
        self._stopped: OrderedDict[frozenset[str], None] = OrderedDict()
        self.counts = Counts()

    def equal(self, answer: str, truth: str) -> bool | None:
        """Whether the two tidy answers are equal; None if the comparison had to be stopped, now or before."""
        # What is read and computed is the same with the two exchanged.
        pair = frozenset((answer, truth))
        with self._lock:
            # Asked inside the lock: all threads that wait with the same pair find what the first one learned.
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
                env=_environment(),
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
                pass  # it has gone already
            self._process.wait()
        self._connection = self._process = None


def _environment() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name in KEPT_VARIABLES or name.startswith("LC_")}


def _import_path() -> list[str]:
    """The folder of this package, then this process's own, so that the worker finds the same packages."""
    return [str(Path(__file__).parents[1]), *(entry for entry in sys.path if entry)]


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


def counts() -> Counts:
    """The counts of this process."""
    return _judge.counts


def equal(answer: str, truth: str) -> bool:
    """Whether the two tidy answers are equal; False if that could not be found out, which is counted. Never raises."""
    return bool(_equal(answer, truth))


# Siblings often give the same answer.
@lru_cache(maxsize=4096)
def _equal(answer: str, truth: str) -> bool | None:
    return _judge.equal(answer, truth)
