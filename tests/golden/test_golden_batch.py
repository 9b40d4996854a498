"""Equations 5 and 6 over whole batches, gradient by gradient, through what verl calls.

Random G, lengths, padding, missing siblings, updates, micro-batches and ranks; the gradient of every update must be
that of the plain loops, whatever the split.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from recipe.skpo.method.loss import token_losses
from tests.golden.batches import CLIPS, FlatPolicy, gradient_of_updates, make_case, nested, relative_error
from tests.support.reference import random_row, reference_downstream_objective, reference_upstream_objective

ROOT = Path(__file__).resolve().parents[2]
seeds = st.integers(0, 2**32)
PRECISIONS = {torch.float64: 1e-6, torch.float32: 1e-4}
every_precision = pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp64", "fp32"])


@every_precision
@settings(max_examples=60)
@given(seed=seeds)
def test_both_losses_and_their_gradients_follow_the_reference(dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, int(rng.integers(1, 12))) for _ in range(rng.integers(1, 6))]
    fields = [
        torch.nested.to_padded_tensor(nested([torch.tensor(values, dtype=dtype) for values in column]), 0.0)
        for column in ([r.log_prob for r in rows], [r.old_log_prob for r in rows], [r.mask for r in rows])
    ]
    leaf, old, mask = fields[0].requires_grad_(), fields[1], fields[2]
    advantages = torch.tensor([[row.advantage] for row in rows], dtype=dtype).expand_as(leaf)
    tokens = mask.sum(-1)

    losses = [
        token_losses(leaf, old, advantages, torch.full((len(rows),), upstream), *CLIPS) * mask
        for upstream in (True, False)
    ]
    upstream, downstream = losses[0].sum(-1) / tokens, losses[1].sum() / tokens.sum()
    (up_gradient,) = torch.autograd.grad(upstream.sum(), leaf)
    (down_gradient,) = torch.autograd.grad(downstream, leaf)

    values, slopes = zip(*(reference_upstream_objective(row, *CLIPS) for row in rows), strict=True)
    assert upstream.tolist() == pytest.approx([-value for value in values], rel=PRECISIONS[dtype], abs=1e-5)
    value, down_slopes = reference_downstream_objective(rows, *CLIPS)
    assert float(downstream.detach()) == pytest.approx(-value, rel=PRECISIONS[dtype], abs=1e-5)
    for gradient, expected in ((up_gradient, list(slopes)), (down_gradient, down_slopes)):
        found = [gradient[index, : len(row.mask)].tolist() for index, row in enumerate(rows)]
        assert relative_error(iter(found), expected) < PRECISIONS[dtype]


def random_split(seed: int) -> Callable[[TensorDict], list[TensorDict]]:
    """Micro-batches of random sizes in random order."""
    rng = np.random.default_rng(seed)

    def split(data: TensorDict) -> list[TensorDict]:
        from verl.utils.tensordict_utils import index_select_tensor_dict

        order, parts = rng.permutation(len(data)).tolist(), []
        while order:
            size = int(rng.integers(1, len(order) + 1))
            parts.append(index_select_tensor_dict(data, order[:size]))
            order = order[size:]
        return parts

    return split


@pytest.mark.parametrize("aggregation", ["group_token_mean", "token_mean"])
@pytest.mark.parametrize("ranks", [1, 2])
@every_precision
@settings(max_examples=15)
@given(seed=seeds)
def test_the_gradient_of_every_update_follows_the_reference(
    dtype: torch.dtype, ranks: int, aggregation: str, seed: int
) -> None:
    case = make_case(seed, ranks, aggregation)
    values, expected = case.reference()
    policy = FlatPolicy(case, dtype)
    everything = torch.zeros_like(policy.parameter)
    for update, loss, gradient in gradient_of_updates(policy, list(range(ranks)), random_split(seed)):
        # Data parallelism averages over ranks.
        assert loss / ranks == pytest.approx(-values.get(update, 0.0), rel=PRECISIONS[dtype], abs=1e-5)
        everything += gradient / ranks
        for row, own in zip(case.update, policy.row_gradients(gradient), strict=True):
            assert row == update or not any(own), "an update has moved a row of another one"
    assert relative_error(policy.row_gradients(everything), expected) < PRECISIONS[dtype]


@settings(max_examples=15)
@given(seed=seeds)
def test_the_gradient_does_not_depend_on_the_micro_batches(seed: int) -> None:
    case = make_case(seed, 1)
    policy = FlatPolicy(case, torch.float64)
    rows = case.share(0)[0]
    whole = [loss_gradient for *_, loss_gradient in gradient_of_updates(policy, [0], lambda data: [data])]
    for other in (seed + 1, seed + 2):
        parts = [loss_gradient for *_, loss_gradient in gradient_of_updates(policy, [0], random_split(other))]
        for first, second in zip(whole, parts, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)
    assert len(rows) == case.rows_per_update


GLOO_SEEDS = [11, 12, 13, 14, 15, 16]


def test_two_gloo_processes_get_the_gradient_of_the_reference(tmp_path: Path, preloaded) -> None:
    preloaded.run_ranks(
        "tests.golden.ranks", *((str(tmp_path), str(rank), "2", *map(str, GLOO_SEEDS)) for rank in (0, 1))
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    found: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for (seed, dtype, update, loss, gradient), (*_, same) in zip(first, second, strict=True):
        assert torch.equal(gradient, same)
        values, _ = make_case(seed, 2).reference()
        assert loss == pytest.approx(-values.get(update, 0.0), rel=PRECISIONS[dtype], abs=1e-5)
        found[seed, dtype] = found.get((seed, dtype), torch.zeros_like(gradient)) + gradient
    assert len(found) == 2 * len(GLOO_SEEDS)
    for (seed, dtype), gradient in found.items():
        case = make_case(seed, 2)
        _, expected = case.reference()
        error = relative_error(FlatPolicy(case, dtype).row_gradients(gradient), expected)
        print(f"seed {seed} {dtype}: largest relative error {error:.1e}")
        assert error < PRECISIONS[dtype]
