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

from recipe.skpo.checks import ACTOR, ROLLOUT
from recipe.skpo.checks.engine import check_model_engine, check_polarity, choose_engine, flash_attention_installed
from recipe.skpo.checks.gpus import check_ranks, check_token_budgets
from recipe.skpo.checks.options import check_options
from recipe.skpo.checks.paths import nearest_existing
from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import SkpoSettings

METHOD_SETTINGS = {
    "rollout": [
        *("candidates", "split", "split_low", "split_high", "boundaries", "selection", "skip", "chat_quote"),
        *("upstream_reward", "initial_length", "trees_per_step", "trees_per_validation", "trees_max_mb"),
    ],
    "objective": ["upstream", "weight_up", "weight_down", "clip_low", "clip_high", "downstream_aggregation"],
    "tracker": ["tracker"],
    "curriculum": ["curriculum"],
}
"""Keys below ``skpo`` by the part of a method that reads them; all others are read by every method."""


def check_method_settings(config: DictConfig, overrides: Iterable[str]) -> None:
    """Refuse settings given on the command line that the chosen method would ignore."""
    ignored = {key for part, keys in METHOD_SETTINGS.items() if part not in config.method.uses for key in keys}
    for override in overrides:
        if override.startswith("preset=") and not override.endswith("=paper") and "objective" not in config.method.uses:
            raise ConfigError(f"preset: has no effect with method={config.method.name}; leave it out")
        match = re.match(r"[+~]{0,2}skpo\.(\w+)", override)
        if match and match[1] in ignored:
            raise ConfigError(f"skpo.{match[1]}: has no effect with method={config.method.name}; leave it out")
        match = re.match(r"[+~]{0,2}polarity\.(strength|target|decay)", override)
        if match and not config.polarity.enable:
            raise ConfigError(f"polarity.{match[1]}: has no effect without polarity.enable=true; give that, too")
        if match and match[1] == "decay" and config.polarity.target != "ema":
            raise ConfigError(
                f"polarity.decay: has no effect with polarity.target={config.polarity.target}; leave it out"
            )


# ---------------------------------------------------------------- numbers


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


