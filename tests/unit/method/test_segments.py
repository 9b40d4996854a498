"""Where a segment ends, which candidate is kept, how [s, q] is put together (docs/method.md, sections 1 to 4)."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.segments import (
    cut_segment,
    fixed_split_position,
    last_boundary,
    sample_split_position,
    select_segment,
    skip_prompt,
    split_bounds,
)
from tests.conftest import build_tokenizer
from tests.support.reference import reference_selection, reference_split_positions

lengths = st.floats(min_value=0.5, max_value=5000)
deviations = st.lists(st.integers(0, 12).map(lambda value: value / 4), min_size=1, max_size=9)
tokens = st.lists(st.integers(2, 99), min_size=1, max_size=12)


# ---------------------------------------------------------------- split position


def test_split_bounds_are_a_sixth_and_a_half_of_the_mean_length() -> None:
    assert split_bounds(1024) == (171, 512)  # 170.67 is rounded up, so that it lies inside
    assert split_bounds(60) == (10, 30)
    assert split_bounds(60, low=0.25, high=0.75) == (15, 45)


@pytest.mark.parametrize("mean_length", [0.5, 1, 2, 3])
def test_very_short_answers_are_split_after_one_token(mean_length: float) -> None:
    assert split_bounds(mean_length) == (1, 1)


def test_an_interval_without_an_integer_gives_its_upper_end_rounded_down() -> None:
    assert split_bounds(10, low=0.45, high=0.49) == (4, 4)


@given(lengths)
def test_split_bounds_are_the_first_and_last_integer_of_the_interval(mean_length: float) -> None:
    inside = reference_split_positions(mean_length, 1 / 6, 1 / 2)
    only = max(1, math.floor(mean_length / 2))
    assert split_bounds(mean_length) == ((inside[0], inside[-1]) if inside else (only, only))


@given(lengths, st.integers(0, 2**32))
def test_split_position_lies_within_the_bounds_and_is_an_integer(mean_length: float, seed: int) -> None:
    first, last = split_bounds(mean_length)
    position = sample_split_position(mean_length, np.random.default_rng(seed))
    assert type(position) is int and 1 <= first <= position <= last


def test_split_position_is_uniform_with_both_ends() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(sample_split_position(24, rng) for _ in range(9000))
    assert set(drawn) == set(range(4, 13))
    assert all(abs(count - 1000) < 150 for count in drawn.values())  # five standard deviations


def test_one_split_position_takes_one_draw() -> None:
    used, plain = np.random.default_rng(7), np.random.default_rng(7)
    assert sample_split_position(24, used) == plain.integers(4, 12, endpoint=True)
    assert used.bit_generator.state == plain.bit_generator.state


def test_split_range_of_the_settings_is_used() -> None:
    rng = np.random.default_rng(0)
    drawn = {sample_split_position(100, rng, 0.5, 0.52) for _ in range(100)}
    assert drawn == {50, 51, 52}


@pytest.mark.parametrize("mean_length", [0, -1, math.nan, math.inf])
def test_a_mean_length_that_is_no_length_is_refused(mean_length: float) -> None:
    with pytest.raises(ValueError, match="mean_length"):
        split_bounds(mean_length)


@pytest.mark.parametrize(("low", "high"), [(0, 0.5), (0.5, 0.4), (0.5, 1), (-0.1, 0.5), (math.nan, 0.5)])
def test_a_split_range_outside_zero_and_one_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="split range"):
        split_bounds(100, low, high)


@given(lengths, st.integers(1, 1000))
def test_a_fixed_split_is_the_lower_end_in_odd_steps_and_the_upper_one_in_even(mean_length: float, step: int) -> None:
    first, last = split_bounds(mean_length)
    assert fixed_split_position(mean_length, step) == (first if step % 2 == 1 else last)


def test_a_fixed_split_alternates_between_a_sixth_and_a_half() -> None:
    assert [fixed_split_position(60, step) for step in (1, 2, 3, 4)] == [10, 30, 10, 30]
    assert [fixed_split_position(60, step, 0.25, 0.75) for step in (1, 2)] == [15, 45]


# ---------------------------------------------------------------- boundaries


def one_letter_per_token(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def cut_text(text: str, *boundaries: str) -> int | None:
    """Where a text of one-letter tokens is cut."""
    return last_boundary([ord(letter) for letter in text], [], boundaries, one_letter_per_token)


@pytest.mark.parametrize(
    ("text", "boundaries", "kept"),
    [
        ("ab.cd", ["."], "ab."),
        ("a.b.c", ["."], "a.b."),
        ("ab.", ["."], "ab."),
        (".abc", ["."], "."),
        ("abc", ["."], None),
        ("ab</p>c", ["</p>"], "ab</p>"),
        ("ab</p", ["</p>"], None),
        ("a.b\n\nc", [".", "\n\n"], "a.b\n\n"),
        ("a\n\nb.c", [".", "\n\n"], "a\n\nb."),
        ("a\n\nb", ["\n\n", "\n"], "a\n\n"),  # one is a part of the other
        ("a\n\n\nb", ["\n\n"], "a\n\n\n"),  # they overlap
        ("aababb", ["ab", "bab"], "aabab"),
    ],
)
def test_the_cut_is_behind_the_last_boundary_text(text: str, boundaries: list[str], kept: str | None) -> None:
    assert cut_text(text, *boundaries) == (None if kept is None else len(kept))


@pytest.mark.parametrize(
    ("ids", "boundary_ids", "kept"),
    [
        ([5, 9, 6, 9, 7], [9], 4),
        ([9, 5, 6], [9], 1),
        ([5, 6, 9], [9], 3),
        ([5, 6], [9], None),
        ([5, 8, 9, 6], [8, 9], 3),
    ],
)
def test_the_cut_is_behind_the_last_boundary_id(ids: list[int], boundary_ids: list[int], kept: int | None) -> None:
    def never(token_ids: Sequence[int]) -> str:
        raise AssertionError("ids are compared without decoding")

    assert last_boundary(ids, boundary_ids, [], never) == kept


def test_the_later_one_of_a_text_and_an_id_counts() -> None:
    ids = [ord(letter) for letter in "a.bXc"]
    assert last_boundary(ids, [ord("X")], ["."], one_letter_per_token) == 4
    assert last_boundary(ids, [ord("a")], ["."], one_letter_per_token) == 2


def test_a_token_in_which_a_boundary_ends_is_kept_whole() -> None:
    pieces = ["one", ". T", "wo.\n", "\nThr", "ee"]

    def decode(token_ids: Sequence[int]) -> str:
        return "".join(pieces[token] for token in token_ids)

    ids = list(range(5))
    assert last_boundary(ids, [], ["."], decode) == 3
    assert last_boundary(ids, [], ["\n\n"], decode) == 4, "it begins in one token and ends in the next"
    assert last_boundary(ids, [], ["e. Two.\n\nT"], decode) == 4
    assert last_boundary(ids[:1], [], ["n"], decode) == 1
    assert last_boundary(ids[:2], [], ["."], decode) == 2


tokenizer = cache(build_tokenizer)
"""One token per byte."""


def decode_bytes(token_ids: Sequence[int]) -> str:
    return tokenizer().decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_bytes(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "boundary", "kept"),
    [
        ("a。b", "。", "a。"),
        ("é.ü", ".", "é."),
        ("😀!😀", "😀", "😀!😀"),
        ("日本。語", "本。", "日本。"),
        ("。", "。", "。"),
    ],
)
def test_a_character_of_several_tokens_is_never_torn_apart(text: str, boundary: str, kept: str) -> None:
    ids = encode_bytes(text)
    cut = last_boundary(ids, [], [boundary], decode_bytes)
    assert cut == len(kept.encode())
    assert decode_bytes(ids[:cut]) == kept


def test_an_unfinished_character_at_the_end_is_no_obstacle() -> None:
    ids = encode_bytes("é.日")[:-1]
    assert last_boundary(ids, [], ["."], decode_bytes) == len("é.".encode())


def test_special_tokens_can_be_boundaries_as_text_too() -> None:
    ids = [*encode_bytes("ab"), 3, *encode_bytes("c")]
    assert decode_bytes([3]) == "<|im_start|>"
    assert last_boundary(ids, [], ["<|im_start|>"], decode_bytes) == last_boundary(ids, [3], [], decode_bytes) == 3


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


def logprobs_of(count: int) -> list[float]:
    return [-0.5 * (index + 1) for index in range(count)]


def test_candidate_that_goes_on_is_cut_at_the_split_position() -> None:
    segment = cut_segment([5, 6, 7, 8], logprobs_of(4), 3, finished=False)
    assert segment.token_ids == (5, 6, 7)
    assert segment.logprobs == (-0.5, -1.0, -1.5)


def test_deviation_is_the_mean_negative_log_prob_of_the_kept_tokens() -> None:
    assert cut_segment([5, 6, 7, 8], logprobs_of(4), 3, finished=False).deviation == pytest.approx(1.0)
    # Of an early finisher too only the kept half counts.
    assert cut_segment([5, 6, 7, 8], logprobs_of(4), 9, finished=True).deviation == pytest.approx(0.75)


@pytest.mark.parametrize(("wrote", "kept"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (9, 4)])
def test_early_finisher_keeps_the_first_half_of_what_it_wrote(wrote: int, kept: int) -> None:
    segment = cut_segment(list(range(wrote)), logprobs_of(wrote), 10, finished=True)
    assert segment.token_ids == tuple(range(kept))


def test_end_marker_exactly_at_the_split_position_counts_as_early() -> None:
    assert cut_segment([1, 2, 3, 9], logprobs_of(4), 4, finished=True).token_ids == (1, 2)
    assert cut_segment([1, 2, 3, 4], logprobs_of(4), 4, finished=False).token_ids == (1, 2, 3, 4)


def test_candidate_that_ended_after_the_split_position_is_cut_there() -> None:
    assert cut_segment([1, 2, 3, 4, 9], logprobs_of(5), 4, finished=True).token_ids == (1, 2, 3, 4)


def test_candidate_that_is_shorter_without_having_ended_is_kept_whole() -> None:
    assert cut_segment([1, 2, 3], logprobs_of(3), 4, finished=False).token_ids == (1, 2, 3)


@given(tokens, st.integers(1, 15), st.booleans())
def test_a_segment_is_a_prefix_of_at_most_the_split_position(ids: list[int], split: int, finished: bool) -> None:
    segment = cut_segment(ids, logprobs_of(len(ids)), split, finished)
    size = len(segment.token_ids)
    assert 1 <= size <= split
    assert segment.token_ids == tuple(ids[:size])
    assert segment.logprobs == tuple(logprobs_of(len(ids))[:size])


@pytest.mark.parametrize(("ids", "logprobs"), [([], []), ([1, 2], [-1.0]), ([1], [])])
def test_candidate_without_one_log_prob_per_token_is_refused(ids: list[int], logprobs: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(ids)} tokens and {len(logprobs)} log-probs"):
        cut_segment(ids, logprobs, 1, finished=False)


def boundary_at(*ends: int):
    """A boundary finder that knows where boundaries end."""
    return lambda token_ids: max((end for end in ends if end <= len(token_ids)), default=None)


def test_a_segment_ends_at_the_last_boundary_up_to_the_split_position() -> None:
    ids = [5, 6, 7, 8, 9]
    segment = cut_segment(ids, logprobs_of(5), 4, False, boundary_at(1, 3, 5))
    assert (segment.token_ids, segment.logprobs) == ((5, 6, 7), (-0.5, -1.0, -1.5))
    assert segment.deviation == pytest.approx(1.0), "of what is kept alone"
    assert cut_segment(ids, logprobs_of(5), 4, False, boundary_at(4)).token_ids == (5, 6, 7, 8)


def test_without_a_boundary_a_segment_ends_where_it_did_anyway() -> None:
    assert cut_segment([5, 6, 7, 8, 9], logprobs_of(5), 4, False, boundary_at()).token_ids == (5, 6, 7, 8)
    assert cut_segment([5, 6, 7, 8, 9], logprobs_of(5), 9, True, boundary_at()).token_ids == (5, 6)


def test_of_an_early_finisher_the_first_half_is_cut_at_its_boundary() -> None:
    ids = [5, 6, 7, 8, 9, 10, 11]
    assert cut_segment(ids, logprobs_of(7), 9, True, boundary_at(2, 4)).token_ids == (5, 6)
    assert cut_segment(ids, logprobs_of(7), 9, True, boundary_at(4)).token_ids == (5, 6, 7)
    assert cut_segment([5], logprobs_of(1), 9, True, boundary_at(1)).token_ids == (5,)


def test_split_position_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="split_position"):
        cut_segment([1], [-1.0], 0, finished=False)


# ---------------------------------------------------------------- selection


def test_the_median_candidate_is_selected() -> None:
    assert select_segment([0.1, 5.0, 0.9]) == 2
    assert select_segment([3.0]) == 0


def test_of_an_even_group_the_earlier_middle_one_is_selected() -> None:
    assert select_segment([4.0, 2.0, 1.0, 3.0]) == 1
    assert select_segment([4.0, 3.0, 1.0, 2.0]) == 1
    # Equally close on paper; in floating point |d - mean| would prefer one of them.
    assert select_segment([0.0, 0.1, 0.3, 9.0]) == 1
    assert select_segment([0.0, 0.3, 0.1, 9.0]) == 1


def test_a_tie_goes_to_the_lowest_index() -> None:
    assert select_segment([2.0, 2.0, 2.0]) == 0
    assert select_segment([9.0, 2.0, 2.0, 0.0]) == 1


@given(deviations)
def test_no_candidate_is_closer_to_the_median_than_the_selected_one(values: list[float]) -> None:
    assert select_segment(values) == reference_selection(values)


@given(deviations, st.randoms())
def test_order_of_the_candidates_only_decides_ties(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    middle = statistics.median(values)
    assert abs(shuffled[select_segment(shuffled)] - middle) == abs(values[select_segment(values)] - middle)


def test_extreme_takes_the_smallest_and_the_largest_deviation_in_turn() -> None:
    values = [2.0, 0.5, 3.0, 1.0]
    assert [select_segment(values, "extreme", step) for step in (1, 2, 3, 4)] == [1, 2, 1, 2]
    assert [select_segment([2.0, 1.0, 2.0, 1.0], "extreme", step) for step in (1, 2)] == [1, 0], "lowest index on a tie"


def test_first_takes_the_first_whatever_it_deviates() -> None:
    assert {select_segment([2.0, 0.5, 3.0], "first", step, seed) for step in (1, 2) for seed in range(9)} == {0}


def test_random_is_uniform_and_depends_on_the_seed_alone() -> None:
    values = [2.0, 0.5, 3.0, 1.0]
    drawn = [select_segment(values, "random", 1, seed) for seed in range(4000)]
    assert drawn == [select_segment(sorted(values), "random", 2, seed) for seed in range(4000)]
    assert all(abs(count - 1000) < 140 for count in Counter(drawn).values())  # five standard deviations
    assert set(drawn) == {0, 1, 2, 3}


def test_the_median_needs_neither_step_nor_seed() -> None:
    assert {select_segment([0.1, 5.0, 0.9], "median", step, seed) for step in (1, 2) for seed in (0, 1)} == {2}


@pytest.mark.parametrize("selection", ["median", "extreme", "first", "random"])
def test_a_lone_candidate_is_selected(selection: str) -> None:
    assert select_segment([1.0], selection, 2, 7) == 0


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="median, extreme, first or random, got 'best'"):
        select_segment([1.0], "best")


@pytest.mark.parametrize("selection", ["median", "extreme", "first", "random"])
@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0, 2.0]])
def test_deviations_that_are_no_numbers_are_refused(values: list[float], selection: str) -> None:
    with pytest.raises(ValueError, match="deviations"):
        select_segment(values, selection)


# ---------------------------------------------------------------- [s, q]


def test_skip_prompt_is_the_segment_then_the_problem() -> None:
    assert skip_prompt([1, 2], [7, 8, 9]) == [1, 2, 7, 8, 9]
    assert skip_prompt((1, 2), (7, 8, 9), bos_token_id=0) == [1, 2, 7, 8, 9]


def test_the_bos_of_the_problem_moves_to_the_front() -> None:
    assert skip_prompt([5, 6], [0, 7, 8], bos_token_id=0) == [0, 5, 6, 7, 8]


@given(tokens, tokens, st.booleans())
def test_skip_prompt_loses_and_adds_no_token(segment: list[int], problem: list[int], with_bos: bool) -> None:
    templated = [1, *problem] if with_bos else problem
    skip = skip_prompt(segment, templated, bos_token_id=1)
    assert skip.count(1) == int(with_bos)
    assert [token for token in skip if token != 1] == segment + problem
    assert not with_bos or skip[0] == 1


def test_skip_prompt_leaves_its_arguments_alone() -> None:
    segment, problem = [5], [0, 7]
    skip_prompt(segment, problem, bos_token_id=0).append(9)
    assert (segment, problem) == ([5], [0, 7])
