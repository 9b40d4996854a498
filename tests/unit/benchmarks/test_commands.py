"""The other measurements in small: they run the real code, and their commands report what was measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import recipe, threads, update


def test_without_a_name_all_parts_run_and_the_first_failure_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(arguments: list[str]) -> subprocess.CompletedProcess:
        started.append(arguments[1:])
        return subprocess.CompletedProcess(arguments, {"recipe": 3, "update": 4}.get(arguments[-1], 0))

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main([]) == 3
    assert started == [["-m", "benchmarks", part] for part in command.PARTS]


def test_a_name_chooses_a_part_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "main", lambda argv: len(argv) * 10)
    assert command.main(["recipe", "--repeats", "2"]) == 20


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["nothing"], 2)])
def test_anything_else_prints_what_there_is(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == code
    said = capsys.readouterr().out
    assert all(f"    {part} " in said for part in command.PARTS)


# ---------------------------------------------------------------- the recipe's own Python


def test_each_part_of_a_prompt_can_be_called() -> None:
    parts = {name: call() for name, call in recipe.prompt_parts().items()}
    assert 0 <= parts["selection"] < recipe.GROUP
    assert len(parts["prompt building"]) == recipe.SEGMENT_TOKENS + recipe.PROBLEM_TOKENS
    assert len(parts["rows"]) == recipe.GROUP + 1


def test_the_step_is_a_whole_one() -> None:
    metrics = recipe.training_step(prompts=2)()
    assert metrics["skpo/downstream/length/mean"] == recipe.RESPONSE_TOKENS
    assert metrics["skpo/tracker/prompts_seen"] == 2
    assert metrics["skpo/prompts_dropped"] == 0


def test_tables_of_some_prompts_are_measured() -> None:
    found = recipe.million(2000)
    assert set(found) == {"memory_mb", "peak_mb", "update_ms", "save_s", "load_s", "file_mb"}
    assert found["file_mb"] > 2000 * 16 / 1e6, "16 characters per key at least"
    assert found["update_ms"] > 0


@pytest.mark.parametrize(("value", "code"), [(0.9, 0), (1.1, 1)])
def test_a_limit_that_is_passed_fails_the_command(
    value: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [recipe.Measured("a", value, "ms", 1.0), recipe.Measured("b", 5.0, "s")]
    monkeypatch.setattr(recipe, "measure", lambda repeats: found)
    assert recipe.main(["--out", str(tmp_path / "recipe.json")]) == code
    assert f"| a | {value} ms | 1 ms |\n| b | 5 s |  |" in capsys.readouterr().out
    assert json.loads((tmp_path / "recipe.json").read_text())["values"][0]["value"] == value


# ---------------------------------------------------------------- the actor's update


def test_shared_prompts_are_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "update.json"
    sizes = ["--prompts=2", "--group=3", "--problem=20", "--segment=4", "--response=6", "--prompts-per-batch=1"]
    assert update.main(["--model=random", "--repeats=1", "--threads=1", f"--out={out}", *sizes]) == 0
    content = json.loads(out.read_text())
    computed: dict[str, int] = content["positions"]
    # Two batches: 4 rows padded to the longest, at least 4 + 20 + 3 tokens; or a shared prompt and its branches.
    assert computed["separate rows"] >= 8 * 27 > computed["shared prompts"] >= 2 * (24 + 3 * 3)
    assert content["settings"]["model"] == "random"
    assert "| shared prompts |" in capsys.readouterr().out


# ---------------------------------------------------------------- threads


def test_updates_are_timed_alone_and_beside_an_idle_pool(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def seconds(*arguments: Any) -> float:
        calls.append(arguments[:3])
        return float(len(calls))

    monkeypatch.setattr(threads, "update_seconds", seconds)
    out = tmp_path / "threads.json"
    assert threads.main(["--model=random", "--threads", "2", "--out", str(out)]) == 0
    assert calls == [(2, "PASSIVE", False), (2, "PASSIVE", True), (2, "ACTIVE", True)]
    assert "| 2 threads, beside a pool that spins | 3.00 |" in capsys.readouterr().out
    assert json.loads(out.read_text())["seconds"]["2 threads, alone"] == 1.0


@pytest.mark.parametrize("beside", [True, False])
def test_the_idle_pool_is_there_during_the_update_and_ends_with_it(
    beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen:
        pools.append(popen(*arguments, **options))
        return pools[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(threads, "_IDLE_POOL", "import sys; print('ready', flush=True); sys.stdin.read()")

    def fake(arguments: list[str], **rest: Any) -> None:
        assert arguments[:4] == [sys.executable, "-m", "benchmarks", "update"] and "--threads=2" in arguments
        assert [pool.poll() for pool in pools] == ([None] if beside else []), "running"
        assert (rest["env"]["OMP_NUM_THREADS"], rest["env"]["OMP_WAIT_POLICY"]) == ("2", "ACTIVE")
        out = Path(arguments[arguments.index("--out") + 1])
        out.write_text(json.dumps({"seconds": {"shared prompts": [3.0, 1.0, 2.0]}}), encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", fake)
    assert threads.update_seconds(2, "ACTIVE", beside, []) == 2.0
    assert all(pool.poll() == 0 for pool in pools)
