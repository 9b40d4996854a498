"""Keys that verl's config does not have, or that verl no longer reads.

Hydra takes any key behind a ``+`` and from a config file of the user's; a training that ignores it is another training
than its command says.  A key is known if the composed config has it, or verl's dataclass of its node, or if verl reads
it without naming it anywhere (``OPTIONAL``).  Options that verl passes to other programs are open (``OPEN``).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import SequenceMatcher
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from omegaconf import OmegaConf

from recipe.skpo.errors import ConfigError

CONFIG = Path(__file__).resolve().parents[1] / "config"
GROUPS = ("platform", "method", "preset", "model", "data", "budget", "model_engine")

OPEN = {
    "apply_chat_template_kwargs",
    "controller_nsight_options",
    "custom",
    "engine_kwargs",
    "env_vars",
    "hydra",
    "kw_args",
    "lora",
    "mbridge_config",
    "mm_processor_kwargs",
    "override_config",
    "override_ddp_config",
    "override_mcore_model_config",
    "override_optimizer_config",
    "override_transformer_config",
    "reward_kwargs",
    "runtime_env",
    "sampler_kwargs",
    "skpo",  # refused by its own settings
    "teacher_models",
    "transfer_queue",
    "worker_nsight_options",
}
"""Names of nodes whose keys another program reads: vLLM, transformers, Megatron, Ray, a reward function."""

OPTIONAL: dict[str, set[str]] = {
    "data": {"chat_template_func", "cache_dir", "filter_prompts", "need_tools_kwargs"},
    "trainer": {"remove_previous_ckpt_in_save"},
    "reward": {"estimated_tokens_per_request", "max_concurrent", "max_rpm", "max_tpm", "reward_kwargs", "timeout"},
    "custom_reward_function": {"reward_kwargs"},
    "mixed_precision": {"param_dtype", "reduce_dtype", "buffer_dtype"},
    "wrap_policy": {"disable", "min_num_params", "transformer_layer_cls_to_wrap"},
}
"""Name of a node to keys that verl reads there and that neither its config files nor its dataclasses name."""

MOVED = {
    "actor_rollout_ref.actor.grad_clip": "actor_rollout_ref.actor.optim.clip_grad",
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model": "reward.reward_model",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.reward_kwargs": "reward.reward_kwargs",
    "reward_model.reward_loop_class_name": "reward.reward_manager.module.name",
    "reward_model.reward_loop_module_path": "reward.reward_manager.module.path",
    "reward_model.reward_loop_source": "reward.reward_manager.source",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "sandbox_fusion": "reward.sandbox_fusion",
}
"""Keys that verl's config still has and verl no longer reads, to where they are now."""
_LONGEST_FIRST = sorted(MOVED, key=len, reverse=True)

_ELSEWHERE = ("critic", "distillation", "reward.reward_model", "skip", "global_profiler", "actor_rollout_ref.ref")
"""Nodes that hold the names of others again and that no method here uses: not offered as the nearest key."""


