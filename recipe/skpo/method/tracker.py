"""KL-adaptive per-prompt trackers and the clock that measures the policy's drift between visits.

docs/method.md, section 6 (SPO, arXiv 2509.13232).  For one prompt, with N its effective count and D the drift since
its last visit:

    rho  = clip(2 ** (-D / half_life), rho_min, rho_max)
    eta  = 1 / (rho * N + 1)
    V   <- V + eta * (observation - V)              N <- rho * N + 1

A prompt never seen has N = 0, so its first observation replaces the initial value.  The same class tracks the value
(in [0, 1], half_life in the drift's unit) and the mean response length (in tokens).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_FIRST_CAPACITY = 1024
_NEVER = -1
"""In place of the step of a visit."""


class PromptRows:
    """Numbers prompts in the order of their first visit, so that what is kept of them can be arrays.

    Several tables share one numbering: a million keys are then kept once, in about 130 MB.
    """

    def __init__(self) -> None:
        self._row: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def find(self, key: str) -> int | None:
        """The row of ``key``, None if it has none."""
        return self._row.get(key)

    def add(self, key: str) -> int:
        """The row of ``key``, a new one if it has none."""
        return self._row.setdefault(key, len(self._row))

    def replace(self, keys: list[str]) -> None:
        """Number these keys from 0 and forget all others.

        Raises:
            ValueError: a key twice.
        """
        rows = {key: row for row, key in enumerate(keys)}
        if len(rows) != len(keys):
            raise ValueError("prompt rows have a key twice")
        self._row = rows

    def state_dict(self) -> dict[str, np.ndarray]:
        """``text``: all keys in a row, UTF-8, uint8 (bytes,); ``lengths``: characters of each, int32 (keys,)."""
        # An array of strings would take four bytes per character and be padded to the longest key.
        text = "".join(self._row).encode("utf-8", "surrogatepass")
        lengths = np.fromiter(map(len, self._row), dtype=np.int32, count=len(self._row))
        return {"text": np.frombuffer(text, dtype=np.uint8), "lengths": lengths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned.

        Raises:
            ValueError: missing arrays, arrays that do not fit together, or a key twice.
        """
        missing = {"text", "lengths"} - set(state)
        if missing:
            raise ValueError(f"prompt rows lack {sorted(missing)}")
        text = np.asarray(state["text"], dtype=np.uint8).tobytes().decode("utf-8", "surrogatepass")
        ends = np.cumsum(state["lengths"], dtype=np.int64).tolist()
        if (ends[-1] if ends else 0) != len(text) or (np.asarray(state["lengths"]) < 0).any():
            raise ValueError("prompt rows have arrays that do not fit together")
        self.replace([text[start:end] for start, end in zip([0, *ends], ends, strict=False)])


def _grown(array: np.ndarray, rows: int, fill: float) -> np.ndarray:
    """The array, or one that starts with it and has room for ``rows``; doubling makes single rows cheap."""
    if rows <= array.size:
        return array
    return np.concatenate([array, np.full(max(_FIRST_CAPACITY, rows, 2 * array.size) - array.size, fill, array.dtype)])


