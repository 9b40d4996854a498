"""verl's FSDP engine over packed sequences: no padding, shared prompts computed once, log-probs of responses only.

Importing the module (``model.external_lib``) registers the engine for VERL_ENGINE_DEVICE=packed. It chooses per model
and device between the variable-length kernels, FlexAttention and verl's own padded rows, and logs the choice. verl's
batching, FSDP, autocast and losses stay.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from transformers.utils.generic import ModelOutput
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.metric import Metric
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

from recipe.skpo.engine import attention
from recipe.skpo.engine.log_probs import in_rows, log_probs
from recipe.skpo.engine.packing import PackedSequence
from recipe.skpo.engine.sizes import BLOCK
from recipe.skpo.engine.slopes import SlopesEngine, wants_slopes
from recipe.skpo.method.rows import SLOPE_FIELD

logger = logging.getLogger(__name__)

DEVICE = "packed"
"""Name of this engine in verl's registry of engines."""
KIND_VARIABLE, SHARE_VARIABLE = "SKPO_PACKED_ATTENTION", "SKPO_SHARE_PREFIXES"
"""Environment variables by which the choices reach the actor's processes."""
_UNSUPPORTED = ("use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk")


@dataclass
class TokenScores(ModelOutput):
    """Output of the model: log-probs, entropies and slopes of the response tokens, float32 (response tokens,)."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    slopes: torch.Tensor | None = None


def _forward(
    self: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    packed: PackedSequence | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Compute a causal language model on ``packed``; without it, the model's own forward."""
    if packed is None:
        own = type(self).forward
        return own(self, input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs)
    hidden = self.model(input_ids=input_ids, position_ids=position_ids, packed=packed, use_cache=False)
    states = hidden.last_hidden_state.flatten(0, 1)[packed.predictors]
    scores = log_probs(self.lm_head, states, packed.labels, packed.temperature, with_slopes=packed.with_slopes)
    return TokenScores(*scores)


