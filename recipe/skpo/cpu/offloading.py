"""Let FSDP2 keep a model in main memory without pinning it, which needs an accelerator.

verl offloads a reference policy so (verl/workers/engine/fsdp/transformer_impl.py:462), and no configuration reaches it.
The module is imported in the actor's processes (``model.external_lib``), when verl has imported its engines.
"""

from collections.abc import Callable
from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy

from recipe.skpo.cpu.override import FunctionOverride


def _unpinned(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_fsdp2(model: Any, fsdp_kwargs: dict[str, Any], config: Any) -> Any:
        if fsdp_kwargs.get("offload_policy") is not None:
            fsdp_kwargs = fsdp_kwargs | {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
        return original(model, fsdp_kwargs, config)

    return apply_fsdp2


OVERRIDE = FunctionOverride(
    module="verl.utils.fsdp_utils",
    function="apply_fsdp2",
    parameters=("model", "fsdp_kwargs", "config"),
    place="verl/utils/fsdp_utils.py:573 of verl 0.9.1",
    wrap=_unpinned,
)
OVERRIDE.install()
