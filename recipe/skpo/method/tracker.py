"""The table of prompts: tracked value and response length, and the policy's drift since a prompt was last visited.

Docs: docs/method.md, section 6 (SPO, arXiv 2509.13232).  For one prompt, with N its effective count and D the drift
since its last visit:

    rho  = clip(2 ** (-D / half_life), rho_min, rho_max)
    eta  = 1 / (rho * N + 1)
    V   <- V + eta * (value - V)        L <- L + eta * (length - L)        N <- rho * N + 1

A prompt never seen has N = 0, so its first visit replaces the initial value and length.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_FIRST_CAPACITY = 1024
_LONGEST = 1e7
"""Tokens: no tracked length in a saved state is above."""


class PromptIndex:
    """Numbers prompts in the order of their first visit, so that what is kept of them can be arrays.

    A million keys take about 130 MB.
    """

    def __init__(self) -> None:
        self._row: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._row)

    def find(self, key: str) -> int | None:
        """Return the row of ``key``, None if it has none."""
        return self._row.get(key)

    def add(self, key: str) -> int:
        """Return the row of ``key``, a new one if it has none."""
        return self._row.setdefault(key, len(self._row))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return ``text``, all keys joined in UTF-8, uint8 (bytes,), and ``sizes``, their characters, int32 (keys,)."""
        # An array of strings would take four bytes per character and be padded to the longest key.
        text = "".join(self._row).encode("utf-8", "surrogatepass")
        sizes = np.fromiter(map(len, self._row), dtype=np.int32, count=len(self._row))
        return {"text": np.frombuffer(text, dtype=np.uint8), "sizes": sizes}

    @classmethod
    def from_state(cls, text: np.ndarray, sizes: np.ndarray) -> "PromptIndex":
        """Rebuild the index from what ``state_dict`` returned.

        Raises:
            ValueError: arrays that do not fit together, or a key twice.
        """
        joined = np.asarray(text, dtype=np.uint8).tobytes().decode("utf-8", "surrogatepass")
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        if (ends[-1] if ends else 0) != len(joined) or (np.asarray(sizes) < 0).any():
            raise ValueError("prompt index has arrays that do not fit together")
        index = cls()
        for start, end in zip([0, *ends], ends, strict=False):
            index.add(joined[start:end])
        if len(index) != len(ends):
            raise ValueError("prompt index has a key twice")
        return index


class DriftClock:
    """Measures how far the policy moves from step to step.

    Every training step adds the KL that the policy moved by.  ``unit="nats"`` counts the sum.  ``unit="kl_steps"``
    divides it by its mean per step, so that it reads in steps: a policy that moves evenly drifts by 1 per step.  While
    no KL was seen at all (one update per step is exactly on-policy), ``kl_steps`` counts steps.

    Attributes:
        unit: one of ``UNITS``.
        steps: training steps so far.
        total_kl: their KL, in nats per token.
    """

    UNITS = ("kl_steps", "nats")

    def __init__(self, unit: str = "kl_steps") -> None:
        if unit not in self.UNITS:
            raise ValueError(f"tracker.drift must be one of {', '.join(self.UNITS)}, got {unit!r}")
        self.unit = unit
        self.steps = 0
        self.total_kl = 0.0

    def advance(self, kl: float) -> None:
        """Close one training step in which the policy moved by ``kl`` nats per token; a negative estimate counts as 0.

        Raises:
            ValueError: ``kl`` is not finite.
        """
        if not np.isfinite(kl):
            raise ValueError(f"policy KL of a step must be finite, got {kl}")
        self.steps += 1
        self.total_kl += max(0.0, kl)

    def since(self, steps: int, total_kl: float) -> float:
        """Return the drift since the clock stood at these values."""
        kl = self.total_kl - total_kl
        if self.unit == "nats":
            return kl
        return kl * self.steps / self.total_kl if self.total_kl > 0 else float(self.steps - steps)


