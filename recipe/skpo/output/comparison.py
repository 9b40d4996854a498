"""What the page that compares several runs holds of them: final numbers, curves over each other, differing settings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
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
    read_settings,
    run_steps,
    shorten,
    that_fit,
    tokens_of,
)
from recipe.skpo.output.summary import LABELS, decoding, minutes_of, problems
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
    names, settings = _names(output_dirs), [dict(read_settings(folder) or []) for folder in output_dirs]
    notes += [f"Config: {name} holds no config.yaml." for name, one in zip(names, settings, strict=True) if not one]
    runs = [
        {"name": name, "method": _method(chosen)} | _numbers(folder, name, len(output_dirs), notes)
        for name, folder, chosen in zip(names, output_dirs, settings, strict=True)
    ]
    return {
        "labels": LABELS,
        "runs": runs,
        "groups": _groups(runs),
        "meanings": meanings(sorted({metric for run in runs for metric in run["series"]})),
        "differences": _differences(settings, notes),
        "notes": notes,
    }


def _names(output_dirs: Sequence[Path]) -> list[str]:
    """Name every run by its folder, with as many of the folders above it as tell all of them apart."""
    places = [folder.resolve() for folder in output_dirs]
    for place in places:
        if places.count(place) > 1:
            raise ReportError(f"{place}: is named {places.count(place)} times; name every run once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:])[-200:] for place in places]


def _method(settings: dict[str, str]) -> str | None:
    """Return the method's name; runs of former releases name their estimator alone."""
    found = settings.get("method.name", settings.get("algorithm.adv_estimator"))
    return None if found is None else shorten(found.strip('"'))


def _numbers(output_dir: Path, name: str, runs: int, notes: list[str]) -> dict[str, Any]:
    """Collect one run's headline and series.

    Returns:
        ``axes`` are, at every step kept, the step, and the tokens and seconds of the run up to it, None if not logged.
        ``series`` maps a metric to its value at each of these steps, None where the step has none.
    """
    steps = run_steps(output_dir)
    how = decoding(output_dir)
    axes = {
        "step": [int(line["step"]) for line in steps],
        "tokens": _total([tokens_of(line) for line in steps]),
        "seconds": _total([_seconds(line) for line in steps]),
    }
    found = [numbers_of(line) for line in steps]
    names = sorted({metric for line in found for metric in line if len(metric) <= LONGEST_NAME})
    most = min(MOST_POINTS, max(2, MOST_VALUES // (runs * max(1, len(names)))))
    validated = [place for place, line in enumerate(found) if any(metric.startswith(HELD_OUT) for metric in line)]
    kept = sorted({*spread(len(steps), most), *(validated[place] for place in spread(len(validated), most // 4 or 1))})
    if len(kept) < len(steps):
        notes.append(f"Curves of {name}: {len(kept)} of {len(steps)} logged steps, evenly spaced, and validations.")
    # Held-out numbers and the known curves come first, should there be no room for all.
    known = [metric for _, lines in CURVES for _, metric in lines]
    names.sort(key=lambda metric: not metric.startswith(HELD_OUT) and metric not in known)
    series = [(metric, [found[place].get(metric) for place in kept]) for metric in names]
    shown = dict(that_fit(series, LARGEST_SERIES // runs))
    if len(shown) < len(names):
        notes.append(f"Metrics of {name}: {len(shown)} of {len(names)}.")
    return {
        "decoding": how,
        "headline": headline(steps, problems(output_dir), LARGEST_HEADLINE // runs),
        "axes": {unit: values and [values[place] for place in kept] for unit, values in axes.items()},
        "series": shown,
    }


def _seconds(line: Mapping[str, Any]) -> float | None:
    """Return the seconds of a step and its validation; None if not logged."""
    minutes = number(minutes_of([line]))
    return None if minutes is None else 60 * minutes


def _total(values: Sequence[float | None]) -> list[float | None] | None:
    """Add up what is known; None if nothing is."""
    if all(value is None for value in values):
        return None
    return [number(total) for total in accumulate(value or 0.0 for value in values)]


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


def _differences(settings: Sequence[dict[str, str]], notes: list[str]) -> list[dict[str, Any]]:
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
