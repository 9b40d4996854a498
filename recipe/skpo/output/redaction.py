"""Keys, tokens and passwords: how they are recognised, and their refusal in a run's configuration.

The configuration is written to ``config.yaml`` and Hydra's record, and verl prints it (main_ppo.py).  So a secret is
refused before Hydra writes anything; it belongs into the environment, which every process of a Ray that the command
starts inherits.  Names and forms are guesses.  One rule is exact: a value that contains that of an environment variable
whose name looks secret.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from recipe.skpo.errors import ConfigError

HIDDEN = "(hidden)"
"""Shown instead of a secret on a page."""

SHORTEST = 8
"""Characters that the value of a variable must have: a shorter one would be found in ordinary words."""

_WORDS = re.compile(
    "(?:api|access|private|secret)key|(?:auth|access)?tokens?|auth(?:orization)?|bearer|credentials?|passphrase|passwd"
    "|password|pwd|secrets?"
)
_KEYS = re.compile(
    "access|account|anthropic|api|auth|aws|azure|client|cohere|comet|deepseek|deploy|encryption|fireworks|gemini|github"
    "|gitlab|google|gpg|groq|hf|hub|huggingface|judge|license|master|mistral|ngc|nvidia|openai|openrouter|private"
    "|replicate|rsa|secret|service|session|shared|signing|ssh|storage|subscription|swanlab|together|wandb|webhook|xai"
)
"""Words before ``key`` that make a name secret; ``prompt_key`` is not."""

_COUNTED = frozenset(("token", "tokens", "auth"))
"""Last words of names that may hold a number: ``budget.tokens=300``."""

SECRET_VALUE = re.compile(
    r"""(?x)
    \b(?: sk-[\w-]{20,} | [sr]k_(?:live|test)_\w{16,} | hf_[A-Za-z0-9]{20,} | gsk_\w{20,} | r8_\w{20,}
        | gh[oprsu]_[A-Za-z0-9]{20,} | github_pat_\w{20,}
        | gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat)-[\w-]{20,} | npm_[A-Za-z0-9]{30,}
        | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,} | ya29\.[\w-]{20,} | xox[a-z]-[\w-]{10,} | xapp-[\w-]{10,}
        | nvapi-[\w-]{20,} | pypi-[\w-]{40,} | hvs\.[\w-]{20,} | dop_v1_\w{20,} | xai-\w{20,} | tgp_v1_[\w-]{20,}
        | SG\.[\w-]{16,}\.[\w-]{16,} | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]* )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | \b(?i:bearer|basic)\ (?=\S*\d)[\w.~+/=-]{16,}
    | ://[^/\s:@]*:[^/\s@]+@
    | (?i:https?)://[^/\s@]+@
    | [?&;](?i:api[-_]?key|(?:access|auth|id|refresh)?[-_]?token|key|secret|sig(?:nature)?|pass(?:word|wd)?|pwd
        |x-amz-(?:signature|security-token)|accountkey|sharedaccesskey)=[^&\s]+
    """
)
"""Forms of keys of well-known services, URLs with a password, a user of http or a key in their query."""


def is_secret_name(name: str) -> bool:
    """Tell whether a key or an environment variable of this name holds secrets; not ``max_num_batched_tokens``."""
    words = _words(name)
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    # A plural that counts (max_tokens, tokens_generated) is not one of ``tokens`` alone.
    if last == "tokens":
        return len(words) == 1 or bool(_KEYS.fullmatch(before))
    return bool(_WORDS.fullmatch(last)) or (last in ("key", "keys") and bool(_KEYS.fullmatch(before)))


def _words(name: str) -> list[str]:
    """Split a name: ``hfToken``, ``hf-token``, ``HF_TOKEN`` and ``hf_token_1`` are all hf, token."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", parted) if word]
    while words and words[-1].isdigit():
        words.pop()
    return words


def environment_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map value to name of the secret-looking variables, by default of ``os.environ``; paths are left out."""
    given = os.environ if environment is None else environment
    return {
        value: name
        for name, value in given.items()
        if len(value) >= SHORTEST and is_secret_name(name) and not os.path.exists(value)
    }


def hide_secrets(config: Any, instead: Callable[[str, str], Any] = lambda path, why: HIDDEN) -> Any:
    """Copy a plain configuration with every secret in it replaced, keys of mappings included.

    ``instead`` makes the replacement of a value or key from its path and the reason.
    """
    known = environment_secrets()

    def copy(node: Any, path: str, name: str, below: bool) -> Any:
        inside = below or is_secret_name(name)
        if isinstance(node, Mapping) and node:
            copied = {}
            for key, value in node.items():
                why = _why("", key, known)
                shown = instead(f"{path}.{HIDDEN}".lstrip("."), why) if why else key
                place = f"{path}.{shown}" if path else str(shown)
                copied[shown] = copy(value, place, str(key), inside)
            return copied
        if isinstance(node, list | tuple) and node:
            return [copy(value, f"{path}[{index}]", "", inside) for index, value in enumerate(node)]
        why = _why(name, node, known, below)
        return instead(path, why) if why else node

    return copy(config, "", "", False)


def _why(name: str, value: Any, known: Mapping[str, str], below: bool = False) -> str:
    if value is None or isinstance(value, bool | Mapping | list | tuple) or value == "":
        return ""
    text = str(value)
    for secret, variable in known.items():
        # A number is not searched: a short secret could be part of any.
        if (isinstance(value, str) and secret in text) or secret == text:
            return f"holds the value of the environment variable {variable}"
    named = below or is_secret_name(name)
    if named and (isinstance(value, str) or below or _words(name)[-1] not in _COUNTED):
        return "looks like a secret"
    return "looks like a secret" if isinstance(value, str) and SECRET_VALUE.search(text) else ""


def reject_secrets(config: Any) -> None:
    """Refuse a plain configuration that holds a secret.

    Raises:
        ConfigError: naming its path, never its value.
    """

    def refuse(path: str, why: str) -> None:
        raise ConfigError(
            f"{path}: {why}, and the configuration is written to files and logs; export it as a "
            f"variable of the environment (on a running Ray cluster: of `ray start`) and leave it out here"
        )

    hide_secrets(config, refuse)


def reject_secret_overrides(arguments: Iterable[str]) -> None:
    """Refuse a command line that holds a secret, before Hydra writes it down.

    Raises:
        ConfigError: naming the path.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
            value = override.value()
        except HydraException:
            # An option like --cfg, or an override that Hydra will refuse and quote.
            reject_secrets({argument.partition("=")[0]: argument.partition("=")[2]})
            continue
        plain = str(value) if override.is_sweep_override() else _plain(value)
        for part in reversed(override.key_or_group.split(".")):
            plain = {part: plain}
        reject_secrets(plain)


def _plain(value: Any) -> Any:
    """Convert a value of Hydra's parser, which has classes for quoted strings and dictionary keys, to plain types."""
    if isinstance(value, Mapping):
        return {str(getattr(key, "text", key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return getattr(value, "text", value)
