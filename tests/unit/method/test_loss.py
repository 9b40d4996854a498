"""Equations 5 and 6 token by token: clipping, detached weights, far ratios, and the sums that the run logs.

The gradients of whole batches against plain loops are in tests/golden.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.skpo.method.loss import phase_sums, token_losses
from recipe.skpo.method.tracker import DriftClock
from recipe.skpo.output.metrics import update_metrics

CLIPS = (0.2, 0.28)
seeds = st.integers(0, 2**32)
UP, DOWN = torch.tensor([True]), torch.tensor([False])
both = pytest.mark.parametrize("upstream", [UP, DOWN], ids=["upstream", "downstream"])


def one_token(upstream: torch.Tensor, ratio: float, advantage: float) -> tuple[float, float]:
    """Return the loss of a token with this ratio, and its gradient by the log-prob."""
    log_prob = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    value = token_losses(log_prob, old, torch.tensor([[advantage]], dtype=torch.float64), upstream, *CLIPS)
    value.sum().backward()
    return float(value.detach()), float(log_prob.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),  # inside the range, the upper bound is the wider one
        (1.5, 2.0, -2.56, 0.0),  # good and already likelier: held at 1 + e_high
        (0.5, 2.0, -1.0, -1.0),  # good but less likely: free to come back
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: held at 1 - e_low
        (0.75, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),  # bad but likelier: free to come back
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_upstream_surrogate_is_clipped_on_the_pessimistic_side(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    assert one_token(UP, ratio, advantage) == pytest.approx((loss, gradient), rel=1e-9)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.8), (0.9, 0.9), (1.0, 1.0), (1.25, 1.25), (1.5, 1.28)])
def test_downstream_gradient_is_the_clipped_ratio_also_where_it_clips(
    ratio: float, weight: float, advantage: float
) -> None:
    loss, gradient = one_token(DOWN, ratio, advantage)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-9)
    assert loss == pytest.approx(-weight * advantage * (math.log(ratio) - 1.0), rel=1e-9)


@both
@pytest.mark.parametrize("move", [500.0, -500.0])
def test_a_ratio_beyond_all_bounds_stays_finite(upstream: torch.Tensor, move: float) -> None:
    leaf = torch.tensor([[-600.0 + move, -1.0]], requires_grad=True)
    old, advantages = torch.tensor([[-600.0, -1.0]]), torch.tensor([[-1.0, -1.0]])
    value = token_losses(leaf, old, advantages, upstream, *CLIPS)
    value.sum().backward()
    assert leaf.grad is not None
    assert bool(value.isfinite().all()) and bool(leaf.grad.isfinite().all())


@settings(max_examples=30)
@given(seed=seeds)
def test_a_positive_factor_of_the_advantages_is_one_of_the_losses(seed: int) -> None:
    # What lets loss weights and importance weights stand outside of the clipping and of the detached weight.
    rng = np.random.default_rng(seed)
    old = torch.from_numpy(-rng.exponential(1.0, (3, 5)))
    new, advantages, factor = (
        torch.from_numpy(values)
        for values in (old.numpy() + rng.normal(0, 0.4, (3, 5)), rng.normal(size=(3, 5)), rng.exponential(size=(3, 5)))
    )
    upstream = torch.from_numpy(rng.random(3) < 0.5)
    outside = token_losses(new, old, advantages, upstream, *CLIPS) * factor
    torch.testing.assert_close(token_losses(new, old, advantages * factor, upstream, *CLIPS), outside)


# ---------------------------------------------------------------- sums


@settings(max_examples=15)
@given(seed=seeds)
def test_shares_are_those_of_the_trained_tokens_of_each_phase(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (4, 6))
    new, losses, mask = old + rng.normal(0, 0.35, (4, 6)), rng.normal(size=(4, 6)), rng.random((4, 6)) < 0.7
    phases = {"upstream": rng.random(4) < 0.5}
    phases["downstream"] = ~phases["upstream"]
    sums = phase_sums(*map(torch.from_numpy, (losses, new, old, mask, phases["upstream"])), *CLIPS)
    shares, step_kl = update_metrics(sums)

    assert shares["skpo/loss"] == pytest.approx(losses[mask].sum())
    move = new - old
    measured = {
        "ratio_clipped_low_share": np.exp(move) < 1 - CLIPS[0],
        "ratio_clipped_high_share": np.exp(move) > 1 + CLIPS[1],
        "kl": np.exp(move) - 1 - move,
    }
    for phase, rows in phases.items():
        tokens = mask & rows[:, None]
        assert shares[f"skpo/{phase}/loss"] == pytest.approx(losses[tokens].sum())
        for name, values in measured.items():
            expected = values[tokens].mean() if tokens.any() else 0.0
            assert shares[f"skpo/{phase}/{name}"] == pytest.approx(expected)
    assert step_kl == pytest.approx(measured["kl"][mask].mean() if mask.any() else 0.0)


def test_one_token_far_out_does_not_blind_the_drift_clock() -> None:
    new, old = torch.full((1, 100), -0.5), torch.full((1, 100), -0.5)
    old[0, -1] = -50.5
    outlier = phase_sums(torch.zeros(1, 100), new, old, torch.ones(1, 100, dtype=torch.bool), DOWN, *CLIPS)
    clock, ordinary = DriftClock(), 0.05
    clock.advance(outlier["skpo/downstream/kl_sum"] / 100)
    then = clock.steps, clock.total_kl
    for _ in range(20):
        clock.advance(ordinary)
    assert 15 < clock.since(*then) <= 20.5, "twenty ordinary steps"
