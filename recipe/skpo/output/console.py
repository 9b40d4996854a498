"""The console of a command, whatever its encoding."""

import io
import sys


def replace_unprintable() -> None:
    """Let a character that the console's encoding lacks be printed as ``?``, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        # A test or a notebook may have put another kind of stream there.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
