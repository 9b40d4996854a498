"""verl's platform interface on the CPU.

verl thinks in accelerators: it moves tensors to `get_device_id()`, asks `torch.<device>` for memory and
random state, and lets Ray assign a "GPU". `CpuPlatform` answers each of these for a machine that has none.
Registering it is the plugin's business (verl_plugin.py); importing this module changes nothing.
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
    """What `get_device_id()` returns: "cpu" to torch, "0" in an f-string.

    verl hands it to `tensor.to(...)` and `device=`, where the integer 0 would mean "accelerator 0" and raise,
    and also writes f"{device_name}:{device_id}" (verl/utils/fsdp_utils.py:229), where it has to read as an
    index.
    """

    def __new__(cls) -> "CpuDeviceId":
        return super().__new__(cls, "cpu")

    def __format__(self, format_spec: str) -> str:
        return format("0", format_spec)

    def __reduce__(self) -> tuple[type["CpuDeviceId"], tuple[()]]:
        return CpuDeviceId, ()


class CpuDeviceModule(ModuleType):
    """`torch.cpu`, with those calls of `torch.cuda` that verl makes without asking first.

    `torch.cpu` itself will not do: it has no memory, random state, IPC or device-name functions. Memory is
    that of the process. `max_memory_allocated` is its peak since it started, which cannot be reset.
    """

    def __init__(self) -> None:
        super().__init__("recipe.skpo.cpu.torch_cpu", self.__doc__)

    def __getattr__(self, name: str) -> Any:
        """Streams, events and the like, for which torch.cpu has stand-ins."""
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        raise AttributeError(f"the CPU platform has no torch.<device>.{name} (recipe/skpo/cpu/platform.py)")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> CpuDeviceId:
        return CpuDeviceId()

    def device_count(self) -> int:
        return 1

    def set_device(self, device: object) -> None:
        return None

    def synchronize(self, device: object = None) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def ipc_collect(self) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

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

    def memory_reserved(self, device: object = None) -> int:
        return self.memory_allocated()

    def max_memory_allocated(self, device: object = None) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB, and lags behind
        return max(peak, self.memory_allocated())

    def max_memory_reserved(self, device: object = None) -> int:
        return self.max_memory_allocated()

    def reset_peak_memory_stats(self, device: object = None) -> None:
        return None

    def reset_accumulated_memory_stats(self, device: object = None) -> None:
        return None

    def set_per_process_memory_fraction(self, fraction: float, device: object = None) -> None:
        return None


_DEVICE_MODULE = CpuDeviceModule()


class CpuPlatform(PlatformBase):
    """The CPU as one logical accelerator per Ray "GPU"; selected by VERL_PLATFORM=cpu only."""

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
        """Every machine has a CPU: say no, so that this platform never wins verl's auto-detection."""
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

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Nothing to set: verl asks for expandable segments of the CUDA allocator before a weight sync."""

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_id: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """The variable Ray sets for its resource "GPU", see `ray_resource_name`."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        """A logical "GPU": start Ray with `num_gpus` = number of workers.

        verl counts GPU or NPU only (verl/single_controller/ray/base.py:230) and asks for the ids that Ray
        assigned (vllm_async_server.py:1348), which Ray keeps for its own accelerator names and not for custom
        resources.
        """
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        """No: weights then travel to vLLM through POSIX shared memory (BucketedWeightSender, use_shm)."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """What a vLLM server needs, for a Ray that was not started from our environment."""
        names = [*environment(num_threads=1, kv_cache_gib=1), "VLLM_PLUGINS"]
        return {name: os.environ[name] for name in names if name in os.environ and not name.startswith("RAY_")}

    def cudart(self) -> None:
        return None
