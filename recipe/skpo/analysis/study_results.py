"""What the runs of a study logged, as one small file, and the tables and figures made from it alone."""

import math
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.untrusted import read_json
from recipe.skpo.analysis.compare import Groups, curves_of, held_out_metrics, table_of, text_of, values_of
from recipe.skpo.analysis.study import METHODS, REFERENCE, RUNS, StudyConfig, elsewhere, read_records, shown
from recipe.skpo.devices import query_gpus
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.options import require
from recipe.skpo.evaluation.results import json_bytes
from recipe.skpo.output.console import markdown_table
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.page_data import ReportError, number
from recipe.skpo.output.recorded import RecordedRun, read_runs
from recipe.skpo.output.summary import decoding, held_out

QUANTITIES = {
    "skpo/downstream/all_equal_share": "equal groups",
    "skpo/downstream/length/mean": "length",
    "actor/entropy": "entropy",
    "skpo/upstream/signal_to_noise": "signal to noise",
    "skpo/downstream/copied_share": "copied",
    "skpo/validation/skip_gap": "skip gap",
}
"""Metrics of the table beside accuracy, and of the figures, by their heading."""

TOKENS, SECONDS = "skpo/tokens/generated", ("timing_s/step", "timing_s/testing")
STEP_METRICS = (*QUANTITIES, "skpo/downstream/reward/mean")
DRAWN = ("skpo/downstream/all_equal_share", "skpo/downstream/length/mean", "actor/entropy")


# ---------------------------------------------------------------- the file


def collect(config: StudyConfig, rates: Mapping[str, float]) -> dict[str, Any]:
    """Read every run of a study, finished or not.

    Args:
        config: the plan.
        rates: each method's learning rate, as far as it is known.

    Returns:
        ``arm``; the ``machine``; the ``plan``: what is compared, and on what learning rates were chosen; one entry per
        cell with its record and its ``steps``, of ``thinned``.

    Raises:
        ConfigError: nothing has been started.
    """
    records = read_records(config.out)
    require(bool(records), f"{config.out}: holds no run of a study; name its folder by --out")
    chosen_from = config.rates if config.chooses else ()
    plan = {"rates": rates, "seeds": config.seeds, "chosen_from": chosen_from, "rate_seeds": config.rate_seeds}
    cells = []
    for cell, record in records.items():
        folder = config.out / RUNS / cell.name
        command, error = elsewhere([shown(record.overrides), record.error], config.arm, record)
        steps: list[dict[str, float]] = []
        counted: Mapping[str, int] = {}
        how = ""
        with suppress(ReportError):
            (run,) = read_runs([folder])
            steps, counted, how = thinned(run.steps), run.problems, decoding(folder)
        cells.append(
            {
                "name": cell.name,
                "method": cell.method,
                "rate": cell.rate,
                "seed": cell.seed,
                "state": record.state,
                "ended": record.ended,
                "error": error,
                "launches": record.launches,
                "command": command,
                "problems": dict(counted),
                "decoding": how,
                "steps": steps,
            }
        )
    return {"arm": config.arm, "machine": machine(), "plan": plan, "cells": cells}


def machine() -> str:
    """Name this machine's GPU, or its processor."""
    if names := query_gpus("name"):
        return f"{len(names)} x {names[0].strip()}"
    model = platform.machine()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        model = match[1].strip() if (match := re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)) else model
        return f"{len(re.findall(r'^processor', text, re.MULTILINE))} cores, {model}"
    return model


