"""Prioritised sampling: which prompts are rolled out next.

docs/method.md, section 13.  Prompts whose value V in [0, 1] is near 1/2 teach most, because their responses differ:

    weight(q) = sqrt(V_q (1 - V_q)) + epsilon           drawn without replacement per batch

A prompt never visited has V = 1/2, hence the largest weight.  ``epsilon`` > 0 keeps every prompt reachable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_MOST_HALVINGS = 20
"""Keeps the weight of a prompt that always fails above 0."""


def prompt_weights(values: np.ndarray, epsilon: float) -> np.ndarray:
    """sqrt(V (1 - V)) + epsilon per prompt; float64, the shape of ``values``, whose entries are in [0, 1]."""
    # Rounding may put a tracked mean a hair outside of [0, 1].
    inside = np.clip(values, 0.0, 1.0)
    return np.sqrt(inside * (1.0 - inside)) + epsilon


def draw_prompts(weights: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` different positions, one after the other with probability proportional to the weights that are left."""
    return [int(index) for index in rng.choice(weights.size, count, replace=False, p=weights / weights.sum())]


class PrioritisedBatches:
    """Batches of dataset positions for torch's ``DataLoader(batch_sampler=...)``, drawn when they are requested.

    An epoch has as many batches as the dataset fills; within it a prompt may come up again, in another batch.  All
    randomness is in the generator behind ``rng``, whose state the trainer keeps in the checkpoint, so the sampler's
    own state is how many batches of the epoch are gone.

    Args:
        ids: prompt id of every dataset row.
        batch_size: prompts per batch.
        epsilon: added to every weight.
        value: V of a prompt id, in [0, 1].
        rng: gives the generator to draw from; asked each time, because a resume replaces it.
        failures: gives the ids whose last visits all failed, to their number; each halves the weight.  Such a prompt
            would otherwise keep the weight of one never visited, and be drawn again and again.
    """

    def __init__(
        self,
        ids: Sequence[str],
        batch_size: int,
        epsilon: float,
        value: Callable[[str], float],
        rng: Callable[[], np.random.Generator],
        failures: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.ids, self.batch_size, self.epsilon = list(ids), batch_size, epsilon
        self.value, self.rng, self.failures = value, rng, failures
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.ids) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        while self.drawn < len(self):
            self.drawn += 1
            values = np.array([self.value(prompt_id) for prompt_id in self.ids])
            weights = prompt_weights(values, self.epsilon)
            failures = self.failures()
            if failures:
                weights *= [0.5 ** min(failures.get(prompt_id, 0), _MOST_HALVINGS) for prompt_id in self.ids]
            yield draw_prompts(weights, self.batch_size, self.rng())
        self.drawn = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of drawn batches of the epoch, which torchdata stores instead of drawing them again."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that many batches."""
        self.drawn = int(state["drawn"])
