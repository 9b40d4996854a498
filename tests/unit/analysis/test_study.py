"""A study's plan, runs and results, with a script in the place of the training command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.skpo.analysis import study, study_results
from recipe.skpo.checks.config import check_config, check_method_settings
from recipe.skpo.errors import ConfigError
from recipe.skpo.main import scale_batch_for_spo
from recipe.skpo.settings import SkpoSettings

ROOT = Path(__file__).parents[3]

TRAINING = '''
"""As the training command as far as a study can see: what it logs depends on method, rate and seed alone."""
import json, os, pathlib, signal, sys, time
given = dict(text.split("=", 1) for text in sys.argv[1:])
folder = pathlib.Path(given["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "launches").open("a") as file:
    file.write(os.environ["SKPO_NUM_THREADS"] + "\\n")
method, rate = given["method"], float(given["actor_rollout_ref.actor.optim.lr"])
seed, tokens = int(given["skpo.seed"]), int(given["budget.tokens"])
if given.get("skpo.skip") and len((folder / "launches").read_text().split()) == 1:
    print("a line of a library")
    sys.exit(f"error: {folder}: the disk is full")
held = pathlib.Path(given.get("hold", "none")).is_file() and method == "spo"
gain = (0.2 if method == "grpo" else 0.1) * (1 - abs(rate - 2e-4) * 2000) + 0.01 * seed
with (folder / "metrics.jsonl").open("w") as file:
    # The last step is not validated.
    for step in range(4 if held else 12):
        line = {"step": step}
        if step:
            line |= {"skpo/tokens/generated": tokens / 10, "actor/entropy": 1.0, "timing_s/step": 2.0}
            line |= {"skpo/downstream/all_equal_share": 0.5, "skpo/downstream/length/mean": 30 + step}
        if step % 5 == 0:
            line["val-core/a/task/acc/mean@4"] = 0.4 + gain * step / 10
        file.write(json.dumps(line) + "\\n")
time.sleep(60 if held else 0)
'''


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    monkeypatch.setattr(study, "COMMAND", (sys.executable, "-I", str(script)))
    monkeypatch.setattr(study, "_POLL_S", 0.01)
    monkeypatch.delenv("SKPO_NUM_THREADS", raising=False)


def run(out: Path, *more: str) -> int:
    sizes = ["--methods", "grpo,spo", "--seeds", "1,2,3,1", "--rate-seeds", "101", "--rates", "1e-4,2e-4"]
    return study.main([*sizes, "--tokens", "1000", "--parallel", "4", "--out", str(out), *more])


def launches(out: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().split()) for path in (out / "runs").glob("*/launches")}


def test_a_study_chooses_rates_compares_and_skips_what_is_finished(
    tmp_path: Path, training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out) == 0
    said = capsys.readouterr().out
    assert "learning rates: grpo 0.0002, spo 0.0002" in said
    assert re.search(r"\(\d done, \d left, about 0\.0 h, until \d\d:\d\d\)", said)
    chosen = {f"{method}-lr{rate}-seed101" for method in ("grpo", "spo") for rate in ("0.0001", "0.0002")}
    compared = {f"{method}-lr0.0002-seed{seed}" for method in ("grpo", "spo") for seed in (1, 2, 3)}
    assert launches(out) == dict.fromkeys(chosen | compared, 1)
    # 0.2 and 0.1 at the end, and 0.01 per seed: mean 0.62 and 0.52, the paired difference without spread
    row = next(line for line in said.splitlines() if line.startswith("| SPO, lr 0.0002 | 3 | 0.400 | 0.520"))
    assert "| -0.100 | -0.100 to -0.100 (3 pairs of seeds) |" in row
    assert "Training at 1,000 generated tokens" in said
    assert "| GRPO, lr 0.0002 | 0.500 +- 0.000 | 38.000" in said, "of the steps before that validation"

    results = (out / "tiny.json").read_bytes()
    assert str(tmp_path).encode() not in results, "results are published"
    assert run(out) == 0
    assert launches(out) == dict.fromkeys(chosen | compared, 1), "nothing is trained again"
    assert (out / "tiny.json").read_bytes() == results

    assert run(out, "--only", "grpo-lr2.5e-05-seed1") == 0
    said = capsys.readouterr().out
    assert row in said and "GRPO, lr 2.5e-05" not in said, "what is not of the plan is in no mean"
    assert "| `grpo-lr2.5e-05-seed1` | finished | 11 | 1,100 |" in said


@pytest.mark.parametrize("flags", [["--tokens", "500"], ["skpo.group_size=4"]])
def test_the_runs_of_another_plan_are_refused(
    tmp_path: Path, training: None, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = (tmp_path, "--methods", "grpo", "--seeds", "1", "--rates", "2e-4")
    assert run(*given) == 0
    assert run(*given, *flags) == 1
    setting = flags[-1] if "=" in flags[-1] else "budget.tokens=1000, budget.tokens=500"
    assert f"has grpo-lr0.0002-seed1 with other settings ({setting}); give another --out" in capsys.readouterr().err
    assert launches(tmp_path) == {"grpo-lr0.0002-seed1": 1}


def test_a_variant_takes_the_rate_of_its_method_if_that_is_studied(tmp_path: Path, training: None) -> None:
    chosen = {f"skpo-lr{rate}-seed101" for rate in ("0.0001", "0.0002")}
    assert run(tmp_path / "both", "--methods", "skpo,weight_up", "--seeds", "1") == 0
    assert set(launches(tmp_path / "both")) == chosen | {"skpo-lr0.0002-seed1", "weight_up-lr0.0002-seed1"}
    assert run(tmp_path / "alone", "--methods", "weight_up", "--seeds", "1") == 0
    assert {name.replace("skpo", "weight_up") for name in chosen} < set(launches(tmp_path / "alone"))


def test_no_method_is_compared_before_its_rate_is_chosen_from_all(tmp_path: Path, training: None) -> None:
    assert run(tmp_path, "--methods", "grpo,no_skip", "--seeds", "1") == 1
    assert "no_skip-lr0.0001-seed101" in launches(tmp_path) and "grpo-lr0.0002-seed1" in launches(tmp_path)
    assert not [name for name in launches(tmp_path) if name.startswith("no_skip") and name.endswith("seed1")]
    run(tmp_path, "--methods", "grpo,no_skip", "--seeds", "1")
    assert "no_skip-lr0.0002-seed1" in launches(tmp_path)


def test_a_failed_run_is_named_leaves_the_others_and_is_tried_again(
    tmp_path: Path, training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, "--methods", "grpo,no_skip", "--rates", "2e-4") == 1
    said = capsys.readouterr().out
    assert f"failed no_skip-lr0.0002-seed1, 0 s: error: {out}/runs/no_skip-lr0.0002-seed1: the disk is full" in said
    failed = "failed error: outputs/study-tiny/runs/no_skip-lr0.0002-seed1: the disk is full"
    assert f"| `no_skip-lr0.0002-seed1` | {failed} | 0 | 0 | 0 |  |" in said
    assert "| GRPO, lr 0.0002 | 3 |" in said
    assert run(out, "--methods", "grpo,no_skip", "--rates", "2e-4") == 0
    said = capsys.readouterr().out
    assert "| SKPO w/o skip, lr 0.0002 | 3 |" in said and "failed error" not in said
    counted = launches(out)
    assert counted["grpo-lr0.0002-seed1"] == 1 and counted["no_skip-lr0.0002-seed1"] == 2


def test_only_runs_one_cell_and_list_runs_none(
    tmp_path: Path, training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, "--list") == 0
    said = capsys.readouterr().out
    assert not out.exists() and said.count("bash run_skpo.sh model=tiny") == 10
    assert run(out, "--only", "spo-lr0.0003-seed7") == 0
    assert launches(out) == {"spo-lr0.0003-seed7": 1}
    for name in ("sppo-lr0.0003-seed7", "skpo-lrnan-seed7", "skpo-lr0.0003-seed-7"):
        assert run(out, "--only", name) == 1
        assert f"{name}: is not a cell" in capsys.readouterr().err


def test_a_run_is_stopped_at_its_limit_and_counts_as_it_is(
    tmp_path: Path, training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hold = tmp_path / "out", tmp_path / "hold"
    hold.touch()
    arguments = (out, "--rates", "2e-4", "--seeds", "1", "--limit", "1", f"hold={hold}")
    for _ in range(2):
        assert run(*arguments) == 0
        said = capsys.readouterr().out
        assert "| `spo-lr0.0002-seed1` | stopped after 1 s | 3 |" in said
        assert "| GRPO, lr 0.0002 | 1 |" in said and "| SPO, lr 0.0002 |" not in said
        assert "Training at 1,000 generated tokens" in said, "a run validated only before it began moves no table"
    assert launches(out) == {"grpo-lr0.0002-seed1": 1, "spo-lr0.0002-seed1": 1}
    hold.unlink()
    assert run(out, "--rates", "2e-4", "--seeds", "1", f"hold={hold}") == 0
    assert launches(out)["spo-lr0.0002-seed1"] == 2, "without a limit it goes to its end"


def test_a_terminated_study_stops_its_runs_and_resumes(tmp_path: Path, training: None) -> None:
    out, hold = tmp_path / "out", tmp_path / "hold"
    hold.touch()
    script = tmp_path / "training.py"
    code = (
        f"import sys; from recipe.skpo.analysis import study; study.COMMAND = (sys.executable, '-I', {str(script)!r});"
        f"sys.exit(study.main(['--methods', 'spo', '--seeds', '1', '--rates', '2e-4', '--tokens', '1000',"
        f"'--out', {str(out)!r}, 'hold={hold}']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    started = out / "runs/spo-lr0.0002-seed1/launches"
    deadline = time.monotonic() + 60
    while not started.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command resumes" in errors
    record = json.loads((out / "cells/spo-lr0.0002-seed1.json").read_text())
    assert record["code"] is None
    assert not [found for found in Path("/proc").glob("[0-9]*/cmdline") if str(script).encode() in _read(found)]
    hold.unlink()
    assert run(out, "--methods", "spo", "--seeds", "1", "--rates", "2e-4", f"hold={hold}") == 0
    assert launches(out) == {"spo-lr0.0002-seed1": 2}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "grpo,ppo"], "--methods ppo: must be of grpo"),
        (["--seeds", "1,101"], "--rate-seeds 101: is a seed of the comparison too"),
        (["--parallel", "0"], "--parallel: must be >= 1"),
        (["--report"], "holds no run of a study"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([*flags, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_cores_are_shared_and_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKPO_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    config = study.StudyConfig(parallel=3, overrides=("platform=gpu", "data.train_batch_size=8"))
    assert study.environment_of(config)["SKPO_NUM_THREADS"] == "2"
    given = study.overrides_of(config, study.Cell("grpo", 1e-5, 4))
    assert {"data.train_batch_size=8", "skpo.seed=4", "data.seed=4"} <= {*given}
    assert "actor_rollout_ref.rollout.gpu_memory_utilization=0.2" in given
    assert len(given) == len({text.partition("=")[0] for text in given}), "each key once"


def test_the_page_says_what_the_committed_results_say(tmp_path: Path) -> None:
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    for arm in study.ARMS:
        marks = [f"<!-- results of {arm} -->", f"<!-- end of {arm} -->"]
        assert all(page.count(mark) == 1 for mark in marks)
        file = ROOT / f"docs/evidence/{arm}.json"
        if file.is_file():
            results = json.loads(file.read_text(encoding="utf-8"))
            assert study_results.filled(page, arm, study_results.page_of(results), Path("evidence.md")) == page
            for drawn in study_results.draw(results, tmp_path):
                assert (ROOT / "docs/evidence" / drawn.name).is_file(), f"{drawn.name} is drawn by --redraw"
    with pytest.raises(ConfigError, match="has no lines <!-- results of tiny -->"):
        study_results.filled("", "tiny", "", Path("evidence.md"))


@pytest.mark.parametrize("arm", study.ARMS)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_method_composes_and_passes_the_checks(arm: str, platform: str, compose_config) -> None:
    config = study.StudyConfig(arm=arm, parallel=2, methods=tuple(study.METHODS), overrides=(f"platform={platform}",))
    for method in study.METHODS:
        given = study.overrides_of(config, study.Cell(method, 1e-5, 1))
        composed = compose_config(*given)
        check_method_settings(composed, given)
        scale_batch_for_spo(composed)
        check_config(composed, SkpoSettings.from_config(composed.skpo), given)
