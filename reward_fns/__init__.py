"""Answer checking: `compute_score` is the one entry that verl calls (SPEC section 3, R = 2 * 1[correct] - 1).

It is routed by `data_source` to a room per kind of answer: numbers (`hash_answer`), mathematics (`math_answer`),
multiple choice (`choice_answer`); `forms` finds the answer in the response. Sources that verl checks by running model
text as code (`codecontests`, `numina_*`, `geometry3k`, ...) are refused: text written by a model is never executed
here. Time and memory are bounded, see `judge`.
"""

from collections.abc import Callable
from typing import Any

from reward_fns import choice_answer, hash_answer, math_answer
from reward_fns.forms import check_format

# Answers stand at the end; looking at no more than this keeps a runaway response from costing time.
TAIL_CHARACTERS = 2000

NUMBER_SOURCES = frozenset({"openai/gsm8k"})
MATH_SOURCES = frozenset(
    {
        "lighteval/MATH",
        "DigitalLearningGmbH/MATH-lighteval",
        "EleutherAI/hendrycks_math",
        "HuggingFaceH4/MATH-500",
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "math_dapo",
        "math",
        "math_dapo_reasoning",
        "amc23",
        "minerva_math",
        "olympiadbench",
    }
)  # and everything that starts with "aime"
CHOICE_SOURCES = frozenset({"TIGER-Lab/MMLU-Pro"})

Check = Callable[[str, str, str], tuple[str, bool]]


def route(data_source: str) -> Check:
    """The check for a data source: (end of the response, ground truth, answer format) -> (answer, whether correct).

    Raises ValueError for a source that has none.
    """
    if data_source == "skpo/arithmetic":
        # Its form is part of the task, so `answer_format` does not loosen it.
        return lambda text, truth, _: hash_answer.check(text, truth)
    if data_source in NUMBER_SOURCES:
        return hash_answer.check_any
    if data_source in MATH_SOURCES or data_source.startswith("aime"):
        return math_answer.check
    if data_source in CHOICE_SOURCES:
        return choice_answer.check
    known = ", ".join(sorted({"skpo/arithmetic"} | NUMBER_SOURCES | MATH_SOURCES | CHOICE_SOURCES))
    raise ValueError(
        f"data_source {data_source!r} has no reward here (known: {known}, aime*); change the column "
        "data_source or set reward.custom_reward_function.path to your own compute_score"
    )


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    answer_format: str = "any",
    **kwargs: Any,
) -> dict[str, float | str]:
    """Check one response.

    `answer_format` (`forms.AnswerFormat`) is set through ``reward.custom_reward_function.reward_kwargs``: "any" takes
    the answer from a box, after "####" or from a line "Answer: ..."; "boxed", "hash" and "line" take that form alone.

    Returns `score` (+1.0 correct, -1.0 not), `acc` (1.0 or 0.0), `well_formed` (1.0 if an answer in the
    expected form was found, right or wrong) and `pred` (that answer, "" if none). `extra_info` and `kwargs`
    are verl's and not used. Raises ValueError for an unknown data source or format, or a ground truth that is no
    answer, never because of `solution_str`.
    """
    check_format(answer_format)
    pred, correct = route(data_source)(solution_str[-TAIL_CHARACTERS:], ground_truth, answer_format)
    return {
        "score": 1.0 if correct else -1.0,
        "acc": 1.0 if correct else 0.0,
        "well_formed": 1.0 if pred else 0.0,
        "pred": pred,
    }
