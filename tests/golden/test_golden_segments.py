"""Sections 1 to 4 of docs/method.md with the ablations (split, cut, selection, skip prompt); sampling of prompts."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.curriculum import draw_prompts, prompt_weights
from recipe.skpo.method.segments import (
    cut_segment,
    fixed_split_position,
    last_boundary,
    sample_split_position,
    select_segment,
    skip_prompt,
    split_bounds,
)
from tests.support.reference import (
    reference_extreme,
    reference_segment,
    reference_selection,
    reference_skip_prompt,
    reference_split_positions,
    reference_weight,
)

seeds = st.integers(0, 2**32)


def four_sigma(draws: int, share: float) -> float:
    """What a count of independent draws stays within."""
    return 4 * math.sqrt(draws * share * (1 - share)) + 1e-9


# ---------------------------------------------------------------- split position


@given(mean_length=st.floats(0.5, 3000), low=st.floats(0.05, 0.5), width=st.floats(0, 0.45))
def test_bounds_enclose_every_integer_of_the_range(mean_length: float, low: float, width: float) -> None:
    allowed = reference_split_positions(mean_length, low, low + width)
    first, last = split_bounds(mean_length, low, low + width)
    if allowed:
        assert list(range(first, last + 1)) == allowed
    else:
        assert first == last == max(1, int((low + width) * mean_length))


@pytest.mark.parametrize("mean_length", [2.0, 13.0, 25.5, 60.0])
def test_split_positions_are_uniform_over_the_range(mean_length: float) -> None:
    allowed, draws = reference_split_positions(mean_length, 1 / 6, 1 / 2), 4000
    rng = np.random.default_rng(0)
    counts = Counter(sample_split_position(mean_length, rng) for _ in range(draws))
    assert sorted(counts) == allowed
    for count in counts.values():
        assert abs(count - draws / len(allowed)) <= four_sigma(draws, 1 / len(allowed))


@given(mean_length=st.floats(12, 3000), step=st.integers(1, 1000))
def test_a_fixed_split_takes_the_ends_of_the_range_in_turn(mean_length: float, step: int) -> None:
    allowed = reference_split_positions(mean_length, 1 / 6, 1 / 2)
    assert fixed_split_position(mean_length, step) == (allowed[0] if step % 2 == 1 else allowed[-1])


# ---------------------------------------------------------------- segments


@given(seed=seeds, finished=st.booleans())
def test_a_candidate_is_cut_as_the_reference_cuts_it(seed: int, finished: bool) -> None:
    rng = np.random.default_rng(seed)
    split = int(rng.integers(1, 12))
    written = int(rng.integers(1, split + 1)) if finished else split
    tokens, logprobs = rng.integers(0, 99, written).tolist(), (-rng.exponential(1.0, written)).tolist()
    segment = cut_segment(tokens, logprobs, split, finished)
    kept, deviation = reference_segment(tokens, logprobs, split, finished)
    assert list(segment.token_ids) == kept
    assert segment.logprobs == tuple(logprobs[: len(kept)])
    assert segment.deviation == pytest.approx(deviation, rel=1e-12)


@given(seed=seeds, count=st.integers(1, 9))
def test_median_selection_follows_the_reference_also_on_ties(seed: int, count: int) -> None:
    # Multiples of 1/4: ties are frequent, and the reference's mean of the middle values is exact.
    deviations = (np.random.default_rng(seed).integers(0, 8, count) / 4).tolist()
    assert select_segment(deviations) == reference_selection(deviations)


@given(seed=seeds, count=st.integers(2, 9), step=st.integers(1, 9))
def test_extreme_selection_follows_the_reference(seed: int, count: int, step: int) -> None:
    deviations = (np.random.default_rng(seed).integers(0, 8, count) / 4).tolist()
    assert select_segment(deviations, "extreme", step) == reference_extreme(deviations, step)


@given(seed=seeds, boundary=st.sampled_from(["x", "xy", "yx", "zz"]), wanted=st.integers(0, 3))
def test_the_last_boundary_is_the_first_prefix_that_holds_as_many_as_the_whole(
    seed: int, boundary: str, wanted: int
) -> None:
    pieces = ["x", "y", "z", "xy"]
    tokens = np.random.default_rng(seed).integers(0, 4, 8).tolist()

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[token] for token in ids)

    def last_end(ids: list[int]) -> int:
        """Where the last boundary text ends, in characters; 0 without one."""
        text = decode(ids)
        return max((end for end in range(1, len(text) + 1) if text[:end].endswith(boundary)), default=0)

    ends = [number for number in range(1, 9) if len(decode(tokens[:number])) >= last_end(tokens) > 0][:1]
    ends += [number for number in range(1, 9) if tokens[number - 1] == wanted]
    assert last_boundary(tokens, [wanted], [boundary], decode) == (max(ends) if ends else None)


@given(seed=seeds, bos=st.sampled_from([None, 0, 1]))
def test_the_skip_prompt_follows_the_reference(seed: int, bos: int | None) -> None:
    rng = np.random.default_rng(seed)
    segment, problem = (rng.integers(0, 4, int(rng.integers(1, 6))).tolist() for _ in range(2))
    assert skip_prompt(segment, problem, bos) == reference_skip_prompt(segment, problem, bos)


# ---------------------------------------------------------------- prioritised sampling


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=20), epsilon=st.floats(1e-3, 1))
def test_weights_follow_the_reference(values: list[float], epsilon: float) -> None:
    expected = [reference_weight(value, epsilon) for value in values]
    assert prompt_weights(np.array(values), epsilon).tolist() == pytest.approx(expected, rel=1e-12)


def test_prompts_are_drawn_by_weight_and_never_twice() -> None:
    weights, draws = np.array([4.0, 1.0, 2.0, 1.0]), 4000
    rng = np.random.default_rng(1)
    batches = [draw_prompts(weights, 3, rng) for _ in range(draws)]
    assert all(len(set(batch)) == 3 for batch in batches)
    for index, weight in enumerate(weights):
        share = weight / weights.sum()
        assert abs(sum(batch[0] == index for batch in batches) - draws * share) <= four_sigma(draws, share)
