"""KL-adaptive per-prompt trackers and the clock that measures the policy's drift between visits.

SPEC section 4 (SPO, arXiv 2509.13232).  For one prompt, with N its effective count and D the drift since it was
last acted on:

    rho  = clip(2 ** (-D / half_life), rho_min, rho_max)
    eta  = 1 / (rho * N + 1)
    V   <- V + eta * (observation - V)              N <- rho * N + 1

A prompt never seen has N = 0, so its first observation replaces the initial value.  The same class tracks the value
(in [0, 1], half_life in the drift's unit) and the mean response length (in tokens).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

_FIRST_CAPACITY = 1024


class KLAdaptiveTracker:
    """Tabular running mean per key whose memory shortens as the policy drifts.

    Args:
        initial_value: what ``value`` says of a key that was never updated.
        rho_min, rho_max: bounds of the retention, 0 <= rho_min <= rho_max <= 1.
        half_life: drift after which an old observation counts half, > 0, in the drift's unit.

    Raises:
        ValueError: constants outside these bounds.
    """

    def __init__(
        self, initial_value: float, rho_min: float = 0.875, rho_max: float = 0.96, half_life: float = 8.0
    ) -> None:
        if not 0 <= rho_min <= rho_max <= 1:
            raise ValueError(f"tracker needs 0 <= rho_min <= rho_max <= 1, got {rho_min} and {rho_max}")
        if not half_life > 0:
            raise ValueError(f"tracker.half_life must be > 0, got {half_life}")
        self.initial_value, self.rho_min, self.rho_max = float(initial_value), rho_min, rho_max
        self.half_life = half_life
        # Arrays and one dict instead of an object per key: a million prompts stay in tens of megabytes.
        self._row: dict[str, int] = {}
        self._values = np.empty(0)
        self._counts = np.empty(0)

    def __len__(self) -> int:
        return len(self._row)

    def value(self, key: str) -> float:
        """The tracked value of ``key``; ``initial_value`` before its first update."""
        row = self._row.get(key)
        return self.initial_value if row is None else float(self._values[row])

    def count(self, key: str) -> float:
        """The effective number N of observations behind ``value(key)``; 0 before the first update."""
        row = self._row.get(key)
        return 0.0 if row is None else float(self._counts[row])

    def update(self, key: str, observation: float, drift: float) -> float:
        """Fold one observation in and return the new value.

        Args:
            key: stable prompt id.
            observation: finite number in the tracker's unit.
            drift: D >= 0 since the last update of ``key`` (``inf`` is allowed and means rho_min); irrelevant, but
                still checked, on the first one.

        Raises:
            ValueError: an observation that is not finite, or a drift that is negative or NaN.
        """
        if not np.isfinite(observation):
            raise ValueError(f"observation of prompt {key} must be finite, got {observation}")
        if not drift >= 0:
            raise ValueError(f"drift of prompt {key} must be >= 0, got {drift}")
        row = self._row.get(key)
        if row is None:
            row = self._append(key)
        rho = min(self.rho_max, max(self.rho_min, 2.0 ** (-drift / self.half_life)))
        kept = rho * self._counts[row]
        self._values[row] += (observation - self._values[row]) / (kept + 1.0)
        self._counts[row] = kept + 1.0
        return float(self._values[row])

    def _append(self, key: str) -> int:
        row = len(self._row)
        if row == self._values.size:
            capacity = max(_FIRST_CAPACITY, 2 * row)
            self._values = np.concatenate([self._values[:row], np.full(capacity - row, self.initial_value)])
            self._counts = np.concatenate([self._counts[:row], np.zeros(capacity - row)])
        self._row[key] = row
        return row

    def state_dict(self) -> dict[str, np.ndarray]:
        """``keys`` (unicode), ``values`` and ``counts`` (float64), row by row in order of first visit."""
        size = len(self._row)
        return {
            "keys": np.array(list(self._row), dtype=np.str_),
            "values": self._values[:size].copy(),
            "counts": self._counts[:size].copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned; the constants stay those of the constructor.

        Raises:
            ValueError: missing arrays, lengths that differ, duplicate keys, or numbers out of range.
        """
        missing = {"keys", "values", "counts"} - set(state)
        if missing:
            raise ValueError(f"tracker state lacks {sorted(missing)}")
        keys = [str(key) for key in state["keys"]]
        values = np.array(state["values"], dtype=np.float64)
        counts = np.array(state["counts"], dtype=np.float64)
        if not len(keys) == values.size == counts.size or len(set(keys)) != len(keys):
            raise ValueError("tracker state has arrays of different lengths or a key twice")
        if not (np.isfinite(values).all() and np.isfinite(counts).all() and (counts >= 0).all()):
            raise ValueError("tracker state has a value or count that is not a number in range")
        self._row = {key: row for row, key in enumerate(keys)}
        self._values, self._counts = values, counts


