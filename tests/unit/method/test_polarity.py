"""Entropy polarity (docs/method.md, section 17) in float64; tests/golden compares it with plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tests.support.reference  # noqa: F401  (how hypothesis runs)
from recipe.skpo.method import polarity as module
from recipe.skpo.method.polarity import EntropyTrajectory, entropy_slopes, polarity, reweighted

seeds = st.integers(0, 2**32)


def random_policy(seed: int, size: int = 7) -> torch.Tensor:
    """Logits of one state, float64 (size,)."""
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(0, float(rng.uniform(0.2, 4)), size))


def entropy(logits: torch.Tensor) -> float:
    return float(torch.special.entr(logits.softmax(-1)).sum())


def slopes_of_all(logits: torch.Tensor) -> torch.Tensor:
    """T of every token of one state."""
    return entropy_slopes(logits.log_softmax(-1).expand(len(logits), -1), torch.arange(len(logits)))


def gradient_step(logits: torch.Tensor, token: int, advantage: float, eta: float) -> torch.Tensor:
    """One step up the gradient of advantage * log pi(token)."""
    ascent = -logits.softmax(-1)
    ascent[token] += 1
    return logits + eta * advantage * ascent


@pytest.mark.parametrize("advantage", [1.5, -0.7])
@given(seed=seeds)
def test_the_entropy_moves_as_predicted_up_to_the_square_of_the_step(advantage: float, seed: int) -> None:
    logits = random_policy(seed)
    token = int(np.random.default_rng(seed).integers(len(logits)))
    slope = float(polarity(torch.tensor([advantage]), slopes_of_all(logits)[token : token + 1]))

    def error(eta: float) -> float:
        return abs(entropy(gradient_step(logits, token, advantage, eta)) - entropy(logits) - eta * slope)

    coarse, fine = error(1e-3), error(1e-4)
    assert coarse < 1e-5
    assert fine < coarse / 50 or fine < 1e-12, "ten times smaller steps, a hundred times smaller errors"


@given(seed=seeds)
def test_slopes_have_mean_zero_under_the_policy(seed: int) -> None:
    logits = random_policy(seed)
    found, probs, level = slopes_of_all(logits).tolist(), logits.softmax(-1).tolist(), entropy(logits)
    assert sum(prob * slope for prob, slope in zip(probs, found, strict=True)) == pytest.approx(0, abs=1e-15)
    rare = [slope for prob, slope in zip(probs, found, strict=True) if prob <= math.exp(-level)]
    assert all(slope > 0 for slope in rare), "rewarding a token below e^-H expands"


def test_the_policy_that_is_uniform_on_its_support_has_no_slope() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, 0.0], dtype=torch.float64)
    slopes = entropy_slopes(logits.log_softmax(-1).expand(3, -1), torch.tensor([0, 2, 3]))
    assert slopes.abs().max() < 1e-16


@pytest.mark.parametrize(("token", "advantage", "sign"), [(0, 1.0, -1), (0, -1.0, 1), (2, 1.0, 1), (2, -1.0, -1)])
def test_four_quadrants(token: int, advantage: float, sign: int) -> None:
    logits = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64)  # a frequent token, two rare ones
    found = polarity(torch.tensor([advantage]), slopes_of_all(logits)[token : token + 1])
    assert found.sign().item() == sign
    moved = entropy(gradient_step(logits, token, advantage, 1e-3)) - entropy(logits)
    assert math.copysign(1, moved) == sign


def test_float32_keeps_the_sign_where_the_policy_is_nearly_certain() -> None:
    logits = torch.tensor([0.0, -12.0, -13.0, -12.5], dtype=torch.float64) + 20
    labels = torch.tensor([0, 1])
    exact, single = (
        entropy_slopes(logits.to(dtype).log_softmax(-1).expand(2, -1), labels)
        for dtype in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(single.double(), exact, rtol=1e-2, atol=0)


# ---------------------------------------------------------------- reweighting


def some_tokens(seed: int, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and slopes, some of either 0."""
    rng = np.random.default_rng(seed)
    advantages, slopes = rng.normal(0, 1, count), rng.normal(-0.1, 0.2, count)
    advantages[rng.random(count) < 0.2] = 0
    slopes[rng.random(count) < 0.1] = 0
    return torch.tensor(advantages), torch.tensor(slopes)


def test_a_phase_above_zero_moves_the_predicted_entropy_up() -> None:
    advantages, slopes = some_tokens(3)
    predicted = [
        float(polarity(reweighted(advantages, slopes, phase, 0.5), slopes).mean()) for phase in (-1, -0.3, 0, 0.3, 1)
    ]
    assert predicted == sorted(predicted)
    assert len(set(predicted)) == 5