def check_structure(given: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Refuse former keys, and a config that lacks a group or key which is read.

    Args:
        given: the composed config in plain types, interpolations unresolved.
        choices: config group to its choice.
    """
    for group in GROUPS:
        if choices.get(group) is None:
            raise ConfigError(f"{group}: cannot be taken out; give one of its choices, which --help lists")
        if choices[group] in _of_verl(group):
            raise ConfigError(unknown_choice(group, choices[group]))
    known = reference(choices)
    _check_former(given, known)
    if not _foreign(choices):  # which may lack keys of the recipe's choices
        _check_whole(given, known, "")


def unknown_choice(group: str, choice: str, known: Iterable[str] = ()) -> str:
    """Say that a group does not have a choice, and which it has: ours and, but for verl's own, the ``known`` ones."""
    ours = {path.stem for path in (CONFIG / group).glob("*.yaml")} | set(known)
    return f"{group}: {choice!r} is unknown; known are {', '.join(sorted(ours - _of_verl(group)))}"


def _of_verl(group: str) -> set[str]:
    """Return the choices that verl's files, on the same search path, add to a group of the recipe."""
    spec = find_spec("verl")
    if group not in GROUPS or group == "model_engine" or spec is None or spec.origin is None:
        return set()
    folder = Path(spec.origin).parent / "trainer" / "config" / group
    return {path.stem for path in folder.glob("*.yaml")}


def check_keys(given: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Refuse keys that nobody reads; the arguments are those of ``check_structure``.

    The platform must have been applied, because verl's dataclasses are imported.
    """
    known = reference(choices)
    for key in _unknown(given, known, ""):
        raise ConfigError(unknown_key(key, _offered(known)))


def unknown_key(path: str, known: Iterable[str]) -> str:
    """Say that nobody reads a key, and which of the ``known`` ones is nearest."""
    former = _moved_to(path)
    if former is not None:
        return f"{path}: is a former key that verl no longer reads; give {former} instead"
    if any(part in OPEN for part in path.split(".")[1:-1]):
        return f"{path}: is not in the config yet; add it with a + in front: +{path}=<value>"
    near = nearest(path, known)
    return f"{path}: unknown key; " + (f"the nearest known is {near}" if near else "--cfg job prints the known ones")


def nearest(path: str, known: Iterable[str]) -> str | None:
    """Return the known key that looks most like ``path``; None if none does."""
    away = tuple(node for node in _ELSEWHERE if not _below(path, node))
    words = _words(path)

    def likeness(other: str) -> float:
        theirs = _words(other)
        last = SequenceMatcher(None, path.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return len(words & theirs) / len(words | theirs) + SequenceMatcher(None, path, other).ratio() + last

    candidates = [key for key in known if not any(_below(key, node) for node in (*away, *MOVED))]
    return max((key for key in candidates if likeness(key) > 1.3), key=likeness, default=None)


def _words(path: str) -> set[str]:
    # Singular and plural alike.
    return {word.removesuffix("s") for word in re.split(r"[._]", path)}


def reference_keys(overrides: Iterable[str]) -> list[str]:
    """Return the dotted paths of all keys of the config under the groups chosen by ``overrides``."""
    choices = (re.fullmatch(rf"\+{{0,2}}({'|'.join(GROUPS)})=(\w+)", override) for override in overrides)
    return _offered(reference({match[1]: match[2] for match in choices if match}))


def reference(choices: Mapping[str, Any]) -> Mapping[str, Any]:
    """Compose the config of these choices without any override; plain and unresolved.

    A user's own choice may have the keys of any of the recipe's choices in its group.
    """
    foreign = _foreign(choices)
    chosen = {group: str(choices[group]) for group in GROUPS if choices.get(group) and group not in foreign}
    config = _composed(tuple(sorted(chosen.items())))
    if not foreign:
        return config
    merged = OmegaConf.create(config)
    for group in foreign:
        for file in sorted((CONFIG / group).glob("*.yaml")):
            more = _composed(tuple(sorted((chosen | {group: file.stem}).items())))
            merged = OmegaConf.merge(more, merged)  # type: ignore[assignment]
    return OmegaConf.to_container(merged, resolve=False)  # type: ignore[return-value]


def _foreign(choices: Mapping[str, Any]) -> list[str]:
    """Return the groups whose choice is a file of the user's own."""
    ours = [group for group in GROUPS if group != "model_engine" and choices.get(group)]
    return [group for group in ours if not (CONFIG / group / f"{choices[group]}.yaml").is_file()]


@cache
def _composed(choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    running = GlobalHydra.instance()
    before, running.hydra = running.hydra, None
    try:
        with initialize_config_dir(str(CONFIG), version_base=None):
            config = compose("skpo_trainer", overrides=[f"{group}={choice}" for group, choice in choices])
    finally:
        GlobalHydra.instance().hydra = before
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of all that is in a node of plain types: ``a``, ``a.b``, ``a.b[0]``."""
    if isinstance(node, Mapping):
        inside = [(_join(path, key), value) for key, value in node.items()]
    else:
        inside = [(f"{path}[{index}]", value) for index, value in enumerate(node if isinstance(node, list) else [])]
    for place, value in inside:
        yield place, value
        yield from walk(value, place)


def _offered(known: Mapping[str, Any]) -> list[str]:
    """Return the keys that may be named as the nearest: groups, and keys that have a value."""
    keys = ((path, value) for path, value in walk(known) if "[" not in path)
    return [path for path, value in keys if "." not in path or not isinstance(value, Mapping)]


def _below(path: str, node: str) -> bool:
    return path == node or path.startswith(f"{node}.")


def _moved_to(path: str) -> str | None:
    former = next((old for old in _LONGEST_FIRST if _below(path, old)), None)
    return None if former is None else MOVED[former] + path.removeprefix(former)


def _check_former(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    defaults = dict(walk(known))
    for path, value in walk(given):
        now = _moved_to(path)
        if now is not None and not isinstance(value, Mapping) and value is not None and value != defaults.get(path):
            raise ConfigError(f"{path}: is a former key that verl no longer reads; give {now}={value}")


def _check_whole(given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> None:
    """Refuse nodes that were replaced by a value, and keys that were taken out."""
    for key, below in known.items():
        place = _join(path, key)
        if key not in given:
            raise ConfigError(f"{place}: is read and cannot be taken out by ~{place}; give it a value")
        value = given[key]
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            _check_whole(value, below if key not in OPEN else {}, place)
        elif isinstance(below, Mapping) and not is_reference(value) and (value is not None or not path):
            raise ConfigError(f"{place}: is {value!r}, must be a group of keys; give {place}.<key>=<value>")


def _unknown(given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the keys of ``given`` that nobody reads."""
    name, parent = path.rpartition(".")[2], path.rpartition(".")[0].rpartition(".")[2]
    if name in OPEN or parent in OPEN:
        return
    unnamed = _fields(known.get("_target_")) | OPTIONAL.get(name, set())
    if path == "ray_kwargs.ray_init":
        import ray

        unnamed |= set(signature(ray.init).parameters) - {"kwargs"}
    for key, value in given.items():
        place, below = _join(path, key), known.get(key)
        if key not in known and key not in unnamed and key not in OPEN:
            yield place
        elif isinstance(below, Mapping) and isinstance(value, Mapping):
            yield from _unknown(value, below, place) if below else ()
        elif isinstance(value, Mapping) and key in OPTIONAL:
            yield from (f"{place}.{item}" for item in value if item not in OPTIONAL[key])


def is_reference(value: Any) -> bool:
    """Return whether a value refers to another key or to a resolver."""
    return isinstance(value, str) and "${" in value


def _fields(target: str | None) -> set[str]:
    """Return the fields of one of verl's dataclasses."""
    return {item.name for item in fields(get_class(target))} if target else set()  # type: ignore[arg-type]
