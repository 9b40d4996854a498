"""Where a segment ends, which candidate is kept, how [s, q] is put together (docs/method.md, sections 1 to 4).

Numbers by hand; ``tests/golden/test_golden_segments.py`` compares random ones with the reference.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.segments import (
    begins_with,
    cut_segment,
    fixed_split_position,
    last_boundary,
    sample_split_position,
    select_segment,
    skip_prompt,
    split_bounds,
)
from tests.conftest import build_tokenizer

# ---------------------------------------------------------------- split position


@pytest.mark.parametrize(
    ("mean_length", "interval", "bounds"),
    [
        (1024, (), (171, 512)),  # a sixth is 170.67: rounded up, so that it lies inside
        (60, (), (10, 30)),
        (60, (0.25, 0.75), (15, 45)),
        *((length, (), (1, 1)) for length in (0.5, 1, 2, 3)),
        (10, (0.45, 0.49), (4, 4)),  # without an integer: its upper end, rounded down
    ],
)
def test_split_bounds_are_the_integers_of_the_interval(mean_length: float, interval: tuple, bounds: tuple) -> None:
    assert split_bounds(mean_length, *interval) == bounds
    assert [fixed_split_position(mean_length, step, *interval) for step in (1, 2, 3, 4)] == [*bounds, *bounds]
    drawn = {sample_split_position(mean_length, np.random.default_rng(seed), *interval) for seed in range(9)}
    assert bounds[0] <= min(drawn) <= max(drawn) <= bounds[1] and {type(position) for position in drawn} == {int}


def test_one_split_position_takes_one_draw() -> None:
    used, plain = np.random.default_rng(7), np.random.default_rng(7)
    assert sample_split_position(24, used) == plain.integers(4, 12, endpoint=True)
    assert used.bit_generator.state == plain.bit_generator.state


@pytest.mark.parametrize("mean_length", [0, -1, math.nan, math.inf])
def test_a_mean_length_that_is_no_length_is_refused(mean_length: float) -> None:
    with pytest.raises(ValueError, match="mean_length"):
        split_bounds(mean_length)


@pytest.mark.parametrize(("low", "high"), [(0, 0.5), (0.5, 0.4), (0.5, 1), (-0.1, 0.5), (math.nan, 0.5)])
def test_a_split_range_outside_zero_and_one_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="split range"):
        split_bounds(100, low, high)


# ---------------------------------------------------------------- boundaries

tokenizer = cache(build_tokenizer)
"""One token per byte."""


def decode_bytes(token_ids: Sequence[int]) -> str:
    return tokenizer().decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_bytes(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "boundaries", "kept"),
    [
        ("a.b.c", ["."], "a.b."),
        (".abc", ["."], "."),
        ("abc", ["."], None),
        ("ab</p>c", ["</p>"], "ab</p>"),
        ("a.b\n\nc", [".", "\n\n"], "a.b\n\n"),
        ("a\n\nb.c", [".", "\n\n"], "a\n\nb."),
        ("a\n\nb", ["\n\n", "\n"], "a\n\n"),  # one is a part of the other
        ("a\n\n\nb", ["\n\n"], "a\n\n\n"),  # they overlap
        ("aababb", ["ab", "bab"], "aabab"),
        ("日本。語", ["本。"], "日本。"),  # no character of several tokens is split
        ("😀!😀", ["😀"], "😀!😀"),
    ],
)
def test_the_cut_is_behind_the_last_boundary_text(text: str, boundaries: list[str], kept: str | None) -> None:
    cut = last_boundary(encode_bytes(text), [], boundaries, decode_bytes)
    assert cut == (None if kept is None else len(kept.encode()))


@pytest.mark.parametrize(
    ("ids", "boundary_ids", "kept"),
    [([5, 9, 6, 9, 7], [9], 4), ([9, 5], [9], 1), ([5], [9], None), ([5, 9], [9], 2)],
)
def test_the_cut_is_behind_the_last_boundary_id(ids: list[int], boundary_ids: list[int], kept: int | None) -> None:
    def never(token_ids: Sequence[int]) -> str:
        raise AssertionError("ids are compared without decoding")

    assert last_boundary(ids, boundary_ids, [], never) == kept


def test_special_tokens_can_be_boundaries_as_text_too() -> None:
    ids = [*encode_bytes("ab"), 3, *encode_bytes("c")]
    assert last_boundary(ids, [], ["<|im_start|>"], decode_bytes) == last_boundary(ids, [3], [], decode_bytes) == 3


def test_a_token_in_which_a_boundary_ends_is_kept_whole() -> None:
    pieces = ["one", ". T", "wo.\n", "\nThr", "ee"]

    def decode(token_ids: Sequence[int]) -> str:
        return "".join(pieces[token] for token in token_ids)

    # The second begins in one token and ends in the next.
    for text, count, kept in ((".", 5, 3), ("\n\n", 5, 4), ("e. Two.\n\nT", 5, 4), ("n", 1, 1), (".", 2, 2)):
        assert last_boundary(list(range(count)), [], [text], decode) == kept


def naive_boundary(ids: list[int], boundary_ids: list[int], texts: list[str]) -> int | None:
    """Every prefix in turn: a boundary ends in its last token if this prefix is the first to hold the boundary."""
    whole, best = decode_bytes(ids), None
    for size in range(1, len(ids) + 1):
        ends_here = ids[size - 1] in boundary_ids
        held, held_before = decode_bytes(ids[:size]), decode_bytes(ids[: size - 1])
        for end in range(1, len(whole) + 1):
            complete = held.startswith(whole[:end]) and not held_before.startswith(whole[:end])
            if complete and any(whole[:end].endswith(text) for text in texts):
                ends_here = True
        if ends_here:
            best = size
    return best


@given(
    st.lists(st.sampled_from(["a", ".", "\n", "é", "日", "😀"]), min_size=1, max_size=8).map("".join),
    st.integers(0, 3),
    st.lists(st.sampled_from([3, *range(5, 261)]), max_size=2),
    st.lists(st.text(alphabet="a.\né日😀", min_size=1, max_size=3), max_size=3),
)
def test_the_cut_is_where_a_search_over_all_prefixes_finds_it(
    text: str, lost: int, boundary_ids: list[int], texts: list[str]
) -> None:
    ids = encode_bytes(text)
    ids = ids[: max(1, len(ids) - lost)]  # generation may stop inside a character
    assert last_boundary(ids, boundary_ids, texts, decode_bytes) == naive_boundary(ids, boundary_ids, texts)


# ---------------------------------------------------------------- cutting


def boundary_at(*ends: int):
    """A boundary finder that knows where boundaries end."""
    return lambda token_ids: max((end for end in ends if end <= len(token_ids)), default=None)


@pytest.mark.parametrize(
    ("wrote", "split", "finished", "boundaries", "kept"),
    [
        (4, 3, False, None, 3),  # goes on: cut at the split position
        (3, 4, False, None, 3),  # cut short by the server
        *((wrote, 10, True, None, kept) for wrote, kept in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (9, 4))),
        (4, 4, True, None, 2),  # an end marker right at the split position counts as early
        (4, 4, False, None, 4),
        (5, 4, True, None, 4),  # ended after the split position
        (5, 4, False, (1, 3, 5), 3),
        (5, 4, False, (4,), 4),
        (5, 4, False, (), 4),  # without a boundary it ends where it did anyway
        (5, 9, True, (), 2),
        (7, 9, True, (2, 4), 2),  # the first half is cut at its boundary
        (7, 9, True, (4,), 3),
        (1, 9, True, (1,), 1),
    ],
)
def test_a_candidate_is_cut_and_judged_by_what_is_kept(
    wrote: int, split: int, finished: bool, boundaries: tuple[int, ...] | None, kept: int
) -> None:
    logprobs = [-0.5 * (index + 1) for index in range(wrote)]
    finder = () if boundaries is None else (boundary_at(*boundaries),)
    segment = cut_segment(list(range(wrote)), logprobs, split, finished, *finder)
    assert (segment.token_ids, segment.logprobs) == (tuple(range(kept)), tuple(logprobs[:kept]))
    assert segment.deviation == pytest.approx(-fmean(logprobs[:kept]))


@pytest.mark.parametrize(
    ("ids", "logprobs", "split", "said"),
    [
        ([], [], 1, "0 tokens and 0 log-probs"),
        ([1, 2], [-1.0], 1, "2 tokens and 1 log-probs"),
        ([1], [], 1, "1 tokens and 0 log-probs"),
        ([1], [-1.0], 0, "split_position"),
    ],
)
def test_what_is_no_candidate_is_refused(ids: list[int], logprobs: list[float], split: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cut_segment(ids, logprobs, split, finished=False)


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("deviations", "chosen"),
    [
        ([0.1, 5.0, 0.9], 2),
        ([4.0, 2.0, 1.0, 3.0], 1),  # the earlier one of the two in the middle
        ([4.0, 3.0, 1.0, 2.0], 1),
        # Equally close on paper; in floating point |d - mean| would prefer one of them.
        ([0.0, 0.1, 0.3, 9.0], 1),
        ([0.0, 0.3, 0.1, 9.0], 1),
        ([2.0, 2.0, 2.0], 0),
        ([9.0, 2.0, 2.0, 0.0], 1),
    ],
)
def test_the_median_candidate_is_selected(deviations: list[float], chosen: int) -> None:
    assert {select_segment(deviations, "median", step, seed) for step in (1, 2) for seed in (0, 1)} == {chosen}


def test_first_takes_the_first_whatever_it_deviates() -> None:
    assert {select_segment([2.0, 0.5, 3.0], "first", step, seed) for step in (1, 2) for seed in range(9)} == {0}


def test_random_is_uniform_and_depends_on_the_seed_alone() -> None:
    values = [2.0, 0.5, 3.0, 1.0]
    drawn = [select_segment(values, "random", 1, seed) for seed in range(4000)]
    assert drawn == [select_segment(sorted(values), "random", 2, seed) for seed in range(4000)]
    assert all(abs(count - 1000) < 140 for count in Counter(drawn).values())  # five standard deviations
    assert set(drawn) == {0, 1, 2, 3}


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="median, extreme, first or random, got 'best'"):
        select_segment([1.0], "best")


@pytest.mark.parametrize("selection", ["median", "extreme", "first", "random"])
def test_deviations_are_numbers_and_one_is_enough(selection: str) -> None:
    assert select_segment([1.0], selection, 2, 7) == 0
    for values in ([], [1.0, math.nan], [math.inf, 1.0, 2.0]):
        with pytest.raises(ValueError, match="deviations"):
            select_segment(values, selection)


# ---------------------------------------------------------------- [s, q]


def test_the_bos_of_the_problem_moves_to_the_front_of_the_skip_prompt() -> None:
    segment, problem = [5], [0, 7]
    assert skip_prompt((1, 2), (7, 8, 9), bos_token_id=0) == [1, 2, 7, 8, 9]
    assert skip_prompt(segment, problem, bos_token_id=0) == [0, 5, 7]
    skip_prompt(segment, problem).append(9)
    assert (segment, problem) == ([5], [0, 7]), "its arguments stay"


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(
    ("response", "copied"), [((1, 2, 3), True), ([1, 2], True), ((1,), False), ((1, 3, 2), False), ((), False)]
)
def test_a_copy_begins_with_all_of_the_segment(response: Sequence[int], copied: bool) -> None:
    assert begins_with(response, (1, 2)) is copied
