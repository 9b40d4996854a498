"""The text of a response after its last thought, the only part that counts.

An open thought has no answer: a response that ran out of budget inside it must not be paid for a guess that it might
have dropped. Known marks are ``<think>`` and similar names (``thinking``, ``thought``, ``reasoning``, ``seed:think``),
``[THINK]``, ``◁think▷``, ``<|begin_of_thought|>``, ``<|START_THINKING|>``, the channels of gpt-oss (all but ``final``)
and of Gemma. Within a thought, only its own kind of mark closes it. All functions are linear in the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

AFTER_THOUGHT = "response_after_thought"
"""Key of `extra_info`: the part of the response that counts, set by code that saw the prompt and the tokens."""

_NAME = r"(?:[a-zA-Z]{1,12}:)?(?i:think|thinking|thoughts?|reasoning)(?::[a-zA-Z]{1,20})?"
# The first character of both marks, and the rest of each.
_KNOWN = (
    ("<", rf"{_NAME}>", rf"/{_NAME}>"),
    ("[", r"THINK\]", r"/THINK\]"),
    ("◁", "think▷", "/think▷"),
    ("<", r"\|begin_of_thought\|>", r"\|end_of_thought\|>"),
    ("<", r"\|START_THINKING\|>", r"\|END_THINKING\|>"),
    ("<", r"\|channel\|>(?!final)(?:[a-z]{1,20})?(?:<\|message\|>)?", r"\|channel\|>final"),
    ("<", r"\|channel>", r"channel\|>"),
)


@dataclass(frozen=True)
class Marks:
    """Pairs of opening and closing marks, one pair per kind of thought.

    Attributes:
        mark: any of them; group 2 * kind + 1 opens, the next one closes.
        at_end: a text that ends in an opening one; group kind + 1.
        texts: the literal marks, if given by a user.
    """

    mark: re.Pattern[str]
    at_end: re.Pattern[str]
    texts: tuple[str, ...] = ()

    def consist_of(self, token: str) -> bool:
        """Return whether a special token is a mark or part of one, so that text without special tokens lacks it."""
        return bool(self.mark.search(token)) or any(token in text for text in self.texts)

    def opened_by(self, prompt_end: str) -> int | None:
        """Return the kind of thought that a prompt leaves open by ending in an opening mark; None if it does not."""
        match = self.at_end.search(prompt_end)
        return None if match is None or match.lastindex is None else match.lastindex - 1

    def answer_start(self, text: str, opened: int | None = None) -> int | None:
        """Return where the last thought of a response ends: 0 without a thought, None if it is left open.

        `opened` is the kind of thought that the prompt left open.
        """
        start, inside = 0, opened
        for match in self.mark.finditer(text):
            assert match.lastindex is not None
            kind, closes = divmod(match.lastindex - 1, 2)
            if inside is None and not closes:
                inside = kind
            elif closes and inside in (None, kind):
                start, inside = match.end(), None
        return start if inside is None else None


def _marks(opening: Sequence[str], closing: Sequence[str], texts: tuple[str, ...] = ()) -> Marks:
    """Build marks from regular expressions of one group each after a plain character, which lets `re` skip fast."""
    every = "|".join(f"{opens}|{closes}" for opens, closes in zip(opening, closing, strict=True))
    return Marks(re.compile(every), re.compile(rf"(?:{'|'.join(opening)})\s*\Z"), texts)


@lru_cache
def _pair(opening: str, closing: str) -> Marks:
    ways = [f"{re.escape(mark[0])}({re.escape(mark[1:])})" for mark in (opening, closing)]
    return _marks(ways[:1], ways[1:], (opening, closing))


_AUTOMATIC = _marks(
    [f"{re.escape(first)}({opening})" for first, opening, _ in _KNOWN],
    [f"{re.escape(first)}({closing})" for first, _, closing in _KNOWN],
)


def read_marks(option: str | Sequence[str] = "auto") -> Marks | None:
    """Parse the option `thought_marks`: "auto", "none" (returns None), or [opening, closing].

    Raises:
        ValueError: any other value; the configuration is wrong.
    """
    if option == "auto":
        return _AUTOMATIC
    if option == "none":
        return None
    pair = [] if isinstance(option, str) or not isinstance(option, Sequence) else list(option)
    if len(pair) != 2 or not all(isinstance(mark, str) and mark.strip() for mark in pair) or pair[0] == pair[1]:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.thought_marks: {option!r} is unknown; give auto, none, or "
            "the opening and the closing mark as a list of two different texts"
        )
    return _pair(pair[0].strip(), pair[1].strip())


def after_thought(text: str, option: str | Sequence[str] = "auto") -> str:
    """Return the part of a response that counts: all of it without a thought, "" if a thought is left open."""
    marks = read_marks(option)
    start = 0 if marks is None else marks.answer_start(text)
    return "" if start is None else text[start:]
