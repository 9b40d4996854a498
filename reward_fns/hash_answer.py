"""Numbers as answers: GSM8K, and the default task with its strict form "#### number".

`check` is the strict form. Well-formed is a plain decimal number on the line of the last "####": an optional sign,
ASCII digits with optional thousands commas, an optional fraction; words or a full stop may follow ("#### 7 pens."),
arithmetic may not ("#### 7 - 2").

`check_any` takes the answer from wherever `forms` finds it and reads it as a person would: currency, units, LaTeX
spaces, thousands separators and what stands before a last "=" are passed over ("x = \\$1{,}234.50"). A second number
("7 or 8") is no answer. Numbers are compared as exact decimals, so 5, 5.0 and +5 are the same.
"""

import re
from decimal import Decimal

from reward_fns.forms import HASH, answer_text

# Bounded in length, and possessive (`++`, `?+`): without that a rejected "1,234 + 5" would be retried as "1".
_NUMBER = r"[+-]?[0-9](?:[0-9,]{0,30}+)(?:\.[0-9]{1,12}+)?+"
_TRUTH = re.compile(_NUMBER)
_ANSWER = re.compile(rf"[ \t]*+({_NUMBER})(?![0-9]|\.[0-9]|[ \t]*[-+*/=^])")

# Longer answers are no numbers with a unit.
LONGEST = 200
_LATEX = re.compile(r"\\[,!;: ]|\\(?:text|textbf|mathrm|mathbf|mbox)(?![a-zA-Z])|\\[()\[\]]|[{}$*~]|[€£¥₹]")
_GROUPED = re.compile(r"\{,\}")
_LOOSE = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<digits>[0-9]{1,3}(?:,[0-9]{3}){1,10}+|[0-9]{1,40}+)?(?P<fraction>\.[0-9]{1,12}+)?"
    r"(?:\.(?![0-9]))?(?P<rest>[^0-9]*+)"
)


def extract(text: str) -> str:
    """The number after the last "####", without commas; "" if there is none."""
    _, mark, rest = text.rpartition(HASH)
    match = _ANSWER.match(rest) if mark else None
    return match.group(1).replace(",", "") if match else ""


def read_number(answer: str) -> str:
    """The one number in an answer, without separators and unit; "" if there is none or more than one."""
    if len(answer) > LONGEST:
        return ""
    answer = _GROUPED.sub(",", answer.replace("\\$", "").replace("−", "-"))
    answer = _LATEX.sub("", answer.rpartition("=")[2]).strip()
    match = _LOOSE.fullmatch(answer)
    if match is None or not (match["digits"] or match["fraction"]):
        return ""
    if re.match(r"\s*[-+*/^,:<>×÷·]", match["rest"]):
        return ""
    return f"{match['sign'].replace('+', '')}{(match['digits'] or '0').replace(',', '')}{match['fraction'] or ''}"


def check(text: str, ground_truth: str) -> tuple[str, bool]:
    """The extracted number ("" if none) and whether it equals `ground_truth`.

    Raises ValueError if `ground_truth` is no number, which is a fault of the data, not of the response.
    """
    return _compare(extract(text), ground_truth)


def check_any(text: str, ground_truth: str, answer_format: str = "any") -> tuple[str, bool]:
    """As `check`, with the answer in any form of `forms`, read loosely."""
    return _compare(read_number(answer_text(text, answer_format)), ground_truth)


def _compare(pred: str, ground_truth: str) -> tuple[str, bool]:
    truth = ground_truth.strip()
    if not _TRUTH.fullmatch(truth):
        raise ValueError(f"ground_truth {ground_truth!r} is not a number; write a plain decimal such as '1234'")
    return pred, bool(pred) and Decimal(pred) == Decimal(truth.replace(",", ""))
