"""Compare runs at an equal number of tokens (or steps, or seconds), and draw their curves: the paper's figures 9 to 11.

Runs that differ in their seed alone form a group; NAME=RUN,RUN makes one of your own.  Values are those at the largest
number of tokens that every run has, linear between two validations.  The interval of a group is Student's over its
seeds; a single run has Wilson's over the validation problems instead.  The first group is the one that the others are
compared with, seed by seed where two or more seeds are in both.  docs/analysis.md describes tables and curves.

    python -m recipe.skpo.analysis.compare RUN... [--x step|tokens|seconds] [--against GROUP] [--out DIR]
"""

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pandas as pd

from recipe.skpo.analysis.common import parser_of, write_results
from recipe.skpo.evaluation.options import require
from recipe.skpo.evaluation.results import run_cli
from recipe.skpo.output.console import markdown_table
from recipe.skpo.output.recorded import UNITS, RecordedRun, at_equal, read_runs
from recipe.skpo.output.summary import LABELS, wilson_interval
from recipe.skpo.output.trees import spread
from recipe.skpo.trainer.fingerprint import is_compared, shown

SEEDS = ("skpo.seed", "data.seed")
"""Settings that are a run's seed: the first of them that differs between the runs."""

OWN = (
    "method.name",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.lora_rank",
    "data.train_files",
    "data.val_files",
)
"""Settings that make another group, beside those that a resume compares."""

CURVES = ("skpo/downstream/reward/mean", "actor/entropy", "skpo/downstream/all_equal_share", "skpo/tokens/generated")
"""Metrics that are drawn beside the held-out numbers."""

STEP_TIME = "timing_s/step"
_PHASE = re.compile(r"timing_s/[^/]+")

_MOST_POINTS = 400
_MOST_NAMED = 3
"""Settings that a group is named by."""


@dataclass(frozen=True)
class CompareConfig:
    """What is compared.

    Attributes:
        runs: folders whose groups their configs tell.
        named: groups that were given by name.
        x: step, tokens or seconds.
        metrics: compared beside the held-out numbers.
        against: the group that the others are compared with; None for the first.
    """

    runs: tuple[Path, ...] = ()
    named: Mapping[str, tuple[Path, ...]] | None = None
    x: str = "tokens"
    metrics: tuple[str, ...] = ()
    against: str | None = None


Groups = Mapping[str, Sequence[RecordedRun]]
"""Name to runs, in the order in which they were given."""


# ---------------------------------------------------------------- groups


def read_groups(
    folders: Sequence[Path], named: Mapping[str, Sequence[Path]] | None = None
) -> dict[str, list[RecordedRun]]:
    """Read runs and group them: those of ``folders`` by their configs, those of ``named`` as given.

    Raises:
        ReportError: a folder holds no run or is named twice, or a config cannot be read.
        ConfigError: two groups have one name, or there is no run.
    """
    given = {name: list(members) for name, members in (named or {}).items()}
    runs = iter(read_runs([*folders, *(folder for members in given.values() for folder in members)]))
    alike: dict[Any, list[RecordedRun]] = defaultdict(list)
    for _ in folders:
        run = next(runs)
        # Nothing is known of a run without a config, so it is alone.
        alike[tuple(_choices(run).items()) or run.name].append(run)
    groups = dict(zip(_titles([members[0] for members in alike.values()]), alike.values(), strict=True))
    for name, members in given.items():
        require(name not in groups, f"{name}: is the name of two groups; give NAME=RUN[,RUN...] with another name")
        groups[name] = [next(runs) for _ in members]
    require(bool(groups), "no run is named; name run folders")
    return groups


def _choices(run: RecordedRun) -> dict[str, str]:
    """Return the settings that make a group, by their path; 300 and 300.0 are equal."""
    return {
        name: value.removesuffix(".0")
        for name, value in run.settings.items()
        if name in OWN or (is_compared(name) and not name.endswith("seed"))
    }


def _titles(runs: Sequence[RecordedRun]) -> list[str]:
    """Name groups by their first runs: by method, by model if there are several, and by settings if need be."""
    choices = [_choices(run) for run in runs]
    titles = [run.method or run.name for run in runs]
    models = [_last_part(run.settings.get("actor_rollout_ref.model.path", "")) for run in runs]
    if len(set(models)) > 1:
        titles = [f"{title} {model}".rstrip() for title, model in zip(titles, models, strict=True)]
    for title in [title for title, count in Counter(titles).items() if count > 1]:
        places = [place for place, other in enumerate(titles) if other == title]
        names = sorted(
            {name for place in places for name in choices[place]}, key=lambda name: not name.startswith("skpo.")
        )
        differing = [name for name in names if len({choices[place].get(name) for place in places}) > 1]
        for place in places:
            values = [f"{name.rpartition('.')[2]}={choices[place].get(name, 'null')}" for name in differing]
            titles[place] = " ".join([title, *values[:_MOST_NAMED]])
    return [
        title if titles.count(title) == 1 else f"{title} ({titles[:place].count(title) + 1})"
        for place, title in enumerate(titles)
    ]


