"""Start-up checks: what can be known to be wrong before a model is loaded, each as one line that names the fix."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.skpo.checks.engine import check_model_engine, choose_engine, flash_attention_installed
from recipe.skpo.checks.gpus import check_ranks, check_token_budgets
from recipe.skpo.checks.options import check_options
from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import SkpoSettings

METHOD_SETTINGS = {
    "rollout": [
        *("candidates", "split", "split_low", "split_high", "boundaries", "selection", "skip", "chat_quote"),
        *("upstream_reward", "initial_length", "trees_per_step", "trees_max_mb"),
    ],
    "objective": ["weight_up", "weight_down", "clip_low", "clip_high", "downstream_aggregation"],
    "tracker": ["tracker"],
    "curriculum": ["curriculum"],
}
"""Keys below ``skpo`` by the part of a method that reads them; all others are read by every method."""


def check_given(config: DictConfig, overrides: Iterable[str]) -> None:
    """Refuse values with which the rest of the config cannot be computed, and settings that the method ignores.

    Raises:
        ConfigError: naming the config path, the value and what it must be.
    """
    check_method_settings(config, overrides)
    check_numbers(config)


def check_method_settings(config: DictConfig, overrides: Iterable[str]) -> None:
    """Refuse settings given on the command line that the chosen method would ignore.

    Raises:
        ConfigError: naming the setting and the method.
    """
    ignored = {key for part, keys in METHOD_SETTINGS.items() if part not in config.method.uses for key in keys}
    for override in overrides:
        match = re.match(r"[+~]{0,2}skpo\.(\w+)", override)
        if match and match[1] in ignored:
            raise ConfigError(f"skpo.{match[1]}: has no effect with method={config.method.name}; leave it out")


@dataclass(frozen=True)
class Number:
    """Bounds of a number in verl's part of the config.

    Attributes:
        whole: an integer is needed.
        low, high: bounds; ``low`` itself is outside where ``above`` is set.
        none: null is allowed.
    """

    whole: bool
    low: float
    above: bool = False
    high: float = math.inf
    none: bool = False

    def holds(self, value: Any) -> bool:
        """Return whether the value is such a number."""
        if value is None:
            return self.none
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        """Put the bounds into words."""
        text = "a whole number" if self.whole else "a number"
        if self.low > -math.inf:
            text += (" above " if self.above else " of at least ") + f"{self.low:g}"
        text += f" and at most {self.high:g}" if self.high < math.inf else ""
        return text + (", or null" if self.none else "")


_COUNT = Number(whole=True, low=1)
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
NUMBERS = {
    "data.train_batch_size": _COUNT,
    # Not above 0 means all.
    "data.train_max_samples": Number(whole=True, low=-1),
    "data.val_max_samples": Number(whole=True, low=-1),
    "data.max_prompt_length": _COUNT,
    "data.max_response_length": _COUNT,
    f"{_ACTOR}.ppo_mini_batch_size": _COUNT,
    f"{_ACTOR}.ppo_epochs": _COUNT,
    f"{_ACTOR}.entropy_coeff": Number(whole=False, low=-math.inf),
    f"{_ACTOR}.kl_loss_coef": Number(whole=False, low=0),
    f"{_ACTOR}.optim.lr": Number(whole=False, low=0, above=True),
    f"{_ACTOR}.optim.weight_decay": Number(whole=False, low=0),
    f"{_ACTOR}.optim.clip_grad": Number(whole=False, low=0, above=True),
    f"{_ROLLOUT}.temperature": Number(whole=False, low=0, above=True),
    f"{_ROLLOUT}.top_p": Number(whole=False, low=0, above=True, high=1),
    f"{_ROLLOUT}.gpu_memory_utilization": Number(whole=False, low=0, above=True, high=1),
    f"{_ROLLOUT}.tensor_model_parallel_size": _COUNT,
    f"{_ROLLOUT}.max_model_len": Number(whole=True, low=1, none=True),
    "trainer.nnodes": _COUNT,
    "trainer.n_gpus_per_node": _COUNT,
    "trainer.total_epochs": _COUNT,
    "trainer.total_training_steps": Number(whole=True, low=1, none=True),
    # Not above 0 means never.
    "trainer.save_freq": Number(whole=True, low=-1),
    "trainer.test_freq": Number(whole=True, low=-1),
    "trainer.max_actor_ckpt_to_keep": Number(whole=True, low=1, none=True),
}
"""Config path to its bounds: outside of them verl accepts the value, and later fails or trains nothing."""


DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""Types that vLLM computes in."""


