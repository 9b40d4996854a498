"""The console of a command, whatever its encoding."""

import io
import logging
import sys
from collections.abc import Iterable, Sequence

from data_prep.untrusted import LONGEST_LINE, one_line


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


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Format a Markdown table; ``numbers`` aligns all columns but the first to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