class PromptTable:
    """Tabular running means per prompt whose memory shortens as the policy drifts.

    Args:
        initial_length: L of a prompt never visited, in tokens; its V is 0.5, which is reward 0.
        rho_min: smallest retention.
        rho_max: largest retention, 0 <= rho_min <= rho_max <= 1.
        half_life: drift after which an old observation counts half, > 0, in the drift's unit.
        unit: unit of the drift, one of ``DriftClock.UNITS``.

    Attributes:
        clock: advanced once per training step by the trainer.

    Raises:
        ValueError: constants outside these bounds.
    """

    INITIAL_VALUE = 0.5

    def __init__(
        self,
        initial_length: float = 1.0,
        rho_min: float = 0.875,
        rho_max: float = 0.96,
        half_life: float = 8.0,
        unit: str = "kl_steps",
    ) -> None:
        if not 0 <= rho_min <= rho_max <= 1:
            raise ValueError(f"tracker needs 0 <= rho_min <= rho_max <= 1, got {rho_min} and {rho_max}")
        if not half_life > 0:
            raise ValueError(f"tracker.half_life must be > 0, got {half_life}")
        self.rho_min, self.rho_max, self.half_life = rho_min, rho_max, half_life
        self.clock = DriftClock(unit)
        self._initial = {"values": self.INITIAL_VALUE, "lengths": float(initial_length), "counts": 0.0, "squares": 0.0}
        self._index = PromptIndex()
        # Arrays instead of an object per prompt: a million prompts stay in tens of megabytes.
        self._columns: dict[str, np.ndarray] = {
            "values": np.empty(0),
            "lengths": np.empty(0),
            "counts": np.empty(0),
            # Q <- (1 - eta)^2 Q + eta^2: the sum of the squared weights that the visits have in V.
            "squares": np.empty(0),
            "visit_steps": np.empty(0, dtype=np.int64),
            "visit_kl": np.empty(0),
        }

    def __len__(self) -> int:
        return len(self._index)

    def _get(self, column: str, key: str) -> float:
        row = self._index.find(key)
        return self._initial[column] if row is None else float(self._columns[column][row])

    def value(self, key: str) -> float:
        """Return V of the prompt, in [0, 1]."""
        return self._get("values", key)

    def rows(self, keys: Iterable[str]) -> np.ndarray:
        """Return the row of each prompt, int64 (keys,), -1 for one never visited; a row stays a prompt's."""
        return np.array([-1 if row is None else row for row in map(self._index.find, keys)], dtype=np.int64)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Return V of these rows, float64, the shape of ``rows``."""
        # The last entry is that of row -1.
        return np.append(self._columns["values"][: len(self)], self.INITIAL_VALUE)[rows]

    def length(self, key: str) -> float:
        """Return L of the prompt, in tokens."""
        return self._get("lengths", key)

    def count(self, key: str) -> float:
        """Return the effective number N of visits behind V and L; 0 before the first one."""
        return self._get("counts", key)

    def squares(self, key: str) -> float:
        """Return Q, the sum of the squared weights of the visits in V: its variance per visit; 0 before the first."""
        return self._get("squares", key)

    def drift(self, key: str) -> float:
        """Return D since the last visit; 0 for a prompt never visited, for which it does not matter."""
        row = self._index.find(key)
        if row is None:
            return 0.0
        return self.clock.since(int(self._columns["visit_steps"][row]), float(self._columns["visit_kl"][row]))

    def visit(self, key: str, value: float, length: float, drift: float | None = None) -> float:
        """Fold one visit into V, L and N, and start to count the prompt's drift again.

        Args:
            key: stable prompt id.
            value: observed value, in [0, 1].
            length: observed mean response length, in tokens.
            drift: D >= 0 that was measured otherwise; None takes the clock's.  ``inf`` means rho_min.

        Returns:
            The drift that was used.

        Raises:
            ValueError: an observation that is not finite, or a drift that is negative or NaN; nothing has changed.
        """
        for observation in (value, length):
            if not np.isfinite(observation):
                raise ValueError(f"observation of prompt {key} must be finite, got {observation}")
        drift = self.drift(key) if drift is None else drift
        if not drift >= 0:
            raise ValueError(f"drift of prompt {key} must be >= 0, got {drift}")
        row = self._index.add(key)
        self._grow(row + 1)
        columns = self._columns
        rho = min(self.rho_max, max(self.rho_min, 2.0 ** (-drift / self.half_life)))
        kept = rho * columns["counts"][row]
        eta = 1.0 / (kept + 1.0)
        columns["squares"][row] = (1.0 - eta) ** 2 * columns["squares"][row] + eta**2
        columns["values"][row] += (value - columns["values"][row]) / (kept + 1.0)
        columns["lengths"][row] += (length - columns["lengths"][row]) / (kept + 1.0)
        columns["counts"][row] = kept + 1.0
        columns["visit_steps"][row], columns["visit_kl"][row] = self.clock.steps, self.clock.total_kl
        return drift

    def _grow(self, rows: int) -> None:
        """Make room for ``rows`` prompts; doubling makes single ones cheap."""
        size = self._columns["values"].size
        if rows > size:
            more = max(_FIRST_CAPACITY, rows, 2 * size) - size
            for name, column in self._columns.items():
                added = np.full(more, self._initial.get(name, 0), column.dtype)
                self._columns[name] = np.concatenate([column, added])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the index, the columns, (prompts,) each, and the clock's ``steps`` and ``total_kl``, as arrays."""
        size = len(self._index)
        return {
            **self._index.state_dict(),
            **{name: column[:size].copy() for name, column in self._columns.items()},
            "steps": np.array(self.clock.steps, dtype=np.int64),
            "total_kl": np.array(self.clock.total_kl, dtype=np.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned; the constants stay those of the constructor.

        Raises:
            ValueError: missing arrays, arrays that do not fit together, a key twice, or numbers out of range.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"prompt table lacks {sorted(missing)}")
        index = PromptIndex.from_state(state["text"], state["sizes"])
        columns = {name: np.array(state[name], dtype=column.dtype) for name, column in self._columns.items()}
        if any(column.shape != (len(index),) for column in columns.values()):
            raise ValueError("prompt table has arrays of different lengths")
        steps, total_kl = int(state["steps"]), float(state["total_kl"])
        numbers = [column for column in columns.values() if column.dtype.kind == "f"]
        finite = all(np.isfinite(column).all() for column in numbers)
        visited = ((columns["visit_steps"] >= 0) & (columns["visit_steps"] <= steps)).all()
        if not (finite and visited and steps >= 0 and 0 <= total_kl < np.inf and (columns["counts"] >= 0).all()):
            raise ValueError("prompt table has an entry that is not a number in range")
        for name, highest in (("values", 1.0), ("squares", 1.0), ("lengths", _LONGEST)):
            # A running mean of numbers up to the bound exceeds it by rounding at most.
            if not ((columns[name] >= -1e-9) & (columns[name] <= highest * (1 + 1e-9))).all():
                raise ValueError(f"prompt table has an entry of {name} outside 0 to {highest:g}")
        self._index, self._columns = index, columns
        self.clock.steps, self.clock.total_kl = steps, total_kl
