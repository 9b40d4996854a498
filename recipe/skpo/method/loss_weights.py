"""The weight that each token of a row carries in the loss (docs/method.md, section 9).

Both objectives are means over the prompts of an update, equation 6 over a segment's tokens and equation 5 over those of
a whole group.  A micro-batch holds any part of an update, so every row gets a factor that does not depend on it.
"""

import torch

from recipe.skpo.method.rows import UPSTREAM, Rows


def loss_weights(
    rows: Rows, updates: torch.Tensor, weight_up: float, weight_down: float, aggregation: str = "group_token_mean"
) -> torch.Tensor:
    """Compute the factors with which the tokens' losses add up to the objective.

    Args:
        rows: the batch.
        updates: number of the update that trains the row, int64 (rows,).
        weight_up: weight of the upstream objective.
        weight_down: weight of the downstream objective.
        aggregation: of the downstream tokens: ``group_token_mean`` (eq. 5) or ``token_mean`` over the whole update.

    Returns:
        The factor of each token of the row, float32 (rows,), 0 where not valid.  With P the valid prompts of the row's
        update: upstream ``weight_up / (P * |s|)``; downstream ``weight_down / (P * sum_i |o_i|)`` over the prompt's
        siblings or, for ``token_mean``, ``weight_down / sum |o|`` over all responses of the update.
    """
    valid, prompts = rows.valid_mask, rows.prompts
    # A prompt's rows share its update; its prompt count is taken once per prompt, at any of its valid rows.
    pairs = torch.unique(torch.stack([updates[valid], prompts[valid]]), dim=1)
    prompts_per_update = torch.bincount(pairs[0], minlength=int(updates.max()) + 1).clamp(min=1)
    share = 1.0 / prompts_per_update[updates].to(torch.float64)
    pooled = aggregation == "token_mean"
    _, pool = torch.unique(updates if pooled else prompts, return_inverse=True)
    tokens = (rows.lengths * rows.responses).to(torch.float64)
    pool_tokens = torch.zeros(int(pool.max()) + 1, dtype=torch.float64).index_add(0, pool, tokens)
    downstream = weight_down * (torch.ones_like(share) if pooled else share) / pool_tokens[pool].clamp(min=1)
    weight = torch.where(rows.phase == UPSTREAM, weight_up * share / rows.lengths.clamp(min=1), downstream)
    return (weight * valid).to(torch.float32)
