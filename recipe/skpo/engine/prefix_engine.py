"""verl's FSDP engine with shared prompts: rows of a micro-batch that begin with the same prompt compute it once.

verl 0.9.1 knows ``use_prefix_grouper`` in its older trainer only.  This engine overrides the two methods that turn a
micro-batch into model inputs and the model's output into log-probs; verl's batching, FSDP, autocast and losses stay.
Importing the module (``model.external_lib``) registers it for VERL_ENGINE_DEVICE=shared_prefix.  It needs an attention
that takes a mask (sdpa or eager) and rows that are padded, not packed.
"""

from typing import Any

import torch
import verl.utils.torch_functional as verl_functional
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from recipe.skpo.engine.prefix_packing import pack_rows
from recipe.skpo.engine.rows import in_rows

DEVICE = "shared_prefix"
_PACKED = "skpo_packed"
_UNSUPPORTED = ("use_remove_padding", "use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk")


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=DEVICE)
class SharedPrefixEngine(FSDPEngineWithLMHead):
    """``FSDPEngineWithLMHead`` over trees of rows; log-probs and entropies come back row by row, as verl's do."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """Model inputs of the packed rows.

        Raises:
            ValueError: an option of verl that this engine does not know.
        """
        for name in _UNSUPPORTED:
            if tu.get_non_tensor_data(data=micro_batch, key=name, default=False):
                raise ValueError(f"share_prefixes=true cannot be used with {name}=true; set share_prefixes=false")
        pad_token_id = tu.get_non_tensor_data(data=micro_batch, key="pad_token_id", default=0)
        packed = pack_rows(micro_batch["prompts"].unbind(), micro_batch["responses"].unbind(), pad_token_id)
        # Logits are as dear as half of a small model: only where a response token is predicted.
        length = packed.input_ids.shape[1]
        columns, column = torch.unique(packed.predictors % length, return_inverse=True)
        predictors = packed.predictors // length * len(columns) + column
        model_inputs = {
            "input_ids": packed.input_ids,
            "attention_mask": packed.attention_mask,
            "position_ids": packed.position_ids,
            "logits_to_keep": columns,
        }
        return model_inputs, {_PACKED: (predictors, packed.labels)}

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """``log_probs`` and, if asked for, ``entropy``: nested (rows, prompt + response), 0 on the prompt."""
        predictors, labels = output_args[_PACKED]
        logits = output.logits.flatten(0, 1)[predictors].float()
        temperature = micro_batch["temperature"]
        if isinstance(temperature, torch.Tensor) and temperature.numel() > 1:
            lengths = micro_batch["responses"].offsets().diff()
            temperature = temperature.float().repeat_interleave(lengths).unsqueeze(-1)
        logits = logits / temperature
        result = {"log_probs": in_rows(verl_functional.logprobs_from_logits(logits, labels), micro_batch)}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            result["entropy"] = in_rows(verl_functional.entropy_from_logits(logits), micro_batch)
        return result


# Critics have nothing to share here, but look their engine up under the same name.
EngineRegistry.register(model_type="value_model", backend=["fsdp", "fsdp2"], device=DEVICE)(FSDPEngineWithValueHead)
