"""The check for a machine with a GPU: its parts on the CPU, and the script that bounds them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu_check
from recipe.skpo.output.metrics import json_lines

ROOT = Path(__file__).parents[3]
TINY = ("--device", "cpu", "--tiny", "--out")


@pytest.fixture(autouse=True)
def platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKPO_PLATFORM", "cpu")


def test_attention_agrees_with_float32_and_every_attention_is_timed(tmp_path: Path, capsys) -> None:
    assert gpu_check.main(["attention", *TINY, str(tmp_path)]) == 0
    results = {line["what"]: line for line in json_lines(tmp_path / "results.jsonl")}
    for share in ("shared", "separate"):
        found = results[f"skpo_varlen, {share}"]
        assert found["passed"] is True
        assert found["values"]["sdpa"] == 0 and found["values"]["gradient"] < 1e-4
    assert results["skpo_varlen, shared"]["values"]["positions"][0] % 128 == 64
    shared, padded = (results[f"update, {name}"]["values"] for name in ("skpo_varlen, shared", "padded rows, separate"))
    assert shared["seconds"] > 0 and shared["positions"] < padded["positions"]
    capsys.readouterr()
    assert gpu_check.main(["table", "--out", str(tmp_path)]) == 0
    assert "| attention | skpo_varlen, shared | log-prob gap " in capsys.readouterr().out


def test_wrong_gradients_fail_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' backward is given each call's own out and lse, as autograd would; the loss stays right."""
    from recipe.skpo.engine import attention

    forward, real = attention._forward, attention._backward

    def own(grad, q, k, v, out, lse, queries, keys, causal, scale):
        out, lse = forward(q, k, v, queries, keys, causal, scale)
        return real(grad, q, k, v, out, lse, queries, keys, causal, scale)

    monkeypatch.setattr(attention, "_backward", own)
    assert gpu_check.main(["attention", *TINY, str(tmp_path)]) == 0
    results = {line["what"]: line["passed"] for line in json_lines(tmp_path / "results.jsonl")}
    assert (results["skpo_varlen, shared"], results["skpo_varlen, separate"]) == (False, True)
    assert gpu_check.main(["table", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("data", [None, "gsm8k"])
def test_the_runs_compose_on_a_gpu(data, tmp_path: Path, compose_config, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], folder: Path) -> subprocess.Popen:
        commands.append(command[3:])
        raise RuntimeError("not started")

    monkeypatch.setattr(gpu_check, "start", run)
    options = ["--out", str(tmp_path), *(["--data", data] if data else [])]
    for part in ("default", "resume", "compare", "determinism"):
        gpu_check.main([part, *options, "skpo.seed=3"])
    assert len(commands) == 6
    for command in commands:
        config = compose_config(*command)
        assert (config.platform.name, config.skpo.seed) == ("gpu", 3)
    compared = [compose_config(*command) for command in commands[2:5]]
    assert [(c.method.name, c.share_prefixes) for c in compared] == [("skpo", True), ("grpo", False), ("grpo", True)]
    assert {c.data.train_batch_size for c in compared} == {128}
    assert {"gsm8k" in str(c.data.train_files) for c in compared} == {data is not None}


def script(*arguments: str, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/gpu_check.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=2700,
    )


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, monkeypatch) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/usr/bin/env bash\n"
        f'case "$3" in attention) exit 7 ;; resume) sleep 60 ;; table) exec {sys.executable} "$@" ;;\n'
        f'*) echo "$3" >>{tmp_path / "ran"} ;; esac\n'
    )
    hurried = tmp_path / "bin/timeout"  # the real one after two seconds, whatever it is told
    hurried.parent.mkdir()
    hurried.write_text(f'#!/usr/bin/env bash\nexec {shutil.which("timeout")} 2 "${{@:3}}"\n')
    for program in (fake, hurried):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(hurried.parent), prepend=os.pathsep)
    arguments = ("--parts", "attention,default,resume,compare", "--minutes", "1", "--device", "cpu")
    done = script(*arguments, "--out", str(tmp_path), python=fake)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "ran").read_text().split() == ["default", "compare"]
    assert "| attention | stopped | reason exit status 7 | FAILED |" in done.stdout
    assert "| resume | stopped | reason no end within 10 s | FAILED |" in done.stdout


def test_a_signal_ends_the_running_part(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/usr/bin/env bash\necho $$ >{tmp_path / 'pid'}\nexec sleep 60\n")
    fake.chmod(0o755)
    command = ["bash", "scripts/gpu_check.sh", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHON": str(fake)})
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.05)
    part = psutil.Process(int((tmp_path / "pid").read_text()))
    process.terminate()
    assert process.wait(10) == 130
    psutil.wait_procs([part], timeout=10)
    assert not part.is_running()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "attention,speed"], "error: --parts: speed is unknown; choose from attention,default,"),
        (["--minutes", "many"], "error: --minutes: is many; give a whole number of minutes"),
        (["--out"], "error: --out: has no value; give one"),
        ([], "error: no NVIDIA GPU was found; --device cpu --tiny runs the parts without one"),
    ],
)
def test_the_script_refuses_in_one_line(arguments: list[str], said: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


@pytest.mark.e2e
@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_every_part_passes_with_the_tiny_model(tmp_path: Path) -> None:
    done = script("--minutes", "120", *TINY, str(tmp_path))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    results = {(line["part"], line["what"]): line for line in json_lines(tmp_path / "results.jsonl")}
    assert results["resume", "steps before and after"]["values"] == {"before": 2, "after": 4}
    skpo, grpo = (results["compare", name]["values"] for name in ("SKPO", "GRPO, separate rows"))
    assert skpo["positions per token"] < grpo["positions per token"] == 1
    assert results["determinism", "two runs are equal"]["passed"] is True