def check_numbers(config: DictConfig) -> None:
    """Refuse sizes, rates and frequencies that no run can have.

    Raises:
        ConfigError: naming the config path, the value and what it must be.
    """
    platform = (
        {"platform.num_threads": _COUNT, "platform.kv_cache_gib": _COUNT} if config.platform.name == "cpu" else {}
    )
    for path, number in (NUMBERS | platform).items():
        value = OmegaConf.select(config, path)
        if not number.holds(value):
            raise ConfigError(f"{path}: is {value!r}, must be {number}")


def check_config(config: DictConfig, settings: SkpoSettings, overrides: Sequence[str] = ()) -> None:
    """Refuse options that are not installed, that nothing would read, or that cannot be trained with together.

    Args:
        config: resolved.
        settings: its ``skpo`` node.
        overrides: of the command line.

    Raises:
        ConfigError: naming the config path, what it is and what it must be.
    """
    check_model_engine(config)
    _check_combinations(config, settings)
    check_options(config, overrides)
    check_loggers(config)


def _check_combinations(config: DictConfig, settings: SkpoSettings) -> None:
    required: dict[str, tuple[Any, str]] = {
        "algorithm.use_kl_in_reward": (False, "rewards stay plain; for a KL loss set actor.use_kl_loss"),
        "algorithm.rollout_correction.rollout_rs": (None, "groups are normalised by all of their samples"),
        "actor_rollout_ref.rollout.calculate_log_probs": (True, "rollout and actor are compared by their log-probs"),
        "data.dataloader_num_workers": (0, "prefetched prompts would be lost to a checkpoint"),
        "reward.reward_model.enable": (False, "rewards are rules, computed while others generate"),
        "trainer.use_v1": (True, "the trainers are V1 trainers"),
        "trainer.critic_warmup": (0, "there is no critic; steps without an update would still move the trackers"),
        "actor_rollout_ref.rollout.name": ("vllm", "the rollout is written for vLLM's server"),
        "trainer.default_hdfs_dir": (None, "only a local folder gets the whole checkpoint, trackers included"),
        "actor_rollout_ref.actor.checkpoint.async_save": (False, "it leaves no mark of the checkpoint to resume from"),
    }
    if config.method.name == "skpo":
        required |= {
            "algorithm.adv_estimator": ("skpo", "SKPO computes its own advantages"),
            "algorithm.filter_groups.enable": (False, "filtered groups would tear a segment from its responses"),
            f"{_ACTOR}.policy_loss.loss_mode": ("skpo", "choose another loss with method=<name>"),
            "actor_rollout_ref.actor.shuffle": (False, "an update must see whole prompts"),
            "actor_rollout_ref.rollout.n": (
                settings.group_size + 1,
                "one row per sibling and one for the segment; set skpo.group_size",
            ),
        }
    choose_engine(config, flash_attention=flash_attention_installed())
    if config.actor_rollout_ref.rollout.dtype not in DTYPES:
        raise ConfigError(
            f"actor_rollout_ref.rollout.dtype: is {config.actor_rollout_ref.rollout.dtype!r}, must be one of "
            f"{', '.join(DTYPES)}"
        )
    if config.platform.name == "cpu" and config.actor_rollout_ref.actor.strategy == "fsdp":
        raise ConfigError("actor_rollout_ref.actor.strategy: is fsdp, which refuses modules on a CPU; use fsdp2")
    trainers = {"skpo": "skpo", "spo": "skpo_spo"}
    wanted_trainer = trainers.get(config.method.name, "skpo_baseline")
    required["trainer.v1.trainer_mode"] = (wanted_trainer, "choose the method with method=<name>")
    for path, (wanted, reason) in required.items():
        value = OmegaConf.select(config, path)
        if value != wanted:
            raise ConfigError(f"{path}: is {value}, must be {wanted}: {reason}")
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if batch % mini:
        raise ConfigError(
            f"data.train_batch_size: {batch} prompts do not split into mini-batches of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}"
        )
    if config.budget.match == "tokens" and (type(config.budget.tokens) is not int or config.budget.tokens < 1):
        raise ConfigError(
            f"budget.tokens: is {config.budget.tokens}; give the number of tokens to generate, such as the last "
            f"skpo/tokens/generated_so_far in the metrics.jsonl of the run to compare with"
        )
    if config.budget.match == "steps" and config.budget.tokens is not None:
        raise ConfigError(
            f"budget.tokens: is {config.budget.tokens} with budget=steps; give budget=tokens too, or leave it out"
        )
    if settings.curriculum.enable and "curriculum" in config.method.uses:
        fetched = config.data.get("gen_batch_size") or batch
        if fetched != batch or config.trainer.v1.sampler.sync_refill_failed_groups:
            raise ConfigError(
                "skpo.curriculum.enable: must be false where prompts are fetched in other numbers than a batch "
                "(data.gen_batch_size, trainer.v1.sampler.sync_refill_failed_groups)"
            )
    if config.actor_rollout_ref.rollout.full_determinism and not settings.seed_requests:
        raise ConfigError(
            "skpo.seed_requests: is false with full_determinism=true, so vLLM would give all requests of a server the "
            "same seed and all siblings would be the same response; set it to true"
        )
    if config.method.name == "skpo":
        _check_context(config, settings)
    check_ranks(config)
    check_token_budgets(config)


