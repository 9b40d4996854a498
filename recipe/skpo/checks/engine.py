"""Which engine computes the actor's rows, by ``packed_attention``, ``share_prefixes`` and ``model_engine``."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.skpo.checks import ACTOR, CORRECTION, MODEL, ROLLOUT
from recipe.skpo.errors import ConfigError

DENSE_MASK_GB = 2
"""Largest mask of ``packed_attention=dense``; building it takes twice as much."""
KINDS = ("auto", "varlen", "flex", "dense", "none")
ATTENTION = f"{MODEL}.override_config.attn_implementation"


@dataclass(frozen=True)
class EngineChoice:
    """The engine of the actor.

    Attributes:
        device: name in verl's registry of engines; None for verl's own engine.
        library: module that registers it.
        kind: ``packed_attention`` as resolved.
        share: whether a prompt that several rows begin with is computed once.
        reason: why ``auto`` did not choose packed attention, None if it did or was not asked.
    """

    device: str | None
    library: str | None
    kind: str
    share: bool
    reason: str | None = None


def flash_attention_installed() -> bool:
    """Return whether transformers can use flash-attn 2; a package that only carries its name does not count."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    return is_flash_attn_2_available()


def choose_engine(config: DictConfig, flash_attention: bool) -> EngineChoice:
    """Choose the engine by the options and by whether flash-attn is installed; refuse options that contradict."""
    choice = _choose(config, flash_attention)
    if choice.device is None and config.polarity.enable:
        return replace(choice, device="slopes", library="recipe.skpo.engine.slopes")
    return choice


def _choose(config: DictConfig, flash_attention: bool) -> EngineChoice:
    kind, share = config.packed_attention, config.share_prefixes
    if kind not in KINDS:
        raise ConfigError(f"packed_attention: is {kind}, must be one of {', '.join(KINDS)}")
    if share not in (True, False, "auto"):
        raise ConfigError(f"share_prefixes: is {share}, must be true, false or auto")
    parallel = sequence_parallel_size(config)
    attention = OmegaConf.select(config, ATTENTION)
    fsdp = config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2")
    if fsdp and parallel > 1 and (not flash_attention if attention is None else "flash" not in attention):
        # verl gathers the shards of a sequence in flash attention only: any other would attend within its own shard.
        raise ConfigError(
            f"{ACTOR}.ulysses_sequence_parallel_size: is {parallel}, but sequence parallelism needs flash attention "
            f"(flash-attn is {'installed' if flash_attention else 'not installed'}, attn_implementation is "
            f"{attention}); set it to 1, or install flash-attn"
        )
    obstacle = _obstacle(config, kind)
    if kind == "auto":
        if obstacle is None and flash_attention and share is not True:
            obstacle = "flash-attn is installed"
        if obstacle is not None:
            if share is True:
                raise ConfigError(f"share_prefixes: is true, but {obstacle}; set it to auto or false")
            return EngineChoice(None, None, "none", False, obstacle)
        kind = "varlen"
    if kind == "none":
        if share is True:
            raise ConfigError("share_prefixes: is true, which packed_attention=none cannot do; set it to auto or false")
        return EngineChoice(None, None, "none", False)
    if obstacle is not None:
        raise ConfigError(f"packed_attention: is {kind}, but {obstacle}; change that, or set packed_attention=none")
    if kind == "dense":
        if share is False:
            raise ConfigError(
                "packed_attention: is dense, which is for shared prompts; set share_prefixes=true, or none"
            )
        return EngineChoice("shared_prefix", "recipe.skpo.engine.dense", kind, True)
    return EngineChoice("packed", "recipe.skpo.engine.fsdp", kind, share is not False)