class DriftClock:
    """Policy drift since a prompt was last acted on.

    Every training step adds the KL that the policy moved by.  ``unit="nats"`` returns the sum since the prompt's last
    visit; ``unit="kl_steps"`` (default) divides it by the running mean per step, so that it reads in steps: a policy
    that moves evenly drifts by exactly 1 per step.  As long as no KL was seen at all (one update per step is exactly
    on-policy, so there is nothing to see), ``kl_steps`` counts steps.
    """

    UNITS = ("kl_steps", "nats")

    def __init__(self, unit: str = "kl_steps") -> None:
        if unit not in self.UNITS:
            raise ValueError(f"tracker.drift must be one of {', '.join(self.UNITS)}, got {unit!r}")
        self.unit = unit
        self.steps = 0
        self.total_kl = 0.0
        self._visits: dict[str, tuple[int, float]] = {}

    def advance(self, kl: float) -> None:
        """Close one training step in which the policy moved by ``kl`` nats per token (>= 0; estimates below 0 count as 0).

        Raises:
            ValueError: ``kl`` is not finite.
        """  # noqa: E501
        if not np.isfinite(kl):
            raise ValueError(f"policy KL of a step must be finite, got {kl}")
        self.steps += 1
        self.total_kl += max(0.0, kl)

    def drift(self, key: str) -> float:
        """D since ``visit(key)``; 0 for a prompt that was never visited (its count is 0, so D does not matter)."""
        visit = self._visits.get(key)
        if visit is None:
            return 0.0
        steps, kl = self.steps - visit[0], self.total_kl - visit[1]
        if self.unit == "nats":
            return kl
        return kl * self.steps / self.total_kl if self.total_kl > 0 else float(steps)

    def visit(self, key: str) -> None:
        """Note that the policy acts on ``key`` now."""
        self._visits[key] = (self.steps, self.total_kl)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays ``keys``, ``visit_steps``, ``visit_kl``, and the totals ``steps`` and ``total_kl``."""
        return {
            "keys": np.array(list(self._visits), dtype=np.str_),
            "visit_steps": np.array([steps for steps, _ in self._visits.values()], dtype=np.int64),
            "visit_kl": np.array([kl for _, kl in self._visits.values()], dtype=np.float64),
            "steps": np.array(self.steps, dtype=np.int64),
            "total_kl": np.array(self.total_kl, dtype=np.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned.

        Raises:
            ValueError: missing arrays or lengths that differ.
        """
        missing = {"keys", "visit_steps", "visit_kl", "steps", "total_kl"} - set(state)
        if missing:
            raise ValueError(f"drift state lacks {sorted(missing)}")
        if not len(state["keys"]) == len(state["visit_steps"]) == len(state["visit_kl"]):
            raise ValueError("drift state has arrays of different lengths")
        self.steps, self.total_kl = int(state["steps"]), float(state["total_kl"])
        visits = zip(state["keys"], state["visit_steps"], state["visit_kl"], strict=True)
        self._visits = {str(key): (int(steps), float(kl)) for key, steps, kl in visits}
