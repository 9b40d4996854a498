"""Entropy slopes and reweighted advantages against the plain loops of docs/method.md, section 17; both precisions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.polarity import entropy_slopes, reweighted
from tests.support.reference import reference_reweighted, reference_slope

seeds = st.integers(0, 2**32)
every_precision = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)


@every_precision
@given(seed=seeds)
def test_slopes_follow_the_reference(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.2, 4), (5, int(rng.integers(2, 12)))).astype(np.float32)
    labels = rng.integers(0, logits.shape[1], 5)
    found = entropy_slopes(torch.tensor(logits, dtype=dtype).log_softmax(-1), torch.tensor(labels))
    expected = [reference_slope(row.tolist(), int(label)) for row, label in zip(logits, labels, strict=True)]
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-2)


@every_precision
@given(seed=seeds, phase=st.floats(-1, 1), strength=st.floats(0, 0.99))
def test_reweighted_advantages_follow_the_reference_and_keep_their_total(
    dtype: torch.dtype, tolerance: float, seed: int, phase: float, strength: float
) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    advantages, slopes = rng.normal(0, 1, count).astype(np.float32), rng.normal(-0.1, 0.2, count).astype(np.float32)
    advantages[rng.random(count) < 0.2] = 0
    slopes[rng.random(count) < 0.1] = 0
    found = reweighted(torch.tensor(advantages, dtype=dtype), torch.tensor(slopes, dtype=dtype), phase, strength)
    expected = reference_reweighted(list(zip(advantages.tolist(), slopes.tolist(), strict=True)), phase, strength)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx(expected, rel=tolerance, abs=1e-12)
    assert float(found.double().abs().sum()) == pytest.approx(sum(map(abs, advantages.tolist())), rel=1e-6)
