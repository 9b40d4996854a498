"""Both advantages (docs/method.md, sections 7 and 8) against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from recipe.skpo.method.advantage import group_relative_advantage, single_stream_advantage, skpo_advantage
from recipe.skpo.method.loss import DOWNSTREAM, UPSTREAM
from tests.support.reference import reference_group_relative, reference_single_stream

seeds = st.integers(0, 2**32)
PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-4)]


def random_rows(seed: int) -> tuple[np.random.Generator, int, np.ndarray, list[bool]]:
    """A generator, the number of rows, rewards of {-1, +1} and a validity mask."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 40))
    return rng, rows, rng.choice([-1.0, 1.0], rows), (rng.random(rows) < 0.8).tolist()


# ---------------------------------------------------------------- upstream


def test_upstream_advantage_is_reward_minus_baseline_normalised_over_the_batch() -> None:
    rewards = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    baselines = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    # raw 1.0, -0.5, -1.5: mean -1/3, population variance 38/36
    expected = [(raw + 1 / 3) / (38 / 36) ** 0.5 for raw in (1.0, -0.5, -1.5)]
    assert single_stream_advantage(rewards, baselines).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_reward_above_its_baseline_gets_the_higher_advantage() -> None:
    advantage = single_stream_advantage(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.9]))
    assert advantage.tolist() == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(seed=seeds)
