"""Where a segment ends, which candidate is kept, how [s, q] is put together (SPEC section 2)."""

import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.segments import cut_segment, sample_split_position, select_segment, skip_prompt, split_bounds
from tests.reference import reference_selection, reference_split_positions

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


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0, 2.0]])
def test_deviations_that_are_no_numbers_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="deviations"):
        select_segment(values)


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
