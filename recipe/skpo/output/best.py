"""The best validated step of a run, by the metric of ``trainer.keep_best``.

What is best is computed from the validations in ``metrics.jsonl`` and stored nowhere else, so that no kill can leave
two answers.  A resume drops the lines of steps that it trains again, and their validations with them.
"""

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data_prep.untrusted import UntrustedError, one_line, read_yaml
from recipe.skpo.errors import RunError
from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.run_folder import checkpoints_of, stored_checkpoints


class Validations:
    """Values of one metric of a run's validations.

    Args:
        given: name of the metric; with ``-`` in front the lowest value is the best one.

    Attributes:
        values: step to value, at step 0 that of the model before training.  A step that was validated again after a
            resume keeps its first value; NaN is never the best.
    """

    def __init__(self, given: str) -> None:
        self.name, self._sign = given.removeprefix("-"), -1.0 if given.startswith("-") else 1.0
        self.values: dict[int, float] = {}

    def read(self, metrics_file: Path, last: int | None = None) -> "Validations":
        """Take over the validations up to step ``last`` that a metrics file has; returns itself."""
        for line in read_lines(metrics_file):
            value = line.get(self.name)
            if isinstance(value, int | float) and (last is None or line["step"] <= last):
                self.values.setdefault(line["step"], float(value))
        return self

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take over a validation.

        Raises:
            RunError: it has no such metric; naming those that look alike.
        """
        if self.name not in metrics:
            near = get_close_matches(self.name, metrics, n=3, cutoff=0.0)
            raise RunError(
                f"trainer.keep_best: validation logs no {one_line(self.name)}; the nearest names are {', '.join(near)}"
            )
        self.values.setdefault(step, float(metrics[self.name]))

    def best(self, among: Iterable[int] | None = None) -> int | None:
        """Return the best step, by default of all; of equal ones the first; None if none of them was validated."""
        steps = sorted(self.values if among is None else self.values.keys() & set(among))
        scores = {step: self._sign * self.values[step] for step in steps if not math.isnan(self.values[step])}
        return max(scores, key=lambda step: scores[step], default=None)

    def without_gain(self) -> int:
        """Count the validations since the best one."""
        best = self.best()
        return sum(best is None or step > best for step in self.values)


def kept_best(run: Path) -> tuple[Validations, int] | None:
    """Read which checkpoint of a run is the best one.

    Args:
        run: its folder.

    Returns:
        Its validations and the best step that has a checkpoint; None where there is none, or where
        ``trainer.keep_best`` was not set.
    """
    try:
        metric = read_yaml(run / "config.yaml")["trainer"].get("keep_best")
    except (UntrustedError, OSError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(metric, str):
        return None
    validations = Validations(metric).read(run / "metrics.jsonl")
    best = validations.best(stored_checkpoints(checkpoints_of(run)))
    return None if best is None else (validations, best)