def test_upstream_advantage_follows_the_reference(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rng, rows, _, valid = random_rows(seed)
    rewards, baselines = rng.integers(-8, 9, rows) / 8, rng.uniform(-1, 1, rows)
    actual = single_stream_advantage(
        torch.tensor(rewards, dtype=dtype), torch.tensor(baselines, dtype=dtype), torch.tensor(valid)
    )
    assert actual.dtype == dtype
    raw = [reward - baseline for reward, baseline, ok in zip(rewards, baselines, valid, strict=True) if ok]
    # The difference of nearly equal numbers has no four digits in fp32.
    assume(len(raw) < 2 or max(raw) - min(raw) > 1e-2)
    expected = reference_single_stream(rewards, baselines, valid)
    assert actual.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@given(seeds)
def test_upstream_advantages_of_valid_rows_have_mean_zero_and_std_one(seed: int) -> None:
    rng, rows, _, _ = random_rows(seed)
    advantage = single_stream_advantage(torch.tensor(rng.normal(size=rows + 1)), torch.zeros(rows + 1).double())
    assert float(advantage.mean()) == pytest.approx(0, abs=1e-9)
    assert float(advantage.std(correction=0)) == pytest.approx(1, rel=1e-6)


@given(seeds)
def test_padding_rows_do_not_move_the_upstream_statistics(seed: int) -> None:
    rng, rows, _, _ = random_rows(seed)
    rewards, baselines = torch.tensor(rng.uniform(-1, 1, rows)), torch.tensor(rng.uniform(-1, 1, rows))
    padding = torch.tensor(rng.uniform(-100, 100, 5))
    valid = torch.tensor([True] * rows + [False] * 5)
    padded = single_stream_advantage(torch.cat([rewards, padding]), torch.cat([baselines, -padding]), valid)
    assert torch.equal(padded[:rows], single_stream_advantage(rewards, baselines))
    assert padded[rows:].tolist() == [0.0] * 5


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_single_segment_and_equal_ones_get_zero(count: int) -> None:
    advantage = single_stream_advantage(torch.full((count,), 0.75), torch.full((count,), 0.25))
    assert advantage.tolist() == [0.0] * count


@pytest.mark.parametrize("dtype", [torch.float32])
def test_equal_segments_get_zero_whatever_their_reward(dtype: torch.dtype) -> None:
    for reward in np.random.default_rng(0).uniform(-1, 1, 200):
        for count in (3, 7, 15):
            advantage = single_stream_advantage(
                torch.full((count,), float(reward), dtype=dtype), torch.zeros(count, dtype=dtype)
            )
            assert float(advantage.abs().max()) < 1e-4


def test_a_batch_without_a_valid_row_gets_zero() -> None:
    assert single_stream_advantage(torch.ones(2), torch.zeros(2), torch.zeros(2)).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- downstream


def test_downstream_advantage_is_relative_to_the_siblings() -> None:
    rewards = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    groups = torch.tensor([3, 8, 8, 8, 3, 8])
    # of group 8 one of four is right: mean -1/2, std sqrt(3)/2
    wrong, right = -1 / 3**0.5, 3**0.5
    expected = [1.0, wrong, right, wrong, -1.0, wrong]
    assert group_relative_advantage(rewards, groups).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reward", [-1.0, 1.0])
def test_a_group_with_equal_rewards_gets_zero(reward: float) -> None:
    rewards = torch.tensor([reward] * 8 + [1.0, -1.0])
    groups = torch.tensor([0] * 8 + [1, 1])
    assert group_relative_advantage(rewards, groups).tolist() == [0.0] * 8 + [1.0, -1.0]


def test_a_group_of_one_gets_zero() -> None:
    assert group_relative_advantage(torch.tensor([1.0]), torch.tensor([4])).tolist() == [0.0]


def test_equal_rewards_of_any_size_get_zero() -> None:
    for reward in np.random.default_rng(0).uniform(-1, 1, 200):
        advantage = group_relative_advantage(torch.full((7,), float(reward)), torch.zeros(7))
        assert advantage.tolist() == [0.0] * 7


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(seed=seeds)
def test_downstream_advantage_follows_the_reference(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rng, rows, rewards, valid = random_rows(seed)
    groups = rng.integers(-3, 4, rows)
    actual = group_relative_advantage(torch.tensor(rewards, dtype=dtype), torch.tensor(groups), torch.tensor(valid))
    assert actual.dtype == dtype
    expected = reference_group_relative(rewards.tolist(), groups.tolist(), valid)
    assert actual.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@given(seeds)
def test_failed_siblings_do_not_move_the_statistics_of_their_group(seed: int) -> None:
    rng, rows, rewards, valid = random_rows(seed)
    groups, kept = torch.tensor(rng.integers(0, 3, rows)), torch.tensor(valid)
    rewards_with_garbage = torch.where(kept, torch.tensor(rewards), 50.0)
    actual = group_relative_advantage(rewards_with_garbage, groups, kept)
    alone = group_relative_advantage(torch.tensor(rewards)[kept], groups[kept])
    assert actual[kept].tolist() == pytest.approx(alone.tolist(), rel=1e-12)
    assert not actual[~kept].any()


@given(seeds)
def test_order_of_rows_does_not_matter(seed: int) -> None:
    rng, rows, rewards, valid = random_rows(seed)
    order = torch.tensor(rng.permutation(rows))
    values, groups, kept = torch.tensor(rewards), torch.tensor(rng.integers(0, 4, rows)), torch.tensor(valid)
    baselines = torch.tensor(rng.uniform(-1, 1, rows))
    down = group_relative_advantage(values, groups, kept)
    up = single_stream_advantage(values, baselines, kept)
    torch.testing.assert_close(group_relative_advantage(values[order], groups[order], kept[order]), down[order])
    torch.testing.assert_close(single_stream_advantage(values[order], baselines[order], kept[order]), up[order])


# ---------------------------------------------------------------- shapes


def test_rows_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="1-D"):
        single_stream_advantage(torch.ones(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1-D"):
        group_relative_advantage(torch.ones(2, 1), torch.zeros(2, 1))


def test_arguments_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="baselines"):
        single_stream_advantage(torch.ones(3), torch.zeros(1))
    with pytest.raises(ValueError, match="group_ids"):
        group_relative_advantage(torch.ones(3), torch.zeros(1))
    with pytest.raises(ValueError, match="valid"):
        group_relative_advantage(torch.ones(3), torch.zeros(3), torch.ones(1, dtype=torch.bool))


# ---------------------------------------------------------------- both


@given(seeds)
def test_each_phase_is_normalised_by_its_own_rows(seed: int) -> None:
    rng, rows, rewards, valid = random_rows(seed)
    phase = rng.choice([UPSTREAM, DOWNSTREAM], rows)
    prompts, baselines = rng.integers(0, 5, rows), rng.uniform(-1, 1, rows)
    actual = skpo_advantage(
        torch.tensor(rewards),
        torch.tensor(baselines),
        torch.tensor(phase),
        torch.tensor(prompts),
        torch.tensor(valid),
    )
    upstream_valid = [ok and own == UPSTREAM for ok, own in zip(valid, phase, strict=True)]
    downstream_valid = [ok and own == DOWNSTREAM for ok, own in zip(valid, phase, strict=True)]
    up = reference_single_stream(rewards.tolist(), baselines.tolist(), upstream_valid)
    down = reference_group_relative(rewards.tolist(), prompts.tolist(), downstream_valid)
    assert actual.tolist() == pytest.approx([a + b for a, b in zip(up, down, strict=True)], rel=1e-6, abs=1e-6)
