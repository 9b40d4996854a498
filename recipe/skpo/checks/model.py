"""Start-up checks of the model to train: its folder, tokenizer and chat template, and every prompt under them.

Nothing of the weights but the headers of their files is read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from data_prep.hub import quiet_hub
from data_prep.schema import DataError, progress
from data_prep.untrusted import UntrustedError, one_line, read_json
from recipe.skpo.checks.data import prompt_files
from recipe.skpo.checks.paths import caller
from recipe.skpo.errors import ConfigError
from recipe.skpo.isolation.child import LOAD_SECONDS, PROMPT_SECONDS, Place, Stopped, in_child
from recipe.skpo.task.model_files import count_parameters, load_tokenizer
from recipe.skpo.task.prompt_lengths import count_tokens, lengths_file, read_lengths, write_lengths
from recipe.skpo.task.run_settings import Chat
from recipe.skpo.task.thoughts import configured_marks
from reward_fns import OUR_REWARD

LONGEST_PROMPT = 10_000_000
"""Characters of a rendered prompt: more than any context holds."""
LONGEST_MARK = 200
"""Characters at a prompt's end that may hold the mark of a thought."""
_TOGETHER, _CHARACTERS = 1_000, 1_000_000
"""Prompts, and characters of several prompts, that are tokenised at once."""
_THREADS = 16


def check_model(config: DictConfig) -> None:
    """Refuse a model that cannot be trained or served."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where, model = "actor_rollout_ref.model.path", config.actor_rollout_ref.model
    if not model.path:
        raise ConfigError(f"{where}: is not set; give a model's folder or hub name, or choose one with model=<name>")
    folder = Path(model.path)
    if folder.is_file():
        raise ConfigError(f"{where}: {folder} is a file; give the folder that holds config.json and the weights")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{where}: {folder} holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        with quiet_hub():
            described = AutoConfig.from_pretrained(model.path, trust_remote_code=model.get("trust_remote_code", False))
        longest = getattr(described.get_text_config(), "max_position_embeddings", None)
        if longest is not None and (type(longest) is not int or longest < 1):
            raise ValueError(f"max_position_embeddings is {longest!r}")
    except Exception as error:  # a process border: the hub, json and the model's own class answer with their own errors
        reason = one_line(error) or type(error).__name__
        if not folder.is_dir():
            missing = f"there is no folder {caller() / folder}"
            reason = missing if folder.is_absolute() else f"{reason}; {missing}"
        raise ConfigError(
            f"{where}: {model.path} cannot be read as a model ({reason}); give a folder with a whole checkpoint, or a "
            f"name on the hub where that can be reached"
        ) from error
    if type(described) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in (
        str(getattr(described, "auto_map", None) or "")
    ):
        raise ConfigError(
            f"{where}: {model.path} is a {one_line(described.model_type, 60)}, which is not a causal language model; "
            f"give one that is"
        )
    context = config.actor_rollout_ref.rollout.max_model_len
    if context is not None and longest is not None and context > longest:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_model_len: is {context}, {model.path} takes {longest} tokens; lower "
            f"data.max_prompt_length or data.max_response_length, or set max_model_len={longest}"
        )
    if folder.is_dir():
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    where = "actor_rollout_ref.model.path"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise UntrustedError("names something that is not a file beside it")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f" ({error})" if isinstance(error, UntrustedError) else ""
            raise ConfigError(
                f"{where}: {index} is not an index of weight files{reason}; download the model again"
            ) from None
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names and not any(folder.glob("*.bin")):
        raise ConfigError(f"{where}: {folder} holds no weights (*.safetensors); give the folder of a whole checkpoint")
    count_parameters((folder / name for name in names), f"{where}: ")


def check_prompt_lengths(config: DictConfig) -> None:
    """Check every prompt's length under the run's own tokenizer and chat template, and that enough are left."""
    errors = (ConfigError, DataError)
    try:
        try:
            left, thinks = in_child(lambda place: _count_prompts(config, place, _TOGETHER), errors)
        except Stopped:
            # One by one, so that the message names the row; or the bounds of one row were too tight for many.
            left, thinks = in_child(lambda place: _count_prompts(config, place, 1), errors)
    except Stopped as error:
        raise DataError(
            f"{error.at}: the model's chat template or tokenizer {error}; take a model whose origin you trust, or give "
            f"another template by actor_rollout_ref.model.custom_chat_template"
        ) from None
    if thinks and config.reward.custom_reward_function.path == OUR_REWARD:
        print(
            "note: prompts end inside a thought (the chat template opens it), so a response counts from its closing "
            "mark on, and one without it has no answer; data.max_response_length="
            f"{config.data.max_response_length} has to hold thought and answer"
        )
    limit = config.data.max_prompt_length
    if config.data.filter_overlong_prompts and left < config.data.train_batch_size:
        raise DataError(
            f"data.train_files: {left} prompts of at most data.max_prompt_length={limit} tokens are fewer than "
            f"data.train_batch_size={config.data.train_batch_size}; raise the first or lower the second"
        )


def _count_prompts(config: DictConfig, place: Place, together: int) -> tuple[int, bool]:
    """Check every prompt, so many together.

    Returns:
        How many training prompts are within the limit, and whether the template opens a thought.
    """
    # A thread of the tokenizer reserves 64 MiB of the child's 2 GiB.
    os.environ["RAYON_NUM_THREADS"] = str(min(_THREADS, len(os.sched_getaffinity(0))))
    place.move("actor_rollout_ref.model.path", LOAD_SECONDS)
    model = config.actor_rollout_ref.model
    options: Any = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    tokenizer = load_tokenizer(
        model.get("tokenizer_path") or model.path,
        Chat(model.get("custom_chat_template"), options),
        "actor_rollout_ref.model.path: ",
        model.get("trust_remote_code", False),
        "data.apply_chat_template_kwargs",
    )
    left, thinks = 0, False
    reward = config.reward.custom_reward_function
    marks = configured_marks(reward.path, reward.get("reward_kwargs"))
    train = prompt_files(config, "train")
    for file in [*train, *prompt_files(config, "val")]:
        place.move(file, LOAD_SECONDS)
        kept = lengths_file(Path(file), config.data.prompt_key, tokenizer, options)
        lengths = read_lengths(kept)
        if lengths is None:
            lengths = _measured(config, file, tokenizer, place, together)
            if kept is not None:
                write_lengths(kept, lengths)
        _refuse_long(config, file, 0, lengths)
        left += int(np.count_nonzero(lengths <= config.data.max_prompt_length)) if file in train else 0
        first = next(_rendered(config, file, tokenizer, place, together))
        thinks = thinks or any(
            marks is not None and marks.opened_by(text[-LONGEST_MARK:]) is not None for text in first
        )
    return left, thinks


def _measured(config: DictConfig, file: str, tokenizer: Any, place: Place, together: int) -> np.ndarray:
    """Count the tokens of a file's prompts, int32 (rows,)."""
    lengths = np.empty(pq.read_metadata(file).num_rows, np.int32)
    done = 0
    with progress(len(lengths), "prompts tokenised") as bar:
        for texts in _rendered(config, file, tokenizer, place, together):
            place.move(f"{file}: row {done}", PROMPT_SECONDS)
            found = np.array(count_tokens(texts, tokenizer), np.int32)
            _refuse_long(config, file, done, found)
            lengths[done : done + len(texts)] = found
            done += len(texts)
            bar.update(len(texts))
    return lengths