@pytest.mark.parametrize(("phase", "strength"), [(0.7, 0.0), (0.0, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_strength_or_phase_no_bit_changes(phase: float, strength: float, dtype: torch.dtype) -> None:
    advantages, slopes = (values.to(dtype) for values in some_tokens(1))
    found = reweighted(advantages, slopes, phase, strength)
    assert found.dtype == dtype
    assert torch.equal(found, advantages)
    none = reweighted(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), 0.5, 0.5)
    assert torch.equal(none, torch.zeros(3, dtype=dtype)), "a step without a signal has none afterwards"


def test_the_order_of_tokens_does_not_matter_and_a_part_of_the_step_is_another_step() -> None:
    advantages, slopes = some_tokens(5)
    order = torch.tensor(np.random.default_rng(0).permutation(len(advantages)))
    whole = reweighted(advantages, slopes, 0.6, 0.8)
    torch.testing.assert_close(reweighted(advantages[order], slopes[order], 0.6, 0.8), whole[order], rtol=1e-14, atol=0)
    half = reweighted(advantages[:100], slopes[:100], 0.6, 0.8)
    assert not torch.allclose(half, whole[:100], rtol=1e-3), "normalised over the step, not over parts of it"


# ---------------------------------------------------------------- target and phase


def test_the_moving_average_is_read_before_it_takes_the_step_in() -> None:
    trajectory = EntropyTrajectory(decay=0.75)
    assert trajectory.aim is None
    assert trajectory.phase(2.0) == 0.0
    assert trajectory.observe(2.0, 0.1) is None
    assert trajectory.aim == 2.0
    assert trajectory.phase(1.5) == pytest.approx(0.25)
    assert trajectory.observe(1.5, 0.1) == -0.5
    assert trajectory.aim == pytest.approx(0.75 * 2.0 + 0.25 * 1.5)


@pytest.mark.parametrize(("entropy", "phase"), [(0.0, 1.0), (1.0, 0.5), (2.0, 0.0), (3.0, -0.5), (9.0, -1.0)])
def test_phase_of_a_number(entropy: float, phase: float) -> None:
    assert EntropyTrajectory(target=2.0).phase(entropy) == phase


def test_a_policy_without_entropy_has_no_phase() -> None:
    trajectory = EntropyTrajectory()
    trajectory.observe(0.0, 0.0)
    assert trajectory.phase(0.0) == 0.0


def test_predictions_are_correlated_with_the_change_to_the_next_step() -> None:
    trajectory, rng, level = EntropyTrajectory(), np.random.default_rng(0), 3.0
    predictions = rng.normal(0, 1, module.MOST_CHANGES + 30)
    for predicted in predictions:
        trajectory.observe(level, predicted)
        level += 0.1 * predicted  # the entropy of the step after
        if len(trajectory.changes) < 3:
            assert trajectory.correlation() is None
    assert len(trajectory.changes) == module.MOST_CHANGES
    assert trajectory.correlation() == pytest.approx(1.0)
    noisy = EntropyTrajectory(changes=list(zip(predictions, rng.normal(0, 1, len(predictions)), strict=True)))
    assert noisy.correlation() == pytest.approx(np.corrcoef(np.array(noisy.changes).T)[0, 1])


def test_it_continues_after_a_checkpoint() -> None:
    whole, part = EntropyTrajectory(), EntropyTrajectory()
    steps = np.random.default_rng(2).uniform(0.5, 3, (12, 2)).tolist()
    for step in steps[:6]:
        whole.observe(*step)
        part.observe(*step)
    resumed = EntropyTrajectory()
    resumed.load_state_dict(part.state_dict())
    for step in steps[6:]:
        assert (resumed.phase(step[0]), resumed.observe(*step)) == (whole.phase(step[0]), whole.observe(*step))
    assert resumed == whole


@pytest.mark.parametrize(
    "change", [{"average": math.nan}, {"last": [1.0]}, {"changes": [[1.0, math.inf]]}, {"changes": [[1.0]]}]
)
def test_a_damaged_trajectory_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="trajectory of the entropy"):
        EntropyTrajectory().load_state_dict({"average": 1.0, "last": [1.0, 0.0], "changes": []} | change)


@pytest.mark.parametrize("seed", range(3))
def test_the_entropies_of_three_trainings_part_towards_their_targets(seed: int) -> None:
    """A softmax policy of eight states learns random rewards by the policy gradient; only the target differs."""
    rewards = torch.tensor(np.random.default_rng(seed).normal(size=(8, 12)))
    found = []
    for target in (None, 8.0, 0.5):  # off, above and below what the policy has at any time before it is certain
        generator, logits = torch.Generator().manual_seed(seed), torch.zeros(8, 12, dtype=torch.float64)
        trajectory, curve = EntropyTrajectory(target=target), []
        for _ in range(100):
            log_probs = logits.log_softmax(-1)
            labels = torch.multinomial(log_probs.exp(), 16, replacement=True, generator=generator)
            given = rewards.gather(1, labels)
            advantages = ((given - given.mean(1, keepdim=True)) / (given.std(1, keepdim=True) + 1e-8)).flatten()
            rows = log_probs.repeat_interleave(16, dim=0)
            curve.append(float(torch.special.entr(log_probs.exp()).sum(-1).mean()))
            if target is not None:
                slopes = entropy_slopes(rows, labels.flatten())
                advantages = reweighted(advantages, slopes, trajectory.phase(curve[-1]), 0.9)
            ascent = torch.nn.functional.one_hot(labels.flatten(), 12) - rows.exp()
            logits = logits + 0.01 * (advantages.unsqueeze(-1) * ascent).reshape(8, 16, 12).sum(1)
        found.append(float(np.mean(curve)))
    off, above, below = found
    assert above > off + 0.1 and below < off - 0.05, found
