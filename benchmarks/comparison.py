"""SKPO, GRPO and two-batch SKPO side by side: medians over runs, and their ratios run by run.

A record is one rollout of one batch: ``variant``, ``shape`` (what differs between batches), ``run`` (seed or
repetition) and what ``workers.RolloutCost`` says.  Ratios compare records of the same shape and run, that is, the same
prompts, budget and server.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import table, write_json

GRPO, TWO_BATCH = "GRPO", "two-batch SKPO"
COSTS = ("seconds", "requests", "generated", "prefilled", "cached")


@dataclass(frozen=True)
class Line:
    """One variant of one shape, medians over its runs.

    Attributes:
        seconds: until the last row is stored.
        tokens: ``generated``, ``prefilled`` and ``cached``, a part of ``prefilled``, over all phases.
        phases: phase to ``COSTS``; phases of different prompts overlap.
        time_ratio, token_ratio: seconds and generated tokens over GRPO's.
        over_token_bound: time_ratio / token_ratio; 1 is what a server that is always equally busy reaches.
        over_two_batch: seconds over those of two-batch SKPO.
        downstream_cached: share of the downstream prefill that came from the prefix cache; None for GRPO.
    """

    variant: str
    shape: str
    seconds: float
    tokens: dict[str, float]
    phases: dict[str, dict[str, float]]
    time_ratio: float
    token_ratio: float
    over_token_bound: float
    over_two_batch: float
    downstream_cached: float | None


def summarise(records: Sequence[dict[str, Any]]) -> list[Line]:
    """A line per shape and variant, in the order of the records."""
    runs = {(record["variant"], record["shape"], record["run"]): record for record in records}

    def total(record: dict[str, Any], name: str) -> float:
        return sum(phase[name] for phase in record["phases"].values())

    lines = []
    for shape, name in dict.fromkeys((record["shape"], record["variant"]) for record in records):
        own = [record for record in records if (record["variant"], record["shape"]) == (name, shape)]
        bases, naives = ([runs[other, shape, record["run"]] for record in own] for other in (GRPO, TWO_BATCH))
        times = [record["seconds"] / base["seconds"] for record, base in zip(own, bases, strict=True)]
        written = [[total(record, "generated") for record in group] for group in (own, bases)]
        tokens = [mine / theirs for mine, theirs in zip(*written, strict=True)]
        down = [record["phases"]["downstream"] for record in own if "downstream" in record["phases"]]
        lines.append(
            Line(
                variant=name,
                shape=shape,
                seconds=statistics.median(record["seconds"] for record in own),
                tokens={
                    cost: statistics.median(total(record, cost) for record in own)
                    for cost in ("generated", "prefilled", "cached")
                },
                phases={
                    phase: {cost: statistics.median(record["phases"][phase][cost] for record in own) for cost in COSTS}
                    for phase in own[0]["phases"]
                },
                time_ratio=statistics.median(times),
                token_ratio=statistics.median(tokens),
                over_token_bound=statistics.median(time / token for time, token in zip(times, tokens, strict=True)),
                over_two_batch=statistics.median(
                    record["seconds"] / naive["seconds"] for record, naive in zip(own, naives, strict=True)
                ),
                downstream_cached=statistics.median(d["cached"] / d["prefilled"] for d in down) if down else None,
            )
        )
    return lines


def ratios_table(lines: Sequence[Line]) -> str:
    """Totals and ratios as Markdown."""
    head = ["batch", "method", "seconds", "time / GRPO", "tokens / GRPO", "time ratio / token ratio"]
    head += ["time / two-batch", "downstream prefill cached"]
    rows = [
        [
            line.shape,
            line.variant,
            f"{line.seconds:.1f}",
            f"{line.time_ratio:.3f}",
            f"{line.token_ratio:.3f}",
            f"{line.over_token_bound:.3f}",
            f"{line.over_two_batch:.3f}",
            "" if line.downstream_cached is None else f"{line.downstream_cached:.3f}",
        ]
        for line in lines
    ]
    return table(head, rows)


def phases_table(lines: Sequence[Line]) -> str:
    """Costs of each phase as Markdown."""
    rows = [
        [line.shape, line.variant, phase, f"{costs['seconds']:.1f}", *(f"{costs[name]:,.0f}" for name in COSTS[1:])]
        for line in lines
        for phase, costs in line.phases.items()
    ]
    return table(["batch", "method", "phase", *COSTS], rows)


def report(records: Sequence[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """Print both tables and store everything."""
    lines = summarise(records)
    print(f"{ratios_table(lines)}\n\n{phases_table(lines)}")
    store(records, settings, out)


def store(records: Sequence[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """Write the runs and their medians."""
    lines = [asdict(line) for line in summarise(records)]
    write_json(out, {"settings": settings, "medians": lines, "runs": list(records)})
