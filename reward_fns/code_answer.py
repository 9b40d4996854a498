"""Programs in Python: the last fenced block of a response, judged by the tests of the problem.

A block is fenced as in Markdown, by three or more backquotes or tildes. The last block that is labelled as Python
counts, or without one the last that has no label; blocks of other languages are not run. A block that is not closed is
not an answer, even after a complete one.
"""

import re

from reward_fns.code_judge import RunOptions, Verdict, verdict
from reward_fns.code_tests import read_tests

MOST_CHARACTERS = 100_000
"""Characters of the end of a response in which the program is looked for."""

_FENCE = re.compile(r" {0,3}(?P<marks>`{3,}|~{3,})[ \t]*(?P<label>[^`\n]*?)\s*")
_PYTHON = re.compile(r"\{?\.?(?:c?python|pypy|py)[\d.]*(?:[\s,:;}{].*)?", re.IGNORECASE)


def program(text: str) -> str:
    """Return the program of a response, "" if there is none."""
    labelled = unlabelled = ""
    marks, label = "", ""
    lines: list[str] = []
    for line in text.splitlines():
        match = _FENCE.fullmatch(line)
        if not marks and match:
            marks, label, lines = match["marks"], match["label"], []
        elif marks and match and match["marks"].startswith(marks) and not match["label"]:
            block = "\n".join(lines) + "\n"
            if _PYTHON.fullmatch(label):
                labelled = block
            elif not label:
                unlabelled = block
            marks = ""
        elif marks:
            lines.append(line)
    if marks and (not label or _PYTHON.fullmatch(label)):
        return ""
    found = labelled or unlabelled
    return found if found.strip() else ""


def check(text: str, ground_truth: str, options: RunOptions) -> tuple[Verdict, bool]:
    """Return the verdict on a response, and whether it is "passed".

    Raises:
        ValueError: `ground_truth` is not the tests of a program; the data are wrong.
        SandboxError: programs cannot be run as `options` say.
    """
    tests = read_tests(ground_truth)
    answer = program(text)
    found: Verdict = verdict(answer, tests, options) if answer else "no code"
    return found, found == "passed"
