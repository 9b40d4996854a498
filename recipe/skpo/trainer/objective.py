"""SKPO in verl's two registries: the advantage estimator and the policy loss named ``skpo``.

verl's ``ppo_loss`` trains the actor: it calls the policy loss and adds the entropy bonus, the KL loss and its metrics.
``skpo_loss`` is a thin wrapper around it.  It hands the phase and the loss weight of the micro-batch's rows to the
policy loss, which verl gives per-token fields only, and reports sums where verl would average.

Importing this module registers both names.  The actor's processes import it when they unpickle the loss function.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.utils import tensordict_utils
from verl.utils.metric import Metric
from verl.utils.torch_functional import masked_mean
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from recipe.skpo.method.advantage import skpo_advantage
from recipe.skpo.method.loss import phase_sums, token_losses
from recipe.skpo.method.rows import DOWNSTREAM, PHASE_FIELD, UPSTREAM, WEIGHT_FIELD

NAME = "skpo"
"""Value of ``algorithm.adv_estimator`` and of ``actor.policy_loss.loss_mode``."""

PREFIX = "skpo/"
"""Metrics of the policy loss that are sums over an update."""


@register_adv_est(NAME)
def skpo_estimator(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    reward_baselines: torch.Tensor,
    config: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the advantages of both phases in verl's form of an estimator.

    A row with a baseline is an upstream segment, compared with that baseline and normalised over the batch.  A row
    without one is a downstream response, compared with the other such rows of its ``index``.

    Args:
        token_level_rewards: float (rows, tokens); a row's reward is their sum.
        response_mask: trained tokens, (rows, tokens).  A row without any moves no statistic and gets 0.
        index: name of the row's prompt, (rows,).
        reward_baselines: float (rows,), in [-1, 1]; NaN on downstream rows.
        config: ``algorithm``; not read.
        kwargs: what else verl hands to estimators; not read.

    Returns:
        Advantages and returns, the same tensor: (rows, tokens), 0 where not trained.
    """
    rewards = token_level_rewards.sum(-1)
    groups = torch.from_numpy(np.unique(index, return_inverse=True)[1])
    phase = torch.where(reward_baselines.isnan(), DOWNSTREAM, UPSTREAM)
    advantages = skpo_advantage(rewards, reward_baselines, phase, groups, response_mask.any(-1))
    per_token = advantages.unsqueeze(-1) * response_mask.to(advantages.dtype)
    return per_token, per_token


@dataclass(frozen=True)
class MicroBatchRows:
    """What the policy loss needs of a micro-batch beyond verl's per-token fields.

    Attributes:
        upstream: whether the row is a segment, bool (rows,).
        loss_weights: factor of each of the row's tokens in the loss, float (rows,).
    """

    upstream: torch.Tensor
    loss_weights: torch.Tensor


@register_policy_loss(NAME)
def skpo_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-sum",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Compute the loss of equations 5 and 6 over a micro-batch.

    Args:
        old_log_prob: log pi_old of the tokens, in nats, (rows, tokens).
        log_prob: log pi of the tokens, (rows, tokens).
        advantages: A~ on upstream rows, A_i on downstream rows, (rows, tokens).
        response_mask: trained tokens, bool (rows, tokens).
        loss_agg_mode: not read.  The loss weights normalise, so the tokens are summed; the mode governs the entropy
            bonus and the KL loss.
        config: verl's ``ActorConfig``, with ``MicroBatchRows`` bound to it by ``skpo_loss``.
        rollout_is_weights: importance weights of rollout correction, (rows, tokens).

    Returns:
        The loss, multiplied by the data-parallel size because data parallelism averages gradients; and metrics.

    Raises:
        ValueError: the config holds no rows.
    """
    rows: MicroBatchRows | None = config.get("skpo_rows", None)
    if rows is None:
        raise ValueError("policy_loss.loss_mode: is skpo, which needs the rows of method=skpo; set method=skpo")
    clips = (config.clip_ratio_low, config.clip_ratio_high)
    losses = token_losses(log_prob, old_log_prob, advantages, rows.upstream, *clips)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    losses = losses * rows.loss_weights.unsqueeze(-1)
    dp_size = config.global_batch_info["dp_size"]
    loss = agg_loss(losses, response_mask, "token-sum", dp_size=dp_size)
    sums = phase_sums(losses * dp_size, log_prob, old_log_prob, response_mask, rows.upstream, *clips)
    return loss, sums | {"actor/ppo_kl": masked_mean(old_log_prob - log_prob, response_mask).item()}


def skpo_loss(
    config: ActorConfig, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Compute verl's ``ppo_loss`` of a micro-batch with the policy loss of SKPO.

    Args:
        config: of the actor, with ``policy_loss.loss_mode=skpo``.
        model_output: verl's; ``log_probs`` and, if computed, ``entropy``: nested (rows, prompt + response).
        data: the micro-batch, with ``PHASE_FIELD`` and ``WEIGHT_FIELD`` (rows,) besides what ``ppo_loss`` reads.
        dp_group: verl's.

    Returns:
        The loss (scalar) and metrics; those below ``skpo/`` are sums over micro-batches.
    """
    bound = copy(config)
    bound.skpo_rows = MicroBatchRows(data[PHASE_FIELD] == UPSTREAM, data[WEIGHT_FIELD])
    # An update of padding alone has no token, and 0 / 0 would be the mean of its entropies.
    tensordict_utils.assign_non_tensor(data, batch_num_tokens=max(1, data["batch_num_tokens"]))
    loss, metrics = ppo_loss(bound, model_output, data, dp_group)
    sums = {name: metric.aggregate() for name, metric in metrics.items() if name.startswith(PREFIX)}
    return loss, metrics | Metric.from_dict(sums, aggregation="sum")
