"""Upstream segments: where to cut, which candidate to keep, how the skip prompt ``[s, q]`` is put together.

SPEC section 2, paper section 3.  Per prompt q, G candidates s_1..s_G ~ pi(.|q) stop at t_q tokens, with

    t_q ~ Uniform[L_q / 6, L_q / 2],  integer >= 1,                L_q = the prompt's tracked mean response length
    d(s) = (1 / |s|) * sum_t -log pi(s_t | q, s_<t)                the deviation of a candidate
    s    = the candidate whose d is closest to the median of the G values (lowest index on a tie)

What the paper leaves open (even G, an end exactly at t_q) is decided where it comes up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One upstream candidate after the cut.

    Attributes:
        token_ids: the kept tokens, at least one.
        logprobs: log pi of each kept token under q alone, in nats, same length.
        deviation: mean of ``-logprobs``, in nats per token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    deviation: float


def split_bounds(mean_length: float, low: float = 1 / 6, high: float = 1 / 2) -> tuple[int, int]:
    """Smallest and largest split position for a prompt whose mean response length is ``mean_length``.

    Args:
        mean_length: L_q in tokens, > 0.
        low, high: the split range as shares of L_q, 0 < low <= high < 1 (the paper: 1/6 and 1/2).

    Returns:
        Integers ``(first, last)`` with ``1 <= first <= last``: every integer inside [low * L_q, high * L_q].  Where
        that interval holds none (very short answers), both are its rounded-down upper end, at least 1.

    Raises:
        ValueError: ``mean_length`` is not a finite positive number, or the range is not inside (0, 1).
    """
    if not (math.isfinite(mean_length) and mean_length > 0):
        raise ValueError(f"mean_length must be a finite number of tokens > 0, got {mean_length}")
    if not 0 < low <= high < 1:
        raise ValueError(f"the split range must satisfy 0 < low <= high < 1, got [{low}, {high}]")
    last = max(1, math.floor(high * mean_length))
    first = min(last, max(1, math.ceil(low * mean_length)))
    return first, last


def sample_split_position(mean_length: float, rng: np.random.Generator, low: float = 1 / 6, high: float = 1 / 2) -> int:
    """One draw of t_q, uniform over the integers of ``split_bounds``; consumes one integer of ``rng``."""
    first, last = split_bounds(mean_length, low, high)
    return int(rng.integers(first, last, endpoint=True))


def cut_segment(token_ids: Sequence[int], logprobs: Sequence[float], split_position: int, finished: bool) -> Segment:
    """Cut one candidate.

    Args:
        token_ids: what the candidate wrote (its EOS included where it wrote one), at least one token.
        logprobs: log pi of each of these tokens, in nats, same length.
        split_position: t_q >= 1.
        finished: the candidate ended by itself (EOS).  If it did so at t_q at the latest, its segment is the first
            half of what it wrote, ``floor(n / 2)`` tokens but at least one: a finished answer is no place to go on.

    Raises:
        ValueError: no tokens, lengths that differ, or ``split_position < 1``.
    """
    if not token_ids or len(token_ids) != len(logprobs):
        raise ValueError(
            f"a candidate needs as many log-probs as tokens and at least one, got {len(token_ids)} "
            f"tokens and {len(logprobs)} log-probs"
        )
    if split_position < 1:
        raise ValueError(f"split_position must be >= 1, got {split_position}")
    # An EOS exactly at t_q is early too: cutting at t_q would leave the end marker inside the skip prompt.
    ended_early = finished and len(token_ids) <= split_position
    keep = max(1, len(token_ids) // 2) if ended_early else min(split_position, len(token_ids))
    kept = tuple(float(value) for value in logprobs[:keep])
    return Segment(tuple(int(token) for token in token_ids[:keep]), kept, -math.fsum(kept) / keep)


def select_segment(deviations: Sequence[float]) -> int:
    """Index of the candidate whose deviation is closest to the median; the lowest index on a tie.

    For an even count the median is the mean of the two middle values, so both are equally close and the earlier
    one wins.

    Raises:
        ValueError: no candidate, or a deviation that is not finite.
    """
    values = np.asarray(deviations, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"deviations must be finite and at least one, got {list(deviations)}")
    middle = np.sort(values)[[(values.size - 1) // 2, values.size // 2]]
    # The candidates closest to the median are the middle order statistics themselves: comparing with them, and not
    # |d - mean(middle)|, keeps the tie exact in floating point.
    return int(np.flatnonzero((values == middle[0]) | (values == middle[1]))[0])


def skip_prompt(segment_ids: Sequence[int], problem_ids: Sequence[int], bos_token_id: int | None = None) -> list[int]:
    """The skip-connected prompt [s, q]: the tokens of s, then the tokens of the templated problem.

    Args:
        segment_ids: tokens of s.
        problem_ids: tokens of the templated q, with its BOS where the tokenizer sets one.
        bos_token_id: the tokenizer's BOS.  If the problem starts with it, it moves to the front of the whole prompt,
            so that there is exactly one, at position 0; a template without BOS stays without.

    Returns:
        A new list of ``len(segment_ids) + len(problem_ids)`` token ids.
    """
    segment, problem = list(segment_ids), list(problem_ids)
    if bos_token_id is not None and problem and problem[0] == bos_token_id:
        return [bos_token_id, *segment, *problem[1:]]
    return segment + problem
