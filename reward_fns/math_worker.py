"""The process that compares mathematical answers (`math_compare`); `reward_fns.judge` runs it as a script.

sympy can run forever and take all memory on a dozen characters, and neither a thread nor an exception can stop it. So a
process that the kernel can stop does the comparison: this script imports sympy once and forks. The fork answers
requests under a timer (`setitimer`; its SIGALRM is not caught) and a memory limit (RLIMIT_AS). When it dies, this
process reports that and forks again within milliseconds. Both exit when the other end of the socket is closed.

No text is ever run as code: `read_number` replaces sympy's `parse_expr`, which would `eval` every number of a response,
and an audit hook makes Python refuse to compile text. The reply reports what the hook refused.

Usage: math_worker.py <socket> <seconds> <bytes> <import path...>.
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
PR_SET_NO_NEW_PRIVS = 38
CURRENT = struct.Struct("q")
"""Number of the request in progress, in memory shared by fork and parent; 0 for none."""
NEXT_FORK = 3
"""Exit code of a fork to be replaced: after an error, or after `REQUESTS_PER_FORK`."""
REQUESTS_PER_FORK = 2000
PLAIN_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])[0-9]{0,400}(?:\.[0-9]{0,400})?(?:[eE][+-]?[0-9]{1,3})?")
FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "shutil."),
    *("os.chmod", "os.chown", "os.setxattr", "os.utime", "os.putenv"),
    *("os.kill", "signal.pthread_kill", "socket.", "ctypes."),
)
"""Prefixes of audit events."""

WARM_UP = (
    ("x^{2}+2x+1", "(x+1)^{2}", True),
    ("\\frac{x+y}{xyz}", "\\frac{1}{yz}+\\frac{1}{xz}", True),
    ("\\frac{\\sqrt{3}}{2}", "\\frac{3}{2\\sqrt{3}}", True),
    ("\\tan^{2}(y)+1", "\\sec^{2}(y)", True),
    ("\\binom{n}{2}+n!-\\lfloor n \\rfloor", "\\frac{n(n-1)}{2}+n!-\\lfloor n \\rfloor", True),
    ("\\{1,2\\}", "\\{2,1\\}", True),
    ("(1,2)", "(1,3)", False),
    ("[1,2)\\cup(3,\\infty)", "(3,\\infty)\\cup[1,2)", True),
    ("\\mathbb{R}\\setminus\\{1,\\sqrt{2}\\}", "(-\\infty,1)\\cup(1,\\sqrt{2})\\cup(\\sqrt{2},\\infty)", True),
    ("x\\le 3", "x\\ge 3", False),
    ("x<\\frac{\\pi}{2}", "(-\\infty,\\frac{\\pi}{2})", True),
    ("y=2x+1", "2x-y+1=0", True),
    ("f(2)=9", "f(2)=8", False),
    ("\\begin{pmatrix}1\\\\x\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", False),
    ("2\\begin{pmatrix}1\\\\x\\end{pmatrix}", "\\begin{bmatrix}2\\\\2x\\end{bmatrix}", True),
    ("\\frac{5}{1+2i}", "1-2 i", True),
    ("3:1", "6:2", True),
)
"""(answer, truth, verdict). They trigger the imports that sympy makes on first use and `forbid_code` would refuse."""

refused: list[str] = []
"""Operations refused by the audit hook since the last reply."""


def read_number(text: str, *_: Any, **__: Any) -> Any:
    """Read plain decimals as sympy's `parse_expr` does, the only text it may receive here.

    Returns:
        An exact Integer or Rational: 0.1 is a tenth.

    Raises:
        SyntaxError: the text is anything else.
    """
    import sympy

    if not PLAIN_NUMBER.fullmatch(text):
        raise SyntaxError("not a plain number")
    return sympy.Rational(text)


def forbid_code() -> None:
    """Make this process unable to compile text, start processes, open connections or write files."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile":
            filename = arguments[1]
            name = os.fsdecode(filename) if isinstance(filename, str | bytes) else ""
            # A module's source has a file; other text is compiled as "<string>" or the like.
            if not os.path.isabs(name):
                refused.append(f"compile of {name or 'text'}")
                raise PermissionError("no text is compiled here")
        elif event == "open":
            mode, flags = arguments[1], arguments[2]
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & writes):
                refused.append(f"writing to {str(arguments[0])[:80]}")
                raise PermissionError("no file is written here")
        elif event.startswith(FORBIDDEN):
            refused.append(event)
            raise PermissionError(f"{event} is not for this process")

    sys.addaudithook(refuse)


def comparison() -> Callable[[str, str], bool]:
    """Return the comparison of two tidy answers, with `read_number` replacing sympy's own parser of numbers."""
    logging.disable()
    from sympy.parsing import sympy_parser

    sympy_parser.parse_expr = read_number
    from reward_fns.math_compare import equal

    return equal


def warm_up(equal: Callable[[str, str], bool]) -> str:
    """Run the comparisons of `WARM_UP`; return an error message if a verdict differs from the known one, else ""."""
    for answer, truth, verdict in WARM_UP:
        if equal(answer, truth) != verdict:
            return (
                f"the judge finds {answer!r} and {truth!r} {'different' if verdict else 'equal'}: its sympy or "
                "latex2sympy2_extended is not the one it was written for; install the pinned versions"
            )
    return ""


def serve(connection: Connection, current: mmap.mmap, equal: Callable[[str, str], bool], seconds: float) -> int:
    """Answer requests; return 0 if the other end has closed, else NEXT_FORK."""
    for _ in range(REQUESTS_PER_FORK):
        try:
            number, answer, truth = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return 0
        current[:] = CURRENT.pack(number)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        trouble = ""
        try:
            verdict = equal(answer, truth)
        except Exception as error:  # sympy may raise anything on a model's text; the client counts and logs it
            verdict, trouble = False, f"failed with {type(error).__name__}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        refusals = ", ".join(dict.fromkeys(refused))[:400]
        refused.clear()
        try:
            connection.send_bytes(json.dumps([number, verdict, trouble, refusals]).encode())
        except OSError:
            return 0
        current[:] = CURRENT.pack(0)
        if trouble:
            break
    return NEXT_FORK


def main(socket: int, seconds: float, memory: int) -> int:
    """Fork a server, wait for it to exit, fork the next; return when the other end has closed."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Signal dispositions and masks are inherited: the parent may block or ignore SIGALRM.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    connection = Connection(socket)
    try:
        equal = comparison()
        fault = warm_up(equal)
    except Exception as error:
        fault = f"the judge of mathematical answers cannot start: {type(error).__name__}: {error}"
    if fault:
        connection.send_bytes(fault.encode())
        return 1
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

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
                connection.send_bytes(json.dumps([number, None, "", ""]).encode())
            except OSError:
                return 0


if __name__ == "__main__":
    sys.path[:] = dict.fromkeys(sys.argv[4:] + sys.path)
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