COUNT = Number(whole=True, low=1)
NUMBERS: dict[Number, tuple[str, ...]] = {
    COUNT: (
        *("data.train_batch_size", "data.max_prompt_length", "data.max_response_length"),
        *(f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_epochs", f"{ROLLOUT}.tensor_model_parallel_size"),
        *("trainer.nnodes", "trainer.n_gpus_per_node", "trainer.total_epochs"),
    ),
    Number(whole=True, low=1, none=True): (
        *(f"{ROLLOUT}.max_model_len", "trainer.total_training_steps", "trainer.max_actor_ckpt_to_keep"),
        "trainer.stop_after_no_gain",
    ),
    # Not above 0 means all rows, and never.
    Number(whole=True, low=-1): (
        *("data.train_max_samples", "data.val_max_samples", "trainer.save_freq", "trainer.test_freq"),
    ),
    Number(whole=False, low=0, above=True): (
        *(f"{ACTOR}.optim.lr", f"{ACTOR}.optim.clip_grad", f"{ROLLOUT}.temperature"),
    ),
    Number(whole=False, low=0): (f"{ACTOR}.kl_loss_coef", f"{ACTOR}.optim.weight_decay"),
    Number(whole=False, low=0, above=True, high=1): (f"{ROLLOUT}.top_p", f"{ROLLOUT}.gpu_memory_utilization"),
    Number(whole=False, low=-math.inf): (f"{ACTOR}.entropy_coeff",),
}
"""Bounds to config paths: outside of them verl accepts the value, and later fails or trains nothing."""


def check_numbers(config: DictConfig) -> None:
    """Refuse sizes, rates and frequencies that no run can have; ``config`` need not be resolved yet."""
    for number, paths in NUMBERS.items():
        if number is COUNT and config.platform.name == "cpu":
            paths += ("platform.num_threads", "platform.kv_cache_gib")
        for path in paths:
            value = OmegaConf.select(config, path)
            if not number.holds(value):
                raise ConfigError(f"{path}: is {value!r}, must be {number}")


# ---------------------------------------------------------------- options together

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""Types that vLLM computes in."""

REQUIRED: dict[str, tuple[Any, str]] = {
    "algorithm.use_kl_in_reward": (False, "rewards stay plain; for a KL loss set actor.use_kl_loss"),
    "algorithm.rollout_correction.rollout_rs": (None, "groups are normalised by all of their samples"),
    f"{ROLLOUT}.calculate_log_probs": (True, "rollout and actor are compared by their log-probs"),
    "data.dataloader_num_workers": (0, "prefetched prompts would be lost to a checkpoint"),
    "reward.reward_model.enable": (False, "rewards are rules, computed while others generate"),
    "trainer.use_v1": (True, "the trainers are V1 trainers"),
    "trainer.critic_warmup": (0, "there is no critic; steps without an update would still move the trackers"),
    f"{ROLLOUT}.name": ("vllm", "the rollout is written for vLLM's server"),
    "trainer.default_hdfs_dir": (None, "only a local folder gets the whole checkpoint, trackers included"),
    f"{ACTOR}.checkpoint.async_save": (False, "it leaves no mark of the checkpoint to resume from"),
}
"""Config path to the value that every method needs, and why."""

REQUIRED_BY_SKPO: dict[str, tuple[Any, str]] = {
    "algorithm.adv_estimator": ("skpo", "SKPO computes its own advantages"),
    "algorithm.filter_groups.enable": (False, "filtered groups would tear a segment from its responses"),
    f"{ACTOR}.policy_loss.loss_mode": ("skpo", "choose another loss with method=<name>"),
    f"{ACTOR}.shuffle": (False, "an update must see whole prompts"),
}

TRAINERS = {"skpo": "skpo", "spo": "skpo_spo"}
"""Method to its trainer; all others have ``skpo_baseline``."""


def check_config(config: DictConfig, settings: SkpoSettings, overrides: Sequence[str] = ()) -> None:
    """Refuse options that are not installed, that nothing would read, or that cannot be trained with together."""
    check_model_engine(config)
    check_polarity(config)
    choose_engine(config, flash_attention=flash_attention_installed())
    _check_required(config, settings)
    _check_combinations(config, settings)
    if config.method.name == "skpo":
        _check_context(config, settings)
    check_ranks(config)
    check_token_budgets(config)
    check_options(config, overrides)
    check_loggers(config)


def _check_required(config: DictConfig, settings: SkpoSettings) -> None:
    required = dict(REQUIRED)
    if config.method.name == "skpo":
        rows = (settings.group_size + 1, "one row per sibling and one for the segment; set skpo.group_size")
        required |= REQUIRED_BY_SKPO | {f"{ROLLOUT}.n": rows}
    trainer = TRAINERS.get(config.method.name, "skpo_baseline")
    required["trainer.v1.trainer_mode"] = (trainer, "choose the method with method=<name>")
    for path, (needed, reason) in required.items():
        value = OmegaConf.select(config, path)
        if value != needed:
            raise ConfigError(f"{path}: is {value}, must be {needed}: {reason}")


def _check_combinations(config: DictConfig, settings: SkpoSettings) -> None:
    dtype = config.actor_rollout_ref.rollout.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"{ROLLOUT}.dtype: is {dtype!r}, must be one of {', '.join(DTYPES)}")
    if config.console not in ("short", "full"):
        raise ConfigError(f"console: is {config.console!r}, must be short or full")
    if config.platform.name == "cpu" and config.actor_rollout_ref.actor.strategy == "fsdp":
        raise ConfigError(f"{ACTOR}.strategy: is fsdp, which refuses modules on a CPU; use fsdp2")
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if batch % mini:
        raise ConfigError(
            f"data.train_batch_size: {batch} prompts do not split into mini-batches of "
            f"{ACTOR}.ppo_mini_batch_size={mini}"
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


def _check_context(config: DictConfig, settings: SkpoSettings) -> None:
    context = config.actor_rollout_ref.rollout.max_model_len
    segment = max(1, int(settings.split_high * config.data.max_response_length))
    longest = config.data.max_prompt_length + segment
    if context is None:
        raise ConfigError(
            f"{ROLLOUT}.max_model_len: is None; give the tokens that [s, q] and a response may take together"
        )
    if context <= longest:
        raise ConfigError(
            f"{ROLLOUT}.max_model_len: {context} leaves no room for a response after the longest "
            f"skip prompt ({config.data.max_prompt_length} problem + {segment} segment tokens); raise it, or lower "
            f"data.max_prompt_length or data.max_response_length"
        )
    if context < longest + config.data.max_response_length:
        print(
            f"note: after the longest skip prompt ({longest} tokens) a response has {context - longest} of "
            f"data.max_response_length={config.data.max_response_length} tokens within max_model_len={context}"
        )


LOGGERS = {name: name for name in ("wandb", "mlflow", "swanlab", "clearml", "trackio", "tensorboard")}
LOGGERS["vemlp_wandb"] = "volcengine_ml_platform"
"""verl's loggers that need a package, to its name."""


def check_loggers(config: DictConfig) -> None:
    """Refuse loggers that verl does not know or that are not installed."""
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
    """Refuse folders of the run that cannot be made or written."""
    for path in ("output_dir", "trainer.default_local_dir"):
        folder = Path(OmegaConf.select(config, path))
        nearest = nearest_existing(folder)
        if not nearest.is_dir():
            raise ConfigError(f"{path}: {folder} cannot be made: {nearest} is a file; give another folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"{path}: {folder} cannot be written: no permission for {nearest}; give another folder")
