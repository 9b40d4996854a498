"""Comparing runs: groups, values at equal tokens, intervals, curves, phases, and the command."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from data_prep.schema import Row, write_parquet
from recipe.skpo.analysis import compare as command
from recipe.skpo.analysis.compare import (
    curves_of,
    held_out_metrics,
    phases_of,
    read_groups,
    student_quantile,
    table_of,
    values_of,
)
from recipe.skpo.analysis.drawing import draw_curves
from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.output.summary import wilson_interval
from tests.conftest import REPOSITORY

SOURCE = "skpo/arithmetic"
ACCURACY = f"held-out {SOURCE}: accuracy"
TOKENS = "skpo/tokens/generated"


def line(step: int, accuracy: float | None = None, tokens: float = 100.0, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"step": step}
    if step:
        values |= {TOKENS: tokens, "timing_s/step": 10.0, "timing_s/gen": 4.0}
    if accuracy is not None:
        values[f"val-core/{SOURCE}/acc/mean@1"] = accuracy
    return values | {name.replace("__", "/"): value for name, value in changes.items()}


def course(end: float, tokens: float = 100.0, steps: int = 2) -> list[dict[str, Any]]:
    """Validated at the start and at the end, which has ``end`` as its accuracy."""
    return [line(0, 0.0), *(line(step, tokens=tokens) for step in range(1, steps)), line(steps, end, tokens)]


def config(method: str, seed: int = 1, **changes: Any) -> dict[str, Any]:
    model = {"path": changes.pop("model", "models/small")}
    return {
        "output_dir": f"/runs/{method}-{seed}",
        "method": {"name": method},
        "skpo": {"seed": seed, "group_size": changes.pop("group_size", 8)},
        "actor_rollout_ref": {"model": model},
        "data": {"seed": changes.pop("data_seed", 1), "val_files": changes.pop("val_files", "val.parquet")},
        "trainer": changes,
    }


def write(folder: Path, lines: list[dict[str, Any]], settings: dict[str, Any] | None = None) -> Path:
    """As a run writes them."""
    folder.mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl", resumed_at=0)
    for item in lines:
        file.log({name: value for name, value in item.items() if name != "step"}, item["step"])
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def rows(table: pd.DataFrame) -> dict[str, Any]:
    return {row.group: row for row in table.itertuples(index=False)}


# ---------------------------------------------------------------- groups


def test_runs_that_differ_in_their_seed_alone_are_a_group(tmp_path: Path) -> None:
    given = {
        "a": config("grpo", 1),
        "b": config("grpo", 2, save_freq=7, total_training_steps=9),
        "c": config("grpo", 1, group_size=8.0, data_seed=2),
        "d": config("skpo", 1, group_size=4),
        "e": config("skpo", 1),
        "f": config("grpo", 1, val_files="other.parquet"),
    }
    folders = [write(tmp_path / name, course(0.5), settings) for name, settings in given.items()]
    groups = read_groups(folders[:5], {"mine": folders[5:]})
    assert {name: [run.name for run in members] for name, members in groups.items()} == {
        "grpo": ["a", "b", "c"],
        "skpo group_size=4": ["d"],
        "skpo group_size=8": ["e"],
        "mine": ["f"],
    }
    # Another model is another group, and what is not recorded is not guessed.
    folders = [folders[0], write(tmp_path / "g", course(0.5), config("grpo", model="/models/large/"))]
    bare = write(tmp_path / "bare", course(0.5))
    assert list(read_groups([*folders, bare])) == ["grpo small", "grpo large", "bare"]
    others = [write(tmp_path / "h", course(0.5), config("grpo", val_files="other.parquet"))]
    assert len(read_groups([tmp_path / "a", *others])) == 2, "validated on other problems"


# ---------------------------------------------------------------- numbers


def test_values_are_compared_where_the_shortest_run_ends(tmp_path: Path) -> None:
    write(tmp_path / "a", [*course(0.8, tokens=100), line(3, 0.2)], config("grpo"))
    write(tmp_path / "b", course(0.5, tokens=75), config("skpo"))
    table = rows(command.compare([tmp_path / "a", tmp_path / "b"]))
    # Run a has 0.0 at its start and 0.8 after 200 tokens: three quarters of it after 150.
    grpo, skpo = table["grpo"], table["skpo"]
    assert (grpo.at, grpo.first, grpo.mean, grpo.last) == (150.0, 0.0, pytest.approx(0.6), 0.2)
    assert (skpo.at, skpo.mean, skpo.last, skpo.against) == (150.0, 0.5, 0.5, "grpo")
    assert skpo.difference == pytest.approx(-0.1) and math.isnan(skpo.difference_low), "one seed has no interval"
    by_step = rows(command.compare([tmp_path / "a", tmp_path / "b"], x="step", against="skpo"))
    assert (by_step["grpo"].at, by_step["grpo"].mean, by_step["grpo"].against) == (2.0, 0.8, "skpo")
    assert rows(command.compare([tmp_path / "a"], x="seconds", metrics=[TOKENS]))["grpo"].at == 30.0


def test_intervals_are_over_seeds_and_of_one_run_over_problems(tmp_path: Path) -> None:
    parquet = tmp_path / "val.parquet"
    write_parquet(
        [Row(SOURCE, [{"role": "user", "content": str(n)}], "1", "x", "val", n, str(n)) for n in range(50)], parquet
    )
    ends = {"grpo": {1: 0.40, 2: 0.50, 3: 0.60}, "skpo": {1: 0.50, 2: 0.62, 3: 0.68, 4: 0.99}, "rloo": {9: 0.5}}
    folders = [
        write(tmp_path / f"{method}-{seed}", course(end), config(method, seed, val_files=str(parquet)))
        for method, by_seed in ends.items()
        for seed, end in by_seed.items()
    ]
    table = rows(command.compare(folders))
    grpo, skpo, rloo = (table[name] for name in ends)
    # Student's t with two degrees of freedom: 4.302653; sd 0.1 over three seeds.
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (grpo.seeds, grpo.over, grpo.low, grpo.high) == (3, "seeds", *map(pytest.approx, (0.5 - half, 0.5 + half)))
    # Over the three seeds that both have: 0.10, 0.12, 0.08.
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert (skpo.pairs, skpo.difference) == (3, pytest.approx(0.1))
    assert (skpo.difference_low, skpo.difference_high) == (pytest.approx(0.1 - half), pytest.approx(0.1 + half))
    assert (rloo.seeds, rloo.over, (rloo.low, rloo.high)) == (1, "problems", wilson_interval(0.5, 50))
    assert rloo.pairs == 0 and math.isnan(rloo.difference_low)
    # Seeds that no other group has: Welch's interval, here of two pairs with 2 degrees of freedom and variance 0.005.
    apart = rows(table_of(values_of(read_groups([], {"a": folders[:2], "b": folders[5:7]}), [ACCURACY])))["b"]
    spread = math.sqrt(0.1**2 / 2 / 2 + 0.31**2 / 2 / 2)
    freedom = spread**4 / (0.0025**2 + 0.024025**2)
    half = student_quantile(freedom) * spread
    assert (apart.pairs, apart.difference) == (0, pytest.approx(0.385))
    assert apart.difference_high - apart.difference == pytest.approx(half)


def test_each_group_has_the_seed_that_its_own_runs_vary(tmp_path: Path) -> None:
    for seed in (1, 2):
        write(tmp_path / f"grpo{seed}", course(0.5 + seed / 10), config("grpo", 1, data_seed=seed))
        write(tmp_path / f"skpo{seed}", course(0.4 + seed / 10), config("skpo", seed))
    table = rows(command.compare(sorted(tmp_path.iterdir())))
    assert (table["grpo"].seeds, table["skpo"].seeds, table["skpo"].pairs) == (2, 2, 2)


def test_runs_of_one_seed_count_once(tmp_path: Path) -> None:
    seeds = {"a": 1, "b": 1, "c": 2}
    folders = [
        write(tmp_path / name, course(0.4 + 0.2 * number), config("grpo", seed))
        for number, (name, seed) in enumerate(seeds.items())
    ]
    grpo = rows(command.compare(folders))["grpo"]
    assert (grpo.seeds, grpo.mean) == (2, pytest.approx((0.5 + 0.8) / 2))
    # Where no seed of the method differs, that of the data is the run's.
    folders = [write(tmp_path / f"data{seed}", course(0.5), config("grpo", data_seed=seed)) for seed in (1, 2, 3)]
    assert rows(command.compare(folders))["grpo"].seeds == 3


def test_a_run_that_had_not_begun_to_log_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a", course(0.5, tokens=10), config("grpo"))
    write(tmp_path / "b", [line(1, tokens=100), line(2, 0.9)], config("skpo"))
    assert list(rows(command.compare([tmp_path / "a", tmp_path / "b"]))) == ["grpo"]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (29, 2.045230), (1000, 1.962339)]
)
def test_quantiles_of_students_distribution(freedom: float, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=1e-6)


def test_a_reward_without_an_accuracy_is_compared_by_its_mean(tmp_path: Path) -> None:
    lines = [{"step": step, "val-core/mine/reward/mean@1": 0.1 * step} for step in (0, 1)]
    groups = read_groups([write(tmp_path / "a", lines, config("grpo"))])
    assert held_out_metrics(groups) == ["held-out mine: mean reward"]
    assert values_of(groups, held_out_metrics(groups), "step")["value"].tolist() == [0.1]


# ---------------------------------------------------------------- curves and picture


def test_a_curve_is_the_mean_of_the_runs_that_reach_a_place(tmp_path: Path) -> None:
    name = "actor/entropy"
    values = {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0]}
    folders = [
        write(
            tmp_path / run,
            [line(step, actor__entropy=value) for step, value in enumerate(found, 1)],
            config("grpo", seed),
        )
        for seed, (run, found) in enumerate(values.items())
    ]
    table = curves_of(read_groups(folders), [name, "unknown"], "step")
    assert table[["metric", "group", "x", "mean", "runs"]].values.tolist() == [
        [name, "grpo", 1, 1.5, 2],
        [name, "grpo", 2, 3.5, 2],
        [name, "grpo", 3, 5.0, 1],
    ]
    half = 12.706205 * math.sqrt(0.5) / math.sqrt(2)
    assert table["high"].tolist()[:2] == [pytest.approx(1.5 + half), pytest.approx(3.5 + half)]
    assert math.isnan(table["low"].iloc[2])


def test_seconds_of_a_phase_are_means_over_training_steps_and_runs(tmp_path: Path) -> None:
    lines = [{"step": 0, "timing_s/testing": 99.0}, line(1, timing_s__save=6.0), line(2, timing_s__gen=8.0)]
    lines[2]["timing_s/gen/inner"] = 1.0
    runs = {"m": [lines], "n": [[line(1, timing_s__save=4.0)], [line(1, timing_s__gen=6.0)]]}
    named = {
        group: [write(tmp_path / f"{group}{number}", lines) for number, lines in enumerate(members)]
        for group, members in runs.items()
    }
    columns = ["seconds", "min", "max"]
    found = phases_of(read_groups([], named)).set_index(["group", "phase"])[columns].apply(tuple, axis=1).to_dict()
    # Validation before the first step is not a step; what a step or a run lacks took no time there.
    assert found == {
        ("m", "gen"): (6.0, 6.0, 6.0),
        ("m", "save"): (3.0, 3.0, 3.0),
        ("m", "step"): (10.0, 10.0, 10.0),
        ("n", "gen"): (5.0, 4.0, 6.0),
        ("n", "save"): (2.0, 0.0, 4.0),
        ("n", "step"): (10.0, 10.0, 10.0),
    }


def test_picture_has_a_panel_for_what_was_logged_only(tmp_path: Path) -> None:
    lines = [line(0, 0.25), line(1, 0.5, timing_s__testing=50.0, actor__entropy=1.0)]
    groups = read_groups([], {"$m$": [write(tmp_path / "a", lines)]})
    figure = draw_curves(curves_of(groups, [ACCURACY, *command.CURVES]), phases_of(groups), "generated tokens")
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == [
        ACCURACY,
        "Entropy of the policy",
        "Tokens generated",
        "Step time by phase",
    ]
    assert figure.axes[0].get_xlabel() == "generated tokens"
    widths = {container.get_label(): container[0].get_width() for container in figure.axes[3].containers}
    assert widths == {"gen": 4.0, "other": 6.0}, "validation is not a part of a step"


# ---------------------------------------------------------------- command


def test_command_prints_the_comparison_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = {"grpo": (0.4, 0.5), "skpo": (0.5, 0.7)}
    folders = [
        str(write(tmp_path / f"{method}-{seed}", course(end, tokens=100 * seed), config(method, seed)))
        for method, found in ends.items()
        for seed, end in enumerate(found, 1)
    ]
    lone = write(tmp_path / "a=b", [line(1, actor__entropy=1.0)], config("rloo"))
    assert command.main([*folders, str(lone), "--against", "grpo"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"note: {ACCURACY} over generated tokens was not logged by a=b",
        f"note: {ACCURACY} is compared at 200 generated tokens, where grpo-1 ends",
    ]
    assert said[-2:] == [
        "| grpo | 2 | 0.000 | 0.325 | -0.628 to 1.278 | 0.450 |  |  |",
        "| skpo | 2 | 0.000 | 0.425 | -0.528 to 1.378 | 0.600 | +0.100 | +0.100 to +0.100 (2 pairs of seeds) |",
    ]
    out = tmp_path / "out"
    assert command.main([f"one={folders[0]}", f"two={folders[2]},{folders[3]}", "--x", "step", "--out", str(out)]) == 0
    assert "| one | 1 | 0.000 | 0.400 | one seed | 0.400 |  |  |" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("compare.png", "compare.svg", "compare.json", "config.json"),
        *("groups.csv", "runs.csv", "curves.csv", "phases.csv"),
    }
    table = rows(pd.read_csv(out / "groups.csv"))
    assert (table["two"].mean, table["two"].pairs, table["two"].at) == (pytest.approx(0.6), 0, 2)
    assert json.loads((out / "config.json").read_text())["named"]["two"] == folders[2:]


def test_the_documented_lines_of_python_compare_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    document = (REPOSITORY / "docs/analysis.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(from pathlib .*?)^```", document, re.DOTALL | re.MULTILINE)
    for method in ("grpo", "skpo"):
        write(tmp_path / f"outputs/smollm2_135m-arithmetic-{method}", course(0.5), config(method))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/analysis.md", "exec"), {})
    assert "skpo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["x"], "x/metrics.jsonl: missing or empty; name the folder of a run"),
        (["a", "a"], "{}/a: is named 2 times; name every run once"),
        (["n=a", "n=b"], "n: is the name of two groups; join its runs with commas"),
        (["n="], "n=: names no run; give NAME=RUN[,RUN...]"),
        (["a", "grpo=b"], "grpo: is the name of two groups; give NAME=RUN[,RUN...] with another name"),
        (["a", "--against", "z"], "--against z: the groups are grpo"),
        (["a"], "the runs logged no held-out numbers; name a metric of metrics.jsonl by --metric"),
        (["a", "--metric", "zz"], "--metric zz: no run logged it over generated tokens"),
    ],
)
def test_what_cannot_be_compared_is_one_line(refusal: Any, tmp_path: Path, flags: list[str], message: str) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [line(1)], config("grpo"))
    assert refusal(command.main, flags).startswith(message.format(tmp_path))