class KLAdaptiveTracker:
    """Tabular running mean per key whose memory shortens as the policy drifts.

    Args:
        initial_value: what ``value`` says of a key that was never updated.
        rho_min, rho_max: bounds of the retention, 0 <= rho_min <= rho_max <= 1.
        half_life: drift after which an old observation counts half, > 0, in the drift's unit.
        rows: numbering that is shared with other tables and saved by whoever shares it; None means one of its own.
        highest: largest value that a saved state may hold; the smallest is 0.  None takes any finite value.

    Raises:
        ValueError: constants outside these bounds.
    """

    def __init__(
        self,
        initial_value: float,
        rho_min: float = 0.875,
        rho_max: float = 0.96,
        half_life: float = 8.0,
        rows: PromptRows | None = None,
        highest: float | None = None,
    ) -> None:
        if not 0 <= rho_min <= rho_max <= 1:
            raise ValueError(f"tracker needs 0 <= rho_min <= rho_max <= 1, got {rho_min} and {rho_max}")
        if not half_life > 0:
            raise ValueError(f"tracker.half_life must be > 0, got {half_life}")
        self.initial_value, self.rho_min, self.rho_max = float(initial_value), rho_min, rho_max
        self.half_life = half_life
        self._highest = highest
        self._shared = rows is not None
        self._rows = PromptRows() if rows is None else rows
        # Arrays instead of an object per key: a million prompts stay in tens of megabytes.
        self._values = np.empty(0)
        self._counts = np.empty(0)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._counts))

    def value(self, key: str) -> float:
        """The tracked value of ``key``; ``initial_value`` before its first update."""
        row = self._rows.find(key)
        return self.initial_value if row is None or row >= self._values.size else float(self._values[row])

    def count(self, key: str) -> float:
        """The effective number N of observations behind ``value(key)``; 0 before the first update."""
        row = self._rows.find(key)
        return 0.0 if row is None or row >= self._counts.size else float(self._counts[row])

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
        row = self._rows.add(key)
        self._reserve(row + 1)
        rho = min(self.rho_max, max(self.rho_min, 2.0 ** (-drift / self.half_life)))
        kept = rho * self._counts[row]
        self._values[row] += (observation - self._values[row]) / (kept + 1.0)
        self._counts[row] = kept + 1.0
        return float(self._values[row])

    def _reserve(self, rows: int) -> None:
        self._values = _grown(self._values, rows, self.initial_value)
        self._counts = _grown(self._counts, rows, 0.0)

    def state_dict(self) -> dict[str, np.ndarray]:
        """``values`` and ``counts``, float64 (rows,), and ``keys`` (unicode) unless the numbering is shared."""
        size = len(self._rows)
        self._reserve(size)
        state = {"values": self._values[:size].copy(), "counts": self._counts[:size].copy()}
        return state if self._shared else {"keys": np.array(list(self._rows), dtype=np.str_), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned; the constants stay those of the constructor.

        A shared numbering has to be loaded first.

        Raises:
            ValueError: missing arrays, lengths that differ, duplicate keys, or numbers out of range.
        """
        missing = {"values", "counts"} | (set() if self._shared else {"keys"})
        missing -= set(state)
        if missing:
            raise ValueError(f"tracker state lacks {sorted(missing)}")
        keys = list(self._rows) if self._shared else [str(key) for key in state["keys"]]
        values = np.array(state["values"], dtype=np.float64)
        counts = np.array(state["counts"], dtype=np.float64)
        if not len(keys) == values.size == counts.size or (not self._shared and len(set(keys)) != len(keys)):
            raise ValueError("tracker state has arrays of different lengths or a key twice")
        if not (np.isfinite(values).all() and np.isfinite(counts).all() and (counts >= 0).all()):
            raise ValueError("tracker state has a value or count that is not a number in range")
        # A running mean of numbers up to the bound is above it by rounding at most.
        if self._highest is not None and not ((values >= -1e-9) & (values <= self._highest * (1 + 1e-9))).all():
            raise ValueError(f"tracker state has a value outside 0 to {self._highest:g}")
        if not self._shared:
            self._rows.replace(keys)
        self._values, self._counts = values, counts


class DriftClock:
    """Policy drift since a prompt was last acted on.

    Every training step adds the KL that the policy moved by.  ``unit="nats"`` returns the sum since the prompt's last
    visit; ``unit="kl_steps"`` (default) divides it by the running mean per step, so that it reads in steps: a policy
    that moves evenly drifts by exactly 1 per step.  As long as no KL was seen at all (one update per step is exactly
    on-policy, so there is nothing to see), ``kl_steps`` counts steps.

    Args:
        unit: one of ``UNITS``.
        rows: as in ``KLAdaptiveTracker``.
    """

    UNITS = ("kl_steps", "nats")

    def __init__(self, unit: str = "kl_steps", rows: PromptRows | None = None) -> None:
        if unit not in self.UNITS:
            raise ValueError(f"tracker.drift must be one of {', '.join(self.UNITS)}, got {unit!r}")
        self.unit = unit
        self.steps = 0
        self.total_kl = 0.0
        self._shared = rows is not None
        self._rows = PromptRows() if rows is None else rows
        self._visit_steps = np.empty(0, dtype=np.int64)
        self._visit_kl = np.empty(0)

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
        row = self._rows.find(key)
        if row is None or row >= self._visit_steps.size or self._visit_steps[row] == _NEVER:
            return 0.0
        steps, kl = self.steps - int(self._visit_steps[row]), self.total_kl - float(self._visit_kl[row])
        if self.unit == "nats":
            return kl
        return kl * self.steps / self.total_kl if self.total_kl > 0 else float(steps)

    def visit(self, key: str) -> None:
        """Note that the policy acts on ``key`` now."""
        row = self._rows.add(key)
        self._reserve(row + 1)
        self._visit_steps[row], self._visit_kl[row] = self.steps, self.total_kl

    def _reserve(self, rows: int) -> None:
        self._visit_steps = _grown(self._visit_steps, rows, _NEVER)
        self._visit_kl = _grown(self._visit_kl, rows, 0.0)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays ``visit_steps`` (-1: never) and ``visit_kl``, (rows,), the totals ``steps`` and ``total_kl``, and
        ``keys`` (unicode) unless the numbering is shared."""
        size = len(self._rows)
        self._reserve(size)
        state = {
            "visit_steps": self._visit_steps[:size].copy(),
            "visit_kl": self._visit_kl[:size].copy(),
            "steps": np.array(self.steps, dtype=np.int64),
            "total_kl": np.array(self.total_kl, dtype=np.float64),
        }
        return state if self._shared else {"keys": np.array(list(self._rows), dtype=np.str_), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned; a shared numbering has to be loaded first.

        Raises:
            ValueError: missing arrays, lengths that differ, a key twice, or numbers out of range.
        """
        missing = {"visit_steps", "visit_kl", "steps", "total_kl"} | (set() if self._shared else {"keys"})
        missing -= set(state)
        if missing:
            raise ValueError(f"drift state lacks {sorted(missing)}")
        keys = list(self._rows) if self._shared else [str(key) for key in state["keys"]]
        steps = np.array(state["visit_steps"], dtype=np.int64)
        kl = np.array(state["visit_kl"], dtype=np.float64)
        if not len(keys) == steps.size == kl.size:
            raise ValueError("drift state has arrays of different lengths")
        now, total = int(state["steps"]), float(state["total_kl"])
        if (
            now < 0
            or not (np.isfinite(kl).all() and 0 <= total < np.inf)
            or not ((steps >= _NEVER) & (steps <= now)).all()
        ):
            raise ValueError("drift state has a step or KL that is not a number in range")
        if not self._shared:
            self._rows.replace(keys)
        self.steps, self.total_kl = now, total
        self._visit_steps, self._visit_kl = steps, kl