def _obstacle(config: DictConfig, kind: str) -> str | None:
    """Say why the engines of this recipe cannot be used; None if they can."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if actor.strategy not in ("fsdp", "fsdp2"):
        return f"{ACTOR}.strategy is {actor.strategy}, and only fsdp and fsdp2 can pack rows"
    if sequence_parallel_size(config) > 1:
        return "ulysses_sequence_parallel_size is above 1, which packed attention does not know"
    if model.get("use_fused_kernels"):
        return f"{MODEL}.use_fused_kernels is true, which computes log-probs in its own way"
    if actor.get("calculate_sum_pi_squared"):
        return f"{ACTOR}.calculate_sum_pi_squared is true, which needs all logits"
    attention = OmegaConf.select(config, ATTENTION)
    if kind == "dense":
        if attention not in ("sdpa", "eager"):
            return f"its masks need +{ATTENTION}=sdpa (is {attention})"
        if model.use_remove_padding:
            return f"{MODEL}.use_remove_padding is true, but it packs rows in its own way"
        gigabytes = _dense_mask_gb(config)
        if gigabytes > DENSE_MASK_GB:
            return (
                f"the mask of a micro-batch may take {gigabytes:.1f} GB, more than {DENSE_MASK_GB} (a byte per pair of "
                f"tokens of {ACTOR}.ppo_max_token_len_per_gpu or {ROLLOUT}.log_prob_max_token_len_per_gpu)"
            )
    elif attention not in (None, "sdpa"):
        return f"{ATTENTION} is {attention}"
    elif not model.use_remove_padding:
        return f"{MODEL}.use_remove_padding is false"
    return None


def _dense_mask_gb(config: DictConfig) -> float:
    """Gigabytes of the largest dense mask: a byte per pair of tokens of a micro-batch."""
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    row, rows = data.max_prompt_length + data.max_response_length, data.train_batch_size * rollout.n
    budgets = (
        actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else row * (actor.ppo_micro_batch_size_per_gpu or 1),
        rollout.log_prob_max_token_len_per_gpu
        if rollout.log_prob_use_dynamic_bsz
        else row * (rollout.log_prob_micro_batch_size_per_gpu or 1),
    )
    return min(max(budgets), row * rows) ** 2 / 1e9


def sequence_parallel_size(config: Any) -> int:
    """Return the Ulysses ranks per sequence: the larger value, since verl has two options for it."""
    nodes = (f"{ACTOR}.{part}ulysses_sequence_parallel_size" for part in ("", "fsdp_config."))
    return max(1, *(int(OmegaConf.select(config, node) or 1) for node in nodes))


def check_polarity(config: DictConfig) -> None:
    """Refuse entropy polarity where the pass of the old log-probs cannot give it the slopes of the entropy."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    reason = None
    if actor.strategy not in ("fsdp", "fsdp2"):
        reason = f"{ACTOR}.strategy is {actor.strategy}, and only fsdp and fsdp2 give the slopes of the entropy"
    elif model.get("use_fused_kernels"):
        reason = f"{MODEL}.use_fused_kernels is true, which never has the probabilities of the vocabulary"
    elif config.algorithm.rollout_correction.bypass_mode:
        reason = f"{CORRECTION}.bypass_mode is true, so that no old log-probs and entropies are computed"
    if config.polarity.enable and reason is not None:
        raise ConfigError(f"polarity.enable: is true, but {reason}; set one of them back")


ENGINES = {"megatron": "megatron.core", "torchtitan": "torchtitan", "veomni": "veomni"}
"""verl's engines that need a package, to its module."""


def check_model_engine(config: DictConfig) -> None:
    """Refuse an engine that cannot run on this platform or is not installed."""
    engine = config.model_engine
    if engine not in ENGINES:
        return
    if config.platform.name == "cpu":
        raise ConfigError(f"model_engine: is {engine}, which needs GPUs; leave it out on the CPU platform")
    package = ENGINES[engine]
    if find_spec(package.partition(".")[0]) is None or find_spec(package) is None:
        raise ConfigError(f"model_engine: {engine} needs the package {package}, which is not installed; install it")
