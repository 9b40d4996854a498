"""Both surrogates of SKPO per token, as losses to minimise (paper equations 5 and 6; docs/method.md, section 9).

With r_t = exp(log pi(token) - log pi_old(token)) and the clip range [1 - e_low, 1 + e_high]:

    upstream    -min(r_t A~, clip(r_t) A~)
    downstream  -sg(clip(r_t)) A_i log pi(token)

Downstream the clipped ratio is a detached weight and the gradient flows through log pi alone, so a clipped token still
learns.  An update's loss is the sum over its tokens, each times the loss weight of its row (``loss_weights``): a sum
does not depend on which rows a micro-batch holds, and a factor outside the clipping changes neither surrogate.
"""

import torch

_LOG_RATIO_BOUND = 20.0
"""Bound of log r, as in verl's own losses: exp(20) is outside every clip range, exp(1000) is inf and inf * 0 is NaN."""

_KL_BOUND = 3.0
"""Largest log-ratio of a token that the KL metric counts, in nats; the objective does not know it."""


def upstream_loss(ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float) -> torch.Tensor:
    """Return the summand of equation 6 per token, negated: the clipped surrogate, (rows, tokens).

    Args:
        ratio: r_t under q alone, (rows, tokens).
        advantages: A~, (rows, tokens).
        clip_low: e_low.
        clip_high: e_high.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def downstream_loss(
    ratio: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """Return the summand of equation 5 per token, negated: log pi, weighted by the detached ratio, (rows, tokens).

    Args:
        ratio: r_t under [s, q], (rows, tokens).
        log_prob: log pi of the token, in nats, (rows, tokens).
        advantages: A_i, (rows, tokens).
        clip_low: e_low.
        clip_high: e_high.
    """
    return -ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * log_prob


def token_losses(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    upstream: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """Return each token's loss by the surrogate of its row's phase, before loss weights, (rows, tokens).

    Args:
        log_prob: log pi of the token, in nats, (rows, tokens).
        old_log_prob: the same under the policy before the step, (rows, tokens).
        advantages: A~ or A_i, (rows, tokens).
        upstream: whether the row is a segment, bool (rows,).
        clip_low: e_low.
        clip_high: e_high.
    """
    ratio = _log_ratio(log_prob, old_log_prob).exp()
    return torch.where(
        upstream.unsqueeze(-1),
        upstream_loss(ratio, advantages, clip_low, clip_high),
        downstream_loss(ratio, log_prob, advantages, clip_low, clip_high),
    )


def _log_ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    return (log_prob - old_log_prob).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)


@torch.no_grad()
def phase_sums(
    losses: torch.Tensor,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    mask: torch.Tensor,
    upstream: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> dict[str, float]:
    """Return the sums from which ``metrics.update_metrics`` makes the shares of an update.

    Args:
        losses: what each token adds to the loss, (rows, tokens).
        log_prob: log pi of the token, in nats, (rows, tokens).
        old_log_prob: the same under the policy before the step, (rows, tokens).
        mask: whether the token is trained, bool (rows, tokens).
        upstream: whether the row is a segment, bool (rows,).
        clip_low: e_low.
        clip_high: e_high.
    """
    log_ratio = _log_ratio(log_prob, old_log_prob)
    ratio = log_ratio.exp()
    # k3 estimator of KL(pi_old || pi) per token: never negative.  Bounded, because a single token far out would make
    # the running mean of the drift clock so large that the steps after it read as none.
    bounded = log_ratio.clamp(-_KL_BOUND, _KL_BOUND)
    counted = {
        "loss": losses,
        "tokens": torch.ones_like(log_ratio),
        "clipped_low": ratio < 1 - clip_low,
        "clipped_high": ratio > 1 + clip_high,
        "kl": bounded.exp() - 1 - bounded,
    }
    phases = {"upstream": mask & upstream.unsqueeze(-1), "downstream": mask & ~upstream.unsqueeze(-1)}
    names = [f"skpo/{phase}/{name}_sum" for phase in phases for name in counted]
    sums = [values.where(tokens, 0).sum() for tokens in phases.values() for values in counted.values()]
    # One transfer from the device for all of them.
    found = dict(zip(names, torch.stack([value.to(log_ratio.dtype) for value in sums]).tolist(), strict=True))
    return {"skpo/loss": found["skpo/upstream/loss_sum"] + found["skpo/downstream/loss_sum"]} | found
