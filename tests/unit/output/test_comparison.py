"""What the page that compares several runs holds; what a browser makes of it is in test_page_browser.py."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.skpo.output.comparison import MOST_RUNS, comparison
from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.output.page import write_comparison
from recipe.skpo.output.page_data import LARGEST_PAGE, MOST_POINTS, ReportError
from tests.support.report_run import SOURCE, validation

ACCURACY = f"held-out {SOURCE}: accuracy"


def make(folder: Path, lines: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl", resumed_at=0)
    for line in lines:
        file.log({name: value for name, value in line.items() if name != "step"}, line["step"])
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def test_runs_lie_over_each_other_by_steps_tokens_and_seconds(tmp_path: Path) -> None:
    reward = "skpo/downstream/reward/mean"
    first = [
        {"step": 0, **validation(0.25, 0.5)},
        {"step": 1, reward: -0.5, "skpo/tokens/generated": 10.0, "timing_s/step": 5.0},
        {
            "step": 2,
            "skpo/tokens/generated": 30.0,
            "timing_s/step": 6.0,
            "timing_s/testing": 4.0,
            **validation(0.5, 1.0),
        },
    ]
    second = [{"step": 1, reward: 0.5, "timing_s/step": 2.0}]
    config = {"method": {"name": "skpo"}}
    old = {"algorithm": {"adv_estimator": "grpo"}}
    data = comparison([make(tmp_path / "a", first, config), make(tmp_path / "b", second, old)])
    a, b = data["runs"]
    assert (a["name"], a["method"], b["name"], b["method"]) == ("a", "skpo", "b", "grpo")
    assert a["axes"] == {"step": [0, 1, 2], "tokens": [0, 10, 40], "seconds": [0, 5, 15]}
    assert b["axes"] == {"step": [1], "tokens": None, "seconds": [2]}
    assert a["series"][reward] == [None, -0.5, None] and a["series"][ACCURACY] == [0.25, None, 0.5]
    assert (a["headline"]["tokens"], a["headline"]["minutes"], a["headline"]["steps"]) == (40, 0.25, 2)
    drawn = {group["name"]: group["title"] for group in data["groups"]}
    assert drawn[ACCURACY] == ACCURACY, "held-out numbers, though one run alone has them"
    assert drawn[reward] == "Reward and baseline: reward" and "skpo/tokens/generated" not in drawn
    assert data["notes"] == [] and data["equal"] == [], "one run has tokens, and nothing to be compared with"


def test_accuracies_are_shown_at_equal_tokens(tmp_path: Path) -> None:
    def lines(tokens: float, accuracy: float) -> list[dict[str, Any]]:
        return [
            {"step": 0, **validation(0.0, 1.0)},
            {"step": 1, "skpo/tokens/generated": tokens, **validation(accuracy, 1.0)},
        ]

    folders = [make(tmp_path / "a", lines(100, 0.5)), make(tmp_path / "b", lines(400, 0.8))]
    folders.append(make(tmp_path / "bare", [{"step": 1, **validation(0.5, 1.0)}]))
    (found,) = comparison(folders)["equal"]
    assert found == {"name": ACCURACY, "at": 100, "cells": [[0.5, None], [0.2, None], None]}


def test_settings_that_differ_are_listed_and_no_others(tmp_path: Path) -> None:
    def config(name: str, **actor: Any) -> dict[str, Any]:
        return {
            "output_dir": f"/runs/{name}",
            "actor": actor | {"mode": name, "WANDB_API_KEY": name},
            "critic": {"mode": name, "same": 1},
            "trainer": {"experiment_name": name, "default_local_dir": f"/runs/{name}/checkpoints"},
            "method": {"name": name},
        }

    lines = [{"step": 1, "x": 1.0}]
    folders = [
        make(tmp_path / "skpo", lines, config("skpo", timeout=300)),
        make(tmp_path / "grpo", lines, config("grpo", timeout=300.0, only="here")),
    ]
    folders.append(make(tmp_path / "bare", lines))
    data = comparison(folders)
    assert data["notes"] == ["Config: bare holds no config.yaml."]
    assert data["differences"] == [
        {"names": ["method.name"], "values": ['"skpo"', '"grpo"', None]},
        {"names": ["actor.mode", "critic.mode"], "values": ['"skpo"', '"grpo"', None]},
        {"names": ["actor.only"], "values": [None, '"here"', None]},
    ]


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    lines = [{"step": 1, "x": 1.0}]
    folders = [make(tmp_path / top / "run", lines) for top in ("a", "b")]
    assert [run["name"] for run in comparison(folders)["runs"]] == ["a/run", "b/run"]
    with pytest.raises(ReportError, match=r"a/run: is named 2 times; name every run once"):
        comparison([folders[0], folders[1], folders[0] / "."])
    with pytest.raises(ReportError, match=r"c/metrics\.jsonl: missing or empty; name the folder of a run"):
        comparison([folders[0], tmp_path / "c"])
    with pytest.raises(ReportError, match=f"{MOST_RUNS + 1} runs: a page compares at most {MOST_RUNS}; name fewer"):
        comparison([tmp_path / str(number) for number in range(MOST_RUNS + 1)])


def test_a_long_run_keeps_its_validations_and_exact_totals(tmp_path: Path) -> None:
    lines = [
        {"step": step, "skpo/tokens/generated": 3.0} | (validation(0.5, 1.0) if step % 700 == 0 else {})
        for step in range(1, 3001)
    ]
    data = comparison([make(tmp_path / "long", lines), make(tmp_path / "short", lines[:5])])
    long, short = data["runs"]
    steps = long["axes"]["step"]
    assert MOST_POINTS <= len(steps) <= MOST_POINTS + 4 and (steps[0], steps[-1]) == (1, 3000)
    assert {700, 1400, 2100, 2800} < set(steps)
    assert long["axes"]["tokens"] == [3 * step for step in steps] and short["axes"]["step"] == [1, 2, 3, 4, 5]
    assert f"Curves of long: {len(steps)} of 3000 logged steps, evenly spaced, and validations." in data["notes"]


def test_a_page_of_endless_runs_stays_below_its_bound(tmp_path: Path) -> None:
    folders = []
    for run in range(MOST_RUNS):
        accuracies = {f"val-core/{'<é' * 50}{run}-{source}/acc/mean@1": 0.5 for source in range(300)}
        lines = [
            {"step": step, "timing_s/step": 1 / 3} | {f"{'é<' * 100}{name}": step / 7 for name in range(300)}
            for step in range(20)
        ]
        config = {f"{'<' * 250}{name}": f"{run}{'<' * 1000}" for name in range(150)}
        folders.append(make(tmp_path / f"{'<' * 200}{run}", [*lines, {"step": 20} | accuracies], config))
    target = write_comparison(folders, tmp_path / "comparison.html")
    assert 2_000_000 < target.stat().st_size < LARGEST_PAGE
