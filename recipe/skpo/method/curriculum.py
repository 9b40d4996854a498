"""Prioritised sampling: which prompts are rolled out next.

docs/method.md, section 13.  Prompts whose value V in [0, 1] is near 1/2 teach most, because their responses differ:

    weight(q) = sqrt(V_q (1 - V_q)) + epsilon           drawn without replacement per batch

A prompt never visited has V = 1/2, hence the largest weight.  ``epsilon`` > 0 keeps every prompt reachable.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recipe.skpo.method.tracker import PromptTable

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

    An id is looked up at the start of an epoch and after it was drawn: with millions of prompts, looking all of them up
    in every step would take seconds.

    Args:
        ids: prompt id of every dataset row, each once.
        batch_size: prompts per batch.
        epsilon: added to every weight.
        prompts: has V of every prompt; changes between two batches only for prompts of the first.
        rng: gives the generator to draw from; asked each time, because a resume replaces it.
        failures: gives the ids whose last visits all failed, to their number; each halves the weight.  Such a prompt
            would otherwise keep the weight of one never visited, and be drawn again and again.
    """

    def __init__(
        self,
        ids: Iterable[str],
        batch_size: int,
        epsilon: float,
        prompts: PromptTable,
        rng: Callable[[], np.random.Generator],
        failures: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.ids, self.batch_size, self.epsilon = list(ids), batch_size, epsilon
        self.prompts, self.rng, self.failures = prompts, rng, failures
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.ids) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        rows = np.empty(len(self.ids), dtype=np.int64)
        failing: set[int] = set()
        stale: Sequence[int] = range(len(self.ids))
        while self.drawn < len(self):
            self.drawn += 1
            rows[stale] = self.prompts.rows(self.ids[position] for position in stale)
            weights = prompt_weights(self.prompts.values(rows), self.epsilon)
            failures = self.failures()
            if failures:
                failing = {position for position in {*failing, *stale} if self.ids[position] in failures}
                for position in failing:
                    weights[position] *= 0.5 ** min(failures[self.ids[position]], _MOST_HALVINGS)
            stale = draw_prompts(weights, self.batch_size, self.rng())
            yield stale
        self.drawn = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of drawn batches of the epoch, which torchdata stores instead of drawing them again."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that many batches."""
        self.drawn = int(state["drawn"])
