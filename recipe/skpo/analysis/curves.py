"""Draw training curves of any number of runs, method by method: the paper's figures 9 to 11.

Per step and method the mean over the method's runs (seeds) that logged it; the band goes from the lowest to the highest
run, and is not a confidence interval.  Of two lines of one step the later value counts.  A metric that a method's runs
did not log is left out and named in one line.  docs/analysis.md lists the metrics.

    python -m recipe.skpo.analysis.curves --run NAME=RUN[,RUN...] ... --out DIR
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from recipe.skpo.analysis.common import add_out, parser_of, write_results
from recipe.skpo.evaluation.options import require
from recipe.skpo.evaluation.results import run_cli
from recipe.skpo.output.console import markdown_table
from recipe.skpo.output.metrics import read_steps
from recipe.skpo.output.summary import held_out

STEP_TIME = "timing_s/step"
_PHASE = re.compile(r"timing_s/[^/]+")
_TOKENS = re.compile(r"skpo/[^/]+/tokens_generated")


@dataclass(frozen=True)
class CurvesConfig:
    """What is compared: per method the ``metrics.jsonl`` of its runs."""

    runs: dict[str, tuple[Path, ...]]

    def __post_init__(self) -> None:
        require(bool(self.runs), "--run: is missing; give NAME=RUN[,RUN...]")


def _named(name: str) -> Callable[[Mapping[str, float]], dict[str, float]]:
    return lambda line: {"": line[name]} if name in line else {}


def _accuracy(line: Mapping[str, float]) -> dict[str, float]:
    return {source: values["acc"] for source, values in held_out(dict(line)).items() if "acc" in values}


def _tokens(line: Mapping[str, float]) -> dict[str, float]:
    counts = [value for name, value in line.items() if _TOKENS.fullmatch(name)]
    return {"": sum(counts)} if counts else {}


READERS: dict[str, tuple[str, Callable[[Mapping[str, float]], dict[str, float]]]] = {
    "reward": ("skpo/downstream/reward/mean", _named("skpo/downstream/reward/mean")),
    "accuracy": ("val-core/*/acc/mean@*", _accuracy),
    "entropy": ("actor/entropy", _named("actor/entropy")),
    "zero_share": ("skpo/downstream/all_equal_share", _named("skpo/downstream/all_equal_share")),
    "tokens": ("skpo/*/tokens_generated", _tokens),
}
"""Curve to the metric's name, for messages, and how a line is read: variant (data source, else "") to value."""


