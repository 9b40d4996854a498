"""What the actor's loss is made of, asked of verl's own functions before a model is loaded.

verl would answer in the first update: after a rollout, from inside a worker.
"""

import math
from typing import Any

from omegaconf import DictConfig

from recipe.skpo.checks import ACTOR, CORRECTION
from recipe.skpo.errors import ConfigError


def check_loss(config: DictConfig) -> None:
    """Refuse a clip range, a loss, a KL loss or importance weights that cannot be computed.

    The platform must have been applied, because verl's losses are imported.
    """
    import torch
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, kl_penalty
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    actor, correction = config.actor_rollout_ref.actor, config.algorithm.rollout_correction
    if config.method.name == "skpo":
        _check_clip_range(config)
    else:
        known = sorted(POLICY_LOSS_REGISTRY.keys() - {"skpo"})
        if actor.policy_loss.loss_mode not in known:
            raise ConfigError(
                f"{ACTOR}.policy_loss.loss_mode: is {actor.policy_loss.loss_mode}, must be one of {', '.join(known)} "
                f"with method={config.method.name}"
            )
    token: Any = torch.zeros(1, 1)
    if actor.use_kl_loss:
        try:
            kl_penalty(token, token, actor.kl_loss_type)
        except (NotImplementedError, AttributeError):
            raise ConfigError(
                f"{ACTOR}.kl_loss_type: is {actor.kl_loss_type}, must be kl, abs, mse or low_var_kl, each with or "
                f"without a + for straight-through gradients"
            ) from None
    if correction.rollout_is is not None:
        if correction.rollout_is not in ("token", "sequence"):
            raise ConfigError(f"{CORRECTION}.rollout_is: is {correction.rollout_is}, must be token, sequence or null")
        try:
            compute_rollout_correction_weights(token, token + 1, "token", correction.rollout_is_threshold)
        except (ValueError, TypeError):
            raise ConfigError(
                f"{CORRECTION}.rollout_is_threshold: is {correction.rollout_is_threshold}, must be an upper bound "
                f'above 0, or two bounds as in "0.5_2.0"'
            ) from None


def _check_clip_range(config: DictConfig) -> None:
    for side, alias in (("low", config.skpo.clip_low), ("high", config.skpo.clip_high)):
        path, value = f"{ACTOR}.clip_ratio_{side}", config.actor_rollout_ref.actor[f"clip_ratio_{side}"]
        if alias is not None and alias != value:
            raise ConfigError(f"skpo.clip_{side}: is {alias}, but {path} is {value}; give {path} alone")
        limit, bounds = (1.0, "inside (0, 1)") if side == "low" else (math.inf, "above 0")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < limit:
            raise ConfigError(f"{path}: is {value}, must be a number {bounds}")
        if alias is not None:
            print(f"note: skpo.clip_{side} is a former name of {path}, and the next release will not know it")
