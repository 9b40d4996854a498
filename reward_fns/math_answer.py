"""Mathematical answers: numbers, fractions, expressions, sets, intervals, tuples, text.

There are three steps, cheapest first. Each either decides or passes to the next.

1. Text without its typesetting (`math_text`): equal text is an equal answer. Two plain numbers (integers, decimals,
   fractions, powers of ten) are compared exactly, and that decides. Thousands separators, units, dollars and a percent
   or degree sign are ignored.
2. `refusal`: an answer that is too long, too deep, or has too large numbers, powers or factorials is wrong. Answers of
   benchmarks are far below these bounds, which stop most inputs on which sympy would not finish.
3. Structure and values (`math_compare`), in a separate process with a timer and a memory limit (`judge`).

An answer is never evaluated as code, see `math_worker`.
"""

import re
import unicodedata
from fractions import Fraction

from reward_fns import judge, units
from reward_fns.forms import BRACES, answer_parts
from reward_fns.math_text import plain, tidy, without_sign

LONGEST = 400
"""Characters; the longest answer of MATH-500 has 53."""
MOST_WAYS = 3
"""Boxes of one list that are compared one by one; a comparison can take a second."""
DEEPEST = 12
MOST_DIGITS = 40
LARGEST_POWER = 9999

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,12}|[0-9]{1,40})(?:\.[0-9]{0,40})?|\.[0-9]{1,40}"
_POWER = r"(?:(?:[eE]|(?:\\times|\\cdot|\*)\s*10\s*\^\s*)\{?(?P<power>[+-]?[0-9]{1,3})\}?)?"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<decimal>{_DECIMAL})\s*{_POWER}")
_RATIO = re.compile(
    r"(?P<sign>[+-]?)\s*(?:\\frac\{(?P<a>[+-]?[0-9]{1,40})\}\{(?P<b>[+-]?[0-9]{1,40})\}"
    r"|(?P<c>[+-]?[0-9]{1,40})/(?P<d>[+-]?[0-9]{1,40}))"
)
_POWERS = re.compile(r"(?:\^|\*\*)\s*[{(\s]*[-+]?\s*([0-9][0-9,]*)")
_TOWER = re.compile(r"(?:\^|\*\*)\s*[{(\s]*[0-9.]+\s*[)}\s]*(?:\^|\*\*)|\^\s*\{[^{}]*\^\s*\{?[^{}]*\^")
_FACTORIAL = re.compile(r"[0-9]{4,}[\s{})]*!|![\s{})]*!|\\[dt]?binom[^!]*[0-9]{4,}")
_DIGITS = re.compile(rf"[0-9]{{{MOST_DIGITS + 1},}}")


def check(text: str, ground_truth: str, answer_format: str = "any") -> tuple[str, bool]:
    """Return the answer as written ("" if none) and whether it equals `ground_truth`.

    Raises:
        ValueError: the ground truth is empty or too long; the data are wrong, not the response.
    """
    if not ground_truth.strip() or len(ground_truth) > LONGEST:
        raise ValueError(f"ground_truth {ground_truth!r:.60} is not an answer: it has {len(ground_truth)} characters")
    parts = answer_parts(text, answer_format)
    pred = ", ".join(parts)
    right = bool(pred) and equal(pred, ground_truth)
    if not right and 1 < len(parts) <= MOST_WAYS:  # the same value written in several ways
        right = all(equal(part, ground_truth) for part in parts)
    return pred, right


def equal(answer: str, truth: str) -> bool:
    """Return whether two answers are mathematically the same; False if the bounds do not allow to decide."""
    if answer.strip() == truth.strip():
        return True
    if len(answer) > LONGEST:
        return False
    left, right = tidy(answer), tidy(truth)
    if not left or not right:
        return False
    if plain(left) == plain(right):
        return True
    left_number, right_number = number(left), number(right)
    if left_number is not None and right_number is not None:
        return left_number == right_number and not units.differ(units.split_unit(left)[2], units.split_unit(right)[2])
    if refusal(left):
        return False
    return judge.equal(left, right)


def number(text: str) -> Fraction | None:
    """Return the exact value of a tidy plain number or fraction without its unit; None for other text."""
    text, factor, _ = units.split_unit(text)
    text = without_sign(text)
    match = _NUMBER.fullmatch(text)
    if match:
        value = Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** int(match["power"] or 0)
        return factor * (-value if match["sign"] == "-" else value)
    match = _RATIO.fullmatch(text)
    if match:
        above, below = int(match["a"] or match["c"]), int(match["b"] or match["d"])
        if below:
            return factor * Fraction(above, below) * (-1 if match["sign"] == "-" else 1)
    return None


def refusal(answer: str) -> str:
    """Return why an answer must not be given to sympy, "" if it may."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn") for character in answer):
        return "control characters"
    depth = deepest = 0
    escaped = False
    for character in answer:
        if character in "([{" and not (escaped and character == "("):
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
        escaped = character == "\\" and not escaped
    if deepest > DEEPEST:
        return "too deeply nested"
    if not _braces_match(answer):
        return "unbalanced braces"
    if _DIGITS.search(answer):
        return "too many digits"
    if any(int(digits.replace(",", "")) > LARGEST_POWER for digits in _POWERS.findall(answer)):
        return "too large a power"
    if _TOWER.search(answer):
        return "a power of a power"
    if _FACTORIAL.search(answer):
        return "too large a factorial or binomial"
    return ""


def _braces_match(answer: str) -> bool:
    depth = 0
    for brace in BRACES.findall(answer):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0