def _check_context(config: DictConfig, settings: SkpoSettings) -> None:
    context = config.actor_rollout_ref.rollout.max_model_len
    segment = max(1, int(settings.split_high * config.data.max_response_length))
    longest = config.data.max_prompt_length + segment
    if context is None:
        raise ConfigError(
            "actor_rollout_ref.rollout.max_model_len: is None; give the tokens that [s, q] and a response "
            "may take together"
        )
    if context <= longest:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_model_len: {context} leaves no room for a response after the longest "
            f"skip prompt ({config.data.max_prompt_length} problem + {segment} segment tokens); raise it, or lower "
            f"data.max_prompt_length or data.max_response_length"
        )
    if context < longest + config.data.max_response_length:
        print(
            f"note: after the longest skip prompt ({longest} tokens) a response has {context - longest} of "
            f"data.max_response_length={config.data.max_response_length} tokens within max_model_len={context}"
        )


LOGGERS = {
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "clearml": "clearml",
    "trackio": "trackio",
    "tensorboard": "tensorboard",
}
"""verl's loggers that need a package, to its name."""


def check_loggers(config: DictConfig) -> None:
    """Refuse loggers that verl does not know or that are not installed.

    Raises:
        ConfigError: naming the logger.
    """
    from verl.utils.tracking import Tracking

    given = config.trainer.logger
    if given is None:
        raise ConfigError("trainer.logger: is null; name loggers, such as [console,tensorboard], or give [] for none")
    for name in [given] if isinstance(given, str) else list(given):
        if name not in Tracking.supported_backend:
            raise ConfigError(f"trainer.logger: {name} is unknown; known are {', '.join(Tracking.supported_backend)}")
        if name in LOGGERS and find_spec(LOGGERS[name]) is None:
            raise ConfigError(
                f"trainer.logger: {name} needs the package {LOGGERS[name]}; install it, or leave {name} out"
            )


def check_folders(config: DictConfig) -> None:
    """Refuse folders of the run that cannot be made or written.

    Raises:
        ConfigError: naming the config path and what is in the way.
    """
    for path in ("output_dir", "trainer.default_local_dir"):
        folder = Path(OmegaConf.select(config, path))
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise ConfigError(f"{path}: {folder} cannot be made: {there} is a file; give another folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"{path}: {folder} cannot be written: no permission for {there}; give another folder")
