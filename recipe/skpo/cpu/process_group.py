"""Run the process group of verl's workers on gloo alone.

verl asks torch for "cpu:gloo,{device}:{backend}" (verl/utils/distributed.py:89). On the CPU that is
"cpu:gloo,cpu:gloo", which torch refuses as a duplicate device. No configuration reaches the string, but the function
takes a backend, which its caller (verl/workers/engine_workers.py:89) omits.

verl's stand-alone SFT trainer builds the same string in `initialize_global_process_group`, which takes no backend; it
is not covered.
"""

from collections.abc import Callable
from typing import Any

from recipe.skpo.cpu.override import FunctionOverride

BACKEND = "cpu:gloo"


def _on_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_global_process_group_ray(timeout_second: float | None = None, backend: str | None = None) -> Any:
        return original(timeout_second=timeout_second, backend=backend or BACKEND)

    return initialize_global_process_group_ray


OVERRIDE = FunctionOverride(
    module="verl.utils.distributed",
    function="initialize_global_process_group_ray",
    parameters=("timeout_second", "backend"),
    place="verl/utils/distributed.py:83 of verl 0.9.1",
    wrap=_on_gloo,
)
