"""Variance components against simulations whose truth is known, and their parts."""

import math

import numpy as np
import pytest

from recipe.skpo.method.curriculum import draw_prompts, prompt_weights
from recipe.skpo.method.tracker import PromptTable
from recipe.skpo.method.variance import Components, Parts, SegmentVariance, nested_parts

G = 8
REPETITIONS = 100


def segments(values: np.ndarray, concentration: float, rng: np.random.Generator) -> np.ndarray:
    """True values of one segment per prompt: Beta(mu c, (1 - mu) c), so that G mu-averaged signal / noise is G / c."""
    return rng.beta(values * concentration, (1 - values) * concentration)


def probed(concentration: float, rng: np.random.Generator) -> np.ndarray:
    """Rewards of 64 prompts x 8 segments x 32 continuations."""
    true = segments(np.repeat(rng.uniform(size=(64, 1)), 8, axis=1), concentration, rng)
    return 2.0 * (rng.uniform(size=(64, 8, 32)) < true[:, :, None]) - 1


def trained(concentration: float, rng: np.random.Generator, prioritised: bool, prompts: int = 64) -> SegmentVariance:
    """Let a tracker follow 48 steps of 16 prompts whose values stand still."""
    mu, tracker, found = rng.uniform(size=prompts), PromptTable(), SegmentVariance()
    for _ in range(48):
        values = np.array([tracker.value(str(key)) for key in range(prompts)])
        weights = prompt_weights(values, 0.05) if prioritised else np.ones(prompts)
        chosen = np.array(draw_prompts(weights, 16, rng))
        right = rng.binomial(G, segments(mu[chosen], concentration, rng)) / G
        squares = np.array([tracker.squares(str(key)) for key in chosen])
        # In reward units, from -1 to 1.
        found.observe(2 * right - 1, 2 * values[chosen] - 1, squares, 4 * right * (1 - right) / (G - 1))
        for key, value in zip(chosen, right, strict=True):
            tracker.visit(str(key), value, 1.0, 4.0)
    return found


def estimates(kind: str, concentration: float) -> list[Components]:
    generators = [np.random.default_rng(seed) for seed in range(REPETITIONS)]
    if kind == "probe":
        return [nested_parts(probed(concentration, rng), G).components() for rng in generators]
    visits = [trained(concentration, rng, kind == "prioritised").parts() for rng in generators]
    return [parts.components() for parts in visits if parts is not None]


@pytest.mark.parametrize(("kind", "concentration"), [("probe", 8), ("probe", 58), ("visits", 8), ("visits", 58)])
def test_the_interval_holds_the_truth(kind: str, concentration: float) -> None:
    """58: a standard deviation of 0.05 within a prompt and noise of 0.14, as small models have."""
    truth = math.sqrt(G / concentration)
    found = estimates(kind, concentration)
    assert sum(item.low <= truth <= item.high for item in found) >= 90
    assert len(found) == REPETITIONS
    signal = np.array([item.signal for item in found])
    # mu is uniform: E[mu (1 - mu)] = 1/6, of which 1 / (c + 1) is between segments; rewards are twice as wide.
    bias = signal.mean() - 4 / 6 / (concentration + 1)
    assert abs(bias) < 3 * signal.std() / math.sqrt(REPETITIONS), "unbiased before the root is taken"


def test_prioritised_sampling_hardly_biases_the_estimate_from_visits() -> None:
    found = estimates("prioritised", 8)
    assert sum(item.low <= 1.0 <= item.high for item in found) >= 90
    assert np.mean([item.signal_to_noise for item in found]) == pytest.approx(1.0, abs=0.05)


def test_segments_that_are_alike_have_no_signal() -> None:
    rewards = np.repeat(np.array([[1.0, -1.0] * 4]), 6, axis=0)[:, None, :].repeat(3, axis=1)
    found = nested_parts(rewards, G).components()
    assert found.signal < 0 and (found.signal_to_noise, found.low, found.high) == (0.0, 0.0, 0.0)


def test_rewards_that_are_all_equal_have_neither() -> None:
    found = nested_parts(np.ones((4, 3, 2)), G).components()
    assert (found.signal, found.noise) == (0.0, 0.0)
    assert all(map(math.isnan, (found.signal_to_noise, found.low, found.high)))