def _last_part(value: str) -> str:
    return value.strip('"').rstrip("/").rpartition("/")[2]


def _seeds(groups: Groups) -> dict[str, str]:
    """Map a run's name to its seed; a run that records none has one of its own."""

    def varied(runs: Sequence[RecordedRun], otherwise: str) -> str:
        return next((name for name in SEEDS if len({run.settings.get(name) for run in runs} - {None}) > 1), otherwise)

    of_all = varied([run for members in groups.values() for run in members], SEEDS[0])
    return {
        run.name: run.settings.get(varied(members, of_all), run.name) for members in groups.values() for run in members
    }


# ---------------------------------------------------------------- numbers


def held_out_metrics(groups: Groups) -> list[str]:
    """List one held-out number per data source: its accuracy, or its mean reward."""
    first = tuple(f": {LABELS[key]}" for key in ("acc", "reward"))
    names = {name for members in groups.values() for run in members for line in run.held_out for name in line}
    return sorted(name for name in names if name.endswith(first))


def values_of(groups: Groups, metrics: Sequence[str], x: str = "tokens", at: float | None = None) -> pd.DataFrame:
    """Read metrics of every run where all runs that logged them can be compared.

    Args:
        groups: of ``read_groups``.
        metrics: names in ``metrics.jsonl``, or ``held-out <source>: accuracy``.
        x: step, tokens or seconds.
        at: the place; None for the largest that every run has.

    Returns:
        One row per metric and run: ``group``, ``run``, ``seed``; ``at``; the ``value`` there, linear between two that
        were logged; ``low`` and ``high``, Wilson's 95% interval over the
        ``problems`` of an accuracy, else NaN; ``first`` and ``last`` value of the run, and ``end``, the last one's
        place.  No row for a run that did not log the metric over ``x``.
    """
    rows, seeds = [], _seeds(groups)
    runs = [(group, run) for group, members in groups.items() for run in members]
    for metric in metrics:
        place, values = at_equal([run for _, run in runs], metric, x, at)
        for (group, run), value in zip(runs, values, strict=True):
            if value is None:
                continue
            places, logged = run.course(metric, x)
            problems = run.problems_of(metric)
            low, high = wilson_interval(value, problems) if problems and 0 <= value <= 1 else (math.nan, math.nan)
            found = (place, logged[0], value, low, high, problems, logged[-1], places[-1])
            rows.append((metric, group, run.name, seeds[run.name], *found))
    columns = ["metric", "group", "run", "seed", "at", "first", "value", "low", "high", "problems", "last", "end"]
    return pd.DataFrame(rows, columns=columns)


