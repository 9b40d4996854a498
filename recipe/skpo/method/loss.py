"""Both objectives of SKPO over one micro-batch, as losses to minimise.

Paper (arXiv 2604.08690), equations 5 and 6; docs/method.md, section 9.  With the ratio
r_t = exp(log pi(token) - log pi_old(token)) and the clip range [1 - e_low, 1 + e_high]:

    upstream    per prompt   (1 / |s|) sum_t min(r_t A~, clip(r_t) A~)
    downstream  per prompt   (1 / sum_i |o_i|) sum_i sum_t sg(clip(r_it)) A_i log pi(o_it | [s, q], o_i,<t)

Downstream the clipped ratio is a detached weight and the gradient flows through log pi alone, so a clipped token
still learns.  A micro-batch holds an arbitrary part of the rows, so nothing is normalised by what happens to be in
it: every row carries its share of the objective, ``skpo_row_scale`` (written by the trainer: phase weight, number of
prompts of the mini-batch and, downstream, the group's 1 / sum_i |o_i|), and micro-batch losses add up.
"""

from typing import Any

import torch

from recipe.skpo.method.rows import DOWNSTREAM, UPSTREAM

_KL_BOUND = 3.0
"""Largest log-ratio of a token that the KL metric counts, in nats; the objective does not know it."""


def _ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    # Clamped like verl's own losses do: exp(20) is far outside every clip range, exp(1000) is inf and inf * 0 is NaN.
    return torch.exp((log_prob - old_log_prob).clamp(-20.0, 20.0))


def upstream_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """Eq. 6 per row, negated: the mean over the segment's tokens of the clipped surrogate.

    Args:
        log_prob, old_log_prob: (rows, tokens), nats, under q alone.
        advantage: A~, (rows,).
        mask: (rows, tokens), 1 on tokens of the segment.
        clip_low, clip_high: e_low and e_high.

    Returns:
        (rows,); 0 for a row whose mask is empty.
    """
    ratio = _ratio(log_prob, old_log_prob)
    gain = advantage.unsqueeze(-1)
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)
    weight = mask.to(log_prob.dtype)
    return -(surrogate * weight).sum(-1) / weight.sum(-1).clamp(min=1)


def downstream_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """Eq. 5 per row, negated: the SUM over the response's tokens; the caller applies 1 / sum_i |o_i|.

    Args:
        log_prob, old_log_prob: (rows, tokens), nats, under [s, q].
        advantage: A_i, (rows,).
        mask: (rows, tokens), 1 on tokens of the response.
        clip_low, clip_high: e_low and e_high.

    Returns:
        (rows,); 0 for a row whose mask is empty.
    """
    weight = _ratio(log_prob, old_log_prob).clamp(1 - clip_low, 1 + clip_high).detach() * mask.to(log_prob.dtype)
    return -(weight * log_prob).sum(-1) * advantage


def skpo_loss(
    model_output: dict[str, Any], data: Any, dp_group: Any = None, *, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What verl calls per micro-batch, through ``actor_rollout_wg.set_loss_fn(partial(skpo_loss, clip_low=..., ...))``.

    Args:
        model_output: verl's; ``log_probs`` is a nested tensor (rows, prompt + response).
        data: the micro-batch's TensorDict.  Read: ``prompts``, ``responses``, ``response_mask``, ``old_log_probs``
            (nested (rows, response)), ``skpo_phase`` (rows,), ``skpo_advantage`` (rows,), ``skpo_row_scale`` (rows,),
            and ``dp_size``.
        dp_group: verl's, not needed: nothing is normalised across ranks here.
        clip_low, clip_high: e_low and e_high.

    Returns:
        The loss (scalar), multiplied by ``dp_size`` because data parallelism averages gradients, and metrics as verl
        ``Metric`` sums over micro-batches (see the trainer for how they become shares).
    """
    # Imported here so that the pure functions of this room are importable without verl.
    from verl.utils.metric import Metric
    from verl.workers.utils.padding import no_padding_2_padding

    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    phase, advantage, scale = data["skpo_phase"], data["skpo_advantage"], data["skpo_row_scale"]
    padded = data.select("response_mask", "old_log_probs").to_padded_tensor()
    mask, old_log_prob = padded["response_mask"].to(log_prob.dtype), padded["old_log_probs"]

    arguments = (log_prob, old_log_prob, advantage, mask, clip_low, clip_high)
    row_loss = torch.where(phase == UPSTREAM, upstream_loss(*arguments), downstream_loss(*arguments)) * scale
    loss = row_loss.sum() * data["dp_size"]

    sums = {"skpo/loss": loss.detach()}
    with torch.no_grad():
        log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)
        ratio = log_ratio.exp()
        for name, value in (("upstream", UPSTREAM), ("downstream", DOWNSTREAM)):
            tokens = mask * (phase == value).to(mask.dtype).unsqueeze(-1)
            # Aggregation across ranks is a mean, across micro-batches a sum; both are undone by dividing sums.
            sums[f"skpo/{name}/loss_sum"] = row_loss[phase == value].sum() * data["dp_size"]
            sums[f"skpo/{name}/tokens_sum"] = tokens.sum()
            sums[f"skpo/{name}/clipped_low_sum"] = (tokens * (ratio < 1 - clip_low)).sum()
            sums[f"skpo/{name}/clipped_high_sum"] = (tokens * (ratio > 1 + clip_high)).sum()
            # k3 estimator of KL(pi_old || pi) per token: never negative.  Bounded, because a single token far out would
            # make the running mean of the drift clock so large that the steps after it read as none.
            bounded = log_ratio.clamp(-_KL_BOUND, _KL_BOUND)
            sums[f"skpo/{name}/kl_sum"] = (tokens * (bounded.exp() - 1 - bounded)).sum()
    return loss, Metric.from_dict({name: float(value) for name, value in sums.items()}, aggregation="sum")
