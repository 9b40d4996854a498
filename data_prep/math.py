r"""MATH (Hendrycks et al. 2021): 7,500 competition problems for training, 5,000 for testing.

The ground truth is the content of the solution's last ``\boxed{}``, or the field `answer` where the source has one.
Read are the hub's forms and the original archive (a folder with a json file per problem).

    python -m data_prep.math --out DIR [--source FOLDER] [--split train|test] [--template boxed]
"""

import sys
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from data_prep import command
from data_prep.pipeline import Problem, RowError, Source, text_field
from reward_fns.forms import last_boxed
from reward_fns.math_answer import LONGEST

HUB = "DigitalLearningGmbH/MATH-lighteval"


def boxed_problem(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `problem` and `solution`, or `answer`."""
    question = text_field(fields, "problem", "question")
    if isinstance(fields.get("answer"), int | float):
        return Problem(data_source, question, whole(fields["answer"]))
    answer = text_field(fields, "answer") if fields.get("answer") else last_boxed(text_field(fields, "solution"))
    if not answer:
        raise RowError("field 'solution' has no complete \\boxed{} with an answer")
    if len(answer) > LONGEST:
        raise RowError(f"the answer has {len(answer)} characters; the reward compares at most {LONGEST}")
    return Problem(data_source, question, answer)


def whole(value: float | Decimal) -> str:
    """Write a number as text, 27.0 as "27".

    Raises:
        RowError: for a boolean, NaN or infinity.
    """
    if isinstance(value, bool) or value != value or value in (float("inf"), float("-inf")):
        raise RowError(f"the answer {value!r} is not a number")
    return str(int(value)) if value == int(value) else str(value)


SOURCE = Source("math", HUB, HUB, boxed_problem)

if __name__ == "__main__":
    sys.exit(command.main(SOURCE))