def use_packed(module: Any, kind: str) -> None:
    """Make a causal language model accept ``packed``, with the attention ``kind``.

    The instance is changed before FSDP wraps it, so that checkpoints and LoRA see the usual class.
    """
    module.set_attn_implementation(kind)
    module.forward = MethodType(_forward, module)


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=DEVICE)
class PackedEngine(SlopesEngine):
    """``FSDPEngineWithLMHead`` over packed sequences; returns log-probs and entropies row by row, as verl does."""

    kind: str | None = None
    """Attention in use: one of ``attention.VARLEN``, ``attention.BLOCKS``, or None for verl's padded rows."""
    share = True
    _positions = 0

    def _build_module(self) -> torch.nn.Module:
        module = super()._build_module()
        self.share = os.environ.get(SHARE_VARIABLE, "1") == "1"
        self.kind, reason = self._choose(module.config)
        if reason is not None and self.rank == 0:
            logger.warning("packed attention: %s; the actor uses %s", reason, self.kind or "padded rows with sdpa")
        if self.kind is not None:
            use_packed(module, self.kind)
        return module

    def _choose(self, config: Any) -> tuple[str | None, str | None]:
        """Return the attention, and why it is not the preferred one."""
        reason = attention.reason_against(config)
        if reason is not None:
            return None, reason
        if os.environ.get(KIND_VARIABLE, "auto") == "flex":
            return attention.BLOCKS, None
        dtype = PrecisionType.to_dtype((self.engine_config.mixed_precision or {}).get("param_dtype", "bf16"))
        reason = attention.kernel_reason(config, dtype, torch.device(get_device_name()))
        return (attention.VARLEN, None) if reason is None else (attention.BLOCKS, reason)

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """Call verl's method, keeping prompts whole in micro-batches if the trainer does (``force_group_size``)."""
        rows = int(tu.get_non_tensor_data(data=data, key="force_group_size", default=1))
        if rows > 1:
            budget = self._budget(data, rows) if self.kind is not None and self.share else None
            if budget is None:
                tu.assign_non_tensor(data, force_group_size=1)
            else:
                tu.assign_non_tensor(data, max_token_len_per_gpu=budget)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def _budget(self, data: TensorDict, rows: int) -> int | None:
        """Return the token budget for micro-batches of whole prompts, in verl's count: every row with its prompt.

        Micro-batches within it have at most ``max_token_len_per_gpu`` positions after sharing. None if one prompt alone
        has more, or if a rank has parts of prompts: then rows are split as verl splits them.
        """
        limit = int(data["max_token_len_per_gpu"])
        prompts, responses = data["prompts"].unbind(), data["responses"].unbind()
        separate, shared = 1, float("inf")
        ratio = 0.0
        if len(prompts) % rows == 0:
            groups = [slice(start, start + rows) for start in range(0, len(prompts), rows)]
            sizes = [_sizes(prompts[group], responses[group]) for group in groups]
            separate, shared = (max(counts) for counts in zip(*sizes, strict=True))
            ratio = max(after / before for before, after in sizes)
        # Every rank must decide alike, or they would wait for each other in the middle of a step.
        worst = torch.tensor([ratio, separate, shared], dtype=torch.float64, device=get_device_name())
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())
        ratio, separate, shared = worst.tolist()
        return None if shared > limit else int(max(limit / ratio, separate))

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """Model inputs of the packed sequence.

        Raises:
            ValueError: an option of verl that this engine does not know.
        """
        for name in _UNSUPPORTED:
            if tu.get_non_tensor_data(data=micro_batch, key=name, default=False):
                raise ValueError(f"packed attention cannot be used with {name}=true; set packed_attention=none")
        if self.kind is None:
            tu.assign_non_tensor(micro_batch, use_remove_padding=False)
            inputs, arguments = super().prepare_model_inputs(micro_batch)
            self._positions = inputs["input_ids"].numel()
            return inputs, arguments
        multiple = self.pad_to_length_bucket if self.pad_to_length else 1
        if self.kind == attention.BLOCKS:
            multiple = BLOCK * -(-multiple // BLOCK)
        device = micro_batch["input_ids"].device
        packed = PackedSequence(
            micro_batch["prompts"].cpu().unbind(),
            micro_batch["responses"].cpu().unbind(),
            share=self.share,
            multiple=multiple,
            device=device,
        )
        temperature = micro_batch["temperature"]
        if isinstance(temperature, torch.Tensor) and temperature.numel() > 1:
            temperature = temperature.float().repeat_interleave(micro_batch["responses"].offsets().diff())
        packed.temperature, packed.with_slopes = temperature, wants_slopes(micro_batch)
        self._positions = packed.positions
        return {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "packed": packed}, {}

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """``log_probs`` and, if requested, entropies and slopes: nested (rows, prompt + response), 0 on the prompt."""
        if self.kind is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        result = {"log_probs": in_rows(output.log_probs, micro_batch)}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            result["entropy"] = in_rows(output.entropy, micro_batch)
        if output.slopes is not None:
            result[SLOPE_FIELD] = in_rows(output.slopes, micro_batch)
        return result

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """Call verl's method and add the computed positions and the scored tokens to the metrics."""
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if loss_function is not None:
            counts: dict[str, Any] = {
                "packing/positions_sum": self._positions,
                "packing/tokens_sum": len(micro_batch["input_ids"].values()),
            }
            output["metrics"] |= Metric.from_dict(counts, aggregation="sum")
        return loss, output


def _sizes(prompts: Any, responses: Any) -> tuple[int, int]:
    """Return the tokens of some rows, and the positions left when equal prompts are shared."""
    written = sum(map(len, responses))
    distinct = {prompt.cpu().numpy().tobytes(): len(prompt) for prompt in prompts}
    return written + sum(map(len, prompts)), written + sum(distinct.values())


# Critics have nothing to share here, but look their engine up under the same name.
EngineRegistry.register(model_type="value_model", backend=["fsdp", "fsdp2"], device=DEVICE)(FSDPEngineWithValueHead)
