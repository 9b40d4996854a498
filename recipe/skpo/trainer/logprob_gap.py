"""How far the log-probs of rollout and actor are apart, and how far they may be.

Both are of the same tokens under the same weights, so they differ by rounding alone, as long as the servers have the
actor's weights.  A policy that rolls out other weights than it trains shows here and nowhere else.
"""

import logging
import math
from typing import Any

import torch

from recipe.skpo.method.rows import Ragged

logger = logging.getLogger(__name__)

METRIC = "skpo/rollout_actor_logprob_gap/mean"


def mean_gap(first: Ragged, second: Ragged, valid: torch.Tensor) -> float:
    """Return the mean of abs(first - second) over the tokens of the valid rows, 0 if none is valid.

    Rows that are not valid may differ in length.
    """
    columns = first.split(), second.split()
    pairs = [(columns[0][row], columns[1][row]) for row in valid.nonzero().flatten().tolist()]
    gaps = [float(torch.dist(*pair, p=1)) for pair in pairs]
    return sum(gaps) / max(1, sum(len(values) for values, _ in pairs))


def allowed_gap(limit: float | None, rollout: Any) -> float | None:
    """Mean gap in nats per token above which a run stops, or None if nothing is known about it; says so once.

    The actor's log-probs are of the whole distribution at the rollout's temperature.  Those of the rollout are of what
    was sampled from: with ``top_p`` the kept tokens hold at least that share, so each is at most -log(top_p) higher.
    With ``top_k`` there is no such bound, and raw log-probs are of another temperature.

    Args:
        limit: ``skpo.max_logprob_gap``.
        rollout: verl's rollout config.
    """
    reasons = {
        "calculate_log_probs": not rollout.calculate_log_probs,
        "top_k": (rollout.get("top_k") or -1) > 0,
        "logprobs_mode": rollout.get("logprobs_mode", "processed_logprobs") != "processed_logprobs",
    }
    for name in [name for name, holds in reasons.items() if holds and limit is not None]:
        logger.warning(
            "skpo.max_logprob_gap is not checked: with actor_rollout_ref.rollout.%s=%s rollout and actor differ for "
            "another reason than their weights",
            name,
            rollout.get(name),
        )
        return None
    return None if limit is None else limit - math.log(rollout.get("top_p") or 1.0)
