"""Which problems are the same problem: exactly, or but for how they are typeset.

`normalised` forgets what does not change a problem (case, spaces, punctuation, dollar signs, braces, sizes of LaTeX
brackets) and keeps what does (letters, digits, operators, decimal points). Rows of a training split whose normalised
text is held out for evaluation are leaks.
"""

import re
import unicodedata
from collections.abc import Iterable

_SIZING = re.compile(r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?|quad|qquad|[,;:! ()\[\]])(?![a-zA-Z])")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
# A dot between digits belongs to a number.
_PUNCTUATION = re.compile(r"[\s${}'\"`,;:!?_]|(?<!\d)\.|\.(?!\d)")
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "−": "-", "–": "-", "—": "-"})


def normalised(text: str) -> str:
    """Return the text by which two problems count as the same."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).casefold()
    text = _SIZING.sub("", _FRACTION.sub(r"\\frac", text))
    return _PUNCTUATION.sub("", text)


def held_out(texts: Iterable[str]) -> frozenset[str]:
    """Return the normalised texts to keep out of training; texts without a letter or digit are left out."""
    return frozenset(filter(None, map(normalised, texts)))
