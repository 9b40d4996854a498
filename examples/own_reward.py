r"""A reward function of your own: right or wrong by the last number, less something for length.

bash run_skpo.sh reward.custom_reward_function.path=examples/own_reward.py \
    +reward.custom_reward_function.reward_kwargs.free_words=100

docs/rewards.md, "Your own reward function", has the contract.
"""

import re
from typing import Any


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    free_words: int = 200,
) -> dict[str, float | str]:
    """Score one response.

    Args:
        data_source: the row's column of that name.
        solution_str: the response as text, without special tokens; empty in the check before the start.
        ground_truth: the row's ``reward_model.ground_truth``.
        extra_info: the row's column of that name, with keys that verl adds.
        free_words: from ``reward_kwargs``; each word above takes 0.001 from a right answer, at most 0.5.

    Returns:
        ``score``, the reward, within [-1, 1] because the value tracker maps that range to [0, 1]; ``acc``, which the
        summary shows as the accuracy; ``pred``, which rollout trees show as the answer.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", solution_str.replace(",", ""))
    answer = numbers[-1] if numbers else ""
    right = bool(answer) and float(answer) == float(ground_truth)
    too_long = max(0, len(solution_str.split()) - free_words)
    return {"score": 1.0 - min(0.5, 0.001 * too_long) if right else -1.0, "acc": float(right), "pred": answer}
