r"""Where the final answer stands in a response: in ``\boxed{}``, after ``####``, or on a line "Answer: ...".

Every form counts by its last occurrence. A ``\boxed{`` that is never closed is no answer: the response was cut, and an
earlier box may be a step on the way. All functions are linear in the text and return "" where there is no answer.
"""

import re
from typing import Literal, get_args

AnswerFormat = Literal["any", "boxed", "hash", "line"]
"""`any`: the later one of boxed and hash, else a line. The others are strict: that form or no answer."""

HASH = "####"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*")
# "Answer: 5", "The final answer is 5"; emphasis around the words is common.
_LINE = re.compile(r"answer(?:[*_]{0,2}[ \t]?:|[ \t]is[ \t]?:?)[*_]{0,2}[ \t]?([^\n]+)", re.IGNORECASE)


def check_format(name: str) -> None:
    """Raises ValueError for a name that is no `AnswerFormat`: a fault of the configuration."""
    if name not in get_args(AnswerFormat):
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.answer_format: {name!r} is unknown; "
            f"known are {', '.join(get_args(AnswerFormat))}"
        )


def last_boxed(text: str) -> str:
    r"""The content of the last ``\boxed{...}`` or ``\fbox{...}``, braces balanced; ``\boxed 5`` counts too."""
    return _last_boxed(text)[0]


def answer_text(text: str, answer_format: str = "any") -> str:
    """The final answer as it was written, stripped."""
    if answer_format == "boxed":
        return last_boxed(text)
    if answer_format == "hash":
        return _after_hash(text)
    if answer_format == "any":
        boxed, start = _last_boxed(text)
        # A box after "####" is read as a box; the other way round the box was a step.
        found = boxed if start > text.rfind(HASH) else _after_hash(text)
        if found or start >= 0:
            return found
    lines = _LINE.findall(text)
    return _bare(lines[-1]) if lines else ""


def _last_boxed(text: str) -> tuple[str, int]:
    """The content and where the box starts, -1 if there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    match = _BOX.match(text, start) if start >= 0 else None
    if match is None:
        return "", -1
    begin = match.end()
    if not text.startswith("{", begin):
        return re.split(r"[\s$]", text[begin:], maxsplit=1)[0], start
    depth = 0
    position = begin
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace does not count
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[begin + 1 : position].strip(), start
        position += 1
    return "", start


def _after_hash(text: str) -> str:
    _, mark, rest = text.rpartition(HASH)
    return _bare(rest.split("\n", 1)[0]) if mark else ""


def _bare(line: str) -> str:
    """Without emphasis around it and without the full stop of the sentence."""
    line = line.strip().strip("*").strip()
    return line[:-1].rstrip() if line.endswith(".") else line
