"""Client of `code_worker`: runs a program on its tests and compares what comes out.

What is expected never enters the sandbox in which the program runs, so the program cannot fake a verdict. Threads
share one fork server per process; as many programs run at once as this process has cores, and the other threads wait.
A program stops at its first test that fails. A server that cannot be started raises: no program runs without the
requested sandbox.
"""

import atexit
import json
import math
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reward_fns.code_program import PASSED, WRONG
from reward_fns.code_tests import CodeTests, same_output, same_value
from reward_fns.code_worker import receive, send
from reward_fns.judge import kept_environment

WORKER = Path(__file__).with_name("code_worker.py")
START_SECONDS = 60.0
GRACE_SECONDS = 10.0
"""Seconds beyond its limit after which the guard of a program counts as stuck."""
WALL, ALL_TESTS = 2, 10
"""Wall-clock seconds of a test, and processor seconds of all tests of a program, as multiples of `seconds`."""
LARGEST_OUTPUT, LARGEST_FILES, MOST_PROCESSES = 8 * 2**20, 16 * 2**20, 32

Verdict = Literal["passed", "wrong answer", "time-out", "error", "no code"]
VERDICTS: tuple[Verdict, ...] = ("passed", "wrong answer", "time-out", "error", "no code")
SANDBOXES = ("namespaces", "rlimits")


class SandboxError(RuntimeError):
    """Programs cannot be run as requested; the message says why and what to do."""


