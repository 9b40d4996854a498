"""verl's platform interface on the CPU.

verl assumes an accelerator: it moves tensors to `get_device_id()`, asks `torch.<device>` for memory and random state,
and lets Ray assign a "GPU". `CpuPlatform` answers each of these calls on a machine without one. `verl_plugin` registers
it; importing this module changes nothing.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase

from recipe.skpo.cpu import environment


class CpuDeviceId(str):
    """The value of `get_device_id()`: "cpu" to torch, "0" in an f-string.

    verl passes it to `tensor.to(...)` and `device=`, where the integer 0 would mean "accelerator 0" and raise. verl
    also writes f"{device_name}:{device_id}" (verl/utils/fsdp_utils.py:229), where it must read as an index.
    """

    def __new__(cls) -> "CpuDeviceId":
        return super().__new__(cls, "cpu")

    def __format__(self, format_spec: str) -> str:
        return format("0", format_spec)

    def __reduce__(self) -> tuple[type["CpuDeviceId"], tuple[()]]:
        return CpuDeviceId, ()


class CpuDeviceModule(ModuleType):
    """`torch.cpu`, with the calls of `torch.cuda` that verl makes unconditionally.

    `torch.cpu` alone lacks functions for memory, random state, IPC and device names. Memory here is that of the
    process; `max_memory_allocated` is its peak since start, which cannot be reset.
    """

    def __init__(self) -> None:
        super().__init__("recipe.skpo.cpu.torch_cpu", self.__doc__)

    def __getattr__(self, name: str) -> Any:
        """Return torch.cpu's streams, events and other stand-ins."""
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        raise AttributeError(f"the CPU platform has no torch.<device>.{name} (recipe/skpo/cpu/cpu_platform.py)")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> CpuDeviceId:
        return CpuDeviceId()

    def device_count(self) -> int:
        return 1

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        """Accept a call that has no meaning on a CPU."""

    set_device = synchronize = empty_cache = ipc_collect = _do_nothing
    reset_peak_memory_stats = reset_accumulated_memory_stats = set_per_process_memory_fraction = _do_nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(new_state)

    def get_device_name(self, device: object = None) -> str:
        return "CPU"  # a key of _DEVICE_FLOPS in verl/utils/flops_counter.py:22

    def get_device_capability(self, device: object = None) -> tuple[int | None, int | None]:
        return None, None

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(name="CPU", total_memory=psutil.virtual_memory().total)

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def memory_allocated(self, device: object = None) -> int:
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device: object = None) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB, and lags behind
        return max(peak, self.memory_allocated())

    memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


_DEVICE_MODULE = CpuDeviceModule()


class CpuPlatform(PlatformBase):
    """The CPU as one logical accelerator per Ray "GPU"; selected only by VERL_PLATFORM=cpu."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Return False, although every machine has a CPU, so that verl's auto-detection never selects it."""
        return False

    def current_device(self) -> CpuDeviceId:  # type: ignore[override]  # see CpuDeviceId
        return CpuDeviceId()

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        """Do nothing: verl requests expandable segments of the CUDA allocator before a weight sync."""

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_id: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Return the variable that Ray sets for its resource "GPU", see `ray_resource_name`."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        """Return a logical "GPU": start Ray with `num_gpus` = number of workers.

        verl counts only GPU or NPU (verl/single_controller/ray/base.py:230) and reads the ids that Ray assigned
        (vllm_async_server.py:1348). Ray assigns ids for its own accelerator names, not for custom resources.
        """
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        """Return False, so that weights reach vLLM through POSIX shared memory (BucketedWeightSender, use_shm)."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """Return the variables that a vLLM server needs if Ray was started from another environment."""
        names = [*environment(num_threads=1, kv_cache_gib=1), "VLLM_PLUGINS"]
        return {name: os.environ[name] for name in names if name in os.environ and not name.startswith("RAY_")}

    def cudart(self) -> None:
        return None
