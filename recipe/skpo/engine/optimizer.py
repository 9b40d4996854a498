"""The optimizer of a resumed run, with the settings of the command that resumes it."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


def use_own_settings(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> float:
    """Restore the settings the optimizer was made with: loading replaces learning rate, weight decay and betas.

    Args:
        optimizer: after ``load_state_dict``; its moments are kept.
        scheduler: likewise; it stays at its step.

    Returns:
        The learning rate of the next update.
    """
    own = optimizer.defaults
    for group in optimizer.param_groups:
        group.update({name: value for name, value in own.items() if name in group}, initial_lr=own["lr"])
    scheduler.base_lrs = [own["lr"] for _ in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = own["lr"] * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return float(scheduler._last_lr[0])


def use_own_settings_in_worker(worker: Any) -> float | None:
    """Call ``use_own_settings`` for the actor's engine inside verl's worker process; None if it has no actor."""
    # verl puts the workers that share a GPU into one process.
    for role in getattr(worker, "worker_dict", {"actor": worker}).values():
        engine = getattr(getattr(role, "actor", None), "engine", None)
        if engine is not None:
            return use_own_settings(engine.optimizer, engine.lr_scheduler)
    return None
