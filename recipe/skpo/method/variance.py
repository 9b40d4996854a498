"""How much of a segment's reward is signal: variance components of rewards (docs/method.md, section 16).

The value v of a segment s of prompt q is the expected reward of a response to [s, q].

    signal   variance of v between the segments of one prompt, averaged over prompts
    noise    variance of a mean of G rewards around v, averaged over segments
    signal to noise = sqrt(signal / noise): two standard deviations, in any unit of the reward

Both estimators use the method of moments: observed variance minus what sampling adds to it.  The signal is unbiased
and may be below 0; its root is cut there.  ``nested_parts`` needs several segments per prompt and visit, as the probe
draws them.  Training has one segment per prompt and visit: ``SegmentVariance`` compares it with the tracked baseline.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
"""Of the bootstrap."""
PERCENTILES = (1.5, 98.5)
"""Of its 95% interval: between 2.5 and 97.5, few units with long tails leave the truth out in 7% of simulations."""


@dataclass(frozen=True)
class Components:
    """Estimated variances, in squared units of the reward.

    Attributes:
        signal: between segments of a prompt; unbiased, so that it may be below 0.
        noise: of a mean of G rewards.
        low, high: 95% interval of ``signal_to_noise``, by a bootstrap over the units.
    """

    signal: float
    noise: float
    low: float
    high: float

    @property
    def signal_to_noise(self) -> float:
        """Standard deviation of the signal over that of the noise; NaN without noise."""
        return _root(self.signal / self.noise) if self.noise > 0 else math.nan


@dataclass(frozen=True)
class Parts:
    """What each independent unit, a prompt or a visit, contributes; float64 (units,) each.

    Attributes:
        observed: squared deviation, whose expectation is ``weight`` x (signal + ``sampling``).
        weight: how much the unit's own reference adds, 1 if nothing.
        sampling: variance that sampling adds to an observed mean reward.
        noise: the same for a mean of G rewards.
    """

    observed: np.ndarray
    weight: np.ndarray
    sampling: np.ndarray
    noise: np.ndarray

    def components(self, seed: int = 0, resamples: int = RESAMPLES) -> Components:
        """Estimate both variances, and the interval of their ratio with a seeded bootstrap over the units."""
        columns = np.stack([self.observed, self.weight, self.sampling, self.noise], axis=1)
        units = len(columns)
        signal, noise = _moments(columns.mean(axis=0))
        if not noise > 0:
            return Components(float(signal), 0.0, math.nan, math.nan)
        drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
        signals, noises = _moments(drawn @ columns / units)
        low, high = np.percentile(signals[noises > 0] / noises[noises > 0], PERCENTILES)
        return Components(float(signal), float(noise), _root(low), _root(high))


def _moments(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    observed, weight, sampling, noise = np.moveaxis(means, -1, 0)
    return observed / weight - sampling, noise


def _root(ratio: float) -> float:
    return math.sqrt(max(0.0, ratio))


def nested_parts(rewards: np.ndarray, group_size: int) -> Parts:
    """Return the parts of a balanced one-way design, one unit per prompt.

    The segments of a prompt must be independent draws.  Nothing is assumed of the rewards' distribution.

    Args:
        rewards: (prompts, segments, K), at least two segments and K >= 2 rewards of each.
        group_size: G of ``noise``.
    """
    count = rewards.shape[2]
    variance = rewards.var(axis=2, ddof=1).mean(axis=1)
    observed = rewards.mean(axis=2).var(axis=1, ddof=1)
    return Parts(observed, np.ones(len(rewards)), variance / count, variance / group_size)


class SegmentVariance:
    """Signal and noise of the last visits, of which each has one segment.

    For a prompt that was visited before, with V its tracked baseline and Q the sum of squared weights of the earlier
    rewards in V (``PromptTable.squares``):

        E[(R_I - V - batch mean)^2] = (1 + Q) (signal + noise)          noise: from the variance within the G rewards

    This is the probe's ``signal`` if prompts keep their values.  It is too large by the variance, over prompts, of how
    much a value has changed since its earlier visits: what all prompts gained alike is in the batch mean, and old
    visits fade from V, but a single prompt's gain looks like a good segment.  Segments of other lengths count as
    segments.  Prompts that prioritised sampling draws more often weigh more.

    Attributes:
        visits: of the last ``MOST``, squared deviation, 1 + Q (NaN on a first visit) and noise, float64 (visits, 3).
    """

    MOST = 512
    LEAST = 32
    """Visits of known prompts, below which there is no estimate."""

    def __init__(self) -> None:
        self.visits = np.empty((0, 3))

    def observe(self, rewards: np.ndarray, baselines: np.ndarray, squares: np.ndarray, noise: np.ndarray) -> None:
        """Add one batch of segments.

        Args:
            rewards: R_I, float (segments,).
            baselines: the prompts' tracked values before the visit, in the same unit, float (segments,).
            squares: Q before the visit, 0 on a first visit, float (segments,).
            noise: estimated variance of each R_I given its segment; NaN if unknown, which leaves the segment out.
        """
        known = np.isfinite(noise)
        for kind in (known & (squares > 0), known & (squares == 0)):
            count = int(kind.sum())
            if count < 2:
                continue
            deviation = (rewards - baselines)[kind]
            squared = (deviation - deviation.mean()) ** 2 * count / (count - 1)
            weight = np.where(squares[kind] > 0, 1 + squares[kind], np.nan)
            self.visits = np.concatenate([self.visits, np.stack([squared, weight, noise[kind]], axis=1)])[-self.MOST :]

    def parts(self) -> Parts | None:
        """Return the parts of the visits of known prompts; None if there are fewer than ``LEAST``."""
        observed, weight, noise = self.visits[~np.isnan(self.visits[:, 1])].T
        return Parts(observed, weight, noise, noise) if len(observed) >= self.LEAST else None

    def shares(self, squares: np.ndarray) -> np.ndarray:
        """Return the share of signal in the variance of each segment's advantage, float (segments,) in [0, 1].

        A first visit, which has no baseline, is compared with the variance of first visits.  Without an estimate,
        every share is 1.

        Args:
            squares: as in ``observe``.
        """
        parts = self.parts()
        if parts is None:
            return np.ones(len(squares))
        total = parts.observed.sum() / parts.weight.sum()
        first = self.visits[np.isnan(self.visits[:, 1]), 0]
        variance = np.where(squares > 0, (1 + squares) * total, first.mean() if len(first) else 2 * total)
        signal = total - parts.sampling.mean()
        return np.clip(np.divide(signal, variance, out=np.zeros(len(squares)), where=variance > 0), 0.0, 1.0)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return ``visits``."""
        return {"visits": self.visits.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned.

        Raises:
            ValueError: an array of another shape, or numbers out of range.
        """
        visits = np.array(state["visits"], dtype=np.float64)
        if visits.ndim != 2 or visits.shape[1] != 3 or len(visits) > self.MOST:
            raise ValueError("visits of segments have another shape")
        squared, weight, noise = visits.T
        if not (np.isfinite(visits[:, [0, 2]]).all() and (squared >= 0).all() and (noise >= 0).all()):
            raise ValueError("visits of segments have a number out of range")
        if not (np.isnan(weight) | ((weight > 1) & (weight <= 2))).all():
            raise ValueError("visits of segments have a weight out of range")
        self.visits = visits
