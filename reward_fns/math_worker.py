r"""The process that compares mathematical answers with math-verify; run as a script by `reward_fns.judge`.

sympy can compute for ever and take all memory on a dozen characters, and neither a thread nor an exception can stop
it. So the comparison is done by a process that the kernel stops: this one imports math-verify once and forks; the fork
answers requests under a timer (`setitimer`, whose SIGALRM is not caught) and a memory limit (RLIMIT_AS). When it dies,
this process says so and forks again, which takes milliseconds. Both end when the other side of the socket is closed.

No text is ever run as code here. sympy turns a string into a number with `eval` (`Number("12")` -> `sympify` ->
`parse_expr`), and math-verify hands it every number of a response. So `parse_expr` is replaced by `read_number`, which
knows plain decimals only, and an audit hook makes Python refuse to compile any text, whoever asks.

Usage: math_worker.py <socket> <seconds> <bytes>. A request is JSON [number, answer, truth], a reply [number, verdict]
with null for "died over it".
"""

import ctypes
import json
import logging
import mmap
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1
CURRENT = struct.Struct("q")
"""The number of the request that a fork is at, in memory that it shares with its parent; 0 for none."""
FORKED_ANEW = 3
"""Exit code of a fork that wants a successor: after trouble, or after `REQUESTS_PER_FORK`."""
REQUESTS_PER_FORK = 2000
PLAIN_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])[0-9]{0,400}(?:\.[0-9]{0,400})?(?:[eE][+-]?[0-9]{1,3})?")
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "subprocess.Popen",
    "socket.",
    "shutil.",
    "ctypes.dlopen",
)
WARM_UP = (
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{\\sqrt{3}}{2}", "\\frac{3}{2\\sqrt{3}}"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("(1, 2)", "(1, 3)"),
    ("[1, 2) \\cup (3, \\infty)", "[1, 2] \\cup (3, \\infty)"),
    ("x \\le 3", "x \\ge 3"),
    ("y = 2x + 1", "2x - y + 1 = 0"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}"),
    ("3 + 4i", "5 e^{i}"),
    ("50\\%", "\\pi"),
)
"""Brings in what sympy imports on first use; a module that builds classes from text could not be imported later."""


def read_number(text: str, *_: Any, transformations: tuple[Any, ...] = (), **__: Any) -> Any:
    """sympy's `parse_expr` for plain decimals, which is all that may be asked of it here; raises SyntaxError for more.

    Returns Integer or Float, or Rational where sympy asks for exact numbers.
    """
    import sympy
    from sympy.parsing.sympy_parser import rationalize

    if not PLAIN_NUMBER.fullmatch(text):
        raise SyntaxError("not a plain number")
    if rationalize in transformations:
        return sympy.Rational(text)
    return sympy.Integer(int(text)) if text.lstrip("+-").isdigit() else sympy.Float(text)


def forbid_code() -> None:
    """From now on this process compiles no text, starts no process, opens no connection and writes no file."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile":
            filename = arguments[1]
            name = os.fsdecode(filename) if isinstance(filename, str | bytes) else ""
            # A module's source has a file; text that arrived from elsewhere is compiled as "<string>" or the like.
            if not os.path.isabs(name):
                raise PermissionError("no text is compiled here")
        elif event == "open":
            mode, flags = arguments[1], arguments[2]
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & writes):
                raise PermissionError("no file is written here")
        elif event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not for this process")

    sys.addaudithook(refuse)


def comparison() -> Callable[[str, str], bool]:
    """math-verify's comparison of two LaTeX answers, without its own timers (they need the main thread's signals)."""
    logging.disable()
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig
    from sympy.parsing import sympy_parser

    sympy_parser.parse_expr = read_number
    # math-verify's units are taken off any end, "3t" becomes "3" and "1 + g" becomes "1 +": `math_answer` does it.
    normalization = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True)
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]

    def equal(answer: str, truth: str) -> bool:
        gold, given = (parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in (truth, answer))
        return bool(verify(gold, given, timeout_seconds=None))

    return equal


def serve(connection: Connection, current: mmap.mmap, equal: Callable[[str, str], bool], seconds: float) -> int:
    """Answer requests; returns an exit code: 0 when the other side has gone, else FORKED_ANEW."""
    for _ in range(REQUESTS_PER_FORK):
        try:
            number, answer, truth = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return 0
        current[:] = CURRENT.pack(number)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = equal(answer, truth)
            trouble = False
        except (Exception, RecursionError, MemoryError):  # whatever sympy meets in a model's text is a wrong answer
            verdict, trouble = False, True
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send_bytes(json.dumps([number, verdict]).encode())
        except OSError:
            return 0
        current[:] = CURRENT.pack(0)
        if trouble:
            break
    return FORKED_ANEW


def main(socket: int, seconds: float, memory: int) -> int:
    """Fork a server, wait for its end, fork the next; ends when the other side has gone."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Dispositions and masks are inherited: the starting process may have blocked or ignored it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    prctl = ctypes.CDLL(None).prctl
    equal = comparison()
    for answer, truth in WARM_UP:
        equal(answer, truth)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    connection = Connection(socket)
    current = mmap.mmap(-1, CURRENT.size)
    connection.send_bytes(b"ready")
    while True:
        current[:] = CURRENT.pack(0)
        pid = os.fork()
        if pid == 0:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            forbid_code()
            os._exit(serve(connection, current, equal, seconds))
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return 0
        (number,) = CURRENT.unpack(current[:])
        if number:
            try:
                connection.send_bytes(json.dumps([number, None]).encode())
            except OSError:
                return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
