"""The vLLM side: a linear layer that can take a second set of weights, a wait that sleeps. No engine is started."""

import inspect
from typing import Any

SCRIPT = """
import os, torch
from vllm.distributed.device_communicators import shm_broadcast
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from recipe.skpo.cpu.vllm_plugin import OVERRIDE, WAIT, register

def sync(layer, method, weight):
    with torch.no_grad():
        layer.weight.copy_(weight)                             # what model.load_weights comes down to
    method.process_weights_after_loading(layer)

def output_is_right(layer, method, weight):
    x = torch.randn(5, 64)
    return torch.allclose(method.apply(layer, x), x @ weight.T, atol=1e-4)

method = UnquantizedLinearMethod()
weights = [torch.randn(32, 64) for _ in range(3)]

os.environ["VLLM_BATCH_INVARIANT"] = "1"
register()                                                     # VERL_PLATFORM is not set: nothing happens
assert not OVERRIDE.is_installed() and not WAIT.is_installed()
assert os.environ["VLLM_BATCH_INVARIANT"] == "1"
layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
sync(layer, method, weights[0])
assert output_is_right(layer, method, weights[0])
assert layer.weight.numel() == 0, "vLLM keeps the weight by itself now: the override is no longer needed"

os.environ["VERL_PLATFORM"] = "cpu"
register()
register()
assert OVERRIDE.is_installed()
from vllm import envs
assert envs.VLLM_BATCH_INVARIANT is False, "its kernels are Triton's"
layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
for weight in weights:
    sync(layer, method, weight)
    assert torch.equal(layer.weight, weight)
    assert output_is_right(layer, method, weight)
assert WAIT.is_installed()
from vllm.distributed import utils
assert shm_broadcast.sched_yield is utils.sched_yield, "engine and worker still spin while they wait for each other"
print("all good")
"""


def test_weights_can_be_synced_again_and_again_and_a_wait_sleeps(run_python: Any) -> None:
    result = run_python(SCRIPT, VLLM_TARGET_DEVICE="cpu", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all good\n")


def test_upstream_function_is_the_one_we_know() -> None:
    """Read from the file: importing vLLM into the test process takes seconds and changes its environment."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    from recipe.skpo.cpu.vllm_plugin import OVERRIDE

    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    layers = Path(spec.submodule_search_locations[0]) / "model_executor" / "layers"
    functions = {
        node.name: node
        for node in ast.parse((layers / "utils.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    arguments = functions[OVERRIDE.function].args.args
    assert tuple(argument.arg for argument in arguments) == OVERRIDE.parameters
    # imported inside the method, at each call: replacing the module's attribute reaches it
    source = inspect.cleandoc((layers / "linear.py").read_text())
    assert "            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm\n" in source
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=True)" in source