def table_of(values: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Compare groups by the values of their runs; runs of one seed count once, by their mean.

    Args:
        values: of ``values_of``.
        against: the group that the others are compared with; None for the first of each metric.

    Returns:
        One row per metric and group: ``at``; number of ``seeds``; means ``first``, ``mean`` (at ``at``) and ``last``;
        ``low`` and ``high``, the mean's 95% interval ``over`` "seeds", "problems" of a single run, or "" if unknown.
        ``difference`` to the group ``against`` with its interval ``difference_low`` and ``difference_high``: over the
        ``pairs`` of seeds in both groups if there are two or more, else Welch's over all seeds, NaN with one seed.
    """
    rows = []
    for metric, found in values.groupby("metric", sort=False):
        groups = {
            str(name): one.groupby("seed", sort=False)["value"].mean()
            for name, one in found.groupby("group", sort=False)
        }
        reference = against if against is not None else next(iter(groups))
        for name, by_seed in groups.items():
            runs = found[found["group"] == name]
            low, high = student_interval(by_seed)
            over = "seeds"
            if len(by_seed) == 1:
                low, high = (float(runs[side].iloc[0]) if len(runs) == 1 else math.nan for side in ("low", "high"))
                over = "" if math.isnan(low) else "problems"
            row = {"metric": metric, "group": name, "at": runs["at"].iloc[0], "seeds": len(by_seed)}
            row |= {"first": runs["first"].mean(), "mean": by_seed.mean(), "low": low, "high": high, "over": over}
            row |= {"last": runs["last"].mean(), "against": "", "pairs": 0}
            row |= dict.fromkeys(("difference", "difference_low", "difference_high"), math.nan)
            if name != reference and reference in groups:
                row |= {"against": reference} | _difference(by_seed, groups[reference])
            rows.append(row)
    return pd.DataFrame(rows)


def _difference(mine: pd.Series, other: pd.Series) -> dict[str, float]:
    paired = (mine - other).dropna()
    if len(paired) > 1 or len(paired) == len(mine) == len(other):
        difference, (low, high), pairs = paired.mean(), student_interval(paired), len(paired)
    else:
        difference, (low, high), pairs = mine.mean() - other.mean(), welch_interval(mine, other), 0
    return {"difference": difference, "difference_low": low, "difference_high": high, "pairs": pairs}


def student_interval(values: pd.Series) -> tuple[float, float]:
    """Return the 95% interval of a mean over independent values; NaN of a single one."""
    count, mean = len(values), float(values.mean())
    half = student_quantile(count - 1) * float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return mean - half, mean + half


def welch_interval(mine: pd.Series, other: pd.Series) -> tuple[float, float]:
    """Return the 95% interval of the difference of two means (Welch 1947); NaN if one is of a single value."""
    if min(len(mine), len(other)) < 2:
        return math.nan, math.nan
    first, second = (float(values.var()) / len(values) for values in (mine, other))
    mean, variance = float(mine.mean() - other.mean()), first + second
    if variance == 0:
        return mean, mean
    freedom = variance**2 / (first**2 / (len(mine) - 1) + second**2 / (len(other) - 1))
    half = student_quantile(freedom) * math.sqrt(variance)
    return mean - half, mean + half


@cache
def student_quantile(freedom: float) -> float:
    """Return the 97.5% quantile of Student's t distribution with at least one degree of freedom."""

    def excess(t: float) -> Any:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05

    return float(mpmath.findroot(excess, (1.9, 13), solver="anderson"))


def compare(
    folders: Sequence[Path],
    named: Mapping[str, Sequence[Path]] | None = None,
    *,
    x: str = "tokens",
    metrics: Sequence[str] = (),
    against: str | None = None,
) -> pd.DataFrame:
    """Compare runs, from their folders to the rows of ``table_of``.

    Args:
        folders: runs that their configs group.
        named: further groups by name.
        x: what is equal: step, tokens or seconds.
        metrics: names in ``metrics.jsonl``; none for the held-out numbers.
        against: the group that the others are compared with; None for the first.

    Raises:
        ReportError, ConfigError: a folder holds no run, a config cannot be read, two groups have one name, ``against``
            is not a group, or no run has a held-out number.
    """
    groups = read_groups(folders, named)
    return table_of(values_of(groups, _metrics(groups, metrics, against), x), against)


def _metrics(groups: Groups, metrics: Sequence[str], against: str | None) -> list[str]:
    """Return the metrics to compare, the held-out numbers if none are given; ``against`` must be a group."""
    require(against is None or against in groups, f"--against {against}: the groups are {', '.join(groups)}")
    chosen = list(metrics) or held_out_metrics(groups)
    require(bool(chosen), "the runs logged no held-out numbers; name a metric of metrics.jsonl by --metric")
    return chosen


# ---------------------------------------------------------------- curves


def curves_of(groups: Groups, metrics: Sequence[str], x: str = "tokens") -> pd.DataFrame:
    """Average curves over the runs of each group.

    Returns:
        One row per metric, ``group`` and place ``x`` that a run of the group logged (at most 400, evenly chosen): the
        ``mean`` over the ``runs`` whose curve reaches from before to behind it, linear between two values, and its 95%
        interval ``low`` and ``high``, NaN of a single run.
    """
    tables = []
    for metric in metrics:
        for group, members in groups.items():
            courses = [course for run in members if (course := run.course(metric, x))[0]]
            every = np.unique([place for places, _ in courses for place in places])
            grid = every[spread(len(every), _MOST_POINTS)]
            lines = [np.interp(grid, *course, left=math.nan, right=math.nan) for course in courses]
            if not lines:
                continue
            frame = pd.DataFrame(np.stack(lines, axis=1))
            runs, mean = frame.count(axis=1), frame.mean(axis=1)
            quantiles = runs.map(lambda count: student_quantile(count - 1) if count > 1 else math.nan)
            half = quantiles * frame.std(axis=1) / np.sqrt(runs)
            columns = {
                "metric": metric,
                "group": group,
                "x": grid,
                "mean": mean,
                "low": mean - half,
                "high": mean + half,
            }
            tables.append(pd.DataFrame(columns | {"runs": runs}))
    empty = pd.DataFrame(columns=["metric", "group", "x", "mean", "low", "high", "runs"])
    return pd.concat(tables, ignore_index=True) if tables else empty


def phases_of(groups: Groups) -> pd.DataFrame:
    """Average the seconds of each phase of a training step.

    Returns:
        One row per ``group`` and ``phase`` (names below ``timing_s/``; ``step`` is the whole step) with the mean over
        runs of the run's mean ``seconds``, ``min`` and ``max`` over runs.  A step without a phase counts as 0 seconds
        of it.
    """
    rows = []
    for group, members in groups.items():
        timed = [[line for line in run.steps if STEP_TIME in line] for run in members]
        timed = [lines for lines in timed if lines]
        names = sorted({name for lines in timed for line in lines for name in line if _PHASE.fullmatch(name)})
        for name in names:
            seconds = [sum(line.get(name, 0.0) for line in lines) / len(lines) for lines in timed]
            phase = name.removeprefix("timing_s/")
            rows.append((group, phase, sum(seconds) / len(seconds), min(seconds), max(seconds)))
    return pd.DataFrame(rows, columns=["group", "phase", "seconds", "min", "max"])


# ---------------------------------------------------------------- command


def text_of(table: pd.DataFrame, x: str) -> str:
    """Format the rows of ``table_of`` as a Markdown table per metric."""
    parts = []
    for metric, rows in table.groupby("metric", sort=False):
        against = next(filter(None, rows["against"]), None)
        head = ["group", "seeds", "at first", f"at {rows['at'].iloc[0]:,.0f} {UNITS[x]}", "95% interval", "at the end"]
        head += [f"difference to {against}", "95% interval"] if against else []
        cells = []
        for row in rows.itertuples(index=False):
            interval = {"seeds": "", "problems": "one seed; over problems ", "": "one seed"}[row.over]
            interval += f"{row.low:.3f} to {row.high:.3f}" if row.over else ""
            line = [row.group, str(row.seeds), *(f"{value:.3f}" for value in (row.first, row.mean))]
            line += [interval, f"{row.last:.3f}"]
            if against:
                known = not math.isnan(row.difference_low)
                over = f" ({row.pairs} pairs of seeds)" if row.pairs else ""
                bounds = f"{row.difference_low:+.3f} to {row.difference_high:+.3f}{over}" if known else "one seed"
                line += [f"{row.difference:+.3f}", bounds] if row.against else ["", ""]
            cells.append(line)
        parts.append(f"{metric}\n\n{markdown_table(head, cells, numbers=True)}")
    return "\n\n".join(parts)


def run(config: CompareConfig, out: Path | None) -> list[Path]:
    """Read, compare, print; with ``out`` draw and write, and return the files."""
    groups = read_groups(config.runs, config.named)
    metrics = _metrics(groups, config.metrics, config.against)
    values = values_of(groups, metrics, config.x)
    for metric in metrics:
        there = set(values.loc[values["metric"] == metric, "run"])
        lacking = [one.name for members in groups.values() for one in members if one.name not in there]
        require(bool(there), f"--metric {shown(metric)}: no run logged it over {UNITS[config.x]}")
        if lacking:
            print(f"note: {metric} over {UNITS[config.x]} was not logged by {', '.join(lacking)}")
        ends = values[values["metric"] == metric].set_index("run")["end"]
        if ends.min() < 0.95 * ends.max():
            print(f"note: {metric} is compared at {ends.min():,.0f} {UNITS[config.x]}, where {ends.idxmin()} ends")
    table = table_of(values, config.against)
    print(text_of(table, config.x))
    if out is None:
        return []
    from recipe.skpo.analysis.drawing import draw_curves

    curves = curves_of(groups, list(dict.fromkeys([*metrics, *held_out_metrics(groups), *CURVES])), config.x)
    phases = phases_of(groups)
    tables = {"groups": table, "runs": values, "curves": curves, "phases": phases}
    return write_results(out, "compare", config, {}, tables, draw_curves(curves, phases, UNITS[config.x]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or NAME=RUN[,RUN...] for a group")
    parser.add_argument("--x", choices=list(UNITS), default="tokens", help="what is equal (default tokens)")
    parser.add_argument(
        "--metric", action="append", default=[], help="a name in metrics.jsonl, repeatable (default: held-out numbers)"
    )
    parser.add_argument(
        "--against", metavar="GROUP", help="the group that the others are compared with (default: the first)"
    )
    parser.add_argument("--out", type=Path, help="folder for picture, tables and config (default: none is written)")
    flags = parser.parse_args(argv)

    def command() -> list[Path]:
        folders, named = list[Path](), dict[str, tuple[Path, ...]]()
        for text in flags.runs:
            name, sign, rest = text.partition("=")
            if not sign or Path(text).exists():
                folders.append(Path(text))
                continue
            require(name not in named, f"{name}: is the name of two groups; join its runs with commas")
            named[name] = tuple(Path(part) for part in rest.split(",") if part)
            require(bool(named[name]), f"{text}: names no run; give NAME=RUN[,RUN...]")
        config = CompareConfig(tuple(folders), named or None, flags.x, tuple(flags.metric), flags.against)
        return run(config, flags.out)

    return run_cli(command)


if __name__ == "__main__":
    sys.exit(main())
