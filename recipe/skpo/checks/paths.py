"""File names on the command line and in the config: what they are relative to, ``~``, and what a run is named after.

``run_skpo.sh`` starts the training in the project root and passes the folder that it was called from.  A relative name
that somebody gives is looked up in that folder; what the recipe's own config makes up (``outputs``, ``.cache``) lies
where the training runs.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.skpo.errors import ConfigError

CALLER = "SKPO_CALLER"
"""Variable of the environment with the folder that a command was called from; the current folder if it is not set."""

MODEL = "actor_rollout_ref.model.path"

NAMES = (
    *("data.source", "data.val_source", "data.template"),
    *(MODEL, "actor_rollout_ref.model.tokenizer_path", "actor_rollout_ref.model.hf_config_path"),
)
"""Config paths whose value is a file if there is one of that name, else a name on the hub or of a template."""

FILES = (
    *("embedded_model", "data.embedded", "data.prepared", "data.train_files", "data.val_files", "data.custom_cls.path"),
    *("output_dir", "trainer.default_local_dir", "trainer.resume_from_path"),
    *("trainer.rollout_data_dir", "trainer.validation_data_dir"),
    *("reward.custom_reward_function.path", "reward.reward_manager.module.path"),
    *("actor_rollout_ref.model.lora_adapter_path", "actor_rollout_ref.model.lora.adapter_path"),
    "actor_rollout_ref.rollout.router_config_path",
    "actor_rollout_ref.rollout.quantization_config_file",
    "actor_rollout_ref.rollout.multi_turn.tool_config_path",
    "actor_rollout_ref.rollout.multi_turn.function_tool_path",
    "actor_rollout_ref.rollout.agent.agent_loop_config_path",
    "actor_rollout_ref.rollout.agent.custom_async_server.path",
    "trainer.v1.sampler.custom_sampler.path",
    *("global_profiler.save_path", "ray_kwargs.timeline_json_file"),
)
"""Config paths whose value is a file or a folder, or a list of them."""

TEMPLATE = "actor_rollout_ref.model.custom_chat_template"
"""Takes a template's text, or a file that holds it."""


def caller() -> Path:
    """Return the folder that relative names on the command line are relative to."""
    return Path(os.environ.get(CALLER) or os.getcwd())


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


# ---------------------------------------------------------------- the command line

_TILDE = re.compile(r"""(^|[\[,])(\s*["']?)(~[\w.-]*)(?=$|[/,\]"'])""")


def readable(arguments: Sequence[str]) -> list[str]:
    """Rewrite file names that Hydra's grammar does not read: ``~`` is expanded, other unusual names are quoted."""
    return list(map(_readable, arguments))


def _readable(argument: str) -> str:
    match = re.match(r"(\+{0,2}([\w.]+)=)(.+)", argument, re.DOTALL)
    if not match or match[2] not in (*NAMES, *FILES, TEMPLATE):
        return argument
    value = _TILDE.sub(lambda name: name[1] + name[2] + os.path.expanduser(name[3]), match[3])
    if _parses(match[1] + value) or value[0] in "[\"'":
        return match[1] + value
    quoted = '"' + re.sub(r'(\\*)"', r'\1\1\\"', value) + '"'
    return match[1] + (quoted if _parses(match[1] + quoted) else value)


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def resolve_environment() -> None:
    """Make the folders that variables of the environment name absolute."""
    for name in ("SKPO_CACHE", "TENSORBOARD_DIR"):
        if folder := os.environ.get(name):
            os.environ[name] = _absolute(folder, caller(), must_exist=False)


def overridden(key: str, overrides: Iterable[str]) -> bool:
    """Return whether a command line sets ``key`` or a node that it is in."""
    for override in overrides:
        name = override.lstrip("+~").partition("=")[0].partition("@")[0]
        # data=files chooses a file of a group and sets no value.
        if key == name or (key.startswith(f"{name}.") and "={" in override):
            return True
    return False


# ---------------------------------------------------------------- the config


def resolve_paths(config: DictConfig, overrides: Sequence[str]) -> None:
    """Make every file name in the config absolute, before other values are computed from it.

    Args:
        config: not resolved yet.
        overrides: of the command line.
    """
    with open_dict(config):
        for key in (*NAMES, *FILES):
            value = OmegaConf.select(config, key)
            if not value or (not isinstance(value, str | list) and not OmegaConf.is_list(value)):
                continue
            given = overridden(key, overrides) or not _is_computed(config, key)
            base = caller() if given else Path.cwd()
            must_exist = key in NAMES
            try:
                absolute = [
                    _absolute(item, base, must_exist) for item in ([value] if isinstance(value, str) else value)
                ]
            except RuntimeError:
                raise ConfigError(f"{key}: {value} names the home folder of an unknown user; give its path") from None
            OmegaConf.update(config, key, absolute[0] if isinstance(value, str) else absolute)
        template = OmegaConf.select(config, TEMPLATE)
        if template and isinstance(template, str) and (text := _text_of_file(template)) is not None:
            OmegaConf.update(config, TEMPLATE, text)


