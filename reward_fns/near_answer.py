"""Mathematical answers with a tolerance, as OlympiadBench gives for some of its numbers.

The ground truth then reads "0.84 (tolerance 0.01)": a number that differs by at most 0.01 is right. "1.5, 20 (tolerance
0.1,1)" has one tolerance per number, in order; a single tolerance holds for every number. Answers that are not plain
numbers must be equal, as `math_answer` decides.
"""

import math
import re
from fractions import Fraction

from reward_fns import math_answer
from reward_fns.math_text import tidy

_TRUTH = re.compile(r"(?P<answer>.*\S) \(tolerance (?P<tolerance>[^()]{1,60})\)", re.DOTALL)
_COMMA = re.compile(r",\s+|,(?![0-9]{3}(?![0-9]))")


def with_tolerance(answer: str, tolerance: str) -> str:
    """Return a ground truth with its tolerance.

    Raises:
        ValueError: the tolerance is not a finite number above 0.
    """
    _tolerances(tolerance)
    return f"{answer} (tolerance {tolerance})"


def check(text: str, ground_truth: str, answer_format: str = "any") -> tuple[str, bool]:
    """Check as `math_answer.check` does; numbers within the tolerance of `ground_truth` are right."""
    match = _TRUTH.fullmatch(ground_truth)
    if match is None:
        return math_answer.check(text, ground_truth, answer_format)
    tolerances = _tolerances(match["tolerance"])
    pred, right = math_answer.check(text, match["answer"], answer_format)
    if right or not pred or len(pred) > math_answer.LONGEST:
        return pred, right
    given, truths = (
        [math_answer.number(tidy(part)) for part in _COMMA.split(answer)] for answer in (pred, match["answer"])
    )
    if len(tolerances) == 1:
        tolerances *= len(truths)
    return pred, len(given) == len(truths) == len(tolerances) and all(
        one is not None and other is not None and abs(one - other) <= tolerance
        for one, other, tolerance in zip(given, truths, tolerances, strict=True)
    )


def _tolerances(text: str) -> list[Fraction]:
    """Parse one tolerance per number; an empty one between commas is 0."""
    values = []
    for part in text.split(","):
        try:
            value = float(part) if part.strip() or "," not in text else 0.0
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf or (value == 0 and not part.strip())):
            raise ValueError(f"the tolerance {text!r:.60} is not a finite number above 0")
        values.append(Fraction(f"{value:.12g}"))
    return values
