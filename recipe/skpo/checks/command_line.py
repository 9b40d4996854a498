"""One sentence for every command line that Hydra or OmegaConf refuse: what was found, where, and what to do."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.skpo.checks.known_keys import is_reference, nearest, reference_keys, unknown_choice, unknown_key, walk
from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import RECORDS, known_keys

_TRACEBACK = "HYDRA_FULL_ERROR"
"""Hydra's variable: with it errors are raised, without it Hydra prints several lines of its own and exits."""


_HYDRA_SAYS = {
    r"already at '([^']+)'": r"\1: is in the config already; leave out the + in front of it",
    # A group that no defaults list has.
    r"Could not override '([^']+)'": r"\1: is not a group of this command; its groups are listed by --help",
    r"^(\S+) appears more than once in the final defaults": r"\1: is chosen twice; leave out the + in front of it",
    r"Ambiguous value for argument '([^=]+)=(.*?)'": r"\1: \2 can be read in several ways; write [\2] for a list, "
    r"quote it for a text, or give --multirun for one run each",
    r"Sweep parameters '([^=]+)=(.*?)' requires": r"\1: \2 means several runs; give --multirun, or one value",
}
"""Message of Hydra's to our sentence."""


@contextmanager
def one_sentence(task: Callable[..., Any], overrides: Sequence[str]) -> Iterator[None]:
    """End the command with one sentence for errors that come before ``task`` is called by Hydra.

    With ``HYDRA_FULL_ERROR=1`` in the environment the traceback is shown instead.

    Args:
        task: the function that Hydra calls with the config; its own errors pass.
        overrides: the arguments of the command.
    """
    given = os.environ.get(_TRACEBACK)
    os.environ[_TRACEBACK] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:  # a process border
        if given or any(frame.f_code is task.__code__ for frame, _ in walk_tb(error.__traceback__)):
            raise
        if isinstance(error, BrokenPipeError):  # as in `--cfg job | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes
            sys.exit(1)
        sys.exit(f"error: {sentence(error, overrides)}")
    finally:
        if given is None:
            os.environ.pop(_TRACEBACK, None)
        else:
            os.environ[_TRACEBACK] = given


def sentence(error: BaseException, overrides: Iterable[str] = ()) -> str:
    """Say in one sentence what Hydra, OmegaConf or a check of the recipe refused, and in which of the arguments."""
    ours = next((cause for cause in _chain(error) if isinstance(cause, ConfigError)), None)
    if ours is not None:
        return str(ours)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    text = " ".join(str(error).split())
    key = _key_of(error, text)
    if key is not None:
        given = (word.partition("=")[0].lstrip("+~") for word in overrides)
        whole = next((word for word in given if word.startswith(f"{key}.")), key)
        return unknown_key(whole, reference_keys(overrides))
    for pattern, said in _HYDRA_SAYS.items():
        if match := re.search(pattern, text):
            return match.expand(said)
    if "Config group override must be" in text:
        return f"{_group_without_choice(overrides)}: a group needs the name of one of its choices; --help lists them"
    if match := re.search(r"Error merging override ([^=]+)=(\S*)", text):
        key, value = match[1].lstrip("+"), match[2].strip("\"'")
        reason = str(error.__cause__ or error).splitlines()[0]
        return _unbalanced(key, value) or f"{key}: {value} cannot be set ({reason}); mend the value"
    if isinstance(error, OmegaConfBaseException):
        return _unresolved(error, overrides)
    if isinstance(error, OSError):
        return f"output_dir: {error.filename}: {error.strerror or error}; give a folder that can be written"
    lines = [str(cause).splitlines()[0] for cause in (error, error.__cause__) if cause is not None and str(cause)]
    return "; ".join(dict.fromkeys(lines)) or type(error).__name__


def resolve(config: DictConfig, overrides: Iterable[str] = ()) -> None:
    """Resolve every interpolation of ``config`` in place."""
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(_with_key(config, error), overrides)) from None


def reject_unknown_settings(arguments: Iterable[str]) -> None:
    """Refuse overrides of ``skpo`` keys that do not exist, with all that do."""
    for argument in arguments:
        match = re.match(r"[+~]{0,2}skpo\.([\w.]+)(=|$)", argument)
        if match and match[1] not in [*known_keys(), *RECORDS]:
            raise ConfigError(f"skpo.{match[1]}: unknown key; known are {', '.join(known_keys())}")


