"""Rows in order, and each row's share of the objective (docs/method.md, section 9), against plain loops."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.skpo.method.loss import DOWNSTREAM, UPSTREAM, downstream_loss, upstream_loss
from recipe.skpo.method.minibatch import (
    counted_rows,
    minibatch_of_rows,
    minibatch_order,
    prompts_fit_ranks,
    row_scales,
    slots,
)
from tests.support.reference import FlatRow, Row, random_batch, reference_batch_objective

CLIPS = (0.2, 0.28)
seeds = st.integers(0, 2**32)


def verl_updates(order: list[int], rows_per_minibatch: int, ranks: int) -> list[list[list[int]]]:
    """Rows per update and rank, as verl splits a batch: a contiguous chunk per rank, in equal contiguous parts."""
    per_rank, part = len(order) // ranks, rows_per_minibatch // ranks
    chunks = [order[rank * per_rank : (rank + 1) * per_rank] for rank in range(ranks)]
    return [[chunk[start : start + part] for chunk in chunks] for start in range(0, per_rank, part)]


def any_even_partition(seed: int) -> Callable[[list[int], int], list[list[int]]]:
    """A partition of equal sizes with no order in it; verl's balances lengths, which must not matter here."""
    rng = np.random.default_rng(seed)

    def partition(lengths: list[int], ranks: int) -> list[list[int]]:
        return rng.permutation(len(lengths)).reshape(ranks, -1).tolist()

    return partition


