"""Each token's share of the objective (docs/method.md, section 9); the gradients are in ``tests/golden``."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.loss_weights import loss_weights
from recipe.skpo.method.rows import Rows
from tests.support.reference import FlatRow, random_batch
from tests.support.rows import make_rows

seeds = st.integers(0, 2**32)


def rows_of(flat: list[FlatRow]) -> Rows:
    return make_rows(
        upstream=[row.upstream for row in flat],
        prompts=[row.prompt for row in flat],
        lengths=[sum(row.row.mask) for row in flat],
        padding=[not row.valid for row in flat],
    )


def weights_of(rows: Rows, updates: list[int], up: float = 0.7, down: float = 0.3, mean: str = "group_token_mean"):
    return loss_weights(rows, torch.tensor(updates), up, down, mean).tolist()


TWO_PROMPTS = {"upstream": [True, False, False, True, False], "prompts": [0, 0, 0, 1, 1], "lengths": [4, 3, 7, 6, 5]}
A_PROMPT_AND_PADDING = {
    "upstream": [True, False, False, True, False],
    "prompts": [0, 0, 0, 7, 7],
    "lengths": [4, 3, 0, 50, 50],
    "padding": [False, False, False, True, True],
}


@pytest.mark.parametrize(
    ("rows", "updates", "mean", "weights"),
    [
        # A segment's tokens share its prompt's part of the update, the responses' tokens that of their group.
        (TWO_PROMPTS, [0] * 5, "group_token_mean", [0.35 / 4, 0.15 / 10, 0.15 / 10, 0.35 / 6, 0.15 / 5]),
        (TWO_PROMPTS, [0, 0, 0, 1, 1], "group_token_mean", [0.7 / 4, 0.3 / 10, 0.3 / 10, 0.7 / 6, 0.3 / 5]),
        # Or the same share for every token of the update.
        (TWO_PROMPTS, [0] * 5, "token_mean", [0.35 / 4, 0.3 / 15, 0.3 / 15, 0.35 / 6, 0.3 / 15]),
        (TWO_PROMPTS, [0, 0, 0, 1, 1], "token_mean", [0.7 / 4, 0.3 / 10, 0.3 / 10, 0.7 / 6, 0.3 / 5]),
        # Padding and failed siblings carry nothing and count nowhere, also in an update of their own.
        (A_PROMPT_AND_PADDING, [0] * 5, "group_token_mean", [0.7 / 4, 0.1, 0, 0, 0]),
        (A_PROMPT_AND_PADDING, [0] * 5, "token_mean", [0.7 / 4, 0.1, 0, 0, 0]),
        (A_PROMPT_AND_PADDING, [0, 0, 0, 1, 1], "group_token_mean", [0.7 / 4, 0.1, 0, 0, 0]),
        (A_PROMPT_AND_PADDING, [0, 0, 0, 1, 1], "token_mean", [0.7 / 4, 0.1, 0, 0, 0]),
    ],
)
def test_every_row_carries_its_share(rows: dict, updates: list[int], mean: str, weights: list[float]) -> None:
    assert weights_of(make_rows(**rows), updates, mean=mean) == pytest.approx(weights)


@given(seeds)
def test_shares_do_not_depend_on_the_order_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = random_batch(rng, 2, 2, 3, padding_prompts=1)
    order = rng.permutation(len(flat)).tolist()
    updates = [row.prompt // 2 for row in flat]
    shuffled = weights_of(rows_of([flat[index] for index in order]), [updates[index] for index in order])
    assert shuffled == pytest.approx([weights_of(rows_of(flat), updates)[index] for index in order])


def reference_token_mean_weights(flat: list[FlatRow], updates: list[int], up: float, down: float) -> list[float]:
    """Per token of a row: its share of the upstream mean over prompts, or of the mean over all response tokens."""
    weights = []
    for row, update in zip(flat, updates, strict=True):
        trained = [other for other, own in zip(flat, updates, strict=True) if own == update and other.valid]
        if not row.valid:
            weights.append(0.0)
        elif row.upstream:
            weights.append(up / len({other.prompt for other in trained}) / sum(row.row.mask))
        else:
            weights.append(down / sum(sum(other.row.mask) for other in trained if not other.upstream))
    return weights


@given(seed=seeds)
def test_token_mean_shares_follow_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = random_batch(rng, int(rng.integers(1, 4)), 3, int(rng.integers(1, 5)), padding_prompts=int(rng.integers(3)))
    updates = [row.prompt // 3 for row in flat]
    expected = reference_token_mean_weights(flat, updates, 0.6, 0.4)
    assert weights_of(rows_of(flat), updates, 0.6, 0.4, "token_mean") == pytest.approx(expected, rel=1e-6)
