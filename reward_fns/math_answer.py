r"""Mathematical answers: numbers, fractions, expressions, sets, intervals, tuples, text.

Three steps, cheapest first; each either decides or hands on.

1. `normalised` text of both: equal text is an equal answer. Two plain numbers (integers, decimals, fractions, powers of
   ten; thousands separators, a percent or degree sign and dollars passed over) are compared exactly, and that decides.
   So are two numbers with a base (52_8).
2. `refusal`: an answer that is too long, too deep, or whose numbers, powers or factorials are too large, is wrong. No
   answer of a benchmark is anywhere near these bounds, and they keep most of what could make sympy run away from it.
3. math-verify in a process of its own with a timer and a memory limit (`judge`).

An answer is never evaluated as code, see `math_worker`.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from reward_fns import judge
from reward_fns.forms import answer_parts

LONGEST = 400
"""Characters; the longest answer of MATH-500 has 53."""
MOST_WAYS = 3
"""Boxes of one list that may be the same value; a comparison can take a second."""
DEEPEST = 12
MOST_DIGITS = 40
LARGEST_POWER = 9999
LARGEST_SYMBOLIC_POWER = 200

_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?)(?![a-zA-Z])|(?<!\\)\\(?:[!,;:()\[\]]|\$)|\$"
)
_DROPPED_END = re.compile(r"\^?\{?(?:\\circ|\\degree)(?![a-zA-Z])\}?$|°$|\\?%$|[.,;]$")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])")
_LATEX_SPACE = re.compile(r"(?<!\\)(?:\\ |~)")
_UNIT = re.compile(r"(?<=[0-9}])\s*\\(?:text|mbox|mathrm|textbf|textrm)\s*\{[^{}\\]*\}(?:\^\{?[0-9]\}?)?\s*$")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}\\]*)\}")
# "1, 234" are two numbers, "1,234" and "1,\! 234" are one.
_THOUSANDS = re.compile(r",\\!\s*(?=[0-9]{3}(?![0-9]))|\{,\}")
_SPACE = re.compile(r"(?<![0-9a-zA-Z,])\s+|(?<=,)\s+(?![0-9])|(?<=,)(?<![0-9],)\s+|\s+(?![0-9a-zA-Z])")
_LONE_LETTER = re.compile(r"\(([a-zA-Z])\)")
_SYMBOLS = {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt"}
_SYMBOLS |= {"≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "∩": "\\cap ", "±": "\\pm ", "÷": "/", "\u00a0": " "}

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,12}|[0-9]{1,40})(?:\.[0-9]{0,40})?|\.[0-9]{1,40}"
_POWER = r"(?:(?:[eE]|(?:\\times|\\cdot|\*)\s*10\s*\^\s*)\{?(?P<power>[+-]?[0-9]{1,3})\}?)?"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<decimal>{_DECIMAL})\s*{_POWER}")
_UNIT_WORD = re.compile(r"(?<=[0-9]) (?!pi\b)[a-zA-Z]{2,}(?: [a-zA-Z]+){0,4}$")
_RATIO = re.compile(
    r"(?P<sign>[+-]?)\s*(?:\\frac\{(?P<a>[+-]?[0-9]{1,40})\}\{(?P<b>[+-]?[0-9]{1,40})\}"
    r"|(?P<c>[+-]?[0-9]{1,40})/(?P<d>[+-]?[0-9]{1,40}))"
)
# "52_8": math-verify does not look at the base.
_BASED = re.compile(r"(?P<digits>[0-9A-F]{1,40})_\{?(?P<base>[0-9]{1,2})\}?")
_POWERS = re.compile(r"([0-9]?)\s*(?:\^|\*\*)\s*[{(\s]*[-+]?\s*([0-9][0-9,]*)")
_TOWER = re.compile(r"(?:\^|\*\*)\s*[{(\s]*[0-9.]+\s*[)}\s]*(?:\^|\*\*)|\^\s*\{[^{}]*\^\s*\{?[^{}]*\^")
_FACTORIAL = re.compile(r"[0-9]{4,}[\s{})]*!|![\s{})]*!|\\[dt]?binom[^!]*[0-9]{4,}")
_UNEVALUATED = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-zA-Z])")
_DIGITS = re.compile(rf"[0-9]{{{MOST_DIGITS + 1},}}")


def check(text: str, ground_truth: str, answer_format: str = "any") -> tuple[str, bool]:
    """The answer as written ("" if none) and whether it equals `ground_truth`.

    Raises ValueError for an empty or overlong ground truth, which is a fault of the data, not of the response.
    """
    if not ground_truth.strip() or len(ground_truth) > LONGEST:
        raise ValueError(f"ground_truth {ground_truth!r:.60} is no answer: it has {len(ground_truth)} characters")
    parts = answer_parts(text, answer_format)
    pred = ", ".join(parts)
    right = bool(pred) and equal(pred, ground_truth)
    if not right and 1 < len(parts) <= MOST_WAYS:  # one value in several ways of writing it
        right = all(equal(part, ground_truth) for part in parts)
    return pred, right


def equal(answer: str, truth: str) -> bool:
    """Whether the two answers are mathematically the same; False where that cannot be found out within the bounds."""
    if answer.strip() == truth.strip():
        return True
    if len(answer) > LONGEST:
        return False
    left, right = normalised(answer), normalised(truth)
    if not left or not right:
        return False
    if left == right:
        return True
    numbers = number(left), number(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    based = _BASED.fullmatch(left), _BASED.fullmatch(right)
    if based[0] and based[1]:
        return based[0].groupdict() == based[1].groupdict()
    if refusal(left, right):
        return False
    return judge.equal(left, right)


@lru_cache(maxsize=4096)
def normalised(answer: str) -> str:
    """The answer without what only typesets it: sizes, spaces, dollars, text wrappers, unit sign, last full stop."""
    for symbol, latex in _SYMBOLS.items():
        answer = answer.replace(symbol, latex)
    answer = _UNIT.sub("", _LATEX_SPACE.sub(" ", _THOUSANDS.sub(",", answer)).rstrip(" $."))
    answer = _FRACTION.sub(r"\\frac", _DROPPED.sub("", answer))
    answer = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", answer)
    answer = _SPACE.sub("", " ".join(_TEXT.sub(r" \1 ", answer).split()))
    answer = _DROPPED_END.sub("", answer)
    whole = _LONE_LETTER.fullmatch(answer)
    if whole:
        return whole[1]
    # Words are compared without their case; a letter may be a variable, whose case matters.
    return answer.casefold() if re.fullmatch(r"[a-zA-Z]{2,}(?: [a-zA-Z]+)*", answer) else answer


def number(text: str) -> Fraction | None:
    """The exact value of a plain number or fraction, None for anything else."""
    match = _NUMBER.fullmatch(_UNIT_WORD.sub("", text))
    if match:
        value = Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** int(match["power"] or 0)
        return -value if match["sign"] == "-" else value
    match = _RATIO.fullmatch(text)
    if match:
        above, below = int(match["a"] or match["c"]), int(match["b"] or match["d"])
        if below:
            return Fraction(above, below) * (-1 if match["sign"] == "-" else 1)
    return None


def refusal(answer: str, truth: str) -> str:
    """Why an answer is not handed to sympy, "" if it may be.

    A sum, product, integral or limit is no answer but the question again, unless `truth` has one too.
    """
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
    for base, digits in _POWERS.findall(answer):
        if int(digits.replace(",", "")) > (LARGEST_POWER if base else LARGEST_SYMBOLIC_POWER):
            return "too large a power"
    if _TOWER.search(answer):
        return "a power of a power"
    if _FACTORIAL.search(answer):
        return "too large a factorial or binomial"
    if _UNEVALUATED.search(answer) and not _UNEVALUATED.search(truth):
        return "not evaluated"
    return ""


def _braces_match(answer: str) -> bool:
    depth = 0
    position = 0
    while position < len(answer):
        if answer[position] == "\\":
            position += 1
        elif answer[position] == "{":
            depth += 1
        elif answer[position] == "}":
            depth -= 1
            if depth < 0:
                return False
        position += 1
    return depth == 0