def thinned(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Keep the lines with a validation, and of the steps that lead to each the sum of tokens and seconds, and means."""
    lines, since = list[dict[str, float]](), list[Mapping[str, Any]]()
    for place, step in enumerate(steps):
        since.append(step)
        if not held_out(dict(step)) and place < len(steps) - 1:
            continue
        line = {"step": step["step"]} | {name: value for name, value in step.items() if name.startswith("val-core/")}
        for name in (TOKENS, *SECONDS, *STEP_METRICS):
            found = [value for one in since if (value := number(one.get(name))) is not None]
            if found:
                line[name] = sum(found) if name in (TOKENS, *SECONDS) else sum(found) / len(found)
        lines.append({name: value if name == "step" else float(f"{value:.5g}") for name, value in line.items()})
        since = []
    return lines


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the file, ``<arm>.json``; one line per cell would be too long, one number per line too many."""
    path = folder / f"{results['arm']}.json"
    text = json_bytes(results).decode()
    # A step on a line of its own.
    text = re.sub(r"\{\n\s+(\"step\":[^{}]*?)\n\s+\}", lambda match: "{" + re.sub(r"\n\s+", " ", match[1]) + "}", text)
    write_atomic(path, text)
    return path


@dataclass(frozen=True)
class StoredRun(RecordedRun):
    """A run of the file; ``counted`` are its validation problems per data source."""

    counted: Mapping[str, int]

    @property
    def problems(self) -> Mapping[str, int]:  # type: ignore[override]
        """Validation problems per data source."""
        return self.counted


def groups_of(results: Mapping[str, Any], chooses: bool) -> dict[str, list[RecordedRun]]:
    """Group the runs of the plan that ended, by method and learning rate, in the order of ``METHODS``.

    A run that was stopped before its first validation in training is in no group.

    Args:
        results: of ``collect``.
        chooses: those on which learning rates were chosen, or those that are compared.
    """
    groups: dict[tuple[str, float], list[RecordedRun]] = defaultdict(list)
    plan = results["plan"]
    for cell in results["cells"]:
        method, rate, seed = cell["method"], cell["rate"], cell["seed"]
        if chooses:
            planned = rate in plan["chosen_from"] and seed in plan["rate_seeds"]
        else:
            planned = rate == plan["rates"].get(method) and seed in plan["seeds"]
        if planned and cell["ended"] and any(held_out(line) and line.get(TOKENS) for line in cell["steps"]):
            settings = {"skpo.seed": str(cell["seed"])}
            run = StoredRun(Path(cell["name"]), cell["name"], settings, cell["steps"], cell["problems"])
            groups[cell["method"], cell["rate"]].append(run)
    order = list(METHODS)
    return {title(*key): groups[key] for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))}


def title(method: str, rate: float) -> str:
    """Name a group."""
    return f"{METHODS[method].title}, lr {rate:g}"


def best_rates(results: Mapping[str, Any]) -> dict[str, float]:
    """Choose each method's learning rate by the held-out number; of equals the smaller rate."""
    groups = groups_of(results, chooses=True)
    if not groups:
        return {}
    table = table_of(values_of(groups, held_out_metrics(groups)[:1])).set_index("group")["mean"]
    chosen: dict[str, float] = {}
    for method in METHODS:
        rates = sorted({cell["rate"] for cell in results["cells"] if cell["method"] == method})
        known = {rate: table[name] for rate in rates if (name := title(method, rate)) in table.index}
        if known:
            chosen[method] = max(known, key=lambda rate: (known[rate], -rate))
    return chosen


# ---------------------------------------------------------------- tables


