"""Answer checking: `compute_score` is the one entry that verl calls (SPEC section 3, R = 2 * 1[correct] - 1).

It is routed by `data_source`: answers of the form "#### number" are checked here (`hash_answer`), competition
maths by verl's own string comparison. Sources that verl checks by running or parsing model text as code
(`codecontests`, `numina_*`, `geometry3k`, ...) are refused: text written by a model is never executed here.
"""

from typing import Any

from reward_fns import hash_answer

# Answers stand at the end; looking at no more than this keeps a runaway response from costing time.
TAIL_CHARACTERS = 2000

HASH_SOURCES = frozenset({"skpo/arithmetic", "openai/gsm8k"})
BOXED_SOURCES = frozenset({"lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"})
DAPO_SOURCES = frozenset({"math_dapo", "math", "math_dapo_reasoning"})  # and everything that starts with "aime"


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Check one response.

    Returns `score` (+1.0 correct, -1.0 not), `acc` (1.0 or 0.0), `well_formed` (1.0 if an answer in the
    expected form was found, right or wrong) and `pred` (that answer, "" if none). `extra_info` and `kwargs`
    are verl's and not used. Raises ValueError for an unknown data source or a ground truth that is no answer,
    never because of `solution_str`.
    """
    tail = solution_str[-TAIL_CHARACTERS:]
    if data_source in HASH_SOURCES:
        pred, correct = hash_answer.check(tail, ground_truth)
    elif data_source in BOXED_SOURCES:
        from verl.utils.reward_score import default_compute_score
        from verl.utils.reward_score.math_reward import last_boxed_only_string

        pred = last_boxed_only_string(tail) or ""
        correct = default_compute_score(data_source, tail, ground_truth) >= 1
    elif data_source in DAPO_SOURCES or data_source.startswith("aime"):
        from verl.utils.reward_score import default_compute_score

        result = default_compute_score(data_source, tail, ground_truth)
        pred = "" if result["pred"] in (None, "[INVALID]") else str(result["pred"])
        correct = bool(result["acc"])
    else:
        known = ", ".join(sorted(HASH_SOURCES | BOXED_SOURCES | DAPO_SOURCES))
        raise ValueError(
            f"data_source {data_source!r} has no reward here (known: {known}, aime*); change the column "
            "data_source or set reward.custom_reward_function.path to your own compute_score"
        )
    return {
        "score": 1.0 if correct else -1.0,
        "acc": 1.0 if correct else 0.0,
        "well_formed": 1.0 if pred else 0.0,
        "pred": pred,
    }
