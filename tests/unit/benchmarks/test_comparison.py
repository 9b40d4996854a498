"""Medians and ratios of records made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import phases_table, ratios_table, report, summarise


def phase(seconds: float, generated: int, prefilled: int = 100, cached: int = 0) -> dict[str, Any]:
    return {"seconds": seconds, "requests": 4, "generated": generated, "prefilled": prefilled, "cached": cached}


def records() -> list[dict[str, Any]]:
    """Three runs of each method; every run of SKPO takes 1.2 x GRPO of that run and 0.8 x two-batch, whatever it is."""
    made = []
    for run, seconds in enumerate((10.0, 20.0, 90.0)):
        down = phase(seconds, 900, 200, 150)
        up = phase(seconds / 4, 300)
        for variant, factor, phases in (
            ("GRPO", 1.0, {"responses": phase(seconds, 1000)}),
            ("SKPO, candidates=8", 1.2, {"upstream": up, "downstream": down}),
            ("two-batch SKPO", 1.5, {"upstream": up, "downstream": {**down, "cached": 0}}),
        ):
            made.append(
                {"variant": variant, "shape": "4 prompts", "run": run, "seconds": seconds * factor, "phases": phases}
            )
    return made


def test_ratios_are_taken_run_by_run() -> None:
    grpo, skpo, naive = summarise(records())
    assert (grpo.time_ratio, grpo.token_ratio, grpo.over_token_bound, grpo.downstream_cached) == (1, 1, 1, None)
    assert skpo.seconds == 24.0
    assert (skpo.time_ratio, skpo.token_ratio) == pytest.approx((1.2, 1.2))
    assert skpo.over_token_bound == pytest.approx(1.0)
    assert skpo.over_two_batch == pytest.approx(0.8)
    assert skpo.tokens == {"generated": 1200, "prefilled": 300, "cached": 150}
    assert (skpo.downstream_cached, naive.downstream_cached) == (0.75, 0.0)
    assert (naive.over_two_batch, naive.over_token_bound) == (1.0, pytest.approx(1.25))


def test_tables_have_a_row_per_method_and_per_phase() -> None:
    lines = summarise(records())
    assert [row.split(" | ")[1] for row in ratios_table(lines).splitlines()[2:]] == [line.variant for line in lines]
    assert "| 4 prompts | SKPO, candidates=8 | 24.0 | 1.200 | 1.200 | 1.000 | 0.800 | 0.750 |" in ratios_table(lines)
    phases = phases_table(lines).splitlines()
    assert len(phases) == 2 + 5
    assert "| 4 prompts | SKPO, candidates=8 | downstream | 20.0 | 4 | 900 | 200 | 150 |" in phases


def test_everything_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new/out.json"
    report(records(), {"group": 8}, path)
    content = json.loads(path.read_text())
    assert content["runs"] == records() and content["settings"] == {"group": 8}
    assert [line["variant"] for line in content["medians"]] == ["GRPO", "SKPO, candidates=8", "two-batch SKPO"]
    assert {"measured", "cores", "load_average"} <= set(content)
    assert ratios_table(summarise(records())) in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]
