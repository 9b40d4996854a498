"""verl's FSDP engine with shared prompts and dense masks: rows that begin with the same prompt compute it once.

The G responses to one [s, q] (for GRPO, to one q) are laid out as one tree: the prompt, then every response. Trees are
packed side by side into sequences of equal length. A token attends to earlier tokens of its own branch and to the
prompt of its tree, and positions restart after the prompt, so every log-prob is that of the separate row.

The engine overrides two methods: micro-batch to model inputs, and model output to log-probs. Importing the module
(``model.external_lib``) registers it for VERL_ENGINE_DEVICE=shared_prefix. It needs an attention that takes a mask
(sdpa or eager) and padded rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import verl.utils.torch_functional as verl_functional
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from recipe.skpo.engine.log_probs import in_rows, slopes
from recipe.skpo.engine.slopes import wants_slopes
from recipe.skpo.method.rows import SLOPE_FIELD

DEVICE = "shared_prefix"
_PACKED = "skpo_packed"
_PADDING = -1
_UNSUPPORTED = ("use_remove_padding", "use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk")


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=DEVICE)
class SharedPrefixEngine(FSDPEngineWithLMHead):
    """``FSDPEngineWithLMHead`` over trees of rows; returns log-probs and entropies row by row, as verl does."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the model inputs of the packed rows.

        Raises:
            ValueError: an option of verl that this engine does not support.
        """
        for name in _UNSUPPORTED:
            if tu.get_non_tensor_data(data=micro_batch, key=name, default=False):
                raise ValueError(f"share_prefixes=true cannot be used with {name}=true; set share_prefixes=false")
        pad_token_id = tu.get_non_tensor_data(data=micro_batch, key="pad_token_id", default=0)
        packed = pack_rows(micro_batch["prompts"].unbind(), micro_batch["responses"].unbind(), pad_token_id)
        # Logits cost as much as half of a small model: compute them only where a response token is predicted.
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
        """Return log-probs and, if requested, entropies and slopes: nested (rows, prompt + response), else 0."""
        predictors, labels = output_args[_PACKED]
        logits = output.logits.flatten(0, 1)[predictors].float()
        temperature = micro_batch["temperature"]
        if isinstance(temperature, torch.Tensor) and temperature.numel() > 1:
            lengths = micro_batch["responses"].offsets().diff()
            temperature = temperature.float().repeat_interleave(lengths).unsqueeze(-1)
        logits = logits / temperature
        entropy = tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False)
        # A backward in place would overwrite the logits that the entropies are computed from.
        log_probs = verl_functional.logprobs_from_logits(logits, labels, inplace_backward=not entropy)
        result = {"log_probs": in_rows(log_probs, micro_batch)}
        if entropy:
            result["entropy"] = in_rows(verl_functional.entropy_from_logits(logits), micro_batch)
        if wants_slopes(micro_batch):
            result[SLOPE_FIELD] = in_rows(slopes(logits, labels), micro_batch)
        return result


# Critics have nothing to share here, but look their engine up under the same name.
EngineRegistry.register(model_type="value_model", backend=["fsdp", "fsdp2"], device=DEVICE)(FSDPEngineWithValueHead)


@dataclass(frozen=True)
class PackedRows:
    """Model inputs of some rows, and where in the model's output each response token is predicted.

    Attributes:
        input_ids, position_ids: int64 (sequences, length).
        attention_mask: bool (sequences, 1, length, length), True where the query (third axis) sees the key (fourth).
        predictors: int64 (response tokens,): position in the flattened (sequences * length) output that predicts each
            response token, in order of rows and, within a row, of tokens.
        labels: int64 (response tokens,): these tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    predictors: torch.Tensor
    labels: torch.Tensor


def pack_rows(prompts: Sequence[torch.Tensor], responses: Sequence[torch.Tensor], pad_token_id: int = 0) -> PackedRows:
    """Pack rows by shared prompt.

    Args:
        prompts: per row, int64 token ids (tokens,), at least one.
        responses: likewise.
        pad_token_id: fills the rest of a sequence; no token of a row attends to it.
    """
    trees: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        trees.setdefault(prompt.cpu().numpy().tobytes(), []).append(row)
    members = list(trees.values())
    lengths = [len(prompts[rows[0]]) + sum(len(responses[row]) for row in rows) for rows in members]
    length = max(lengths)
    starts, sequences = _first_fit(lengths, length)

    device = prompts[0].device
    input_ids = torch.full((sequences, length), pad_token_id, dtype=torch.int64, device=device)
    position_ids = torch.zeros_like(input_ids)
    tree = torch.full_like(input_ids, _PADDING)
    branch = torch.zeros_like(input_ids)
    predictors: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for number, (rows, (sequence, start)) in enumerate(zip(members, starts, strict=True)):
        prompt = prompts[rows[0]]
        end = start + len(prompt)
        input_ids[sequence, start:end] = prompt
        position_ids[sequence, start:end] = torch.arange(len(prompt), device=device)
        tree[sequence, start : start + lengths[number]] = number
        last_of_prompt = end - 1
        for index, row in enumerate(rows):
            begin, end = end, end + len(responses[row])
            input_ids[sequence, begin:end] = responses[row]
            position_ids[sequence, begin:end] = torch.arange(len(prompt), len(prompt) + end - begin, device=device)
            branch[sequence, begin:end] = index + 1
            # The prompt's last token predicts the first one of every response.
            own = torch.arange(begin - 1, end - 1, device=device)
            own[0] = last_of_prompt
            predictors[row] = sequence * length + own

    # In place: with long rows the mask is most of the memory.
    visible = branch.unsqueeze(2) == branch.unsqueeze(1)
    visible |= branch.unsqueeze(1) == 0
    visible &= tree.unsqueeze(2) == tree.unsqueeze(1)
    return PackedRows(
        input_ids,
        position_ids,
        visible.tril_().unsqueeze(1),
        torch.cat(predictors),
        torch.cat(list(responses)),
    )


def _first_fit(lengths: Sequence[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """Return sequence and offset of each part, longest first, and the number of sequences."""
    used: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        sequence = next((number for number, taken in enumerate(used) if taken + lengths[index] <= capacity), len(used))
        if sequence == len(used):
            used.append(0)
        places[index] = (sequence, used[sequence])
        used[sequence] += lengths[index]
    return places, len(used)
