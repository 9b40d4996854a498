r"""Multiple choice with up to ten options, A to J (MMLU-Pro): the letter is the answer.

The letter is read where `forms` finds the final answer: "C", "(C)", "C.", "C) because", "\text{(C)}", "Option C". Two
letters ("C, D") are not an answer. If no form is found, the format `any` accepts "(C) is correct", or a last line with
the letter alone.
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
    """Return the letter ("" if none) and whether it is the right one.

    Raises:
        ValueError: `ground_truth` is not a letter from A to J; the data are wrong.
    """
    truth = ground_truth.strip()
    if not re.fullmatch("[A-J]", truth):
        raise ValueError(f"ground_truth {ground_truth!r} is not an option; write a letter from A to J")
    answer = answer_text(text, answer_format)[:200]
    pred = _letter(_WRAPPING.sub("", answer)) if answer or answer_format != "any" else _said(text)
    return pred, pred == truth


def _letter(answer: str) -> str:
    match = _LETTER.match(answer)
    return match[1] if match and not _SECOND.match(answer, match.end(1)) else ""


def _said(text: str) -> str:
    """Return the letter of a response whose answer is in none of the forms."""
    alone = _ALONE.fullmatch(_WRAPPING.sub("", text.rstrip().rpartition("\n")[2][-40:]))
    if alone:
        return alone[1]
    letters = [match[1] or match[2] for match in _CORRECT.finditer(_WRAPPING.sub("", text))]
    return letters[-1] if letters else ""