def _refuse_long(config: DictConfig, file: str, first: int, lengths: np.ndarray) -> None:
    """Refuse the first prompt that is too long, of lengths that begin with row ``first``, unless such are left out."""
    limit = config.data.max_prompt_length
    if not config.data.filter_overlong_prompts and lengths.max() > limit:
        index = int(np.argmax(lengths > limit))
        raise DataError(
            f"{file}: row {first + index}: the prompt has {lengths[index]} tokens, data.max_prompt_length is {limit}; "
            f"raise it, or set data.filter_overlong_prompts=true to leave such prompts out"
        )


def _rendered(config: DictConfig, file: str, tokenizer: Any, place: Place, together: int) -> Iterator[list[str]]:
    """Yield a file's prompts under the template, as many together as ``_CHARACTERS`` allow.

    Raises:
        DataError: naming the row on which the template fails.
    """
    texts, size = list[str](), 0
    for row, messages in enumerate(_prompts(file, config.data.prompt_key)):
        place.move(f"{file}: row {row}", PROMPT_SECONDS)
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            if len(text) > LONGEST_PROMPT:
                raise ValueError(f"it makes {len(text)} characters of it")
        except MemoryError:
            raise
        except Exception as error:  # a process border: a template is a program
            raise DataError(
                f"{file}: row {row}: the model's chat template fails on this prompt ({one_line(error)}); change "
                f"the prompt's roles, or give another template by actor_rollout_ref.model.custom_chat_template"
            ) from error
        if texts and (len(texts) == together or size + len(text) > _CHARACTERS):
            yield texts
            texts, size = [], 0
        texts.append(text)
        size += len(text)
    yield texts


def _prompts(file: str, column: str) -> Iterator[list[dict[str, str]]]:
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from batch.column(column).to_pylist()
