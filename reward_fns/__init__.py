"""Answer checking: `compute_score` is the one entry that verl calls (R = 2 * 1[correct] - 1).

It is routed by `data_source` to a room per kind of answer: numbers (`hash_answer`), mathematics (`math_answer`),
multiple choice (`choice_answer`); `thoughts` takes the thought off the response, `forms` finds the answer in the rest.
Sources that verl checks by running model text as code (`codecontests`, `numina_*`, `geometry3k`, ...) are refused: text
written by a model is never executed here. Time and memory are bounded, see `judge`.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from reward_fns import choice_answer, hash_answer, math_answer, near_answer
from reward_fns.forms import check_format
from reward_fns.thoughts import AFTER_THOUGHT, after_thought, read_marks

OUR_REWARD = "pkg://reward_fns"
"""The value of ``reward.custom_reward_function.path`` that names this package."""

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
    if data_source == "olympiadbench":
        return near_answer.check
    if data_source in MATH_SOURCES or data_source.startswith("aime"):
        return math_answer.check
    if data_source in CHOICE_SOURCES:
        return choice_answer.check
    known = ", ".join(sorted({"skpo/arithmetic"} | NUMBER_SOURCES | MATH_SOURCES | CHOICE_SOURCES))
    raise ValueError(
        f"data_source {data_source!r} has no reward here (known: {known}, aime*); change the column "
        "data_source or set reward.custom_reward_function.path to your own compute_score"
    )


def check_options(answer_format: str = "any", thought_marks: str | Sequence[str] = "auto", **unknown: Any) -> None:
    """Raise ValueError for an unknown option of `compute_score` or an unknown value: a fault of the configuration."""
    if unknown:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.{next(iter(unknown))}: is unknown; known are answer_format, "
            "thought_marks"
        )
    check_format(answer_format)
    read_marks(thought_marks)


def truth_text(ground_truth: object) -> str:
    """Return a ground truth as text: a number as it is written, 5.0 as "5" since pandas makes floats of integers.

    Raises ValueError for everything else, which is a fault of the data.
    """
    if isinstance(ground_truth, str):
        return ground_truth
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, (int, float, Decimal)):
        raise ValueError(
            f"ground_truth {ground_truth!r:.60} is a {type(ground_truth).__name__}; write a text or a number"
        )
    whole = isinstance(ground_truth, float) and ground_truth.is_integer()
    return str(int(ground_truth) if whole else ground_truth)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | int | float | Decimal,
    extra_info: dict[str, Any] | None = None,
    answer_format: str = "any",
    thought_marks: str | Sequence[str] = "auto",
    **kwargs: Any,
) -> dict[str, float | str]:
    """Check one response.

    Two options are set through ``reward.custom_reward_function.reward_kwargs``. `answer_format` (`forms.AnswerFormat`):
    "any" takes the answer from a box, after "####" or from a statement "Answer: ..."; "boxed", "hash" and "line" take
    that form alone. `thought_marks` (`thoughts.read_marks`): "auto", "none", or the opening and the closing mark.
    What follows the last thought counts: `extra_info["response_after_thought"]` where it is there, because whoever
    decoded the response saw its prompt and special tokens, else what the marks in `solution_str` leave.

    Returns `score` (+1.0 correct, -1.0 not), `acc` (1.0 or 0.0), `well_formed` (1.0 if an answer in the
    expected form was found, right or wrong) and `pred` (that answer, "" if none). `kwargs` are verl's
    and not used. Raises ValueError for an unknown data source or option, or a ground truth that is not an answer, never
    because of `solution_str`.
    """
    check_options(answer_format, thought_marks)
    truth = truth_text(ground_truth)
    told = (extra_info or {}).get(AFTER_THOUGHT)
    text = told if isinstance(told, str) else after_thought(solution_str, thought_marks)
    pred, correct = route(data_source)(text[-TAIL_CHARACTERS:], truth, answer_format)
    return {
        "score": 1.0 if correct else -1.0,
        "acc": 1.0 if correct else 0.0,
        "well_formed": 1.0 if pred else 0.0,
        "pred": pred,
    }
