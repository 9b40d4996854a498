"""The other measurements in small: they run the real code, and their commands report what was measured."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import programs, recipe, slopes, update


def test_without_a_name_all_parts_run_and_the_first_failure_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(arguments: list[str]) -> subprocess.CompletedProcess:
        started.append(arguments[1:])
        return subprocess.CompletedProcess(arguments, {"recipe": 3, "update": 4}.get(arguments[-1], 0))

    monkeypatch.setattr(subprocess, "run", run)
    assert command.main([]) == 3
    assert started == [["-m", "benchmarks", part] for part in command.PARTS]


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


# ---------------------------------------------------------------- programs


def test_answers_of_every_kind_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main(["--answers=4", f"--out={tmp_path / 'programs.json'}"]) == 0
    assert set(json.loads((tmp_path / "programs.json").read_text())["seconds"]) == set(programs.KINDS)
    assert "| 8 assertions |" in capsys.readouterr().out


# ---------------------------------------------------------------- entropy slopes


def test_both_passes_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--vocabulary=31", "--width=8", "--tokens=20", "--repeats=2"]
    assert slopes.main([*shape, f"--out={tmp_path / 'slopes.json'}"]) == 0
    found = json.loads((tmp_path / "slopes.json").read_text())["seconds"]
    assert [len(values) for values in found.values()] == [2, 2]
    said = capsys.readouterr().out
    assert all(name in said for name in found)
