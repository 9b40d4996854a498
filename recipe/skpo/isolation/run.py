"""A run's isolation, seen from the command: folder, environment, and the config by which all processes learn of it."""

import importlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from recipe.skpo.errors import ConfigError
from recipe.skpo.isolation import folder as folders
from recipe.skpo.isolation.http_guard import OPEN_PATHS
from recipe.skpo.isolation.worker import OWN_CLUSTER
from recipe.skpo.output.console import say

HOOK = "recipe.skpo.isolation.worker.set_up"
RECEIVER = "recipe.skpo.isolation.receiver.PrivateReceiver"
GUARD = "recipe.skpo.isolation.http_guard.RequireKey"
_VLLM = "actor_rollout_ref.rollout.engine_kwargs.vllm"


class IsolationError(ConfigError):
    """A setting that would open the run to others; one line that names it."""


def choose_cluster(ray_init: DictConfig) -> None:
    """Give the run a Ray of its own, unless the user names one, in the config or by RAY_ADDRESS.

    Without an address Ray joins whatever a file in a folder open to everybody names, and sends it the user's token.
    """
    if not ray_init.get("address"):
        with open_dict(ray_init):
            ray_init.address = os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def isolated(config: DictConfig) -> Iterator[Path]:
    """Keep the run apart from all others while it lasts; what Ray logged in a run that failed goes to its own folder.

    Yields:
        The run's folder, which is removed in the end.

    Raises:
        FolderError: no folder can be made.
        IsolationError: a setting of the config stands against it.
    """
    ray_init = config.ray_kwargs.ray_init
    own_ray = ray_init.get("address") == "local"
    _check(config)
    temporary = tempfile.gettempdir()
    folders.sweep([temporary, "/tmp"])
    # Another node of a cluster need not have this one's TMPDIR.
    folder = folders.make(own_ray and "RAY_TMPDIR" not in os.environ, None if own_ray else ["/tmp"])
    shared, here = _variables(config, folder, own_ray, temporary)
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    _configure(config, shared)
    try:
        yield folder
    except Exception:
        _keep_logs(folder, Path(config.output_dir))
        raise
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        folders.remove(folder)


def _variables(
    config: DictConfig, folder: Path, own_ray: bool, temporary: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Return variables for the run's workers, and all for this process, from which a Ray of its own inherits."""
    shared = {folders.VARIABLE: str(folder), "VLLM_RPC_BASE_PATH": str(folder)}
    if config.actor_rollout_ref.rollout.prometheus.enable:
        shared[OPEN_PATHS] = "/metrics"
    here = dict(shared)
    if own_ray:
        here[OWN_CLUSTER] = "1"
        if "RAY_TMPDIR" not in os.environ:
            here["RAY_TMPDIR"] = temporary if _reads_session_in_tmp(config) else str(folder)
        if folder.parent == Path(temporary):
            here["TMPDIR"] = str(folder)
        compiled = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
        if compiled.parent == Path(temporary) and compiled.name.startswith("torchinductor_"):
            # Set by torch when it was imported: a name that anybody could have filled with code before.
            here["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torchinductor")
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            # Ray would make one token for all clusters of the user, readable to others by the usual umask.
            token = folder / "ray_token"
            with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(secrets.token_hex(32))
            here["RAY_AUTH_TOKEN_PATH"] = str(token)
    return shared, here


def _reads_session_in_tmp(config: DictConfig) -> bool:
    """Return whether verl looks for Ray's session in /tmp/ray, a constant of its own, for Prometheus or nsys."""
    return bool(config.actor_rollout_ref.rollout.prometheus.enable) or config.global_profiler.tool == "nsys"


def _check(config: DictConfig) -> None:
    ray_init, options = config.ray_kwargs.ray_init, _engine_options(config)
    hook = (ray_init.get("runtime_env") or {}).get("worker_process_setup_hook")
    if hook not in (None, HOOK):
        raise IsolationError(
            f"ray_kwargs.ray_init.runtime_env.worker_process_setup_hook: is {hook}, but the run needs it to sign its "
            f"messages; leave it out, and call yours from an imported module (actor_rollout_ref.model.external_lib)"
        )
    if options.get("middleware") not in (None, GUARD):
        raise IsolationError(
            f"{_VLLM}.middleware: is {options['middleware']}, but the run guards vLLM's HTTP server by its own; leave "
            f"it out"
        )
    receiver = options.get("worker_extension_cls")
    if receiver not in (None, RECEIVER):
        module, _, name = receiver.rpartition(".")
        from recipe.skpo.isolation.receiver import PrivateReceiver

        try:
            extends = issubclass(getattr(importlib.import_module(module), name), PrivateReceiver)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise IsolationError(f"{_VLLM}.worker_extension_cls: {receiver} cannot be imported: {error}") from error
        if not extends:
            raise IsolationError(
                f"{_VLLM}.worker_extension_cls: {receiver} must extend {RECEIVER}, which has the run's socket"
            )


def _configure(config: DictConfig, variables: dict[str, str]) -> None:
    with open_dict(config):
        runtime_env = config.ray_kwargs.ray_init.runtime_env
        runtime_env.worker_process_setup_hook = HOOK
        runtime_env.env_vars = {**(runtime_env.get("env_vars") or {}), **variables}
        options = _engine_options(config)
        options.setdefault("worker_extension_cls", RECEIVER)
        options["middleware"] = GUARD
        config.actor_rollout_ref.rollout.engine_kwargs.vllm = options


def _engine_options(config: DictConfig) -> dict[str, Any]:
    return dict((config.actor_rollout_ref.rollout.get("engine_kwargs") or {}).get("vllm") or {})


def _keep_logs(folder: Path, output_dir: Path) -> None:
    logs = folder / "ray/session_latest/logs"
    with suppress(OSError):  # the run's own error is what has to be seen
        if logs.is_dir():
            kept = output_dir / "ray_logs"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(logs, kept)
            say(f"note: Ray's logs of this run are in {kept}")
