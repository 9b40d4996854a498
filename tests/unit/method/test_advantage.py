"""Both advantages (docs/method.md, sections 7 and 8): numbers by hand; tests/golden compares random batches."""

import numpy as np
import pytest
import torch

from recipe.skpo.method.advantage import group_relative_advantage, single_stream_advantage

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
