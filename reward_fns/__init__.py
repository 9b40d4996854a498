"""Answer checking: `compute_score` is the entry point that verl calls (R = 2 * 1[correct] - 1).

`data_source` selects the check: numbers (`numeric_answer`), mathematics (`math_answer`), numbers with a tolerance
(`near_answer`), multiple choice (`choice_answer`) or programs (`code_answer`). `thoughts` removes the thought from the
response, `forms` finds the answer in the rest. Text of a model is executed for the sources of programs alone, in a
sandbox (`code_worker`). Time and memory are bounded, see `judge` and `code_judge`.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from reward_fns import choice_answer, code_answer, code_judge, math_answer, near_answer, numeric_answer
from reward_fns.code_judge import RunOptions
from reward_fns.forms import read_format
from reward_fns.thoughts import AFTER_THOUGHT, after_thought, read_marks

OUR_REWARD = "pkg://reward_fns"
"""The value of ``reward.custom_reward_function.path`` that names this package."""

# Answers are at the end. Reading only this much keeps a runaway response from costing time.
TAIL_CHARACTERS = 2000

STRICT_SOURCES = frozenset({"skpo/arithmetic", "skpo/steps"})
"""Tasks whose solutions end in the form "#### number": the form is part of the task."""
NUMBER_SOURCES = frozenset({"openai/gsm8k", "own/number"})
MATH_SOURCES = frozenset(
    {
        *(
            "lighteval/MATH",
            "DigitalLearningGmbH/MATH-lighteval",
            "EleutherAI/hendrycks_math",
            "HuggingFaceH4/MATH-500",
        ),
        *("BytedTsinghua-SIA/DAPO-Math-17k", "math_dapo", "math_dapo_reasoning"),
        *("math", "amc23", "minerva_math", "olympiadbench", "own/math"),
    }
)  # and everything that starts with "aime"
CHOICE_SOURCES = frozenset({"TIGER-Lab/MMLU-Pro", "Idavidrein/gpqa", "lukaemon/bbh", "own/choice"})
CODE_SOURCES = frozenset(
    {
        *("livecodebench/code_generation_lite", "openai/openai_humaneval", "evalplus/humanevalplus"),
        *("google-research-datasets/mbpp", "evalplus/mbppplus", "codeparrot/apps", "likaixin/TACO-verified"),
        *("skpo/code", "own/code"),
    }
)

Check = Callable[[str, str, str], tuple[str, bool]]


def route(data_source: str) -> Check:
    """Return the check for a data source: (end of the response, ground truth, answer format) -> (answer, correct).

    Raises:
        ValueError: the source has no check.
    """
    if data_source in STRICT_SOURCES:
        # `answer_format` does not loosen it.
        return lambda text, truth, _: numeric_answer.check(text, truth)
    if data_source in NUMBER_SOURCES:
        return numeric_answer.check_any
    if data_source == "olympiadbench":
        return near_answer.check
    if data_source in MATH_SOURCES or data_source.startswith("aime"):
        return math_answer.check
    if data_source in CHOICE_SOURCES:
        return choice_answer.check
    if data_source in CODE_SOURCES:
        # A program is judged as `answer_format` does not say: by the options of `compute_score`, here their defaults.
        return lambda text, truth, _: code_answer.check(text, truth, RunOptions())
    known = ", ".join(sorted(STRICT_SOURCES | NUMBER_SOURCES | MATH_SOURCES | CHOICE_SOURCES | CODE_SOURCES))
    raise ValueError(
        f"data_source {data_source!r} has no reward here (known: {known}, aime*); change the column "
        "data_source or set reward.custom_reward_function.path to your own compute_score"
    )


def check_options(
    answer_format: str = "any",
    thought_marks: str | Sequence[str] = "auto",
    code_sandbox: str = RunOptions.sandbox,
    code_seconds: float = RunOptions.seconds,
    code_memory_mb: int = RunOptions.memory_mb,
    **unknown: Any,
) -> None:
    """Refuse unknown options of `compute_score` and unknown values.

    Raises:
        ValueError: an unknown option or value; the configuration is wrong.
    """
    if unknown:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.{next(iter(unknown))}: is unknown; known are answer_format, "
            "thought_marks, code_sandbox, code_seconds, code_memory_mb"
        )
    read_format(answer_format)
    read_marks(thought_marks)
    RunOptions(code_sandbox, code_seconds, code_memory_mb)


def truth_text(ground_truth: object) -> str:
    """Return a ground truth as text: numbers as written, 5.0 as "5" because pandas turns integers into floats.

    Raises:
        ValueError: the ground truth is neither text nor a number; the data are wrong.
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
    code_sandbox: str = RunOptions.sandbox,
    code_seconds: float = RunOptions.seconds,
    code_memory_mb: int = RunOptions.memory_mb,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Check one response.

    The options are set through ``reward.custom_reward_function.reward_kwargs``. The text after the last thought
    counts. It is taken from `extra_info["response_after_thought"]` if present, because the code that decoded the
    response saw its prompt and special tokens; otherwise it is found by the marks in `solution_str`.

    Args:
        data_source: selects the check, see `route`.
        solution_str: the response; only its last `TAIL_CHARACTERS` characters are read, of a program's
            `code_answer.MOST_CHARACTERS`.
        ground_truth: the right answer.
        extra_info: see above.
        answer_format: "any" takes the answer from a box, after "####" or from a statement "Answer: ..."; "boxed",
            "gsm8k" and "line" accept only that form (`forms.AnswerFormat`).
        thought_marks: "auto", "none", or the opening and the closing mark (`thoughts.read_marks`).
        code_sandbox: "namespaces" or "rlimits", how programs are run (`code_judge.RunOptions`).
        code_seconds: processor time of one test of a program.
        code_memory_mb: MiB of a program.
        kwargs: verl's other arguments, unused.

    Returns:
        `score` (+1.0 correct, -1.0 not), `acc` (1.0 or 0.0), `well_formed` (1.0 if an answer in the expected form was
        found, right or wrong) and `pred` (that answer, "" if none; of a program the verdict, `code_judge.VERDICTS`).

    Raises:
        SandboxError: programs cannot be run in this sandbox here.
        ValueError: an unknown data source or option, or a ground truth that is not an answer; never because of
            `solution_str`.
    """
    answer_format = read_format(answer_format)
    truth = truth_text(ground_truth)
    given = (extra_info or {}).get(AFTER_THOUGHT)
    text = given if isinstance(given, str) else after_thought(solution_str, thought_marks)
    pred: str
    if data_source in CODE_SOURCES:
        options = RunOptions(code_sandbox, code_seconds, code_memory_mb)
        code_judge.ready(options)
        pred, correct = code_answer.check(text[-code_answer.MOST_CHARACTERS :], truth, options)
    else:
        pred, correct = route(data_source)(text[-TAIL_CHARACTERS:], truth, answer_format)
    return {
        "score": 1.0 if correct else -1.0,
        "acc": 1.0 if correct else 0.0,
        "well_formed": 1.0 if pred not in ("", "no code") else 0.0,
        "pred": pred,
    }
