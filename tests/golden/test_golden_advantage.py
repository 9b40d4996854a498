"""Both advantages of a whole batch against the plain loops of docs/method.md, sections 7 and 8, in both precisions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.advantage import group_relative_advantage, single_stream_advantage, skpo_advantage
from recipe.skpo.method.rows import DOWNSTREAM, UPSTREAM
from tests.support.reference import reference_group_relative, reference_single_stream

seeds = st.integers(0, 2**32)
every_precision = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)


@every_precision
@given(seed=seeds)
def test_upstream_advantages_follow_the_reference(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 20))
    # Rewards and baselines exact in float32, so that both sides see the same numbers.
    rewards, baselines = rng.integers(-8, 9, count) / 8, rng.integers(-512, 513, count) / 512
    valid = rng.random(count) < 0.8
    actual = single_stream_advantage(
        torch.tensor(rewards, dtype=dtype), torch.tensor(baselines, dtype=dtype), torch.tensor(valid)
    )
    expected = reference_single_stream(rewards.tolist(), baselines.tolist(), valid.tolist())
    assert actual.dtype == dtype
    assert actual.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-2)


@every_precision
@given(seed=seeds)
def test_downstream_advantages_follow_the_reference(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    # Mostly right or wrong, as rewards are, so that groups of equal rewards occur.
    rewards = np.where(rng.random(count) < 0.8, rng.choice([-1.0, 1.0], count), rng.integers(-8, 9, count) / 8)
    groups, valid = rng.integers(0, 5, count), rng.random(count) < 0.8
    actual = group_relative_advantage(torch.tensor(rewards, dtype=dtype), torch.tensor(groups), torch.tensor(valid))
    expected = reference_group_relative(rewards.tolist(), groups.tolist(), valid.tolist())
    assert actual.dtype == dtype
    assert actual.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-2)


@every_precision
@given(seed=seeds)
def test_a_mixed_batch_gets_each_row_the_advantage_of_its_phase(
    dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    prompts, group = int(rng.integers(1, 6)), int(rng.integers(2, 9))
    rows = [(number, session == 0) for number in range(prompts) for session in range(group + 1)]
    rows = [rows[int(index)] for index in rng.permutation(len(rows))]
    rewards = rng.choice([-1.0, -0.5, 0.25, 1.0], len(rows))
    baselines, valid = rng.integers(-64, 65, len(rows)) / 64, rng.random(len(rows)) < 0.85
    numbers, upstream = [number for number, _ in rows], [up for _, up in rows]
    actual = skpo_advantage(
        torch.tensor(rewards, dtype=dtype),
        torch.tensor(baselines, dtype=dtype),
        torch.tensor([UPSTREAM if up else DOWNSTREAM for up in upstream]),
        torch.tensor(numbers),
        torch.tensor(valid),
    )
    ups = reference_single_stream(
        rewards.tolist(), baselines.tolist(), [bool(ok) and up for ok, up in zip(valid, upstream, strict=True)]
    )
    downs = reference_group_relative(
        rewards.tolist(), numbers, [bool(ok) and not up for ok, up in zip(valid, upstream, strict=True)]
    )
    expected = [a if up else b for a, b, up in zip(ups, downs, upstream, strict=True)]
    assert actual.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-2)
