"""How a run made its prompts and rewards, read from its ``config.yaml`` when its model is evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.untrusted import UntrustedError, read_yaml
from recipe.skpo.errors import ConfigError

CONFIG = "config.yaml"
_ABOVE = 4
"""Folders between a run's and its deepest model: checkpoints/global_step_N/actor/huggingface."""


@dataclass(frozen=True)
class Chat:
    """How messages become a prompt.

    Attributes:
        custom_chat_template: Jinja template; None is the tokenizer's own.
        chat_template_kwargs: options that the template reads, such as ``enable_thinking``.
    """

    custom_chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run.

    Attributes:
        config: the file that they were read from.
        chat: its chat template.
        reward_path, reward_name, reward_kwargs: its ``reward.custom_reward_function``.
    """

    config: Path
    chat: Chat
    reward_path: str | None
    reward_name: str | None
    reward_kwargs: dict[str, Any]


def run_settings(model: str | Path) -> RunSettings | None:
    """Read the settings of the run that a model belongs to.

    Args:
        model: a run's folder, one of its checkpoints or of their folders, or a model merged from one; empty for none.

    Returns:
        None for a model of no run: a name on the hub, or a folder without a run's ``config.yaml`` in it or above it.

    Raises:
        ConfigError: the run's config cannot be read, or holds something else where these settings belong.
    """
    folder = Path(model).expanduser()
    if not str(model) or not folder.exists():
        return None
    folder = folder.resolve()
    for place in (folder, *list(folder.parents)[:_ABOVE]):
        path = place / CONFIG
        if not path.is_file():
            continue
        try:
            config = read_yaml(path)
        except (UntrustedError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read as a run's config ({error}); repair or remove it") from None
        if isinstance(config, Mapping) and {"skpo", "actor_rollout_ref"} <= config.keys():
            return _settings(path, config)
    return None


def _settings(path: Path, config: Mapping[str, Any]) -> RunSettings:
    def node(dotted: str, kind: type) -> Any:
        found: Any = config
        for key in dotted.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None and not isinstance(found, kind):
            raise ConfigError(f"{path}: {dotted} is {found!r}, must be a {kind.__name__}; repair it")
        return found

    reward = "reward.custom_reward_function"
    return RunSettings(
        path,
        Chat(
            node("actor_rollout_ref.model.custom_chat_template", str),
            node("data.apply_chat_template_kwargs", dict) or {},
        ),
        node(f"{reward}.path", str),
        node(f"{reward}.name", str),
        node(f"{reward}.reward_kwargs", dict) or {},
    )
