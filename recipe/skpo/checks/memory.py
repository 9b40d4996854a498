"""An estimate of the GPU memory of a run, before a model is loaded: parameters, optimizer, logits and vLLM's share."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, open_dict

from recipe.skpo.checks.gpus import actor_ranks
from recipe.skpo.devices import list_gpus
from recipe.skpo.engine.sizes import LOGIT_BYTES, LOGIT_CHUNK
from recipe.skpo.errors import ConfigError

GB = 10**9
_RESERVE = 4 * GB
"""CUDA contexts, communication buffers and activations of a checkpointed layer; a guess."""


@dataclass(frozen=True)
class Estimate:
    """Bytes per GPU.

    Attributes:
        training: parameters, gradients, optimizer and logits during an update; vLLM sleeps.
        rollout: what the actor keeps on the GPU while vLLM generates.
        serving: vLLM's share.
    """

    training: float
    rollout: float
    serving: float


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, entries of its vocabulary, width of its hidden states."""

    parameters: int
    vocabulary: int
    hidden: int


def estimate(config: DictConfig, size: ModelSize, gpu_bytes: int) -> Estimate:
    """Estimate the memory per GPU of the FSDP engine; a GPU has ``gpu_bytes``."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    settings = actor.fsdp_config
    ranks = actor_ranks(config).data_parallel
    width = 2 if str(settings.model_dtype) in ("bf16", "bfloat16", "fp16") else 4
    trained = 0.01 if model.lora_rank > 0 else 1.0
    weights = size.parameters * width / ranks
    # Gradients in the parameters' type, two moments of Adam in float32.
    gradients, moments = trained * weights, trained * size.parameters * 8 / ranks
    if config.packed_attention in ("varlen", "flex"):
        logits = float(LOGIT_BYTES * LOGIT_CHUNK * size.vocabulary)
    else:
        logits = 8.0 * actor.ppo_max_token_len_per_gpu * size.vocabulary if actor.use_dynamic_bsz else 0.0
    # One layer's parameters are gathered in bfloat16; the output layer is the largest.
    gathered = 2.0 * size.vocabulary * size.hidden
    kept = weights * (not settings.param_offload) + moments * (not settings.optimizer_offload)
    serving = config.actor_rollout_ref.rollout.gpu_memory_utilization * gpu_bytes
    return Estimate(weights + gradients + moments + logits + gathered + _RESERVE, kept + _RESERVE, serving)


def check_memory(config: DictConfig) -> None:
    """Refuse a model that cannot be trained on the GPUs, and offload the actor where it would be in vLLM's way.

    Nothing is estimated without a GPU whose memory is known on this machine, or for an engine other than FSDP.
    """
    known = [size for size in list_gpus() if size]
    actor = config.actor_rollout_ref.actor
    if config.platform.name != "gpu" or not known or actor.strategy not in ("fsdp", "fsdp2"):
        return
    gpu_bytes = min(known)
    size = model_size(config)
    needed = estimate(config, size, gpu_bytes)
    name = f"{size.parameters / GB:.1f}B parameters on {actor_ranks(config).world} GPUs of {gpu_bytes / GB:.0f} GB"
    if needed.training > gpu_bytes:
        raise ConfigError(
            f"actor_rollout_ref.model.path: {name} need about {needed.training / GB:.0f} GB each during an update; use "
            f"more GPUs, or LoRA (actor_rollout_ref.model.lora_rank=32 with actor.fsdp_config.model_dtype=bf16)"
        )
    if needed.rollout + needed.serving > gpu_bytes:
        with open_dict(config):
            actor.fsdp_config.param_offload = actor.fsdp_config.optimizer_offload = True
        left = estimate(config, size, gpu_bytes)
        if left.rollout + left.serving > gpu_bytes:
            raise ConfigError(
                f"actor_rollout_ref.rollout.gpu_memory_utilization: vLLM's {needed.serving / GB:.0f} GB leave no room "
                f"for the actor ({left.rollout / GB:.0f} GB with everything offloaded); lower it"
            )
        print(
            f"note: {name}: the actor's {needed.rollout / GB:.0f} GB and vLLM's {needed.serving / GB:.0f} GB do not "
            f"fit together, so parameters and optimizer are offloaded while vLLM generates "
            f"(actor.fsdp_config.param_offload, optimizer_offload)"
        )


def model_size(config: DictConfig) -> ModelSize:
    """Count the model's parameters from its config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = config.actor_rollout_ref.model
    described = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(described, trust_remote_code=model.trust_remote_code)
    text = described.get_text_config()
    return ModelSize(sum(p.numel() for p in empty.parameters()), text.vocab_size, text.hidden_size)