def test_the_noise_is_that_of_a_mean_of_the_training_group() -> None:
    rewards = np.random.default_rng(0).choice([-1.0, 1.0], (5, 3, 16))
    variance = rewards.var(axis=2, ddof=1).mean()
    assert nested_parts(rewards, 4).components().noise == pytest.approx(variance / 4)
    assert nested_parts(rewards, 16).components().noise == pytest.approx(variance / 16)


def test_the_seed_decides_the_interval_alone() -> None:
    parts = nested_parts(probed(8, np.random.default_rng(0)), G)
    first, again, other = parts.components(1), parts.components(1), parts.components(2)
    assert first == again != other
    assert (first.signal, first.noise) == (other.signal, other.noise)


# ---------------------------------------------------------------- visits


def test_too_few_known_prompts_give_no_estimate_and_leave_advantages_alone() -> None:
    variance = SegmentVariance()
    first, known = np.zeros(40), np.full(31, 0.5)
    variance.observe(np.arange(40.0), np.zeros(40), first, np.ones(40))
    variance.observe(np.arange(31.0), np.zeros(31), known, np.ones(31))
    assert variance.parts() is None
    assert variance.shares(np.array([0.0, 0.5])).tolist() == [1.0, 1.0]


def observed(known: np.ndarray, noise: float, first: np.ndarray | None = None) -> SegmentVariance:
    """A window of deviations of prompts seen once before, and of first visits."""
    variance = SegmentVariance()
    variance.observe(known, np.zeros(len(known)), np.ones(len(known)), np.full(len(known), noise))
    if first is not None:
        variance.observe(first, np.zeros(len(first)), np.zeros(len(first)), np.full(len(first), noise))
    return variance


def test_shares_are_signal_over_the_variance_that_each_advantage_has() -> None:
    known = np.array([1.0, -1.0] * 32)
    variance = observed(known, noise=0.125, first=2 * known)
    total = 64 / 63 / 2  # 1 + Q is 2
    signal = total - 0.125
    expected = [signal / (4 * 64 / 63), signal / (2 * total), signal / (1.25 * total)]
    assert variance.shares(np.array([0.0, 1.0, 0.25])) == pytest.approx(expected)


@pytest.mark.parametrize(("noise", "share"), [(2.0, 0.0), (0.0, 0.5)])
def test_shares_stay_between_nothing_and_what_the_baseline_leaves(noise: float, share: float) -> None:
    variance = observed(np.array([1.0, -1.0] * 32), noise)
    assert variance.shares(np.array([0.0, 1.0])).tolist() == pytest.approx([share, share])


def test_rewards_without_any_variance_have_no_signal() -> None:
    assert observed(np.zeros(64), 0.0, np.zeros(64)).shares(np.array([0.0, 1.0])).tolist() == [0.0, 0.0]


def test_what_all_prompts_gained_alike_is_no_signal() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=64)
    moved = observed(rewards + 0.75, 0.5).parts()
    still = observed(rewards, 0.5).parts()
    assert moved is not None and still is not None
    assert moved.components().signal == pytest.approx(still.components().signal)


def test_the_last_visits_count_and_segments_of_unknown_noise_do_not() -> None:
    variance = SegmentVariance()
    for noise in (1.0, 2.0, math.nan):
        variance.observe(np.arange(300.0), np.zeros(300), np.full(300, 0.5), np.full(300, noise))
    assert len(variance.visits) == SegmentVariance.MOST
    assert (variance.visits[:, 2] == 2.0).sum() == 300


def test_a_single_segment_has_nothing_to_be_compared_with() -> None:
    variance = SegmentVariance()
    variance.observe(np.ones(1), np.zeros(1), np.ones(1), np.ones(1))
    assert not len(variance.visits)


def test_parts_of_one_unit_have_no_width() -> None:
    found = Parts(*(np.array([value]) for value in (3.0, 1.0, 1.0, 2.0))).components()
    assert (found.signal, found.noise, found.low, found.high) == (2.0, 2.0, 1.0, 1.0)
