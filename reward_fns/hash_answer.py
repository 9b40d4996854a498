"""The answer form of GSM8K and of the default task: "#### number", the last one in the response counts.

Well-formed is a plain decimal number on the line of the last "####": an optional sign, ASCII digits with
optional thousands commas, an optional fraction; words or a full stop may follow ("#### 7 pens."), arithmetic
may not ("#### 7 - 2"). Numbers are compared as exact decimals, so 5, 5.0 and +5 are the same.
"""

import re
from decimal import Decimal

MARK = "####"
# Bounded in length, and possessive (`++`, `?+`): without that a rejected "1,234 + 5" would be retried as "1".
_NUMBER = r"[+-]?[0-9](?:[0-9,]{0,30}+)(?:\.[0-9]{1,12}+)?+"
_TRUTH = re.compile(_NUMBER)
_ANSWER = re.compile(rf"[ \t]*+({_NUMBER})(?![0-9]|\.[0-9]|[ \t]*[-+*/=^])")


def extract(text: str) -> str:
    """The number after the last "####", without commas; "" if there is none."""
    _, mark, rest = text.rpartition(MARK)
    match = _ANSWER.match(rest) if mark else None
    return match.group(1).replace(",", "") if match else ""


def check(text: str, ground_truth: str) -> tuple[str, bool]:
    """The extracted number ("" if none) and whether it equals `ground_truth`.

    Raises ValueError if `ground_truth` is no number, which is a fault of the data, not of the response.
    """
    truth = ground_truth.strip()
    if not _TRUTH.fullmatch(truth):
        raise ValueError(f"ground_truth {ground_truth!r} is not a number; write a plain decimal such as '1234'")
    pred = extract(text)
    return pred, bool(pred) and Decimal(pred) == Decimal(truth.replace(",", ""))
