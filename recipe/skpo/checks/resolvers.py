"""What the config computes, ``${skpo_rows:...}`` and its like, and the settings; importing this registers both.

An error in a resolver reaches the user with the key of whatever is computed.  So each names the key that is wrong.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from data_prep import tiny
from data_prep.reading import data_files
from recipe.skpo.checks.environment import needed_cpus
from recipe.skpo.checks.gpus import gpus_to_use, visible_gpus
from recipe.skpo.checks.paths import run_name, scratch_folder
from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import HALF_LIVES, PolaritySettings, default_node

CONFIG = Path(__file__).parents[1] / "config"

OWN_DATA = {"tiny": "steps"}
"""Models that have learned a task of their own, to that task; it is trained on unless `data` is given."""

CPU_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
"""vLLM's name of what the CPU platform computes in, to verl's."""


def rows_per_prompt(group_size: int) -> int:
    """Count the rows that one prompt stores: G siblings and the segment."""
    return _number("skpo.group_size", group_size) + 1


def context_length(prompt: int, response: int, split_high: float) -> int:
    """Count the tokens of the longest [s, q] with a full response: problem, longest segment, response."""
    prompt, response = _number("data.max_prompt_length", prompt), _number("data.max_response_length", response)
    return prompt + int(_number("skpo.split_high", split_high, float) * response) + response


def token_share(group_size: int, split_low: float, split_high: float) -> float:
    """Return the share of a segment in the trained tokens of a prompt: |s| / (|s| + G |o|), with |o| = L."""
    ends = [_number(f"skpo.{name}", end, float) for name, end in (("split_low", split_low), ("split_high", split_high))]
    segment = sum(ends) / 2
    return segment / (segment + _number("skpo.group_size", group_size))


def gpus(prompts: int, rows: int, server: int) -> int:
    """Count the GPUs of a node that a run uses; of 8, verl's default, if this machine has none."""
    return gpus_to_use(int(prompts), int(rows), int(server), visible_gpus() or 8)


def cpus(*, _root_: Any) -> int:
    """Count the CPUs that the run's actors request from Ray."""
    return needed_cpus(_root_)[0]


def workers(nodes: int) -> int:
    """Count the rollout workers, and the reward workers, of so many nodes: verl's default is 8 for any number."""
    return 8 * _number("trainer.nnodes", nodes)


def fifth(response: int) -> int:
    """Return the last fifth of the response budget, over which DAPO punishes long responses."""
    return max(1, _number("data.max_response_length", response) // 5)


def cpu_dtype(name: str) -> str:
    """Translate the rollout's dtype into verl's name."""
    if name not in CPU_DTYPES:
        raise ConfigError(
            f"actor_rollout_ref.rollout.dtype: is {name!r}, must be {' or '.join(CPU_DTYPES)} on the CPU platform"
        )
    return CPU_DTYPES[name]


def digest(choices: Any, *places: str | None) -> str:
    """Return eight hex digits that differ when any of the choices does, or the content of local data files.

    Args:
        choices: a node, or a value.
        places: files, and folders of files; what is not on this machine has no content.
    """
    plain = OmegaConf.to_container(choices, resolve=True) if OmegaConf.is_config(choices) else choices
    contents = [_content(file) for place in places if place for file in data_files(Path(str(place)))]
    return hashlib.sha256("".join([json.dumps(plain, sort_keys=True), *contents]).encode()).hexdigest()[:8]


def _content(file: Path) -> str:
    """Return the digest of a file, "" if it cannot be read: its reader says why."""
    try:
        found = file.stat()
        return _digest_of_file(file, found.st_size, found.st_mtime_ns)
    except OSError:
        return ""


@cache  # the config computes its values each time that they are read
def _digest_of_file(file: Path, size: int, modified_ns: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def choices(group: str) -> str:
    """List what can be chosen of a group of ours."""
    return ", ".join(sorted(file.stem for file in (CONFIG / group).glob("*.yaml")))


def _number(path: str, value: Any, kind: Callable[[Any], Any] = int) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{path}: is {value!r}, must be {what}") from None


_RESOLVERS: dict[str, Callable[..., Any]] = {
    "skpo_rows": rows_per_prompt,
    "skpo_context": context_length,
    "skpo_fifth": fifth,
    "skpo_token_share": token_share,
    "skpo_workers": workers,
    "skpo_cpus": cpus,
    "skpo_gpus": gpus,
    # The settings refuse an unknown unit of the drift by name.
    "skpo_half_life": lambda drift: HALF_LIVES.get(drift, 8.0),
    # A value that was given under its former name, else the default.
    "skpo_given": lambda value, default: default if value is None else value,
    "skpo_largest": lambda *values: max(value for value in values if value is not None),
    "skpo_digest": digest,
    "skpo_own_data": lambda model: OWN_DATA.get(model, "arithmetic"),
    "skpo_tiny": tiny.folder_name,
    "skpo_choices": choices,
    "skpo_run_name": run_name,
    "platform_dtype": cpu_dtype,
}
for _name, _resolver in _RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
OmegaConf.register_new_resolver("skpo_scratch", scratch_folder, use_cache=True, replace=True)

ConfigStore.instance().store(
    "skpo_settings",
    {"skpo": default_node(), "polarity": OmegaConf.to_container(OmegaConf.structured(PolaritySettings))},
)
