"""Multiple choice with up to ten options, A to J (MMLU-Pro): the letter is the answer.

Read from wherever `forms` finds the final answer: "C", "(C)", "C.", "C) because", "\\text{(C)}", "Option C". Two
letters ("C, D") are not an answer. Without an answer in these forms, the format `any` takes "(C) is correct", or a last
line with the letter alone.
"""

import re

from reward_fns.forms import answer_text

_WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)(?![a-zA-Z])|\\[()\[\]]|[{}$*`]")
_NAMED = r"(?i:(?:the\s+)?(?:correct\s+|right\s+|best\s+|final\s+)?(?:option|choice|letter|answer)\s*:?\s+)"
_LETTER = re.compile(
    rf"\s*{_NAMED}?[(\[]?([A-J])"
    r"(?:[)\].:,;]|\s*$|\s+[-–—(:=\[]|\s+(?:because|since|as|is|which|with|due)\b|(?=\s*(?:/|&|,|and\b|or\b)))"
)
_SECOND = re.compile(
    rf"[\s)\].]*(?:(?:[,;/&]|and\b|or\b|[-–—])\s*(?:and\s+|or\s+)?{_NAMED}?[(\[]?|[(\[])"
    r"[A-J](?:[)\].,:;/&]|\s*$|\s+(?:and|or|are|because|both)\b)"
)
_CORRECT = re.compile(
    r"(?:\b(?i:option|choice|answer)\s+\(?([A-J])\)?|\(([A-J])\))\s+is\s+(?:therefore\s+|thus\s+|indeed\s+)?"
    r"(?:the\s+)?(?:correct|right|best|answer)\b"
)
_ALONE = re.compile(rf"\s*{_NAMED}?[(\[]?([A-J])[)\]]?[.\s]*")


def check(text: str, ground_truth: str, answer_format: str = "any") -> tuple[str, bool]:
    """The letter ("" if none) and whether it is the right one.

    Raises ValueError if `ground_truth` is no letter from A to J, which is a fault of the data.
    """
    truth = ground_truth.strip()
    if not re.fullmatch("[A-J]", truth):
        raise ValueError(f"ground_truth {ground_truth!r} is no option; write a letter from A to J")
    answer = answer_text(text, answer_format)[:200]
    pred = _letter(_WRAPPING.sub("", answer)) if answer or answer_format != "any" else _said(text)
    return pred, pred == truth


def _letter(answer: str) -> str:
    match = _LETTER.match(answer)
    return match[1] if match and not _SECOND.match(answer, match.end(1)) else ""


def _said(text: str) -> str:
    """The letter of a response without an answer in any form."""
    alone = _ALONE.fullmatch(_WRAPPING.sub("", text.rstrip().rpartition("\n")[2][-40:]))
    if alone:
        return alone[1]
    said = [match[1] or match[2] for match in _CORRECT.finditer(_WRAPPING.sub("", text))]
    return said[-1] if said else ""
