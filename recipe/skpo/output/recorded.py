"""Runs as their folders record them, to be compared: names, settings, and values by step, tokens or seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from recipe.skpo.output.page_data import (
    HELD_OUT,
    ReportError,
    held_out_numbers,
    number,
    read_settings,
    run_steps,
    tokens_of,
)
from recipe.skpo.output.summary import LABELS, minutes_of, problems

UNITS = {"step": "steps", "tokens": "generated tokens", "seconds": "seconds"}
"""What a run's values may lie over."""


@dataclass(frozen=True)
class RecordedRun:
    """What a folder records of its run.

    Attributes:
        folder: of the run.
        name: the folder's, with as many of the folders above it as distinguish the runs that are compared.
        settings: dotted path to value as JSON, secrets hidden; empty without a ``config.yaml``.
        steps: what it logged, one record per step.
    """

    folder: Path
    name: str
    settings: Mapping[str, str]
    steps: Sequence[Mapping[str, Any]]

    @property
    def method(self) -> str | None:
        """The method's name; runs of former releases name their estimator alone."""
        found = self.settings.get("method.name", self.settings.get("algorithm.adv_estimator"))
        return None if found is None else found.strip('"')

    @cached_property
    def axes(self) -> dict[str, list[float | None] | None]:
        """At every step the step, and the tokens and seconds of the run up to it; None if not logged."""
        return {
            "step": [int(line["step"]) for line in self.steps],
            "tokens": _total([tokens_of(line) for line in self.steps]),
            "seconds": _total([_seconds(line) for line in self.steps]),
        }

    @cached_property
    def held_out(self) -> list[dict[str, float]]:
        """The held-out numbers of every step, as ``held-out <source>: <label>``."""
        return [held_out_numbers(line) for line in self.steps]

    @cached_property
    def problems(self) -> dict[str, int]:
        """Validation problems per data source, as far as they are known."""
        return problems(self.folder)

    def problems_of(self, metric: str) -> int | None:
        """Return how many problems an accuracy is a share of; None for another metric, or where it is not known."""
        source, _, label = metric.removeprefix(HELD_OUT).rpartition(": ")
        return self.problems.get(source) if metric.startswith(HELD_OUT) and label == LABELS["acc"] else None

    def course(self, metric: str, unit: str) -> tuple[list[float], list[float]]:
        """Return places (step, tokens or seconds) and values of a metric, both as long as it was logged."""
        lines = self.held_out if metric.startswith(HELD_OUT) else self.steps
        found = [
            (place, line[metric])
            for place, line in zip(self.axes[unit] or [], lines, strict=False)
            if place is not None and number(line.get(metric)) is not None
        ]
        return [place for place, _ in found], [value for _, value in found]


def at_equal(
    runs: Sequence[RecordedRun], metric: str, unit: str, at: float | None = None
) -> tuple[float, list[float | None]]:
    """Read a metric where all runs that logged it can be compared.

    Args:
        runs: to be compared.
        metric: its name.
        unit: step, tokens or seconds.
        at: the place to read it at; None for the largest that every run has.

    Returns:
        The place, NaN if no run logged the metric over ``unit``; each run's value there, linear between the two that
        were logged around it.  Before the first that was logged it is None, but of a place that is given the first.
    """
    courses = [run.course(metric, unit) for run in runs]
    given = at is not None
    at = at if at is not None else min((places[-1] for places, _ in courses if places), default=math.nan)
    begun = [bool(places) and (given or places[0] <= at) for places, _ in courses]
    return at, [float(np.interp(at, *course)) if there else None for there, course in zip(begun, courses, strict=True)]


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """Read runs, in their order.

    Raises:
        ReportError: a folder holds no run or is named twice, or a config cannot be read.
    """
    names = _names(folders)
    return [
        RecordedRun(folder, name, dict(read_settings(folder) or []), run_steps(folder))
        for name, folder in zip(names, folders, strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ReportError(f"{place}: is named {places.count(place)} times; name every run once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:])[-200:] for place in places]


def _seconds(line: Mapping[str, Any]) -> float | None:
    """Return the seconds of a step and its validation; None if not logged."""
    minutes = minutes_of([line])
    return None if minutes is None or number(minutes) is None else 60 * minutes


def _total(values: Sequence[float | None]) -> list[float | None] | None:
    """Add up what is known; None if nothing is."""
    if all(value is None for value in values):
        return None
    return list(accumulate(value or 0.0 for value in values))
