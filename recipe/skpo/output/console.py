"""The console of a command: whatever its encoding, and short.

A run's processes print over a thousand lines.  ``Screen`` sends all of them to a file, and to the console the lines
that this recipe means for people: those of ``say`` and its warnings.  They carry ``MARK``, by which the command knows
them among what Ray forwards from other processes.
"""

import io
import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, TextIO

from tqdm import tqdm

from data_prep.untrusted import LONGEST_LINE, one_line

MARK = "[skpo] "

VARIABLE = "SKPO_CONSOLE"
"""Set in the processes of a run that Ray starts, to ``short`` or ``full``; the former mark their lines."""

_SHOWN = 3
"""Warnings of one kind that a process says; the log has all."""

_FORWARDED = re.compile(r"^(?:\x1b\[\d+m)?(?:\(.{1,200}?\bpid=[^)]*\)(?:\x1b\[0m)? )?" + re.escape(MARK))
"""A marked line, also behind the process that Ray names before it."""

_STEP = re.compile(r"step (\d+)/(\d+) ")


def say(text: str) -> None:
    """Print lines for people, here or in any process of a run."""
    if Screen.active is not None:
        Screen.active.show(text)
    else:
        mark = MARK if os.environ.get(VARIABLE) == "short" else ""
        print("\n".join(mark + line for line in text.splitlines()), flush=True)


def replace_unprintable() -> None:
    """Print a character that the console's encoding lacks as ``?``, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        # A test or a notebook may have put another kind of stream there.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class CleanFormatter(logging.Formatter):
    """Shows each message as one line without control characters: it may quote a model, a server or a data file."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Escape the message; a traceback after it stays as it is."""
        record.message = one_line(record.message, LONGEST_LINE)
        return super().formatMessage(record)


def configure_logging() -> None:
    """In a run's processes, give our loggers handlers of their own: vLLM's import silences root below ERROR."""
    if VARIABLE not in os.environ:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(CleanFormatter("%(levelname)s:%(asctime)s:%(message)s"))
    for name in ("recipe.skpo", "reward_fns"):
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate = [handler], False
        if os.environ.get(VARIABLE) == "short":
            ours.handlers.append(Warnings())
        ours.setLevel(os.environ.get("VERL_LOGGING_LEVEL", "INFO"))


class Warnings(logging.Handler):
    """Says the first warnings and errors of each kind in one line."""

    def __init__(self) -> None:
        """Start without any."""
        super().__init__(logging.WARNING)
        self.said: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Say one."""
        self.said[record.msg] += 1
        if self.said[record.msg] > _SHOWN:
            return
        error = record.exc_info[1] if record.exc_info else None
        cause = f": {type(error).__name__}: {one_line(str(error), LONGEST_LINE)}" if error else ""
        say(f"{record.levelname.lower()}: {one_line(record.getMessage(), LONGEST_LINE)}{cause}")


class Screen:
    """Inside the block, what this process prints goes to ``log``, and marked lines to the console.

    Descriptors 1 and 2 are redirected too, which libraries in C++ and child processes write to.

    Args:
        log: the file, appended to.
        steps: of the run, for a progress bar on a terminal; None if unknown.
        done: of them already.
    """

    active: ClassVar["Screen | None"] = None

    def __init__(self, log: Path, steps: int | None = None, done: int = 0) -> None:
        """Remember what to do; the block does it."""
        self.log_path, self.steps, self.done = log, steps, done
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        """Redirect."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.is_symlink():
            self.log_path.unlink()
        # Processes may print what is in their environment, so it is the owner's alone.
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        self.log = open(descriptor, "a", encoding="utf-8", errors="replace", buffering=1)
        self.log.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n")
        self._before = sys.stdout, sys.stderr
        for stream in self._before:
            stream.flush()
        self._descriptors = [os.dup(1), os.dup(2)]
        self.console = self._console()
        for descriptor in (1, 2):
            os.dup2(self.log.fileno(), descriptor)
        self.bar = tqdm(total=self.steps, initial=self.done, file=self.console, disable=None, leave=False, unit="step")
        sys.stdout, sys.stderr = _Split(self), _Split(self)
        Screen.active = self
        return self

    def _console(self) -> TextIO:
        out = sys.stdout
        with suppress(AttributeError, OSError):  # a test or a notebook may have put a stream without descriptor there
            if out.fileno() == 1:
                return os.fdopen(os.dup(1), "w", encoding=out.encoding, errors="replace", buffering=1)
        return out

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Put everything back."""
        Screen.active = None
        self.bar.close()
        for split in (sys.stdout, sys.stderr):
            if isinstance(split, _Split) and split.rest:
                self.take(split.rest)
        sys.stdout, sys.stderr = self._before
        for descriptor, before in zip((1, 2), self._descriptors, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
        if self.console is not sys.stdout:
            self.console.close()
        with suppress(OSError):
            self.log.close()

    def show(self, text: str) -> None:
        """Print on the console, and into the log."""
        with self._lock:
            for line in text.splitlines():
                self.take(MARK + line)

    def take(self, line: str) -> None:
        """Take a line that something printed."""
        with self._lock:
            with suppress(OSError):  # a full disk costs the line, not the run
                self.log.write(f"{line}\n")
            marked = _FORWARDED.match(line)
            if marked:
                # A model's own text may begin with the mark, and hold what moves a terminal's cursor.
                self._show("".join(letter if letter.isprintable() else "?" for letter in line[marked.end() :]))

    def _show(self, text: str) -> None:
        self.bar.clear()
        print(text, file=self.console, flush=True)
        step = _STEP.match(text)
        if step:
            self.bar.update(int(step[1]) - self.bar.n)
        self.bar.refresh()


class _Split(io.TextIOBase):
    """Hands whole lines to a ``Screen``."""

    encoding = "utf-8"

    def __init__(self, screen: Screen) -> None:
        self.screen, self.rest = screen, ""

    def fileno(self) -> int:
        return self.screen.log.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.screen.take(line)
        return len(text)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Format a Markdown table; ``numbers`` aligns all columns but the first to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
