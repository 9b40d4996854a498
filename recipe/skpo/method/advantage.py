"""Advantages of both phases, per row.

docs/method.md, sections 7 and 8.  Upstream is single-stream: one segment per prompt against its own temporal baseline,
normalised over the batch.  Downstream is group-relative: the G siblings of one skip prompt against each other.

    upstream    A = R_I - V_before           A~ = (A - mean_B A) / (std_B A + eps)
    downstream  A_i = (R_i - mean R) / std R        a group with equal rewards gets 0

Both standard deviations are those of the population (divided by n); the paper does not say.  Rows that are not valid
(padding, failed siblings) move no statistic and get 0.
"""

import torch

from recipe.skpo.method.rows import UPSTREAM

EPSILON = 1e-8
"""Added to the batch standard deviation upstream; also below it a downstream group counts as equal."""


def _checked_mask(rewards: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be 1-D (one per row), got shape {tuple(rewards.shape)}")
    mask = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.to(torch.bool)
    if mask.shape != rewards.shape:
        raise ValueError(f"valid has shape {tuple(mask.shape)}, rewards {tuple(rewards.shape)}")
    return mask


def single_stream_advantage(
    rewards: torch.Tensor, baselines: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Batch-normalised advantage of the upstream segments, docs/method.md section 7.

    Args:
        rewards: R_I in [-1, 1], float (rows,).
        baselines: tracker values mapped to [-1, 1], read BEFORE this batch's update, float (rows,).
        valid: bool (rows,); rows that are no upstream row of the batch are False.  None means all are.

    Returns:
        (rows,), dtype of ``rewards``: A~, 0 where not valid.  A single valid row, or rows that are all equal, give 0.

    Raises:
        ValueError: shapes that differ or are not 1-D.
    """
    mask = _checked_mask(rewards, valid)
    if baselines.shape != rewards.shape:
        raise ValueError(f"baselines have shape {tuple(baselines.shape)}, rewards {tuple(rewards.shape)}")
    advantage = torch.zeros_like(rewards)
    if mask.any():
        # In float64: the rounding of a float32 mean is as large as EPSILON, and equal rows would not give 0.
        raw = (rewards.double() - baselines.double())[mask]
        advantage[mask] = ((raw - raw.mean()) / (raw.std(correction=0) + EPSILON)).to(rewards.dtype)
    return advantage


def group_relative_advantage(
    rewards: torch.Tensor, group_ids: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Advantage of each downstream response among its siblings, docs/method.md section 8.

    Args:
        rewards: R_II, float (rows,).
        group_ids: integer (rows,) or float with integer values; rows with the same id are siblings.
        valid: bool (rows,), False for rows to leave out of mean and std.  None means all are valid.

    Returns:
        (rows,), dtype of ``rewards``; 0 where not valid and in groups whose rewards are equal (a group of one too).

    Raises:
        ValueError: shapes that differ or are not 1-D.
    """
    mask = _checked_mask(rewards, valid)
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids have shape {tuple(group_ids.shape)}, rewards {tuple(rewards.shape)}")
    groups, member = torch.unique(group_ids, return_inverse=True)
    # In float64, so that rounding cannot pass for a difference between equal rewards.
    weight, value = mask.double(), rewards.double()
    zeros = torch.zeros(groups.numel(), dtype=torch.float64)
    size = zeros.index_add(0, member, weight).clamp(min=1)
    mean = zeros.index_add(0, member, value * weight) / size
    centred = (value - mean[member]) * weight
    std = (zeros.index_add(0, member, centred**2) / size).sqrt()[member]
    advantage = torch.where(std > EPSILON, centred / std.clamp(min=EPSILON), torch.zeros_like(value))
    return advantage.to(rewards.dtype)


def skpo_advantage(
    rewards: torch.Tensor,
    baselines: torch.Tensor,
    phase: torch.Tensor,
    prompts: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """Both phases of one batch; what ``algorithm.adv_estimator=skpo`` names.

    Args:
        rewards: R_I on upstream rows, R_II on downstream rows, float (rows,).
        baselines: as in ``single_stream_advantage``; read on upstream rows only.
        phase: ``UPSTREAM`` or ``DOWNSTREAM`` per row.
        prompts: number of the row's prompt, integer (rows,); its downstream rows are one group.
        valid: bool (rows,), False for padding and failed siblings.

    Returns:
        (rows,), 0 where not valid.
    """
    upstream = phase == UPSTREAM
    return torch.where(
        upstream,
        single_stream_advantage(rewards, baselines, valid & upstream),
        group_relative_advantage(rewards, prompts, valid & ~upstream),
    )
