"""Entropy polarity: which tokens expand the policy's entropy, and advantages that steer it.

A token of a state with policy pi and entropy H, trained with advantage A, changes that entropy by eta A T + O(eta^2),
where eta is the step on the logits (docs/method.md, section 17; arXiv 2605.11775; arXiv 2602.03392, theorems 3.2, 3.3):

    S_v = pi_v (log pi_v + H)        C = sum_v pi_v S_v        T_a = C - S_a        polarity P = A T_a

P > 0 expands, P < 0 contracts.  The reweighting of both branches below is this project's own: the paper's formula and
code are not public.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

MOST_CHANGES = 50
"""Steps over which predicted and measured changes of the entropy are correlated."""

_LOG_OF_NOTHING = -1e30


def entropy_slopes(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute T of each token: how the entropy of its state changes, in nats, per unit of advantage and step.

    C and S_a are taken from the same probabilities: an entropy or log-prob that was rounded elsewhere would cover
    their difference where the policy is nearly certain.

    Args:
        log_probs: log pi of every entry of the vocabulary, at the temperature that sampled, (tokens, vocabulary).
        labels: the sampled tokens, int64 (tokens,).

    Returns:
        T in the dtype of ``log_probs``, (tokens,); its mean over tokens drawn from pi is 0.
    """
    probs = log_probs.exp()
    # log pi + H, in which an entry that a mask has made impossible stays finite and takes no part.
    surplus = log_probs.clamp(min=_LOG_OF_NOTHING)
    surplus -= (probs * surplus).sum(-1, keepdim=True)
    surplus *= probs
    own = surplus.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return surplus.mul_(probs).sum(-1) - own


def reweighted(advantages: torch.Tensor, slopes: torch.Tensor, phase: float, strength: float) -> torch.Tensor:
    """Shift weight between the tokens that expand the entropy and those that contract it.

        w = 1 + strength * phase * sign(A T)        A' = w A * (sum |A| / sum |w A|)

    Args:
        advantages: A of all trained tokens of a step, float (tokens,): sums over less would depend on micro-batches.
        slopes: T of these tokens, (tokens,).
        phase: in [-1, 1]; above 0 the entropy is to rise (``EntropyTrajectory.phase``).
        strength: lambda in [0, 1): both branches keep a weight above 0.

    Returns:
        A' in the dtype of ``advantages``, (tokens,), with the same sum of absolute values; ``advantages`` bit by bit if
        ``strength`` or ``phase`` is 0.
    """
    exact = advantages.double()
    weighted = exact * (1 + strength * phase * polarity(exact, slopes).sign())
    total, weighted_total = exact.abs().sum(), weighted.abs().sum()
    scale = total / weighted_total if weighted_total > 0 else 1.0
    return (weighted * scale).to(advantages.dtype)


def polarity(advantages: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Return P = A T, float64 (tokens,): a product of float32 could vanish."""
    return advantages.double() * slopes.double()


@dataclass
class EntropyTrajectory:
    """The mean entropy of a run's steps: what it is to be, and how well its changes are predicted.

    Attributes:
        target: entropy to keep, in nats per token; None for the moving average of the steps before.
        decay: share of the moving average that a step keeps.
        average: moving average of the entropy; None before the first step.
        last: entropy of the last step and the mean of A' T in it; None before the first step.
        changes: mean of A' T of a step and the change of entropy to the step after it, of the last ``MOST_CHANGES``.
    """

    target: float | None = None
    decay: float = 0.9
    average: float | None = None
    last: tuple[float, float] | None = None
    changes: list[tuple[float, float]] = field(default_factory=list)

    @property
    def aim(self) -> float | None:
        """The entropy that the next step is compared with; None if there is none yet."""
        return self.average if self.target is None else self.target

    def phase(self, entropy: float) -> float:
        """Return clip((aim - H) / aim, -1, 1) for a step's mean entropy H in nats: above 0 it is to rise.

        0 in the first step of a moving average, and where that is 0.
        """
        aim = self.aim
        return min(1.0, max(-1.0, (aim - entropy) / aim)) if aim else 0.0

    def observe(self, entropy: float, predicted: float) -> float | None:
        """Take a step into account.

        Args:
            entropy: mean over its tokens, in nats.
            predicted: mean of A' T over its tokens.

        Returns:
            The change of the entropy since the step before; None in the first.
        """
        change = None if self.last is None else entropy - self.last[0]
        if self.last is not None and change is not None:
            self.changes = [*self.changes, (self.last[1], change)][-MOST_CHANGES:]
        keep = 0.0 if self.average is None else self.decay
        self.average = keep * (self.average or 0.0) + (1 - keep) * entropy
        self.last = (entropy, predicted)
        return change

    def correlation(self) -> float | None:
        """Return Pearson's correlation of predicted and measured changes; None without three that differ."""
        if len(self.changes) < 3:
            return None
        predicted, measured = torch.tensor(self.changes, dtype=torch.float64).T
        predicted, measured = predicted - predicted.mean(), measured - measured.mean()
        norms = float(predicted.norm() * measured.norm())
        return float(predicted @ measured) / norms if norms > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Return what has been observed, in types of JSON."""
        return {"average": self.average, "last": self.last, "changes": self.changes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what has been observed by what ``state_dict`` returned.

        Raises:
            ValueError: numbers that it cannot have returned.
        """
        average, last = state["average"], state["last"]
        pairs = [tuple(map(float, pair)) for pair in [*([] if last is None else [last]), *state["changes"]]]
        numbers = [number for pair in pairs for number in pair] + ([] if average is None else [float(average)])
        if any(len(pair) != 2 for pair in pairs) or not all(map(math.isfinite, numbers)):
            raise ValueError("the trajectory of the entropy has a number out of range")
        self.average = None if average is None else float(average)
        self.last = None if last is None else (float(last[0]), float(last[1]))
        self.changes = [(pair[0], pair[1]) for pair in pairs[last is not None :]]
