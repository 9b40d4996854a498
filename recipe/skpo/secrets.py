"""Keys, tokens and passwords: what looks like one, and their refusal in a run's configuration.

Whatever is in the configuration is written to ``config.yaml`` and Hydra's record, and verl prints it (main_ppo.py: the
arguments of ``ray.init`` and the whole config).  So a secret is refused there, before Hydra writes anything; it belongs
into the environment, which every process of a Ray that the command starts inherits.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from recipe.skpo.settings import ConfigError

SECRET_NAME = re.compile(r"(^|_)(api_?key|secret|password|passwd|credentials?|access_key|auth|token)$", re.IGNORECASE)
"""Names of keys that hold secrets; not ``max_num_batched_tokens``."""

SECRET_VALUE = re.compile(
    r"\b(sk-[\w-]{20,}|hf_[A-Za-z0-9]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b|://[^/\s:@]+:[^/\s@]+@"
)
"""Forms of keys that well-known services hand out, and a URL with a password."""


def is_secret(name: str, value: Any) -> bool:
    """Whether ``value``, under the last part ``name`` of its path, is to be kept from files and logs."""
    if not isinstance(value, str) or not value:
        return False
    return bool(SECRET_NAME.search(name) or SECRET_VALUE.search(value))


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Dotted path, last part of it, and value of everything below a plain configuration."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from leaves(value, path)
    else:
        yield path, path.rpartition(".")[2], node


def reject_secrets(config: Any) -> None:
    """Refuse a plain configuration that holds a secret.

    Raises:
        ConfigError: naming its path, never its value.
    """
    for path, name, value in leaves(config):
        if is_secret(name, value):
            raise ConfigError(
                f"{path}: looks like a secret, and the configuration is written to files and logs; export it as a "
                f"variable of the environment (on a running Ray cluster: of `ray start`) and leave it out here"
            )


def reject_secret_overrides(arguments: Iterable[str]) -> None:
    """The same for a command line, before Hydra writes it down.

    Raises:
        ConfigError: naming the path.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
            value = override.value()
        except HydraException:
            continue  # an option like --cfg, or what Hydra itself will refuse
        reject_secrets({override.key_or_group: str(value) if override.is_sweep_override() else _plain(value)})


def _plain(value: Any) -> Any:
    """A value of Hydra's parser, whose quoted strings and dictionary keys are classes of its own, in plain types."""
    if isinstance(value, Mapping):
        return {str(getattr(key, "text", key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return getattr(value, "text", value)
