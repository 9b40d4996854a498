"""Medians and ratios of records made by hand."""

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import report, summarise, tables


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


@pytest.mark.parametrize("order", ["run", "variant"])
def test_ratios_are_taken_run_by_run(order: str) -> None:
    """Whether all variants of a run come first, as on vLLM, or all runs of a variant, as in virtual time."""
    medians = summarise(sorted(records(), key=itemgetter(order))).set_index("variant")
    ratios = ["time_ratio", "token_ratio", "over_token_bound", "over_two_batch", "downstream_cached"]
    assert medians.index.tolist() == ["GRPO", "SKPO, candidates=8", "two-batch SKPO"]
    assert medians.loc["GRPO", ratios].tolist() == pytest.approx([1, 1, 1, 1 / 1.5, float("nan")], nan_ok=True)
    assert medians.loc["SKPO, candidates=8", ratios].tolist() == pytest.approx([1.2, 1.2, 1, 0.8, 0.75])
    assert medians.loc["two-batch SKPO", ratios].tolist() == pytest.approx([1.5, 1.2, 1.25, 1, 0])
    skpo = medians.loc["SKPO, candidates=8", ["seconds", "generated", "prefilled", "cached"]]
    assert skpo.tolist() == [24, 1200, 300, 150]


def test_tables_have_a_row_per_method_and_per_phase() -> None:
    ratios, phases = tables(records()).split("\n\n")
    assert "| 4 prompts | SKPO, candidates=8 | 24.0 | 1.200 | 1.200 | 1.000 | 0.800 | 0.750 |" in ratios
    assert "| 4 prompts | GRPO | 20.0 | 1.000 | 1.000 | 1.000 | 0.667 |  |" in ratios
    assert "| 4 prompts | SKPO, candidates=8 | downstream | 20.0 | 4 | 900 | 200 | 150 |" in phases
    assert (len(ratios.splitlines()), len(phases.splitlines())) == (2 + 3, 2 + 5)


def test_everything_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new/out.json"
    report(records(), {"group": 8}, path)
    content = json.loads(path.read_text())
    assert content["runs"] == records() and content["settings"] == {"group": 8}
    assert [line["downstream_cached"] for line in content["medians"]] == [None, 0.75, 0.0]
    assert len(content["phases"]) == 5 and {"measured", "cores", "load_average"} <= set(content)
    assert tables(records()) in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]
