"""The order of rows, against how verl splits a batch."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.trainer.order import minibatch_of_rows, minibatch_order, prompts_fit_ranks, slots

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
