"""Whole runs under faults: each goes on, or stops within a bound and says why.  Nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from recipe.skpo.cpu.shared_memory import leftover_segments, remove_segments
from recipe.skpo.output.metrics import read_lines
from tests.e2e import injected, tiny
from tests.e2e.processes import alive, seconds_until_gone, shared_memory_files, tree

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.faults, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
START_S = 900
"""For a start and a few steps, on a machine that has other things to do."""


class Run:
    """A tiny run in a session of its own, as in a terminal of its own."""

    def __init__(self, folder: Path, *extra: str, **variables: str) -> None:
        self.folder, self.log = folder, folder / "run.log"
        self.before = shared_memory_files()
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "recipe.skpo.main", *tiny.overrides(folder), *extra],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell ignores it for what it starts in the background, and so would all below it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def steps(self) -> list[int]:
        lines = read_lines(self.folder / "out/metrics.jsonl")
        return [int(line["step"]) for line in lines if "skpo/loss" in line]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Wait for something, and note all processes of the run meanwhile."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"not within {seconds:g} s:\n{self.text()[-4000:]}"
            self.seen |= {(member.pid, member.create_time()): member for member in alive(tree(self.process.pid))}
            time.sleep(0.3)

    def trained(self, steps: int) -> Callable[[], bool]:
        def done() -> bool:
            assert self.process.poll() is None, f"the run ended early:\n{self.text()[-4000:]}"
            return len(self.steps()) >= steps

        return done

    def ended(self) -> bool:
        return self.process.poll() is not None

    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]

    def leaves_nothing(self, seconds: float = 15) -> None:
        seconds_until_gone(list(self.seen.values()), seconds)
        assert not shared_memory_files() - self.before


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(*extra: str, **variables: str) -> Run:
        runs.append(Run(tmp_path, "trainer.save_freq=1000", *extra, **variables))
        return runs[-1]

    yield make
    for run in runs:
        for process in alive([*tree(run.process.pid), *run.seen.values()]):
            process.kill()
        run.process.wait()
        remove_segments(leftover_segments(run.before))


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_signal_ends_everything_within_15_seconds(start, number: int, name: str) -> None:
    """A terminal sends Ctrl-C to every process of the foreground group, a scheduler SIGTERM to the command."""
    run = start("trainer.total_training_steps=1000", "trainer.save_freq=1")
    run.wait(run.trained(2), START_S)
    ended = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(run.process.pid, number)
    run.wait(run.ended, 15)
    run.leaves_nothing(15 - (time.monotonic() - ended))
    print(f"everything was gone {time.monotonic() - ended:.1f} s after it")
    assert run.process.returncode == 128 + number
    assert re.fullmatch(f"stopped by {name}; the same command resumes from step \\d+", run.last_line())
    assert "Traceback" not in run.text() and "KeyboardInterrupt" not in run.text()


def test_a_run_goes_on_under_faults_and_counts_them(start) -> None:
    run = start(
        "trainer.total_training_steps=6",
        "skpo.prompt_timeout_s=5",
        "skpo.max_dropped_share=0.8",
        *injected.overrides(),
        FAULT_RATE="0.05",
    )
    run.wait(run.ended, START_S)
    assert run.process.returncode == 0, run.text()[-4000:]
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    lines = [line for line in read_lines(run.folder / "out/metrics.jsonl") if "skpo/loss" in line]
    assert sum(line["skpo/requests_failed"] for line in lines) > 0
    assert "failures in step" in run.text() and "ValueError: injected: the reward function failed" in run.text()
    run.leaves_nothing()


def test_a_run_whose_prompts_are_all_dropped_stops_and_says_why(start) -> None:
    run = start("trainer.total_training_steps=6", *injected.overrides(), FAULT_RATE="1")
    run.wait(run.ended, START_S)
    assert run.process.returncode != 0
    assert run.last_line().startswith("error: ") and "all 4 prompts were dropped" in run.last_line()
    assert "injected: the server failed" in run.last_line()
    assert run.steps() == []
    run.leaves_nothing()


def test_a_vllm_that_fails_to_receive_weights_stops_the_run(start) -> None:
    run = start(
        "trainer.total_training_steps=6",
        "skpo.weight_sync_timeout_s=5",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=tests.e2e.failing_receiver.FailingExtension",
    )
    run.wait(run.ended, START_S)
    assert run.process.returncode != 0
    # Whose words stand between is vLLM's matter: its engine may report the worker's error in a sentence of its own.
    assert run.last_line().startswith("error: in step 1: vLLM failed while it received weights: ")
    assert "injected: no such weight" in run.last_line()
    assert run.last_line().endswith("; nothing has been saved yet, so the same command starts from the beginning")
    run.leaves_nothing()


def the_server(run: Run) -> psutil.Process:
    (server,) = [member for member in tree(run.process.pid) if "vLLMHttpServer" in " ".join(member.cmdline())]
    return server


PROCESSES = {
    "a vLLM server died (vLLMHttpServer": "vLLMHttpServer",
    "a vLLM engine died": "VLLM::EngineCore",
    "a reward worker died (RewardLoopWorker": "RewardLoopWorker",
}
"""What the last line says to a part of the process's title."""


@pytest.mark.parametrize("said", PROCESSES)
def test_a_process_that_dies_stops_the_run_and_is_named(start, said: str) -> None:
    run = start("trainer.total_training_steps=1000", "trainer.save_freq=1", "skpo.prompt_timeout_s=60")
    run.wait(run.trained(1), START_S)
    (process,) = [member for member in tree(run.process.pid) if PROCESSES[said] in " ".join(member.cmdline())]
    process.kill()
    killed = time.monotonic()
    run.wait(run.ended, 120)
    print(f"the run had ended {time.monotonic() - killed:.1f} s after {PROCESSES[said]} died: {run.last_line()}")
    assert run.process.returncode == 1
    assert said in run.last_line() and run.last_line().startswith("error: ")
    assert re.search(r"; the same command resumes from step \d+$", run.last_line())
    run.leaves_nothing()


def test_a_rollout_server_that_hangs_stops_the_run(start) -> None:
    """Alive and silent, wherever the step is: prompts, putting it to sleep, or sending it weights."""
    run = start("trainer.total_training_steps=1000", "skpo.prompt_timeout_s=10", "skpo.weight_sync_timeout_s=10")
    run.wait(run.trained(1), START_S)
    the_server(run).suspend()
    suspended = time.monotonic()
    run.wait(run.ended, 120)
    assert run.process.returncode != 0
    reasons = ("prompts were dropped", "a rollout server is alive and has not answered", "vLLM did not")
    assert any(reason in run.last_line() for reason in reasons), run.text()[-4000:]
    print(f"the run had ended {time.monotonic() - suspended:.1f} s after its server hung")
    run.leaves_nothing()
