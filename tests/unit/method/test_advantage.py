"""Both advantages (docs/method.md, sections 7 and 8): numbers by hand; tests/golden compares random batches."""

import numpy as np
import pytest
import torch

from recipe.skpo.method.advantage import group_relative_advantage, single_stream_advantage


def upstream(*rewards: float, baseline: float = 0.0, dtype: torch.dtype = torch.float32) -> list[float]:
    values = torch.tensor(rewards, dtype=dtype)
    return single_stream_advantage(values, torch.full_like(values, baseline)).tolist()


def test_upstream_advantage_is_reward_minus_baseline_normalised_over_the_batch() -> None:
    rewards = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    baselines = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    # raw 1.0, -0.5, -1.5: mean -1/3, population variance 38/36
    expected = [(raw + 1 / 3) / (38 / 36) ** 0.5 for raw in (1.0, -0.5, -1.5)]
    assert single_stream_advantage(rewards, baselines).tolist() == pytest.approx(expected, rel=1e-6)


def test_downstream_advantage_is_relative_to_the_siblings() -> None:
    rewards = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    groups = torch.tensor([3, 8, 8, 8, 3, 8])
    # of group 8 one of four is right: mean -1/2, std sqrt(3)/2
    wrong, right = -1 / 3**0.5, 3**0.5
    expected = [1.0, wrong, right, wrong, -1.0, wrong]
    assert group_relative_advantage(rewards, groups).tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_rows_get_zero_whatever_their_reward() -> None:
    assert upstream(0.75, baseline=0.25) == upstream(*[0.75] * 5, baseline=0.25)[:1] == [0.0]
    assert group_relative_advantage(torch.tensor([1.0]), torch.tensor([4])).tolist() == [0.0]
    for reward in np.random.default_rng(0).uniform(-1, 1, 200).tolist():
        assert all(max(map(abs, upstream(*[reward] * count))) < 1e-4 for count in (3, 7, 15))
        rewards, groups = torch.tensor([reward] * 7 + [1.0, -1.0]), torch.tensor([0] * 7 + [1] * 2)
        assert group_relative_advantage(rewards, groups).tolist() == [0.0] * 7 + [1.0, -1.0]


def test_a_batch_without_a_valid_row_gets_zero() -> None:
    assert single_stream_advantage(torch.ones(2), torch.zeros(2), torch.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (single_stream_advantage, (torch.ones(2, 3), torch.zeros(2, 3)), "1-D"),
        (group_relative_advantage, (torch.ones(2, 1), torch.zeros(2, 1)), "1-D"),
        (single_stream_advantage, (torch.ones(3), torch.zeros(1)), "baselines"),
        (group_relative_advantage, (torch.ones(3), torch.zeros(1)), "group_ids"),
        (group_relative_advantage, (torch.ones(3), torch.zeros(3), torch.ones(1, dtype=torch.bool)), "valid"),
    ],
)
def test_other_shapes_are_refused(function, arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        function(*arguments)
