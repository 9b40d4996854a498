"""Upstream segments: where to cut, which candidate to keep, how the skip prompt ``[s, q]`` is put together.

Paper, section 3; docs/method.md, sections 1 to 4.  Per prompt q, G candidates s_1..s_G ~ pi(.|q) stop at t_q
tokens, with

    t_q ~ Uniform[L_q / 6, L_q / 2],  integer >= 1,                L_q = the prompt's tracked mean response length
    d(s) = (1 / |s|) * sum_t -log pi(s_t | q, s_<t)                the deviation of a candidate
    s    = the candidate whose d is closest to the median of the G values (lowest index on a tie)

Ablations that concern a segment (docs/method.md, section 12) are here too: other split positions
(``fixed_split_position``, ``last_boundary``) and other selections.  What the paper leaves open (even G, an end exactly
at t_q) is decided where it comes up.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One upstream candidate after the cut.

    Attributes:
        token_ids: the kept tokens, at least one.
        logprobs: log pi of each kept token under q alone, in nats, same length.
        deviation: mean of ``-logprobs``, in nats per token.
        at_boundary: whether it ends at a boundary; False where none is looked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    deviation: float
    at_boundary: bool = False


def split_bounds(mean_length: float, low: float = 1 / 6, high: float = 1 / 2) -> tuple[int, int]:
    """Smallest and largest split position for a prompt whose mean response length is ``mean_length``.

    Args:
        mean_length: L_q in tokens, > 0.
        low: lower end of the split range as a share of L_q, 0 < low <= high (the paper: 1/6).
        high: upper end, below 1 (the paper: 1/2).

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


def fixed_split_position(mean_length: float, step: int, low: float = 1 / 6, high: float = 1 / 2) -> int:
    """t_q of the ablation ``split=fixed``: the lower end of the range in odd steps, the upper end in even ones.

    Args:
        mean_length: L_q in tokens, > 0.
        step: training step, from 1.
        low: as in ``split_bounds``.
        high: as in ``split_bounds``.
    """
    return split_bounds(mean_length, low, high)[0 if step % 2 else 1]


def last_boundary(
    token_ids: Sequence[int],
    boundary_ids: Sequence[int],
    boundary_texts: Sequence[str],
    decode: Callable[[Sequence[int]], str],
) -> int | None:
    """Where the ablation ``split=boundary_token`` cuts: behind the last boundary among these tokens.

    A text may lie inside one token or across several; the token in which it ends is kept whole.

    Args:
        token_ids: the candidate's tokens up to t_q.
        boundary_ids: token ids that are a boundary.
        boundary_texts: strings that are a boundary, not empty.
        decode: token ids to text.

    Returns:
        The number of tokens up to and including the last boundary; None where there is none.
    """
    wanted = set(boundary_ids)
    cut = next((index + 1 for index in reversed(range(len(token_ids))) if token_ids[index] in wanted), 0)
    if boundary_texts:
        text = decode(token_ids)
        found = [(text.rfind(boundary), boundary) for boundary in boundary_texts]
        end = max((start + len(boundary) for start, boundary in found if start >= 0), default=0)
        if end:
            # The first prefix that holds the text up to there.  Its length would mislead: the first bytes of a
            # character decode to a replacement character, which is as long as the character itself.
            held = bisect_left(range(len(token_ids)), True, key=lambda n: decode(token_ids[:n]).startswith(text[:end]))
            cut = max(cut, held)
    return cut or None


def cut_segment(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    split_position: int,
    finished: bool,
    boundary: Callable[[Sequence[int]], int | None] | None = None,
) -> Segment:
    """Cut one candidate.

    Args:
        token_ids: what the candidate wrote (its EOS included where it wrote one), at least one token.
        logprobs: log pi of each of these tokens, in nats, same length.
        split_position: t_q >= 1.
        finished: the candidate ended by itself (EOS).  If it did so at t_q at the latest, its segment is the first
            half of its text, ``floor(n / 2)`` tokens but at least one: a finished answer cannot be continued.
        boundary: finds the last boundary among the tokens kept so far (``last_boundary``); the segment ends there,
            or where it ended anyway if there is none.  None does not look for any.

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
    found = boundary(token_ids[:keep]) if boundary is not None else None
    keep = found or keep
    kept = tuple(logprobs[:keep])
    return Segment(tuple(token_ids[:keep]), kept, -math.fsum(kept) / keep, at_boundary=found is not None)


def select_segment(deviations: Sequence[float], selection: str = "median", step: int = 1, seed: int = 0) -> int:
    """Index of the candidate that is kept.

    Args:
        deviations: d of every candidate, in nats per token.
        selection: ``median`` (the paper: the candidate whose d is closest to the median; the lowest index on a tie),
            ``extreme`` (the smallest d in odd steps, the largest in even ones), ``first``, or ``random``.
        step: training step, from 1; read by ``extreme``.
        seed: of the draw; read by ``random``.

    For an even count the median is the mean of the two middle values, so both are equally close and the earlier
    one wins.

    Raises:
        ValueError: no candidate, a deviation that is not finite, or an unknown selection.
    """
    values = np.asarray(deviations, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"deviations must be finite and at least one, got {list(deviations)}")
    if selection == "median":
        middle = np.sort(values)[[(values.size - 1) // 2, values.size // 2]]
        # The candidates closest to the median are the middle order statistics themselves: comparing with them, and
        # not |d - mean(middle)|, keeps the tie exact in floating point.
        return int(np.flatnonzero((values == middle[0]) | (values == middle[1]))[0])
    if selection == "extreme":
        return int(values.argmin() if step % 2 else values.argmax())
    if selection == "first":
        return 0
    if selection == "random":
        return int(np.random.default_rng(seed).integers(values.size))
    raise ValueError(f"selection must be median, extreme, first or random, got {selection!r}")


def begins_with(token_ids: Sequence[int], segment_ids: Sequence[int]) -> bool:
    """Return whether what was generated begins with all of the segment: a copy of s."""
    return tuple(token_ids[: len(segment_ids)]) == tuple(segment_ids)


def skip_prompt(segment_ids: Sequence[int], problem_ids: Sequence[int], bos_token_id: int | None = None) -> list[int]:
    """Return the skip-connected prompt [s, q]: the tokens of s, then the tokens of the templated problem.

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
