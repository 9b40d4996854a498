r"""Numbers as answers: GSM8K, and the default task with its strict form "#### number".

`check` is the strict form. An answer is well-formed if a plain decimal number follows the last "####": an optional
sign, ASCII digits with optional thousands commas, an optional fraction. Words or a full stop may follow ("#### 7
pens."), but not arithmetic ("#### 7 - 2") or words that change the number ("#### 7 million").

`check_any` takes the answer from the place that `forms` finds and reads it as a person would. It ignores currency,
units ("18 cm^2", "$18/hour"), LaTeX spaces, thousands separators and the text before a last "=" ("x = \$1{,}234.50").
"18 million" is 18000000. A second number ("7 or 8") is not an answer, nor is a number that words change ("5 squared").
Numbers are compared as exact decimals, so 5, 5.0 and +5 are the same.
"""

import re
from decimal import Decimal

from reward_fns import units
from reward_fns.forms import HASH, answer_text

# Bounded in length, and possessive (`++`, `?+`): without that a rejected "1,234 + 5" would be retried as "1".
_NUMBER = r"[+-]?[0-9](?:[0-9,]{0,30}+)(?:\.[0-9]{1,12}+)?+"
_TRUTH = re.compile(_NUMBER)
_ANSWER = re.compile(rf"[ \t]*+({_NUMBER})(?![0-9]|\.[0-9]|[ \t]*[-+*/=^])")

# Longer answers are not a number with a unit.
LONGEST = 200
_LATEX = re.compile(r"\\[,!;: ]|\\(?:text|textbf|mathrm|mathbf|mbox)(?![a-zA-Z])|\\[()\[\]]|[{}$*~]|[€£¥₹]")
_GROUPED = re.compile(r"\{,\}")
_LOOSE = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<digits>[0-9]{1,3}(?:,[0-9]{3}){1,10}+|[0-9]{1,40}+)?(?P<fraction>\.[0-9]{1,12}+)?"
    r"(?:\.(?![0-9]))?(?P<rest>(?:\^[23](?![0-9])|[^0-9]|(?<=[a-zA-Z])[23](?![0-9a-zA-Z]))*+)"
)
_CURRENCY = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?:US|A|C)\$|(?:Rs|Tk)\.?|(?:USD|EUR|GBP|INR|CAD|AUD|JPY|CNY)(?![a-zA-Z]))\s*"
)
# "18/hour" is 18; "18/2" is not a number.
_OPERATION = re.compile(r"\s*(?:[-+*^,:<>×÷·]|/(?!\s*[a-zA-Z]{2}))")


def extract(text: str) -> str:
    """Return the number after the last "####", without commas; "" if there is none."""
    _, mark, rest = text.rpartition(HASH)
    match = _ANSWER.match(rest) if mark else None
    if match is None or units.scale_of(rest[match.end() : match.end() + LONGEST].split("\n", 1)[0], sentence=True) != 1:
        return ""
    return match[1].replace(",", "")


def read_number(answer: str) -> str:
    """Return the one number in an answer, without separators and unit; "" if there is none or more than one."""
    if len(answer) > LONGEST:
        return ""
    answer = _GROUPED.sub(",", answer.replace("\\$", "$").replace("−", "-"))
    answer = answer.replace("²", "^2").replace("³", "^3").rpartition("=")[2]
    answer = _LATEX.sub("", _CURRENCY.sub(r"\g<sign>", answer, count=1)).strip()
    match = _LOOSE.fullmatch(answer)
    if match is None or not (match["digits"] or match["fraction"]) or _OPERATION.match(match["rest"]):
        return ""
    factor = units.scale_of(match["rest"], sentence=True)
    if factor is None:
        return ""
    number = f"{match['sign'].replace('+', '')}{(match['digits'] or '0').replace(',', '')}{match['fraction'] or ''}"
    return number if factor == 1 else f"{(Decimal(number) * factor).normalize():f}"


def check(text: str, ground_truth: str) -> tuple[str, bool]:
    """Return the number after the last "####" ("" if none) and whether it equals `ground_truth`.

    Raises:
        ValueError: `ground_truth` is not a number; the data are wrong, not the response.
    """
    return _compare(extract(text), ground_truth)


def check_any(text: str, ground_truth: str, answer_format: str = "any") -> tuple[str, bool]:
    """Check as `check` does, with the answer in any form of `forms`, read loosely."""
    return _compare(read_number(answer_text(text, answer_format)), ground_truth)


def _compare(pred: str, ground_truth: str) -> tuple[str, bool]:
    truth = ground_truth.strip()
    if not _TRUTH.fullmatch(truth):
        raise ValueError(f"ground_truth {ground_truth!r} is not a number; write a plain decimal such as '1234'")
    return pred, bool(pred) and Decimal(pred) == Decimal(truth.replace(",", ""))
