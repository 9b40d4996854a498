"""Files of a model: its tokenizer with the run's chat template, and its weights as far as their headers tell."""

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.hub import quiet_hub
from data_prep.untrusted import one_line
from recipe.skpo.errors import ConfigError
from recipe.skpo.task.run_settings import Chat


def load_tokenizer(
    model: str,
    chat: Chat | None = None,
    where: str = "",
    trust_remote_code: bool = False,
    options_key: str = "chat_template_kwargs",
) -> Any:
    """Load the tokenizer of a Hugging Face folder or name.

    Args:
        model: folder or name.
        chat: template and options that ``apply_chat_template`` is to use; None is the tokenizer's own template.
        where: option and ``: ``, for messages.
        trust_remote_code: as for transformers.
        options_key: name of the template's options, for messages.

    Raises:
        ConfigError: none can be loaded, it has no chat template, or the template does not read an option.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_hub():
            tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # a process border: five libraries read these files, each with errors of its own
        reason = one_line(error) or type(error).__name__
        raise ConfigError(
            f"{where}no tokenizer can be loaded from {model} ({reason}); give the folder of a Hugging Face model"
        ) from error
    if chat is not None:
        tokenizer.chat_template = chat.custom_chat_template or tokenizer.chat_template
        _check_template_options(tokenizer, chat.chat_template_kwargs, options_key)
        # So that every prompt gets them, whoever builds it.
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **chat.chat_template_kwargs)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}the tokenizer of {model} has no chat template; give an instruct model, or a template by "
            f"custom_chat_template"
        )
    return tokenizer


def _check_template_options(tokenizer: Any, options: Mapping[str, Any], key: str) -> None:
    """Refuse options that the chat template would not read, or that are not the template's."""
    words = set(re.findall(r"[A-Za-z_]\w*", str(tokenizer.chat_template)))
    for name in options:
        out = f"leave it out (~{key}.{name})" if key.startswith("data.") else "leave it out"
        if name in inspect.signature(type(tokenizer).apply_chat_template).parameters:
            raise ConfigError(f"{key}.{name}: is an argument of transformers and not read by a template; {out}")
        if name not in words:
            near = get_close_matches(name, words, 1)
            fix = f"write {near[0]}, or {out}" if near else out
            raise ConfigError(f"{key}.{name}: the chat template of {tokenizer.name_or_path} does not read it; {fix}")


def count_parameters(files: Iterable[Path], where: str = "") -> int:
    """Count the numbers in safetensors files by their headers.

    Args:
        files: of one model.
        where: option and ``: ``, for messages.

    Raises:
        ConfigError: a file is not there, or was not written to its end.
    """
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{where}{path} is missing or cut off ({one_line(error)}); copy or download the model again"
            ) from None
    return count
