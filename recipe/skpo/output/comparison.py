"""What the page that compares several runs holds of them: final numbers, curves over each other, differing settings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.skpo.output.glossary import unit_of
from recipe.skpo.output.page_data import (
    CURVES,
    HELD_OUT,
    LARGEST_CONFIG,
    LARGEST_HEADLINE,
    LONGEST_NAME,
    MOST_POINTS,
    ReportError,
    headline,
    meanings,
    number,
    numbers_of,
    shorten,
    that_fit,
)
from recipe.skpo.output.recorded import RecordedRun, at_equal, read_runs
from recipe.skpo.output.summary import LABELS, certainty, decoding
from recipe.skpo.output.trees import spread

MOST_RUNS = 16
"""The page tells so many lines apart by colour and dash."""

MOST_VALUES = 240_000
"""Numbers of all series of all runs."""

LARGEST_SERIES, LARGEST_GROUPS = 3_200_000, 300_000
"""Bytes of all series of all runs, and of the titles of the curves."""

OF_A_RUN = frozenset({"output_dir", "experiment_name", "default_local_dir", "TENSORBOARD_DIR"})
"""Settings that name a run or its place: they differ always and tell nothing."""

FIRST = ("method", "skpo")
"""Sections whose differences are shown first."""


def comparison(output_dirs: Sequence[Path]) -> dict[str, Any]:
    """Collect what the page shows of the runs, in their order.

    Raises:
        ReportError: a folder holds no run or is named twice, a config cannot be read, or there are too many runs.
    """
    if len(output_dirs) > MOST_RUNS:
        raise ReportError(f"{len(output_dirs)} runs: a page compares at most {MOST_RUNS}; name fewer")
    notes = list[str]()
    recorded = read_runs(output_dirs)
    notes += [f"Config: {run.name} holds no config.yaml." for run in recorded if not run.settings]
    runs = [
        {"name": run.name, "method": run.method and shorten(run.method)} | _numbers(run, len(output_dirs), notes)
        for run in recorded
    ]
    return {
        "labels": LABELS,
        "runs": runs,
        "equal": _at_equal_tokens(recorded),
        "groups": _groups(runs),
        "meanings": meanings(sorted({metric for run in runs for metric in run["series"]})),
        "differences": _differences([run.settings for run in recorded], notes),
        "notes": notes,
    }


def _numbers(run: RecordedRun, runs: int, notes: list[str]) -> dict[str, Any]:
    """Collect one run's headline and series.

    Returns:
        ``axes`` are, at every step kept, the step, and the tokens and seconds of the run up to it, None if not logged.
        ``series`` maps a metric to its value at each of these steps, None where the step has none.
    """
    steps = run.steps
    found = [numbers_of(line) for line in steps]
    names = sorted({metric for line in found for metric in line if len(metric) <= LONGEST_NAME})
    most = min(MOST_POINTS, max(2, MOST_VALUES // (runs * max(1, len(names)))))
    validated = [place for place, line in enumerate(found) if any(metric.startswith(HELD_OUT) for metric in line)]
    kept = sorted({*spread(len(steps), most), *(validated[place] for place in spread(len(validated), most // 4 or 1))})
    if len(kept) < len(steps):
        notes.append(f"Curves of {run.name}: {len(kept)} of {len(steps)} logged steps, evenly spaced, and validations.")
    # Held-out numbers and the known curves come first, should there be no room for all.
    known = [metric for _, lines in CURVES for _, metric in lines]
    names.sort(key=lambda metric: not metric.startswith(HELD_OUT) and metric not in known)
    series = [(metric, [found[place].get(metric) for place in kept]) for metric in names]
    shown = dict(that_fit(series, LARGEST_SERIES // runs))
    if len(shown) < len(names):
        notes.append(f"Metrics of {run.name}: {len(shown)} of {len(names)}.")
    return {
        "decoding": decoding(run.folder),
        "headline": headline(steps, run.problems, LARGEST_HEADLINE // runs),
        "axes": {unit: values and [_place(values[place]) for place in kept] for unit, values in run.axes.items()},
        "series": shown,
    }


def _at_equal_tokens(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """List the accuracies where every run has generated as many tokens: value and 95% interval over the problems."""
    found, names = [], {name for run in runs for line in run.held_out for name in line}
    for metric in sorted(name for name in names if name.endswith(f": {LABELS['acc']}")):
        at, values = at_equal(runs, metric, "tokens")
        if len(values) - values.count(None) > 1:
            cells = [
                None if value is None else [number(value), certainty(None, value, run.problems_of(metric))[0]]
                for run, value in zip(runs, values, strict=True)
            ]
            found.append({"name": shorten(metric), "at": number(at), "cells": cells})
    return that_fit(found, LARGEST_HEADLINE)


def _place(value: float | None) -> float | None:
    """Round tokens and seconds; a step is whole."""
    return value if isinstance(value, int) else number(value)


def _groups(runs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """List title and metric of the curves to draw: held-out numbers, and known curves that two runs or more have."""
    had = Counter(metric for run in runs for metric in run["series"])
    titled = [(metric, metric) for metric in sorted(had) if metric.startswith(HELD_OUT)]
    for title, lines in CURVES:
        for label, metric in lines:
            # The labels of the lines are the runs' names.
            told = label if len(lines) > 1 else "" if label else unit_of(metric)
            titled += [(f"{title}: {told}" if told else title, metric)] if had[metric] > 1 else []
    return that_fit([{"title": title, "name": metric} for title, metric in titled], LARGEST_GROUPS)


def _differences(settings: Sequence[Mapping[str, str]], notes: list[str]) -> list[dict[str, Any]]:
    """List the settings whose values differ; those that have one name and equal values share a line."""
    lines: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    every = dict.fromkeys(name for one in settings for name in one)
    for name in sorted(every, key=lambda name: name.partition(".")[0] not in FIRST):
        values = tuple(one.get(name) for one in settings)
        last = name.rpartition(".")[2]
        # A run without a config differs in nothing.
        distinct = {_compared(value) for value, one in zip(values, settings, strict=True) if one}
        if last not in OF_A_RUN and len(distinct) > 1:
            lines.setdefault((last, values), []).append(name)
    found = [
        {"names": [shorten(name) for name in names], "values": [value and shorten(value) for value in values]}
        for (_, values), names in lines.items()
    ]
    shown = that_fit(found, LARGEST_CONFIG)
    if len(shown) < len(found):
        notes.append(f"Settings: the first {len(shown)} of {len(found)} that differ.")
    return shown


def _compared(value: str | None) -> str | None:
    """Return a value such that 300 and 300.0 are equal."""
    return value and value.removesuffix(".0")
