"""Run many steps of the tiny model under injected faults, and watch the machine.

    .venv/bin/python scripts/soak.py --steps 200 --rate 0.02 --output <folder>

Checks that the run finishes, that its memory stays flat, and that it leaves no process and no shared memory behind.
Writes ``soak.json`` with the numbers and ``memory.jsonl`` with every reading.  Exit status 1 if a check fails.  The
faults come from ``tests/e2e/injected.py``, which the run's config names.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from recipe.skpo.output.metrics import read_lines  # noqa: E402
from tests.e2e import injected, tiny  # noqa: E402
from tests.e2e.processes import resident_bytes, seconds_until_gone, shared_memory_files, tree  # noqa: E402

WARM_UP = 120
"""Steps left out of the slope: vLLM's worker grows for about that long, from 700 to 935 MiB, and then stays."""

KINDS = {
    "server: error": "injected: the server failed",
    "server: empty": ": 0 tokens with 0 log-probs",
    "server: token out of range": "token ids from",
    "server: log-prob NaN": "a log-prob that is not finite",
    "server: log-probs missing": "[1-9][0-9]* tokens with [0-9]+ log-probs",
    "reward: raises": "injected: the reward function failed",
    "reward: NaN": "returned nan",
    "reward: wrong type": "returned 'right'",
    "server slow or reward hangs": "prompt: TimeoutError",
}
"""Kind of fault to the words of its logged cause."""


def overrides(folder: Path, steps: int, prompt_timeout_s: float) -> list[str]:
    """Return the overrides of the run."""
    return [
        *tiny.overrides(folder),
        *injected.overrides(),
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=50",
        "trainer.test_freq=50",
        f"skpo.prompt_timeout_s={prompt_timeout_s}",
        "skpo.max_dropped_share=0.8",
        # The cache is touched block by block: a large one would grow into memory over the whole run.
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=256",
    ]


def watch(process: subprocess.Popen, folder: Path, seconds: float) -> tuple[list[dict[str, Any]], list]:
    """Read the memory of the process tree once a second until the run ends; all processes that were ever seen."""
    started, readings, seen = time.monotonic(), [], {}
    while process.poll() is None:
        if time.monotonic() - started > seconds:
            raise SystemExit(f"the run has not ended within {seconds:g} s")
        members = tree(process.pid)
        seen |= {(member.pid, member.create_time()): member for member in members if member.is_running()}
        steps = [line["step"] for line in read_lines(folder / "out/metrics.jsonl")]
        memory = {program: size / 2**20 for program, size in resident_bytes(members).items()}
        reading = {
            "seconds": round(time.monotonic() - started, 1),
            "step": max(steps, default=0),
            "processes": len(members),
            "programs": {program: round(mib, 1) for program, mib in sorted(memory.items())},
        }
        readings.append(reading)
        with (folder / "memory.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(reading) + "\n")
        time.sleep(1)
    return readings, list(seen.values())


def memory_slopes(readings: list[dict[str, Any]]) -> dict[str, float]:
    """Fit least-squares slopes in MiB per 100 steps between warm-up and the last step: of every program, and ``all``.

    The last step is left out: the run ends in it and frees its memory.
    """
    last = max((reading["step"] for reading in readings), default=0)
    late = [reading for reading in readings if WARM_UP < reading["step"] < last]
    steps = [reading["step"] for reading in late]
    if len(set(steps)) < 2:
        return {"all": 0.0}

    def slope(sizes: list[float]) -> float:
        return float(np.polyfit(steps, sizes, 1)[0] * 100)

    programs = sorted({program for reading in late for program in reading["programs"]})
    return {"all": slope([sum(reading["programs"].values()) for reading in late])} | {
        program: slope([reading["programs"].get(program, 0.0) for reading in late]) for program in programs
    }


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.02, help="of each kind of fault")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt-timeout", type=float, default=4.0, help="seconds; a hanging request costs this")
    parser.add_argument("--max-slope", type=float, default=30.0, help="MiB per 100 steps")
    parser.add_argument("--minutes", type=float, default=20.0, help="the run is ended after that")
    options = parser.parse_args()
    folder: Path = options.output.resolve()
    if folder.exists():
        parser.error(f"--output: {folder} exists; a soak starts from nothing")
    folder.mkdir(parents=True)
    before = shared_memory_files()
    started = time.monotonic()
    environment = {**os.environ, "FAULT_RATE": str(options.rate), "PYTHONPATH": str(ROOT)}
    # Ray would leave out lines that look alike.
    environment["RAY_DEDUP_LOGS"] = "0"
    with (folder / "run.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "recipe.skpo.main", *overrides(folder, options.steps, options.prompt_timeout)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        # A soak that is stopped stops its run, and Ray's processes follow their driver.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        try:
            readings, processes = watch(process, folder, options.minutes * 60)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    lines = [line for line in read_lines(folder / "out/metrics.jsonl") if "skpo/loss" in line]
    slopes = memory_slopes(readings)
    text = (folder / "run.log").read_text(errors="replace", encoding="utf-8")
    causes: Counter[str] = Counter()
    for noted in re.findall(r"failures in step \d+: (\{.*\})", text):
        causes.update(json.loads(noted))
    faults = {
        kind: sum(count for cause, count in causes.items() if re.search(words, cause)) for kind, words in KINDS.items()
    }
    problems = []
    if process.returncode or len(lines) != options.steps:
        problems.append(f"exit status {process.returncode} after {len(lines)} of {options.steps} steps: {text[-800:]}")
    if slopes["all"] > options.max_slope:
        problems.append(f"memory grows by {slopes['all']:.1f} MiB per 100 steps")
    missed = [kind for kind, count in faults.items() if not count]
    if options.rate > 0 and missed:
        problems.append(f"never seen: {', '.join(missed)}")
    try:
        gone = seconds_until_gone(processes, 15)
    except AssertionError as error:
        gone = float("nan")
        problems.append(str(error))
    left = sorted(shared_memory_files() - before)
    if left:
        problems.append(f"left in /dev/shm: {left}")
    result = {
        "steps": len(lines),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "seconds_per_step": round(float(np.median([line["timing_s/step"] for line in lines])), 2) if lines else None,
        "requests_failed": sum(line["skpo/requests_failed"] for line in lines),
        "prompts_dropped": sum(line["skpo/prompts_dropped"] for line in lines),
        "mib_at_most": max((round(sum(reading["programs"].values())) for reading in readings), default=0),
        "mib_per_100_steps": {program: round(slope, 2) for program, slope in slopes.items()},
        "processes": max((reading["processes"] for reading in readings), default=0),
        "seconds_until_processes_are_gone": round(gone, 1),
        "shared_memory_files_left": left,
        "faults_counted": faults,
        "problems": problems,
    }
    (folder / "soak.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
