"""How many GPUs a run uses, and what must divide by their number: counted before a model is loaded."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from recipe.skpo.checks.engine import sequence_parallel_size
from recipe.skpo.devices import list_gpus
from recipe.skpo.errors import ConfigError


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Count the GPUs that a process started here can use; CUDA_VISIBLE_DEVICES narrows them."""
    present = len(list_gpus())
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    return present if chosen is None else min(present, len([name for name in chosen.split(",") if name.strip()]))


def gpus_to_use(prompts_per_update: int, rows_per_prompt: int, per_replica: int = 1, visible: int | None = None) -> int:
    """Return the largest number of GPUs of this machine over which the rows of an update split evenly, at least 1.

    Args:
        prompts_per_update: ``actor_rollout_ref.actor.ppo_mini_batch_size``.
        rows_per_prompt: ``actor_rollout_ref.rollout.n``.
        per_replica: GPUs of an inference server, ``tensor_model_parallel_size``.
        visible: GPUs to choose from; counted if None.
    """
    visible = visible_gpus() if visible is None else visible
    rows = prompts_per_update * rows_per_prompt
    fitting = [number for number in range(1, visible + 1) if rows % number == 0 and number % per_replica == 0]
    return max(fitting, default=max(1, visible))


@dataclass(frozen=True)
class Ranks:
    """Processes of the actor: all of them, and how many hold different rows."""

    world: int
    data_parallel: int


def actor_ranks(config: DictConfig) -> Ranks:
    """Count the ranks of the actor, by its engine."""
    trainer, actor = config.trainer, config.actor_rollout_ref.actor
    world = int(trainer.nnodes) * int(trainer.n_gpus_per_node)
    names = {"ulysses_sequence_parallel_size": sequence_parallel_size(config)}
    if actor.strategy == "megatron":
        parts = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        names = {part: int(actor.megatron.get(part) or 1) for part in parts}
    together = math.prod(names.values())
    if world % together:
        sizes = ", ".join(f"{name}={size}" for name, size in names.items() if size > 1)
        raise ConfigError(
            f"trainer.n_gpus_per_node: {world} GPUs ({trainer.nnodes} x {trainer.n_gpus_per_node}) do not split into "
            f"groups of {together} ({sizes}); change one of them"
        )
    return Ranks(world, world // together)


def check_ranks(config: DictConfig) -> None:
    """Refuse updates that do not split over the data-parallel ranks, and servers that do not split over the GPUs."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    ranks = actor_ranks(config)
    rows = actor.ppo_mini_batch_size * rollout.n
    if rows % ranks.data_parallel:
        step = ranks.data_parallel // math.gcd(ranks.data_parallel, rollout.n)
        above = -(-actor.ppo_mini_batch_size // step) * step
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size: {actor.ppo_mini_batch_size} prompts of {rollout.n} rows are "
            f"{rows} rows per update, which do not split over {ranks.data_parallel} data-parallel ranks; set it to "
            f"{above} (and data.train_batch_size to a multiple), or use another number of GPUs"
        )
    server = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    if ranks.world % server:
        raise ConfigError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size: inference servers of {server} GPUs do not split "
            f"over {ranks.world} GPUs; set a divisor of {ranks.world}"
        )


def check_token_budgets(config: DictConfig) -> None:
    """Refuse micro-batches that cannot hold the longest row: verl finds out in the step that meets one."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    longest = config.data.max_prompt_length + config.data.max_response_length
    if config.method.name == "skpo":
        longest += max(1, int(config.skpo.split_high * config.data.max_response_length))
    if rollout.max_model_len is not None:
        longest = min(longest, rollout.max_model_len)
    ranks = sequence_parallel_size(config)
    for name, used in (
        ("actor.ppo_max_token_len_per_gpu", actor.use_dynamic_bsz),
        ("rollout.log_prob_max_token_len_per_gpu", rollout.log_prob_use_dynamic_bsz),
    ):
        tokens = OmegaConf.select(config.actor_rollout_ref, name)
        if used and tokens * ranks < longest:
            raise ConfigError(
                f"actor_rollout_ref.{name}: is {tokens}, but the longest row has {longest} tokens (problem, segment, "
                f"response, within max_model_len); set at least {-(-longest // ranks)}"
            )