def read_run(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``, one object per step, by rising step; raises ConfigError if there is none."""
    require(path.is_file(), f"--run: {path}: file not found; name a run folder or its metrics.jsonl")
    steps = read_steps(path)
    require(bool(steps), f"--run: {path}: holds no line with a step; name a metrics.jsonl that a run wrote")
    return steps


def curves_of(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> pd.DataFrame:
    """Compute mean and band of every curve, of the runs of each method as ``read_run`` returns them.

    Returns:
        One row per method, ``curve``, ``variant`` (data source of an accuracy, else "") and ``step`` with ``mean``,
        ``min``, ``max``, population ``std`` and the number of ``runs`` that logged it.
    """
    rows = [
        (method, curve, variant, int(line["step"]), value)
        for method, lines_of_runs in runs.items()
        for lines in lines_of_runs
        for line in lines
        for curve, (_, read) in READERS.items()
        for variant, value in read(line).items()
    ]
    frame = pd.DataFrame(rows, columns=["method", "curve", "variant", "step", "value"])
    grouped = frame.groupby(["method", "curve", "variant", "step"], sort=False)["value"]
    table = grouped.agg(["mean", "min", "max", "count"]).rename(columns={"count": "runs"})
    table["std"] = grouped.std(ddof=0)
    # Rows by method as given, then as the readers are ordered, then by step.
    table = table.reset_index()
    order = {name: number for number, name in enumerate([*runs, *READERS])}
    return table.sort_values(
        ["method", "curve", "variant", "step"],
        key=lambda column: column.map(order) if column.name in ("method", "curve") else column,
        ignore_index=True,
    )[["method", "curve", "variant", "step", "mean", "min", "max", "std", "runs"]]


def phases_of(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> pd.DataFrame:
    """Average the seconds of each phase of a training step.

    Returns:
        One row per method and ``phase`` (names below ``timing_s/``; ``step`` is the whole step) with the mean over runs
        of the run's mean ``seconds``, ``min`` and ``max`` over runs.  A step without a phase counts as 0 seconds of it.
    """
    rows = []
    for method, lines_of_runs in runs.items():
        timed = [[line for line in lines if STEP_TIME in line] for lines in lines_of_runs]
        timed = [lines for lines in timed if lines]
        names = sorted({name for lines in timed for line in lines for name in line if _PHASE.fullmatch(name)})
        for name in names:
            seconds = [sum(line.get(name, 0.0) for line in lines) / len(lines) for lines in timed]
            phase = name.removeprefix("timing_s/")
            rows.append((method, phase, sum(seconds) / len(seconds), min(seconds), max(seconds)))
    return pd.DataFrame(rows, columns=["method", "phase", "seconds", "min", "max"])


def missing(methods: Sequence[str], curves: pd.DataFrame, phases: pd.DataFrame) -> list[str]:
    """List what each method's runs did not log, as text."""
    logged = set(zip(curves["method"], curves["curve"], strict=True))
    lacking = {
        method: [f"{curve} ({name})" for curve, (name, _) in READERS.items() if (method, curve) not in logged]
        + ([] if method in set(phases["method"]) else [f"phases ({STEP_TIME})"])
        for method in methods
    }
    return [f"{method} has no {', '.join(names)}" for method, names in lacking.items() if names]


def summary(curves: pd.DataFrame, phases: pd.DataFrame) -> dict[str, Any]:
    """Collect first and last value of every curve per method, and the seconds of a step."""
    result: dict[str, Any] = {}
    for (method, curve, variant), rows in curves.groupby(["method", "curve", "variant"], sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        result.setdefault(method, {})[f"{curve} {variant}".strip()] = {
            "first_step": first["step"],
            "first": first["mean"],
            "last_step": last["step"],
            "last": last["mean"],
        }
    for _, row in phases[phases["phase"] == "step"].iterrows():
        result.setdefault(row["method"], {})["seconds_per_step"] = row["seconds"]
    return result


def table_of(found: Mapping[str, Any]) -> str:
    """Show a ``summary``: a row per curve, a column per method."""
    names = dict.fromkeys(name for values in found.values() for name in values)

    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{value['first']:.4g} to {value['last']:.4g} (step {value['first_step']} to {value['last_step']})"
        return "" if value is None else f"{value:.4g}"

    rows = [[name.replace("_", " "), *(cell(values.get(name)) for values in found.values())] for name in names]
    return markdown_table(["", *found], rows)


def run(config: CurvesConfig, out: Path) -> list[Path]:
    """Read, draw, write; returns the files."""
    from recipe.skpo.analysis.drawing import draw_curves

    runs = {method: [read_run(path) for path in paths] for method, paths in config.runs.items()}
    curves, phases = curves_of(runs), phases_of(runs)
    require(len(curves) + len(phases) > 0, "--run: the runs logged none of the metrics; see --help for their names")
    lacking = missing(list(runs), curves, phases)
    if lacking:
        print(f"left out: {'; '.join(lacking)}")
    figure, found = draw_curves(curves, phases), summary(curves, phases)
    print(table_of(found))
    return write_results(out, "curves", config, found, {"curves": curves, "phases": phases}, figure)


def _run_argument(text: str) -> tuple[str, tuple[Path, ...]]:
    name, sign, rest = text.partition("=")
    paths = [Path(part) for part in rest.split(",") if part]
    if not (name and sign and paths):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RUN[,RUN...]")
    return name, tuple(path / "metrics.jsonl" if path.is_dir() else path for path in paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = parser_of("curves", __doc__)
    parser.add_argument(
        "--run",
        type=_run_argument,
        action="append",
        required=True,
        help="NAME=RUN[,RUN...], repeatable; a RUN is a run folder or a metrics.jsonl, one per seed",
    )
    add_out(parser)
    flags = parser.parse_args(argv)

    def command() -> list[Path]:
        require(len(dict(flags.run)) == len(flags.run), "--run: a name is there twice; join its runs with commas")
        return run(CurvesConfig(dict(flags.run)), flags.out)

    return run_cli(command)


if __name__ == "__main__":
    sys.exit(main())
