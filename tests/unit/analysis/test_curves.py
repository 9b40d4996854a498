"""Training curves from metrics files: means, bands, phases, and what is missing."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recipe.skpo.analysis import curves
from recipe.skpo.analysis.curves import curves_of, missing, phases_of, read_run, summary
from recipe.skpo.analysis.drawing import draw_curves
from recipe.skpo.errors import ConfigError
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


# ---------------------------------------------------------------- reading


def test_lines_of_one_step_are_joined_and_the_later_value_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [line(2, 0.5), line(1, 0.1), {"step": 2, "actor/entropy": 9.0}])
    first, second = read_run(path)
    assert (first["step"], second["step"]) == (1, 2)
    assert second["skpo/downstream/reward/mean"] == 0.5 and second["actor/entropy"] == 9.0


def test_torn_last_line_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [line(1, 0.1)])
    path.write_text(path.read_text() + '{"step": 2, "actor/en')
    assert len(read_run(path)) == 1


def test_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.jsonl: file not found"):
        read_run(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ConfigError, match=r"empty.jsonl: holds no line with a step"):
        read_run(tmp_path / "empty.jsonl")


# ---------------------------------------------------------------- numbers


def test_mean_and_band_are_over_the_runs_of_a_method() -> None:
    runs = {"skpo": [[line(1, 0.0), line(2, 1.0)], [line(1, 0.5)]], "grpo": [[line(1, -1.0)]]}
    table = curves_of(runs)
    reward = table[table["curve"] == "reward"].set_index(["method", "step"])
    row = reward.loc[("skpo", 1)]
    assert (row["mean"], row["min"], row["max"], row["std"], row["runs"]) == (0.25, 0.0, 0.5, 0.25, 2)
    assert reward.loc[("skpo", 2), "runs"] == 1 and reward.loc[("skpo", 2), "std"] == 0.0
    assert list(dict.fromkeys(table["method"])) == ["skpo", "grpo"]


def test_tokens_are_added_over_phases_and_other_curves_read_their_name() -> None:
    table = curves_of({"m": [[line(1, 0.0, skpo__other__tokens_generated=1.0)]]}).set_index("curve")
    assert table.loc["tokens", "mean"] == 501.0
    assert table.loc["entropy", "mean"] == 1.5 and table.loc["zero_share", "mean"] == 0.25


def test_accuracy_is_one_curve_per_data_source() -> None:
    validated = {"step": 0, f"val-core/{SOURCE}/acc/mean@1": 0.25, "val-core/math/acc/mean@1": 0.5}
    table = curves_of({"m": [[validated]]})
    found = table[table["curve"] == "accuracy"].set_index("variant")["mean"]
    assert found.to_dict() == {SOURCE: 0.25, "math": 0.5}


def test_seconds_of_a_phase_are_means_over_training_steps() -> None:
    lines = [{"step": 0, "timing_s/testing": 99.0}, line(1, 0, timing_s__save=6.0), line(2, 0)]
    lines[2]["timing_s/gen"] = 8.0
    table = phases_of({"m": [lines], "n": [[line(1, 0)], [line(1, 0, timing_s__gen=6.0)]]}).set_index(
        ["method", "phase"]
    )
    assert table.loc[("m", "gen"), "seconds"] == 6.0
    # Saving took 6 seconds in one of two steps; validation before the first step is no step.
    assert table.loc[("m", "save"), "seconds"] == 3.0
    assert ("m", "testing") not in table.index
    assert table.loc[("n", "gen")].to_dict() == {"seconds": 5.0, "min": 4.0, "max": 6.0}


def test_phase_that_one_run_lacks_counts_as_no_time_there() -> None:
    table = phases_of({"m": [[line(1, 0, timing_s__save=4.0)], [line(1, 0)]]}).set_index("phase")
    assert table.loc["save", "seconds"] == 2.0 and table.loc["save", "min"] == 0.0


def test_nested_timings_are_no_phases() -> None:
    table = phases_of({"m": [[line(1, 0, timing_s__gen__inner=1.0)]]})
    assert set(table["phase"]) == {"gen", "step"}


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
    runs = {"m": [[line(1, 0.0), {"step": 1, f"val-core/{SOURCE}/acc/mean@1": 0.5}]]}
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
    assert widths == {"gen": 4.0, "other": 6.0}


def test_validation_is_not_drawn_as_part_of_a_step() -> None:
    runs = {"m": [[line(1, 0.0, timing_s__testing=50.0)]]}
    figure = draw_curves(curves_of(runs), phases_of(runs))
    axis = next(axis for axis in figure.axes if axis.get_title() == "Step time by phase")
    assert {container.get_label() for container in axis.containers} == {"gen", "other"}


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
        (["--run", "a=x.jsonl"], "error: --run: x.jsonl: file not found"),
        (["--run", "a=x.jsonl", "--run", "a=y.jsonl"], "error: --run: a name is there twice"),
    ],
)
def test_bad_runs_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert curves.main([*flags, "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_without_any_known_metric_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 1.0}])
    assert curves.main(["--run", f"a={path}", "--out", str(tmp_path / "out")]) == 1
    assert "none of the metrics" in capsys.readouterr().err


def test_argument_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        curves.main(["--run", "file.jsonl", "--out", str(tmp_path)])