def _with_key(config: DictConfig, error: OmegaConfBaseException) -> OmegaConfBaseException:
    """Return the same error with its key, which ``OmegaConf.resolve`` does not say."""
    plain = OmegaConf.to_container(config, resolve=False)
    for path in (path for path, value in walk(plain) if is_reference(value)):
        try:
            OmegaConf.select(config, path, throw_on_missing=True)
        except OmegaConfBaseException as with_key:
            return with_key
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unreadable(error: OverrideParseException) -> str:
    """Describe an argument outside Hydra's grammar."""
    given = error.override
    key, sign, value = given.partition("=")
    if not sign:
        return f"{given}: is not key=value; write {given}=<value>"
    if re.match(r"['\"\[{]*~", value):
        return f"{key}: {value} is not read as a home folder; write $HOME instead of ~, outside of single quotes"
    if unbalanced := _unbalanced(key, value):
        return unbalanced
    where = re.search(r"\n( *)\^", str(error))
    column = len(where[1]) - len("LexerNoViableAltException: ") if where else -1
    sign_there = f" at {given[column]!r}" if 0 <= column < len(given) else ""
    return f"{key}: {value} cannot be read{sign_there}; quote it for Hydra and for the shell: '{key}=\"{value}\"'"


def _unbalanced(key: str, value: str) -> str | None:
    for opening, closing in {"[": "]", "{": "}", "(": ")"}.items():
        if value.count(opening) != value.count(closing):
            return f"{key}: {value} has {opening} without {closing}; close it, or quote the value: '{key}=\"{value}\"'"
    if value.count('"') % 2 or value.count("'") % 2:
        return f"{key}: {value} has a quotation mark without its second one; close it"
    return None


def _group_without_choice(overrides: Iterable[str]) -> str:
    pairs = (word.partition("=") for word in overrides)
    return next((f"{key}={value}" for key, _, value in pairs if not key or value in ("null", "")), "?")


def _missing_config(error: MissingConfigException) -> str:
    name = error.missing_cfg_file or ""
    group, _, choice = name.rpartition("/")
    if error.options is None or not group:
        reason = str(error).splitlines()[0].rstrip(".")
        return f"{name or 'config'}: {reason}; check --config-name, --config-dir and hydra.searchpath"
    return unknown_choice(group, choice, error.options)


def _key_of(error: BaseException, text: str) -> str | None:
    """Return the key that a composition error calls unknown; None if it has another reason."""
    if match := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        return match[1]
    for cause in (error, error.__cause__):
        key = getattr(cause, "full_key", None)
        if key and re.search(r"is not in struct|not in '", str(cause)):
            return str(key)
    return None


def _unresolved(error: OmegaConfBaseException, overrides: Iterable[str]) -> str:
    """Describe a value that refers to something missing."""
    reason = str(error).splitlines()[0]
    key = error.full_key or "config"

    def named(part: str) -> str:
        """Return the key of the argument that holds ``part``: the config may refer to it from elsewhere."""
        return next((word.partition("=")[0].lstrip("+") for word in overrides if part in word), key)

    if match := re.search(r"Environment variable '([^']+)' not found", reason):
        name = match[1]
        return (
            f"{named(f'oc.env:{name}')}: the environment variable {name} is not set; set it, or write a default: "
            f"${{oc.env:{name},<value>}}"
        )
    if match := re.search(r"Interpolation key '([^']+)' not found", reason):
        near = nearest(match[1], reference_keys(overrides))
        return f"{named(match[1])}: refers to {match[1]}, which the config does not have; " + (
            f"the nearest known is {near}" if near else "--cfg job prints what it has"
        )
    if match := re.search(r"Unsupported interpolation type (\S+)", reason):
        return f"{named(match[1])}: ${{{match[1]}:...}} is unknown; oc.env, oc.select and oc.decode are known"
    if "Recursive interpolation" in reason:
        return f"{named('${')}: refers to itself; give a value"
    if match := re.search(r"Missing mandatory value: (\S+)", reason):
        return f"{match[1]}: has no value (???); give one by {match[1]}=<value>"
    reason = re.sub(r"^\w+ (raised )?while resolving interpolation: ", "", reason)
    return f"{key}: {reason}; mend the value, or what it refers to"