def page_of(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    compared, choosing = groups_of(results, chooses=False), groups_of(results, chooses=True)
    how = next((cell["decoding"] for cell in results["cells"] if cell["decoding"]), "")
    parts = [f"Machine: {results['machine']}. Validation: {how}." if how else f"Machine: {results['machine']}."]
    if compared:
        table = _accuracy(compared)
        parts += [text_of(table, "tokens"), _quantities(compared, float(table["at"].iloc[0]))]
    if choosing:
        parts += ["Seeds on which the learning rates were chosen:", text_of(_accuracy(choosing), "tokens")]
    return "\n\n".join([*parts, "Every run:", _cells(results)])


def _accuracy(groups: Groups) -> pd.DataFrame:
    against = next((name for name in groups if name.startswith(f"{METHODS[REFERENCE].title}, lr")), None)
    return table_of(values_of(groups, held_out_metrics(groups)), against)


def _quantities(groups: Groups, at: float) -> str:
    """Tabulate the other metrics at the tokens of the accuracies: mean and half of its 95% interval."""
    table = table_of(values_of(groups, list(QUANTITIES), at=at))
    rows = []
    for group in groups:
        row = [group]
        for metric in QUANTITIES:
            found = table[(table["metric"] == metric) & (table["group"] == group)]
            known = not found.empty and not (metric.endswith("all_equal_share") and group.startswith("SPO,"))
            row.append(_with_half(found["mean"].iloc[0], found["high"].iloc[0]) if known else "")
        rows.append(row)
    head = markdown_table(["group", *QUANTITIES.values()], rows, numbers=True)
    return f"Training at {at:,.0f} generated tokens, mean over the steps since the validation before:\n\n{head}"


def _with_half(mean: float, high: float) -> str:
    return f"{mean:.3f}" if math.isnan(high) else f"{mean:.3f} +- {high - mean:.3f}"


def _cells(results: Mapping[str, Any]) -> str:
    rows = []
    for cell in results["cells"]:
        steps = cell["steps"]
        scores = [next(iter(found.values())) for line in steps if (found := held_out(line))]
        last = f"{next(iter(scores[-1].values())):.3f}" if scores else ""
        tokens, seconds = (sum(line.get(name, 0) for line in steps for name in names) for names in ((TOKENS,), SECONDS))
        used = [str(steps[-1]["step"]), f"{tokens:,.0f}", f"{seconds:,.0f}"] if steps else ["0", "0", "0"]
        rows.append([f"`{cell['name']}`", f"{cell['state']} {cell['error']}".strip(), *used, last])
    return markdown_table(["cell", "state", "steps", "tokens", "seconds", "last held-out"], rows, numbers=True)


# ---------------------------------------------------------------- figures


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the curves, and the differences to GRPO, as SVG; equal results give equal bytes."""
    from recipe.skpo.analysis.common import rendered
    from recipe.skpo.analysis.drawing import draw_curves, draw_differences

    groups = groups_of(results, chooses=False)
    if not groups:
        return []
    accuracies = held_out_metrics(groups)
    curves = curves_of(groups, [*accuracies, *DRAWN])
    nothing = pd.DataFrame(columns=["group", "phase", "seconds"])
    figures = {"curves": draw_curves(curves, nothing, "generated tokens")}
    table = _accuracy(groups)
    if table["difference_low"].notna().any():
        figures["differences"] = draw_differences(table)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{results['arm']}_{name}.svg")
        write_atomic(paths[-1], rendered(figure, "svg", name))
    return paths


def redraw(folder: Path) -> list[Path]:
    """Draw every ``<arm>.json`` of a folder again, and write the tables into the page beside it, ``<folder>.md``.

    Raises:
        ConfigError: the folder holds no results, or the page has no place for them.
    """
    files = sorted(folder.glob("*.json"))
    require(bool(files), f"{folder}: holds no results of a study; copy <arm>.json into it")
    page = folder.with_suffix(".md")
    text = page.read_text(encoding="utf-8") if page.is_file() else None
    paths = []
    for file in files:
        results: dict[str, Any] = read_json(file)
        paths += draw(results, folder)
        if text is not None:
            text = filled(text, results["arm"], page_of(results), page)
    if text is not None:
        write_atomic(page, text)
        paths.append(page)
    return paths


def filled(text: str, arm: str, tables: str, page: Path) -> str:
    """Put tables between the marks of their arm.

    Raises:
        ConfigError: the page has no such marks.
    """
    first, last = f"<!-- results of {arm} -->", f"<!-- end of {arm} -->"
    before, found, rest = text.partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise ConfigError(f"{page}: has no lines {first} and {last}; add them where the tables belong")
    return f"{before}{first}\n\n{tables}\n\n{last}{after}"
