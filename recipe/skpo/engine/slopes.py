"""verl's FSDP engine, which also returns entropy slopes if the trainer requests them (``polarity.enable``).

Importing the module (``model.external_lib``) registers it for VERL_ENGINE_DEVICE=slopes. ``fsdp.PackedEngine`` is a
subclass, because it leaves models that it cannot pack to verl's padded rows.
"""

from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from recipe.skpo.engine.log_probs import slopes
from recipe.skpo.method.rows import SLOPE_FIELD, WANT_SLOPES

DEVICE = "slopes"
"""Name of this engine in verl's registry of engines."""


def wants_slopes(micro_batch: TensorDict) -> bool:
    """Tell whether the trainer requests entropy slopes, as it does with the old log-probs."""
    return bool(tu.get_non_tensor_data(data=micro_batch, key=WANT_SLOPES, default=False))


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=DEVICE)
class SlopesEngine(FSDPEngineWithLMHead):
    """``FSDPEngineWithLMHead`` with entropy slopes."""

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """Return verl's outputs and, if requested, ``SLOPE_FIELD``: nested (rows, prompt + response), float32."""
        found = {}
        if wants_slopes(micro_batch):
            offsets, labels = micro_batch["input_ids"].offsets(), output_args["input_ids_rmpad_rolled"]
            if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
                values = slopes(output.logits.squeeze(0), labels, output_args["temperature_rmpad"])
                values = self._gather_and_unpad_packed(values, output_args["pad_size"])
            else:
                rows = zip(
                    output.logits, labels.split(offsets.diff().tolist()), output_args["temperature"], strict=True
                )
                values = torch.cat([slopes(logits[: len(row)], row, heat) for logits, row, heat in rows])
            found[SLOPE_FIELD] = torch.nested.nested_tensor_from_jagged(values, offsets)
        return found | super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)


# Critics have no slopes, but look their engine up under the same name.
EngineRegistry.register(model_type="value_model", backend=["fsdp", "fsdp2"], device=DEVICE)(FSDPEngineWithValueHead)