def _is_computed(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    return OmegaConf.is_interpolation(OmegaConf.select(config, parent) if parent else config, name)


_SUFFIXES = (".csv", ".jinja", ".json", ".jsonl", ".parquet", ".txt", ".yaml")


def _absolute(value: Any, base: Path, must_exist: bool) -> Any:
    if not isinstance(value, str) or "://" in value:
        return value
    path = Path(os.path.normpath(base / Path(value).expanduser()))
    # A name on the hub has one slash at most, and neither it nor a template's name ends as a data file does.
    looks_like_one = value.startswith((".", "/", "~")) or value.count("/") > 1 or path.suffix in _SUFFIXES
    return str(path) if looks_like_one or path.exists() or not must_exist else value


def _text_of_file(value: str) -> str | None:
    """Return the text of the file of that name; None for a template's own text."""
    if "{" in value or "\n" in value or len(value) > 4000:
        return None
    path = caller() / Path(value).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{TEMPLATE}: {path} cannot be read ({type(error).__name__}); give a template's text, or a file with it"
        ) from None


# ---------------------------------------------------------------- the name of a run


def short_digest(*parts: Any) -> str:
    """Return six hexadecimal digits that differ where the parts do."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:6]


def _plain(text: str, longest: int = 40) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("._")[:longest]


@dataclass(frozen=True)
class Choices:
    """The parts of a run's name: the choices of the config's groups, and the command line.

    Attributes:
        model, data, method: names of the chosen files in ``config/``.
        overrides: of the command line.
    """

    model: str
    data: str
    method: str
    overrides: tuple[str, ...]

    def name(self, config: DictConfig) -> str:
        """Name a run ``<model>-<data>-<method>`` by what it trains and on what.

        A model or training files given by their path stand for the choice: last part of the path and a digest of it.
        """
        return f"{self._model(config)}-{self._data(config)}-{self.method}"

    def _model(self, config: DictConfig) -> str:
        path = OmegaConf.select(config, MODEL)
        if not path or not overridden(MODEL, self.overrides):
            return self.model
        path = _absolute(path, caller(), must_exist=True)
        return f"{_plain(Path(path).name)}-{short_digest(path)}"

    def _data(self, config: DictConfig) -> str:
        if overridden("data.train_files", self.overrides):
            files = OmegaConf.select(config, "data.train_files") or []
            files = [_absolute(file, caller(), False) for file in ([files] if isinstance(files, str) else files)]
            if files:
                return f"{_plain(Path(str(files[0])).stem)}-{short_digest(files)}"
        # Validation files do not change what is trained.
        names = ("source", "template", "train_rows", "skip_bad", "prepare.seed")
        of_mine, of_code = ("prompt", "answer", "check", "system", "split"), ("from_date", "until_date")
        keys = [f"data.{name}" for name in (*names, *of_mine, *of_code)]
        given = {key: OmegaConf.select(config, key) for key in keys if overridden(key, self.overrides)}
        for key in given.keys() & set(NAMES):
            given[key] = _absolute(given[key], caller(), must_exist=True)
        return f"{self.data}-{short_digest(given)}" if given else self.data


_NOT_IN_A_NAME = re.compile(r"(output_dir|platform|trainer\.(total_|save_|test_|logger|max_|val_|log_)|hydra)")


def job_name(overrides: Iterable[str]) -> str:
    """Name a job of a sweep by its overrides, those left out that may change when it is resumed."""
    kept = [override for override in overrides if not _NOT_IN_A_NAME.match(override.lstrip("+"))]
    parts = [override.lstrip("+~").partition("=") for override in kept]
    # Files and groups are in the run's name or are long; the digest tells them from each other.
    labels = [f"{key.rpartition('.')[2]}_{value}" for key, _, value in parts if "." in key and key not in NAMES + FILES]
    return "-".join([*(_plain(label) for label in labels[:4]), short_digest(kept)])


def run_name(*, _root_: DictConfig) -> str:
    """Resolve ``${skpo_run_name:}``: the run's name, below it the job's in a sweep."""
    hydra = HydraConfig.get()
    choices: Any = hydra.runtime.choices
    overrides = tuple(hydra.overrides.task)
    name = Choices(choices.model, choices.data, choices.method, overrides).name(_root_)
    return f"{name}/{job_name(overrides)}" if is_sweep() else name


def scratch_folder() -> str:
    """Resolve ``${skpo_scratch:}``: where Hydra puts its own record of a sweep, gone when the command ends."""
    folder = tempfile.mkdtemp(prefix="skpo_sweep_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_sweep() -> bool:
    """Return whether this is a job of ``-m``."""
    config: Any = HydraConfig.instance().cfg
    return config is not None and str(OmegaConf.select(config, "hydra.mode")).endswith("MULTIRUN")


def own_folder(config: DictConfig, overrides: Sequence[str]) -> None:
    """Give a job of a sweep a folder of its own below an ``output_dir`` that the command line names for all jobs."""
    if is_sweep() and overridden("output_dir", overrides):
        config.output_dir = f"{config.output_dir}/{job_name(overrides)}"
