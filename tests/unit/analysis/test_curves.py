"""Training curves from metrics files: means, bands, phases, and what is missing."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recipe.skpo.analysis import curves
from recipe.skpo.analysis.curves import curves_of, missing, phases_of, summary
from recipe.skpo.analysis.drawing import draw_curves
from recipe.skpo.output.metrics import MetricsFile

SOURCE = "skpo/arithmetic"


def line(step: int, reward: float, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": step,
        "skpo/downstream/reward/mean": reward,
        "skpo/downstream/all_equal_share": 0.25,
        "actor/entropy": 1.5,
        "skpo/upstream/tokens_generated": 100.0,
        "skpo/downstream/tokens_generated": 400.0,
        "timing_s/step": 10.0,
        "timing_s/gen": 4.0,
    }
    return values | {name.replace("__", "/"): value for name, value in changes.items()}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """As a run writes them."""
    file = MetricsFile(path, resumed_at=0)
    for item in lines:
        file.log({name: value for name, value in item.items() if name != "step"}, item["step"])
    return path


# ---------------------------------------------------------------- numbers


def test_mean_and_band_are_over_the_runs_of_a_method() -> None:
    runs = {"skpo": [[line(1, 0.0), line(2, 1.0)], [line(1, 0.5)]], "grpo": [[line(1, -1.0)]]}
    table = curves_of(runs)
    reward = table[table["curve"] == "reward"].set_index(["method", "step"])
    row = reward.loc[("skpo", 1)]
    assert (row["mean"], row["min"], row["max"], row["std"], row["runs"]) == (0.25, 0.0, 0.5, 0.25, 2)
    assert reward.loc[("skpo", 2), "runs"] == 1 and reward.loc[("skpo", 2), "std"] == 0.0
    assert list(dict.fromkeys(table["method"])) == ["skpo", "grpo"]


def test_every_curve_reads_its_metric_and_accuracy_is_one_per_data_source() -> None:
    validated = {f"val-core/{SOURCE}/acc/mean@1": 0.25, "val-core/math/acc/mean@1": 0.5}
    lines = [line(1, 0.125, skpo__other__tokens_generated=1.0) | validated]
    found = curves_of({"m": [lines]}).set_index(["curve", "variant"])["mean"].to_dict()
    assert found == {
        ("reward", ""): 0.125,
        ("accuracy", SOURCE): 0.25,
        ("accuracy", "math"): 0.5,
        ("entropy", ""): 1.5,
        ("zero_share", ""): 0.25,
        ("tokens", ""): 501.0,
    }


def test_seconds_of_a_phase_are_means_over_training_steps_and_runs() -> None:
    lines = [{"step": 0, "timing_s/testing": 99.0}, line(1, 0, timing_s__save=6.0), line(2, 0, timing_s__gen=8.0)]
    lines[2]["timing_s/gen/inner"] = 1.0
    runs = {"m": [lines], "n": [[line(1, 0, timing_s__save=4.0)], [line(1, 0, timing_s__gen=6.0)]]}
    columns = ["seconds", "min", "max"]
    found = phases_of(runs).set_index(["method", "phase"])[columns].apply(tuple, axis=1).to_dict()
    # Validation before the first step is not a step; what a step or a run lacks took no time there.
    assert found == {
        ("m", "gen"): (6.0, 6.0, 6.0),
        ("m", "save"): (3.0, 3.0, 3.0),
        ("m", "step"): (10.0, 10.0, 10.0),
        ("n", "gen"): (5.0, 4.0, 6.0),
        ("n", "save"): (2.0, 0.0, 4.0),
        ("n", "step"): (10.0, 10.0, 10.0),
    }


def test_what_is_missing_is_said_per_method() -> None:
    runs = {"skpo": [[line(1, 0.0)]], "grpo": [[{"step": 1, "actor/entropy": 1.0}]]}
    table, phases = curves_of(runs), phases_of(runs)
    said = missing(list(runs), table, phases)
    assert said == [
        "skpo has no accuracy (val-core/*/acc/mean@*)",
        "grpo has no reward (skpo/downstream/reward/mean), accuracy (val-core/*/acc/mean@*), "
        "zero_share (skpo/downstream/all_equal_share), tokens (skpo/*/tokens_generated), phases (timing_s/step)",
    ]


def test_summary_has_first_and_last_values() -> None:
    runs = {"m": [[line(1, -0.5), line(7, 0.5)]]}
    numbers = summary(curves_of(runs), phases_of(runs))["m"]
    assert numbers["reward"] == {"first_step": 1, "first": -0.5, "last_step": 7, "last": 0.5}
    assert numbers["seconds_per_step"] == 10.0


# ---------------------------------------------------------------- picture and command


def test_picture_has_a_panel_for_what_was_logged_only() -> None:
    runs = {"m": [[{"step": 1, "actor/entropy": 1.0}, {"step": 2, "actor/entropy": 2.0}]]}
    figure = draw_curves(curves_of(runs), phases_of(runs))
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == ["Entropy of the policy"]
    runs = {"m": [[line(1, 0.0, timing_s__testing=50.0), {"step": 1, f"val-core/{SOURCE}/acc/mean@1": 0.5}]]}
    figure = draw_curves(curves_of(runs), phases_of(runs))
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == [
        "Downstream reward",
        f"Validation accuracy, {SOURCE}",
        "Entropy of the policy",
        "Groups without advantage",
        "Tokens generated",
        "Step time by phase",
    ]
    bars = figure.axes[-1].containers
    widths = {container.get_label(): container[0].get_width() for container in bars}
    assert widths == {"gen": 4.0, "other": 6.0}, "validation is not a part of a step"


def test_command_writes_everything_and_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2):
        write(tmp_path / f"skpo{seed}/metrics.jsonl", [line(1, 0.1 * seed), line(2, 0.2 * seed)])
    write(tmp_path / "grpo.jsonl", [{"step": 1, "actor/entropy": 1.0}])
    flags = ["--run", f"skpo={tmp_path}/skpo1,{tmp_path}/skpo2", "--run", f"$g$={tmp_path}/grpo.jsonl"]
    assert curves.main([*flags, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("left out:") == 1 and "$g$ has no reward" in out
    assert "| reward | 0.15 to 0.3 (step 1 to 2) |  |" in out and "| seconds per step | 10 |  |" in out
    names = {"curves.png", "curves.svg", "curves.json", "curves.csv", "phases.csv", "config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    table = pd.read_csv(tmp_path / "out/curves.csv")
    row = table[(table["method"] == "skpo") & (table["curve"] == "reward") & (table["step"] == 2)].iloc[0]
    assert (row["min"], row["max"], row["runs"]) == (0.2, 0.4, 2)
    used = json.loads((tmp_path / "out/config.json").read_text())["runs"]
    assert used["skpo"] == [f"{tmp_path}/skpo{seed}/metrics.jsonl" for seed in (1, 2)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "a=x.jsonl"], "x.jsonl: file not found"),
        (["--run", "a=empty.jsonl"], "empty.jsonl: holds no line with a step"),
        (["--run", "a=x.jsonl", "--run", "a=y.jsonl"], "a name is there twice"),
        (["--run", "a=loss.jsonl"], "the runs logged none of the metrics"),
    ],
)
def test_bad_runs_are_one_line(refusal: Any, flags: list[str], message: str) -> None:
    Path("empty.jsonl").write_text('{"a": 1}\n[2]\n', encoding="utf-8")
    write(Path("loss.jsonl"), [{"step": 1, "loss": 1.0}])
    assert refusal(curves.main, flags).startswith(f"--run: {message}")


def test_argument_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        curves.main(["--run", "file.jsonl", "--out", str(tmp_path)])
