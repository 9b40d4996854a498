"""SKPO, GRPO and two-batch SKPO side by side: medians over runs, and their ratios run by run.

A record is one rollout of one batch: ``variant``, ``shape`` (of the batch), ``run`` (seed or repetition) and the fields
of ``workers.RolloutCost``.  Ratios compare records of the same shape and run, that is, the same prompts, budget and
server.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import table, write_json

GRPO, TWO_BATCH = "GRPO", "two-batch SKPO"
COSTS = ("seconds", "requests", "generated", "prefilled", "cached")


def summarise(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Take medians over runs.

    Returns:
        One row per shape and variant, in the order of the records: ``seconds`` until the last row is stored;
        ``generated``, ``prefilled`` and ``cached`` tokens of all phases; ``time_ratio`` and ``token_ratio``, seconds
        and generated tokens over GRPO's; ``over_token_bound``, time_ratio / token_ratio, 1 for a server that is always
        equally busy; ``over_two_batch``, seconds over those of two-batch SKPO; ``downstream_cached``, the share of the
        downstream prefill that came from the prefix cache, NaN for GRPO.
    """

    def row(record: dict[str, Any]) -> dict[str, Any]:
        costs = {name: sum(phase[name] for phase in record["phases"].values()) for name in COSTS[2:]}
        down = record["phases"].get("downstream")
        share = down["cached"] / down["prefilled"] if down else float("nan")
        keys = {name: record[name] for name in ("shape", "variant", "run", "seconds")}
        return {**keys, **costs, "downstream_cached": share}

    runs = pd.DataFrame(map(row, records))
    place = ["shape", "run"]
    grpo, two_batch = (runs[place].merge(runs[runs["variant"] == name], "left", on=place) for name in (GRPO, TWO_BATCH))
    runs["time_ratio"] = runs["seconds"] / grpo["seconds"]
    runs["token_ratio"] = runs["generated"] / grpo["generated"]
    runs["over_token_bound"] = runs["time_ratio"] / runs["token_ratio"]
    runs["over_two_batch"] = runs["seconds"] / two_batch["seconds"]
    return runs.drop(columns="run").groupby(["shape", "variant"], sort=False).median().reset_index()


def phase_medians(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Take medians of ``COSTS`` over runs, one row per shape, variant and phase; phases of prompts overlap."""
    rows = [
        {"shape": record["shape"], "variant": record["variant"], "phase": phase, **costs}
        for record in records
        for phase, costs in record["phases"].items()
    ]
    return pd.DataFrame(rows).groupby(["shape", "variant", "phase"], sort=False).median().reset_index()


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Format totals and ratios, and the costs of each phase, as Markdown."""
    ratios = ("time_ratio", "token_ratio", "over_token_bound", "over_two_batch", "downstream_cached")
    head = ["batch", "method", "seconds", "time / GRPO", "tokens / GRPO", "time ratio / token ratio"]
    head += ["time / two-batch", "downstream prefill cached"]
    lines = [
        [line["shape"], line["variant"], f"{line['seconds']:.1f}"]
        + ["" if pd.isna(line[name]) else f"{line[name]:.3f}" for name in ratios]
        for line in summarise(records).to_dict("records")
    ]
    phases = [
        [line["shape"], line["variant"], line["phase"], f"{line['seconds']:.1f}"]
        + [f"{line[name]:,.0f}" for name in COSTS[1:]]
        for line in phase_medians(records).to_dict("records")
    ]
    return f"{table(head, lines)}\n\n{table(['batch', 'method', 'phase', *COSTS], phases)}"


def report(records: Sequence[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """Print both tables and store everything."""
    print(tables(records))
    store(records, settings, out)


def store(records: Sequence[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """Write the runs and their medians."""
    medians = {"medians": summarise(records), "phases": phase_medians(records)}
    content = {
        name: frame.astype(object).where(frame.notna(), None).to_dict("records") for name, frame in medians.items()
    }
    write_json(out, {"settings": settings, **content, "runs": list(records)})
