"""Two runs at the same time on one machine: each ends as it does alone, and neither serves anybody else.

The two differ in seed and learning rate, so that weights that got into the wrong run would be seen.  Minutes.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from recipe.skpo.output.metrics import read_lines
from tests.e2e.processes import alive, tree
from tests.e2e.test_resume import EXACT, MACHINE
from tests.e2e.tiny import overrides

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
STEPS = 20
"""Enough that both runs still train while they are attacked."""

RUNS = {"one": ["skpo.seed=1"], "two": ["skpo.seed=2", "actor_rollout_ref.actor.optim.lr=3e-3"]}


def start(folder: Path, *more: str) -> subprocess.Popen:
    folder.mkdir()
    arguments = [*overrides(folder), *EXACT, "trainer.save_freq=1000", f"trainer.total_training_steps={STEPS}", *more]
    with (folder / "run.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "recipe.skpo.main", *arguments],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_lines(folder / "out/metrics.jsonl") if "skpo/loss" in line]
    return [{k: v for k, v in line.items() if not any(part in k for part in MACHINE)} for line in lines]


def wait(processes: dict[Path, subprocess.Popen], until: Any) -> None:
    deadline = time.monotonic() + 900
    while not until():
        for folder, process in processes.items():
            text = (folder / "run.log").read_text(errors="replace")
            assert process.poll() in (None, 0), text[-4000:]
            assert time.monotonic() < deadline, text[-4000:]
        time.sleep(0.2)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def attack(process: subprocess.Popen, folder: Path) -> dict[str, int]:
    """Send a pickle to every port of TransferQueue's servers, and ask vLLM's server for its models."""
    seen = {"queue ports": 0, "refused requests": 0}
    context = zmq.Context()
    for member in alive(tree(process.pid)):
        title = " ".join(member.cmdline())
        for listening in [found for found in member.net_connections("inet") if found.status == psutil.CONN_LISTEN]:
            address, port = listening.laddr
            if ("TransferQueue" in title or "SimpleStorage" in title) and address == "127.0.0.1":
                attacker = context.socket(zmq.DEALER)
                attacker.setsockopt(zmq.IDENTITY, b"TQ_STORAGE_x")
                attacker.connect(f"tcp://{address}:{port}")
                attacker.send_multipart([b"\xc1\xfe\xed", pickle.dumps(Payload(folder / f"ran-{port}"))])
                seen["queue ports"] += 1
            elif "vLLMHttpServer" in title and address not in ("127.0.0.1", "::", "0.0.0.0"):
                for path in ("/v1/models", "/metrics", "/openapi.json", "/invocations"):
                    try:
                        urllib.request.urlopen(f"http://{address}:{port}{path}", timeout=20)
                    except urllib.error.HTTPError as error:
                        seen["refused requests"] += error.code == 401
                    except OSError:  # another of its ports, which does not speak HTTP
                        break
    time.sleep(1)
    context.destroy(linger=1000)
    return seen


def sockets() -> set[str]:
    """Sockets and run folders in the shared folder for temporary files."""
    base = Path(tempfile.gettempdir())
    return {path.name for path in base.iterdir() if path.is_socket() or path.match("skpo-????????")}


def test_two_runs_at_once_end_as_each_does_alone(tmp_path: Path) -> None:
    before = sockets()
    for name, more in RUNS.items():
        folder = tmp_path / f"{name} alone"
        wait({folder: (process := start(folder, *more))}, lambda process=process: process.poll() == 0)
    together = {tmp_path / f"{name} together": more for name, more in RUNS.items()}
    processes = {folder: start(folder, *more) for folder, more in together.items()}
    try:
        wait(processes, lambda: all(len(steps(folder)) >= 2 for folder in processes))
        attacked = [attack(process, folder) for folder, process in processes.items()]
        wait(processes, lambda: all(process.poll() == 0 for process in processes.values()))
    finally:
        for process in processes.values():
            for member in alive(tree(process.pid)):
                member.kill()
            process.wait()
    assert attacked == [{"queue ports": 3, "refused requests": 4}] * 2
    assert not list(tmp_path.glob("*/ran-*")), "no payload ran"
    for name in RUNS:
        alone, beside = (steps(tmp_path / f"{name} {how}") for how in ("alone", "together"))
        assert len(alone) == STEPS and alone == beside
    assert steps(tmp_path / "one alone") != steps(tmp_path / "two alone"), "or swapped weights could not be seen"
    assert sockets() <= before, "nothing is left in the shared folder"
