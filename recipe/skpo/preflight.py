"""Start-up checks: what can be known to be wrong before a model is loaded, each as one line that names the fix."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from data_prep.schema import DataError, check_parquet
from recipe.skpo.settings import ConfigError, SkpoSettings
from recipe.skpo.state import saved_tokens
from reward_fns import route
from reward_fns.forms import check_format

OUR_REWARD = "pkg://reward_fns"

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


def check_config(config: DictConfig, settings: SkpoSettings) -> None:
    """Refuse combinations that the method cannot train with.

    Raises:
        ConfigError: naming the config path, what it is and what it must be.
    """
    required: dict[str, tuple[Any, str]] = {
        "algorithm.use_kl_in_reward": (False, "no method here has a KL penalty"),
        "algorithm.rollout_correction.rollout_is": (None, "the objectives have no importance weights"),
        "algorithm.rollout_correction.rollout_rs": (None, "the objectives reject no samples"),
        "actor_rollout_ref.actor.use_kl_loss": (False, "no method here has a KL penalty"),
        "actor_rollout_ref.actor.entropy_coeff": (0, "no method here has an entropy bonus"),
        "actor_rollout_ref.rollout.calculate_log_probs": (True, "rollout and actor are compared by their log-probs"),
        "data.dataloader_num_workers": (0, "prefetched prompts would be lost to a checkpoint"),
        "reward.reward_model.enable": (False, "rewards are rules, computed while others generate"),
        "trainer.use_v1": (True, "the trainers are V1 trainers"),
    }
    if config.method.name == "skpo":
        required |= {
            "algorithm.adv_estimator": ("skpo", "SKPO computes its own advantages"),
            "algorithm.filter_groups.enable": (False, "filtered groups would tear a segment from its responses"),
            "actor_rollout_ref.actor.shuffle": (False, "an update must see whole prompts"),
            "actor_rollout_ref.rollout.n": (
                settings.group_size + 1,
                "one row per sibling and one for the segment; set skpo.group_size",
            ),
        }
    if config.share_prefixes:
        required |= {
            "actor_rollout_ref.model.use_remove_padding": (False, "share_prefixes=true packs rows in its own way"),
            "actor_rollout_ref.model.use_fused_kernels": (False, "share_prefixes=true needs the logits"),
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": (
                1,
                "share_prefixes=true has no sequence parallel",
            ),
        }
        strategy = config.actor_rollout_ref.actor.strategy
        attention = OmegaConf.select(config, "actor_rollout_ref.model.override_config.attn_implementation")
        if strategy not in ("fsdp", "fsdp2") or attention not in ("sdpa", "eager"):
            raise ConfigError(
                f"share_prefixes: needs actor.strategy fsdp or fsdp2 (is {strategy}) and "
                f"+actor_rollout_ref.model.override_config.attn_implementation=sdpa (is {attention}); or set false"
            )
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
    check_reward(config)
    if config.method.name == "skpo":
        _check_context(config, settings)


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


def check_reward(config: DictConfig) -> None:
    """Refuse an unknown option of our own reward.

    Raises:
        ValueError: naming the config path and the known values.
    """
    reward = config.reward.custom_reward_function
    if reward.path == OUR_REWARD:
        check_format((reward.get("reward_kwargs") or {}).get("answer_format", "any"))


def check_data(config: DictConfig) -> None:
    """Check the parquet files, and that our own reward, where it is used, knows their data sources.

    Raises:
        DataError: naming file, row or column, and the fix.
    """
    tables = []
    roles: tuple[Literal["train", "val"], ...] = ("train", "val")
    for role in roles:
        for file in _files(config, role):
            tables.append((role, file, check_parquet(Path(file), role=role, prompt_key=config.data.prompt_key)))
    train = [(file, table) for role, file, table in tables if role == "train"]
    rows = sum(table.num_rows for _, table in train)
    if rows < config.data.train_batch_size:
        raise DataError(
            f"data.train_files: {rows} rows are fewer than data.train_batch_size={config.data.train_batch_size}"
        )
    if config.reward.custom_reward_function.path == OUR_REWARD:
        for _, file, table in tables:
            for data_source in table["data_source"].unique().to_pylist():
                try:
                    route(data_source)
                except ValueError as error:
                    raise DataError(f"{file}: {error}") from error
    _check_unique_over_files(train)


def check_prompt_lengths(config: DictConfig) -> None:
    """Check every prompt's length under the run's own tokenizer and chat template.

    Raises:
        ConfigError: no tokenizer at the model's path.
        DataError: naming file and row of the first prompt that is too long.
    """
    if config.data.filter_overlong_prompts:
        return
    tokenizer, limit = _tokenizer(config), config.data.max_prompt_length
    options: Any = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    for file in [*_files(config, "train"), *_files(config, "val")]:
        prompts = pq.read_table(file, columns=[config.data.prompt_key])[config.data.prompt_key].to_pylist()
        for index, messages in enumerate(prompts):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if length > limit:
                raise DataError(
                    f"{file}: row {index}: the prompt has {length} tokens, data.max_prompt_length is {limit}; raise "
                    f"it, or set data.filter_overlong_prompts=true to leave such prompts out"
                )


def _check_unique_over_files(tables: Iterable[tuple[str, pa.Table]]) -> None:
    seen: dict[str, str] = {}
    for file, table in tables:
        for prompt_id in table["id"].to_pylist():
            if seen.setdefault(prompt_id, file) != file:
                raise DataError(
                    f"{file}: id {prompt_id} is in {seen[prompt_id]} too; ids must be unique over all "
                    f"of data.train_files"
                )


def _files(config: DictConfig, role: Literal["train", "val"]) -> list[str]:
    value = config.data[f"{role}_files"]
    if not value:
        raise ConfigError(f"data.{role}_files: is not set; name a parquet file, or choose a data set with data=<name>")
    return [str(file) for file in ([value] if isinstance(value, str) else value)]


def _tokenizer(config: DictConfig):
    from transformers import AutoTokenizer

    model = config.actor_rollout_ref.model
    path = model.get("tokenizer_path") or model.path
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"actor_rollout_ref.model.path: no tokenizer can be loaded from {path} ({reason})") from error


def check_resume(config: DictConfig) -> None:
    """Refuse to resume from a checkpoint whose SKPO state is missing, damaged or of another version.

    Raises:
        StateError: naming the folder.
    """
    folder = resume_folder(config)
    if folder is not None:
        saved_tokens(folder)


def is_finished(config: DictConfig) -> bool:
    """Whether the checkpoint that would be resumed from is at the last training step or has spent its tokens."""
    folder, last, tokens = resume_folder(config), config.trainer.total_training_steps, config.budget.tokens
    if folder is None:
        return False
    if tokens is not None and saved_tokens(folder) >= tokens:
        return True
    return last is not None and int(folder.name.removeprefix("global_step_")) >= last


def resume_folder(config: DictConfig) -> Path | None:
    """The checkpoint folder that verl will resume from, None for a fresh start.

    Raises:
        ConfigError: an unknown mode, a path that is no checkpoint, or a marker file that holds no step.
    """
    trainer = config.trainer
    if trainer.resume_mode not in ("auto", "disable", "resume_path"):
        raise ConfigError(f"trainer.resume_mode: is {trainer.resume_mode}, must be auto, disable or resume_path")
    if trainer.resume_mode == "resume_path":
        folder = Path(str(trainer.resume_from_path))
        if not re.fullmatch(r"global_step_\d+", folder.name) or not folder.is_dir():
            raise ConfigError(f"trainer.resume_from_path: {folder} is no folder named global_step_<N>")
        return folder
    marker = Path(trainer.default_local_dir) / "latest_checkpointed_iteration.txt"
    if trainer.resume_mode == "disable" or not marker.is_file():
        return None
    step = marker.read_text().strip()
    if not step.isdecimal():
        raise ConfigError(f"{marker}: holds {step!r} and no step; write the number of the last whole global_step_<N>")
    folder = marker.parent / f"global_step_{step}"
    return folder if folder.is_dir() else None
