"""The same run on a Ray cluster of two nodes: one actor with its rollout server on each.

Both nodes are on this machine, each with a raylet of its own; Ray and verl treat them as two.  The command joins the
cluster as on a real one, with ``ray_kwargs.ray_init.address``.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recipe.skpo.output.metrics import read_lines
from tests.e2e import tiny
from tests.e2e.processes import alive, tree

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.faults, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
STORE = 300_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """Two nodes that know our code by PYTHONPATH, as an installation on every node would."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    node = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def launch(folder: Path, cluster, *extra: str) -> subprocess.Popen:
    arguments = [
        *tiny.overrides(folder),
        f"ray_kwargs.ray_init.address={cluster.address}",
        # Ray takes these only where it starts a cluster itself.
        *(f"ray_kwargs.ray_init.{name}=null" for name in ("num_cpus", "num_gpus", "object_store_memory")),
        "ray_kwargs.ray_init.include_dashboard=null",
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=1",
        *extra,
    ]
    with (folder / "run.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "recipe.skpo.main", *arguments],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def workers_of(cluster, name: str) -> list[list[psutil.Process]]:
    """Per node, the actors whose process title holds ``name``."""
    found = []
    for node in cluster.list_all_nodes():
        (raylet,) = node.all_processes["raylet"]
        members = tree(raylet.process.pid)[1:]
        found.append([member for member in alive(members) if name in " ".join(member.cmdline())])
    return found


def steps(folder: Path) -> list[int]:
    lines = read_lines(folder / "out/metrics.jsonl")
    return [int(line["step"]) for line in lines if "skpo/loss" in line]


def wait_for_step(folder: Path, process: subprocess.Popen, step: int, seconds: float = 1200) -> None:
    deadline = time.monotonic() + seconds
    while step not in steps(folder):
        text = (folder / "run.log").read_text(errors="replace")
        assert process.poll() is None, f"the run ended early:\n{text[-4000:]}"
        assert time.monotonic() < deadline, f"no step {step} within {seconds:g} s:\n{text[-4000:]}"
        time.sleep(0.2)


def test_both_nodes_train_and_roll_out_and_a_server_that_dies_stops_the_run(cluster, tmp_path: Path) -> None:
    process = launch(tmp_path, cluster, "trainer.total_training_steps=1000", "skpo.prompt_timeout_s=30")
    try:
        wait_for_step(tmp_path, process, 3)
        servers = workers_of(cluster, "vLLMHttpServer")
        assert [len(node) for node in servers] == [1, 1], "a rollout server on each node"
        assert [len(node) for node in workers_of(cluster, "WorkerDict")] == [1, 1], "an actor on each node"
        assert [len(node) for node in workers_of(cluster, "SkpoAgentLoopWorker")] == [1, 1]

        actor = tmp_path / "out/checkpoints/global_step_2/actor"
        assert sorted(path.name for path in actor.glob("model_*.pt")) == [
            "model_world_size_2_rank_0.pt",
            "model_world_size_2_rank_1.pt",
        ]
        assert (tmp_path / "out/checkpoints/global_step_2/skpo_state.npz").is_file()
        lines = [line for line in read_lines(tmp_path / "out/metrics.jsonl") if "skpo/loss" in line]
        assert [int(line["step"]) for line in lines][:3] == [1, 2, 3], "one line per step, not one per node"
        assert all(line["skpo/prompts_dropped"] == 0 for line in lines[:3])
        assert all(0 < line["skpo/rollout_actor_logprob_gap/mean"] < 1e-3 for line in lines[:3]), "both got the weights"

        # The node that is not the head.
        servers[1][0].kill()
        killed = time.monotonic()
        process.wait(300)
        print(f"the run had ended {time.monotonic() - killed:.1f} s after one of two servers died")
        text = (tmp_path / "run.log").read_text(errors="replace")
        assert process.returncode != 0
        assert "vLLMHttpServer" in text and "ActorDiedError" in (tmp_path / "out/logs/run.log").read_text()
    finally:
        for member in alive(tree(process.pid)):
            member.kill()
        process.wait()