def scales_of(
    rows: list[FlatRow],
    minibatch: list[int] | torch.Tensor,
    weight_up: float = 0.7,
    weight_down: float = 0.3,
    aggregation: str = "group_token_mean",
) -> torch.Tensor:
    return row_scales(
        torch.tensor([UPSTREAM if row.upstream else DOWNSTREAM for row in rows]),
        torch.tensor([row.prompt for row in rows]),
        torch.as_tensor(minibatch),
        torch.tensor([sum(row.row.mask) for row in rows]),
        torch.tensor([row.valid for row in rows]),
        weight_up,
        weight_down,
        aggregation,
    )


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("ranks", [1, 2, 4])
@given(seed=seeds)
def test_every_update_takes_whole_prompts(ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows_per_prompt, prompts_per_update, updates = int(rng.integers(2, 9)), 4, int(rng.integers(1, 4))
    prompts = rng.permutation(np.repeat(np.arange(prompts_per_update * updates), rows_per_prompt)).tolist()
    lengths = rng.integers(1, 100, len(prompts)).tolist()
    rows_per_minibatch = rows_per_prompt * prompts_per_update
    order = minibatch_order(prompts, lengths, rows_per_minibatch, ranks, any_even_partition(seed))
    assert sorted(order) == list(range(len(prompts)))
    for number, update in enumerate(verl_updates(order, rows_per_minibatch, ranks)):
        first = number * prompts_per_update
        trained = [prompts[row] for rank in update for row in rank]
        assert sorted(trained) == sorted([*range(first, first + prompts_per_update)] * rows_per_prompt)
        assert {len(rank) for rank in update} == {rows_per_minibatch // ranks}


def test_the_partition_is_asked_per_update_with_its_own_lengths() -> None:
    asked = []

    def partition(lengths: list[int], ranks: int) -> list[list[int]]:
        asked.append((lengths, ranks))
        return [[3, 0], [1, 2]]

    prompts, lengths = [1, 0, 1, 0, 1, 0, 1, 0], [50, 10, 60, 20, 70, 30, 80, 40]
    order = minibatch_order(prompts, lengths, 4, 2, partition)
    assert asked == [([10, 20, 30, 40], 2), ([50, 60, 70, 80], 2)]
    # Rank by rank; within a rank the rows of prompt 0 (1, 3, 5, 7) before those of prompt 1 (0, 2, 4, 6).
    assert order == [1, 7, 0, 6, 3, 5, 2, 4]


def test_one_rank_keeps_the_rows_of_a_prompt_in_their_order() -> None:
    def never(lengths: list[int], ranks: int) -> list[list[int]]:
        raise AssertionError("one rank has nothing to partition")

    assert minibatch_order([2, 0, 2, 0, 1, 1], [1] * 6, 2, 1, never) == [1, 3, 4, 5, 0, 2]


def test_ranks_get_rows_of_similar_length_with_the_partition_of_verl() -> None:
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(8), 9).tolist()
    lengths = rng.integers(1, 1000, len(prompts)).tolist()
    order = minibatch_order(
        prompts, lengths, 36, 2, lambda own, ranks: get_seqlen_balanced_partitions(own, ranks, equal_size=True)
    )
    for update in verl_updates(order, 36, 2):
        first, second = (sum(lengths[row] for row in rank) for rank in update)
        assert abs(first - second) < 0.02 * (first + second)


@pytest.mark.parametrize("ranks", [2, 4])
def test_prompts_stay_whole_on_a_rank_if_told_so(ranks: int) -> None:
    rng = np.random.default_rng(1)
    prompts = rng.permutation(np.repeat(np.arange(8), 3)).tolist()
    assert prompts_fit_ranks(prompts, 12, ranks)
    order = minibatch_order(prompts, rng.integers(1, 9, 24).tolist(), 12, ranks, any_even_partition(1), whole=True)
    for update in verl_updates(order, 12, ranks):
        for rank in update:
            trained = [prompts[row] for row in rank]
            assert trained == sorted(set(trained) and trained) and len(set(trained)) == 4 // ranks
            assert set(Counter(trained).values()) == {3}


@pytest.mark.parametrize(
    ("prompts", "ranks", "fit"),
    [([0, 0, 1, 1], 1, True), ([0, 0, 1, 1], 2, True), ([0, 0, 1, 1], 4, False), ([0, 0, 0, 1], 2, False)],
)
def test_prompts_fit_ranks_that_can_take_whole_ones(prompts: list[int], ranks: int, fit: bool) -> None:
    assert prompts_fit_ranks(prompts, 4, ranks) is fit


@pytest.mark.parametrize(
    ("left", "wanted"), [(8, [4, 4]), (7, [4, 3]), (5, [3, 2]), (2, [1, 1]), (1, [1, 0])]
)  # of 8 prompts in two updates of 4
def test_prompts_are_dealt_evenly_over_the_updates(left: int, wanted: list[int]) -> None:
    names = [f"v{number}" for number in range(left) for _ in range(3)]
    padding = 24 - len(names)
    places = slots(names + ["pad"] * padding, [False] * len(names) + [True] * padding, 3, 4)
    assert sorted(Counter(places).values()) == [3] * 8, "every place has the rows of a prompt"
    trained = [len({place for place in places[: len(names)] if place // 4 == update}) for update in (0, 1)]
    assert trained == wanted
    assert places[: len(names)] == sorted(places[: len(names)])


@pytest.mark.parametrize(("rows", "rows_per_minibatch", "ranks"), [(10, 4, 1), (12, 6, 4)])
def test_rows_that_do_not_split_evenly_are_refused(rows: int, rows_per_minibatch: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows .* of {rows_per_minibatch} rows on {ranks} ranks"):
        minibatch_order([0] * rows, [1] * rows, rows_per_minibatch, ranks, any_even_partition(0))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_number_of_the_update_is_where_verl_trains_the_row(ranks: int) -> None:
    numbers = minibatch_of_rows(48, 16, ranks).tolist()
    for update, parts in enumerate(verl_updates(list(range(48)), 16, ranks)):
        assert {numbers[row] for part in parts for row in part} == {update}
    assert sorted(numbers) == [0] * 16 + [1] * 16 + [2] * 16


# ---------------------------------------------------------------- shares


def row_of(tokens: int, upstream: bool, prompt: int, valid: bool = True) -> FlatRow:
    return FlatRow(Row([-1.0] * tokens, [-1.0] * tokens, [1] * tokens, 1.0), upstream, prompt, valid)


def test_a_segment_carries_the_weight_over_the_prompts_of_its_update() -> None:
    rows = [row_of(5, True, 0), row_of(9, True, 1), row_of(2, True, 2)]
    assert scales_of(rows, [0, 0, 1]).tolist() == pytest.approx([0.35, 0.35, 0.7])


def test_a_response_carries_its_share_of_the_tokens_of_its_group() -> None:
    rows = [row_of(4, True, 0), row_of(3, False, 0), row_of(7, False, 0), row_of(6, True, 1), row_of(5, False, 1)]
    scales = scales_of(rows, [0] * 5).tolist()
    assert scales == pytest.approx([0.35, 0.15 / 10, 0.15 / 10, 0.35, 0.15 / 5])


def test_padding_rows_and_failed_siblings_carry_nothing_and_count_nowhere() -> None:
    rows = [
        row_of(4, True, 0),
        row_of(3, False, 0),
        row_of(50, False, 0, valid=False),
        row_of(50, True, 7, valid=False),
    ]
    assert scales_of(rows, [0] * 4).tolist() == pytest.approx([0.7, 0.1, 0.0, 0.0])


def test_an_update_of_padding_alone_carries_nothing() -> None:
    rows = [row_of(4, True, 0), row_of(3, False, 0), row_of(4, True, 1, valid=False), row_of(3, False, 1, valid=False)]
    assert scales_of(rows, [0, 0, 1, 1]).tolist() == pytest.approx([0.7, 0.1, 0.0, 0.0])
    assert scales_of(rows[2:], [0, 0]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@settings(max_examples=40)
@given(seed=seeds)
def test_micro_batch_losses_add_up_to_the_objective_whatever_their_size_and_order(ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group_size, per_update, updates = int(rng.integers(1, 5)), 4, int(rng.integers(1, 4))
    padding = int(rng.integers(0, per_update)) if rng.random() < 0.5 else 0
    rows = random_batch(rng, updates, per_update, group_size, padding)
    size = (group_size + 1) * per_update
    order = minibatch_order(
        [row.prompt for row in rows], [len(row.row.mask) for row in rows], size, ranks, any_even_partition(seed)
    )
    numbers = minibatch_of_rows(len(rows), size, ranks)
    ordered = [rows[index] for index in order]
    scales = scales_of(ordered, numbers).double()

    leaves = [torch.tensor([row.row.log_prob], dtype=torch.float64, requires_grad=True) for row in ordered]
    positions = verl_updates(list(range(len(rows))), size, ranks)
    values = {}
    for update, parts in enumerate(positions):
        values[update] = 0.0
        for part in parts:
            shuffled, start = rng.permutation(part).tolist(), 0
            while start < len(shuffled):
                micro_batch = shuffled[start : start + int(rng.integers(1, 5))]
                start += len(micro_batch)
                losses = []
                for index in micro_batch:
                    row = ordered[index].row
                    loss = upstream_loss if ordered[index].upstream else downstream_loss
                    old, mask = torch.tensor([row.old_log_prob]).double(), torch.tensor([row.mask]).double()
                    value = loss(leaves[index], old, torch.tensor([row.advantage]).double(), mask, *CLIPS)
                    losses.append(value.sum() * scales[index])
                total = torch.stack(losses).sum()
                total.backward()
                values[update] += float(total.detach())

    expected_values, expected = reference_batch_objective(ordered, numbers.tolist(), (0.7, 0.3), CLIPS)
    for update, value in values.items():
        assert value == pytest.approx(-expected_values.get(update, 0.0), rel=1e-6, abs=1e-5)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert leaf.grad[0].tolist() == pytest.approx([-slope for slope in gradient], rel=1e-6, abs=1e-12)


@given(seeds)
def test_shares_do_not_depend_on_the_order_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_batch(rng, 2, 2, 3, padding_prompts=1)
    minibatch = [row.prompt // 2 for row in rows]
    order = rng.permutation(len(rows)).tolist()
    shuffled = scales_of([rows[index] for index in order], [minibatch[index] for index in order])
    torch.testing.assert_close(shuffled, scales_of(rows, minibatch)[order])


# ---------------------------------------------------------------- token mean over the update


def reference_token_mean_scales(rows: list[FlatRow], minibatch: list[int], weights: tuple[float, float]) -> list[float]:
    """Per row and in float64: its share of the upstream mean over prompts, or of the mean over all response tokens."""
    scales = []
    for row, update in zip(rows, minibatch, strict=True):
        trained = [other for other, own in zip(rows, minibatch, strict=True) if own == update and other.valid]
        if not row.valid:
            scales.append(0.0)
        elif row.upstream:
            scales.append(weights[0] / len({other.prompt for other in trained}))
        else:
            scales.append(weights[1] / sum(sum(other.row.mask) for other in trained if not other.upstream))
    return scales


def test_a_token_weighs_the_same_in_every_response_of_the_update() -> None:
    rows = [row_of(4, True, 0), row_of(3, False, 0), row_of(7, False, 0), row_of(6, True, 1), row_of(5, False, 1)]
    scales = scales_of(rows, [0] * 5, aggregation="token_mean").tolist()
    assert scales == pytest.approx([0.35, 0.3 / 15, 0.3 / 15, 0.35, 0.3 / 15])
    apart = scales_of(rows, [0, 0, 0, 1, 1], aggregation="token_mean").tolist()
    assert apart == pytest.approx([0.7, 0.3 / 10, 0.3 / 10, 0.7, 0.3 / 5])


def test_padding_and_failed_siblings_are_no_tokens_of_the_update() -> None:
    rows = [row_of(4, True, 0), row_of(3, False, 0), row_of(50, False, 0, valid=False), row_of(9, True, 7, valid=False)]
    assert scales_of(rows, [0] * 4, aggregation="token_mean").tolist() == pytest.approx([0.7, 0.1, 0.0, 0.0])
    assert scales_of(rows[2:], [0, 0], aggregation="token_mean").tolist() == [0.0, 0.0]


@given(seed=seeds)
def test_token_mean_shares_follow_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_batch(rng, int(rng.integers(1, 4)), 3, int(rng.integers(1, 5)), padding_prompts=int(rng.integers(3)))
    rows = [rows[index] for index in rng.permutation(len(rows))]
    minibatch = [row.prompt // 3 for row in rows]
    scales = scales_of(rows, minibatch, 0.6, 0.4, "token_mean")
    expected = reference_token_mean_scales(rows, minibatch, (0.6, 0.4))
    assert scales.tolist() == pytest.approx(expected, rel=1e-6)


@given(seed=seeds)
def test_only_groups_of_unequal_length_tell_the_two_means_apart(seed: int) -> None:
    """For groups of equal length they agree; else the longer group weighs more in the token mean."""
    rng = np.random.default_rng(seed)
    same, short, long = int(rng.integers(1, 9)), int(rng.integers(1, 9)), int(rng.integers(10, 20))
    for first, second in ((same, same), (short, long)):
        rows = [row_of(2, True, 0), row_of(first, False, 0), row_of(2, True, 1), row_of(second, False, 1)]
        pooled, grouped = (scales_of(rows, [0] * 4, aggregation=a) for a in ("token_mean", "group_token_mean"))
        assert bool(torch.allclose(pooled, grouped)) == (first == second)
        assert float(pooled[3] * second) >= float(grouped[3] * second) - 1e-6


def test_padding_failed_siblings_and_lonely_segments_do_not_count() -> None:
    # prompt 0: segment, response, failed sibling; prompt 1: a segment whose responses were all lost; then padding
    phase = torch.tensor([UPSTREAM, DOWNSTREAM, DOWNSTREAM, UPSTREAM, DOWNSTREAM, UPSTREAM])
    prompts = torch.tensor([0, 0, 0, 1, 1, 2])
    padding = torch.tensor([False, False, False, False, False, True])
    lengths = torch.tensor([4, 9, 0, 5, 0, 1])
    counted = counted_rows(phase, prompts, padding, lengths)
    assert counted.tolist() == [True, True, False, False, False, False]


def test_a_padding_response_does_not_save_a_segment() -> None:
    counted = counted_rows(
        torch.tensor([UPSTREAM, DOWNSTREAM]), torch.tensor([0, 0]), torch.tensor([False, True]), torch.tensor([3, 3])
    )
    assert counted.tolist() == [False, False]