@dataclass(frozen=True)
class RunOptions:
    """How programs are run.

    Attributes:
        sandbox: "namespaces" (own user, files, processes and network) or "rlimits" (limits alone: a program has the
            rights of this user).
        seconds: processor time of one test.
        memory_mb: MiB of one program, beyond those of Python itself.
    """

    sandbox: str = "namespaces"
    seconds: float = 6.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        """Refuse other values.

        Raises:
            ValueError: naming option and value; the configuration is wrong.
        """
        where = "reward.custom_reward_function.reward_kwargs.code_"
        if self.sandbox not in SANDBOXES:
            raise ValueError(f"{where}sandbox: {self.sandbox!r} is unknown; give one of {', '.join(SANDBOXES)}")
        for name, least, most in (("seconds", 0.1, 600), ("memory_mb", 64, 1_048_576)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ValueError(f"{where}{name}: is {value!r}; give a number from {least} to {most}")


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        how: "exited", or the limit: "time", "memory", "output".
        code: exit code of the program, negative for a signal.
        cpu: seconds of processor time.
        output: what it wrote.
    """

    how: str
    code: int
    cpu: float
    output: bytes

    @property
    def failure(self) -> Verdict | None:
        """The verdict of a run that did not end by itself and well."""
        if self.how == "time":
            return "time-out"
        return None if self.how == "exited" and self.code == 0 else "error"


class Server:
    """A fork server and the socket to it.

    Raises:
        SandboxError: it cannot be started.
    """

    def __init__(self, sandbox: str) -> None:
        packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                # -S: site would run the .pth files of all packages.
                [sys.executable, "-P", "-S", WORKER, str(theirs.fileno()), sandbox, WORKER.parents[1], *packages],
                # Sets have the same order in every run.
                env=kept_environment() | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.control = ours
        ours.settimeout(START_SECONDS)
        try:
            said = ours.recv(4096).decode()
        except OSError:
            said = ""
        if said != "ready":
            self.close()
            raise SandboxError(
                f"programs cannot be run in the sandbox '{sandbox}' here ({said or 'its server does not start'}); "
                "allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
                "kernel.apparmor_restrict_unprivileged_userns; in docker --security-opt seccomp=unconfined "
                "--security-opt systempaths=unconfined), or set reward.custom_reward_function.reward_kwargs."
                "code_sandbox=rlimits, with which programs have your rights"
            )

    def open(self, message: bytes, link: socket.socket | None = None) -> socket.socket:
        """Have a guard forked and return the connection to it; `link` goes to its program."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno()] + ([link.fileno()] if link is not None else [])
            socket.send_fds(self.control, [message], descriptors)
        return ours

    def close(self) -> None:
        """End the server and all that runs in it."""
        self.control.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has already ended
        self.process.wait()


class CodeJudge:
    """The server of each kind of sandbox, started when it is first needed, and the slots that threads wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: dict[str, Server] = {}
        self.slots = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))

    def server(self, sandbox: str) -> Server:
        """Return the running server.

        Raises:
            SandboxError: it cannot be started.
        """
        with self._lock:
            server = self._servers.get(sandbox)
            if server is not None and server.process.poll() is not None:
                server.close()
                server = None
            if server is None:
                server = self._servers[sandbox] = Server(sandbox)
            return server

    def close(self) -> None:
        """End all servers."""
        with self._lock:
            for server in self._servers.values():
                server.close()
            self._servers.clear()

    def verdict(self, program: str, tests: CodeTests, options: RunOptions) -> Verdict:
        """Run a program on its tests until the first that fails.

        Raises:
            SandboxError: it cannot be run.
        """
        # The socket sends UTF-8.
        program = program.encode("utf-8", "replace").decode()
        with self.slots:
            for attempt in range(2):  # a server that died, for example killed from outside, is replaced once
                server = self.server(options.sandbox)
                try:
                    judge = {"stdin": self._printed, "call": self._called, "assert": self._asserted}[tests.kind]
                    return judge(server, program, tests, options)
                except (EOFError, OSError) as error:
                    with self._lock:
                        if self._servers.get(options.sandbox) is server:
                            server.close()
                            del self._servers[options.sandbox]
                    if isinstance(error, TimeoutError):
                        return "time-out"
                    if attempt:
                        raise SandboxError(f"the sandbox ended twice while a program ran ({error})") from error
        raise AssertionError("unreachable")

    def _printed(self, server: Server, program: str, tests: CodeTests, options: RunOptions) -> Verdict:
        """Run the program again for every input."""
        cpu = 0.0
        for given, expected in tests.tests:
            ended = _run(server, {"role": "stdin", "program": program, "stdin": given}, options)
            cpu += ended.cpu
            if ended.failure is not None:
                return ended.failure
            if not same_output(ended.output.decode("utf-8", "replace"), expected, tests.tolerance):
                return "wrong answer"
            if cpu > ALL_TESTS * options.seconds:
                return "time-out"
        return "passed"

    def _called(self, server: Server, program: str, tests: CodeTests, options: RunOptions) -> Verdict:
        """Run the program once and call its function with all arguments in turn."""
        calls = [given for given, *_ in tests.tests]
        request = {"role": "call", "program": program, "entry": tests.names[0], "calls": calls}
        ended = _run(server, request, options, ALL_TESTS)
        lines = ended.output.decode("utf-8", "replace").split("\n")[:-1]
        # A wrong result before the end of the run is the first test that failed.
        for line, (_, *expected) in zip(lines, tests.tests, strict=False):
            try:
                value = json.loads(line)
                if not any(same_value(value, one, tests.tolerance) for one in expected):
                    return "wrong answer"
            except (ValueError, RecursionError):
                return "error"
        return ended.failure or ("passed" if len(lines) == len(calls) else "error")

    def _asserted(self, server: Server, program: str, tests: CodeTests, options: RunOptions) -> Verdict:
        """Run the program and its tests in two sandboxes that a socket links."""
        preload = b"numpy" if "numpy" in tests.tests else b"run"
        one, other = socket.socketpair()
        with one, other, server.open(preload, one) as serving, server.open(preload, other) as asserting:
            one.close()
            other.close()
            _ask(serving, {"role": "serve", "setup": tests.setup, "program": program}, options)
            record = {"role": "assert", "setup": tests.setup, "tests": tests.tests, "names": list(tests.names)}
            # Longer, so that it is the program that runs out of time.
            _ask(asserting, record, options, more_seconds=1)
            asserted = _answer(asserting)
            if asserted.how == "exited" and asserted.output in (PASSED, WRONG):
                return "passed" if asserted.output == PASSED else "wrong answer"
            served = _answer(serving)
        return "time-out" if "time" in (served.how, asserted.how) else "error"


def _run(server: Server, request: Mapping[str, Any], options: RunOptions, tests: int = 1) -> Ended:
    with server.open(b"run") as connection:
        _ask(connection, request, options, tests)
        return _answer(connection)


def _ask(
    connection: socket.socket,
    request: Mapping[str, Any],
    options: RunOptions,
    tests: int = 1,
    more_seconds: float = 0,
) -> None:
    """Send a request; `tests` is how many times the seconds of a test the whole run may take."""
    wall = WALL * options.seconds + more_seconds
    limits = {
        "seconds": options.seconds,
        "wall_seconds": wall,
        "all_seconds": tests * options.seconds,
        "all_wall_seconds": tests * wall,
        "memory": options.memory_mb * 2**20,
        "processes": MOST_PROCESSES,
        "output": LARGEST_OUTPUT,
        "files": LARGEST_FILES,
    }
    connection.settimeout(math.ceil(tests * wall + GRACE_SECONDS))
    send(connection, json.dumps({**request, "limits": limits}).encode())


def _answer(connection: socket.socket) -> Ended:
    said = json.loads(receive(connection))
    output = receive(connection)
    if said["end"] == "fault":
        raise SandboxError(f"the sandbox of a program cannot be made ({said['fault']})")
    return Ended(said["end"], said["code"], said["cpu"], output)


_judge = CodeJudge()


def _forget_servers() -> None:
    """Drop the servers in a fork of this process: they belong to the parent."""
    global _judge
    _judge = CodeJudge()


os.register_at_fork(after_in_child=_forget_servers)
atexit.register(lambda: _judge.close())


def ready(options: RunOptions) -> None:
    """Start the sandbox.

    Raises:
        SandboxError: it cannot be started here.
    """
    _judge.server(options.sandbox)


def close() -> None:
    """End the servers of this process; the next program starts another."""
    _judge.close()


def verdict(program: str, tests: CodeTests, options: RunOptions) -> Verdict:
    """Return the verdict on a program; see `CodeJudge.verdict`."""
    return _judge.verdict(program, tests, options)
