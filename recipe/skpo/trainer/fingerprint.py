"""What a run is, kept in every checkpoint, and what a command that resumes from it changes.

A change of the model, its shape, LoRA, the method or the optimizer's kind is refused: the checkpoint's weights would be
trained on under another name.  Every other change is said in one line and takes effect as far as it can.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from data_prep.untrusted import one_line, read_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.output.files import write_atomic

FILE_NAME = "fingerprint.json"
"""In a run's folder that of its last launch, in a checkpoint that of the launch that saved it."""

_FORMAT = 1
MOST_LINES = 12
"""Differences that are said one by one."""


class Rule(Enum):
    """The fate of a command that differs from the checkpoint it would resume from."""

    REFUSED = "refused"
    SAID = "said"


@dataclass(frozen=True)
class Model:
    """The model that a run began with.

    Attributes:
        path: its folder, or its name on the hub.
        config: digest of ``config.json`` without what its writer notes of itself.
        weights: digest of names, sizes, headers and samples of the weight files; None where they are not here yet.
        vocabulary: digest of the tokenizer's tokens, None where no file tells.
        template: digest of the chat template, None without one.
        shape: sizes that a checkpoint depends on, by their name in ``config.json``.
    """

    path: str
    config: str | None
    weights: str | None
    vocabulary: str | None
    template: str | None
    shape: dict[str, Any]


@dataclass(frozen=True)
class Content:
    """A file, or a package of Python files.

    Attributes:
        path: as it is configured.
        digest: of its bytes, None where it cannot be read.
        rows: of a data file.
    """

    path: str
    digest: str | None
    rows: int | None = None

    def __str__(self) -> str:
        """Show path and rows."""
        return shown(self.path) + (f" ({self.rows} rows)" if self.rows is not None else "")


@dataclass(frozen=True)
class Fingerprint:
    """The parts of a run that make it this run.

    Attributes:
        method: name.
        model: what it began with.
        lora: settings of the adapter, None without one.
        reward: the reward function's file.
        train, val: data files in their order.
        settings: every other config value that training depends on, by its dotted path.
        versions: of packages, and the recipe's commit.
    """

    method: str
    model: Model
    lora: dict[str, Any] | None
    reward: Content
    train: tuple[Content, ...]
    val: tuple[Content, ...]
    settings: dict[str, Any]
    versions: dict[str, str]

    def write(self, folder: Path) -> Path:
        """Write it into ``folder``, atomically; return the file."""
        path = folder / FILE_NAME
        write_atomic(path, json.dumps({"format": _FORMAT} | asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, folder: Path) -> "Fingerprint | None":
        """Read that of a checkpoint or a run, None where none was kept.

        Raises:
            ConfigError: the file is damaged.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            given = read_json(path)
            if given["format"] != _FORMAT:
                raise ValueError(f"format {given['format']}")
            model = Model(**given["model"])
            reward, train, val = Content(**given["reward"]), given["train"], given["val"]
            parts: dict[str, Any] = {name: given[name] for name in ("method", "lora", "settings", "versions")}
            found = cls(model=model, reward=reward, train=_contents(train), val=_contents(val), **parts)
            mappings = (model.shape, found.settings, found.versions, found.lora or {})
            if not all(isinstance(mapping, dict) for mapping in mappings):
                raise TypeError("not an object")
            _rename(found)
            return found
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}: cannot be read as the fingerprint of a run ({one_line(error, 100)}); remove it to resume "
                f"without a comparison"
            ) from error


def _rename(saved: Fingerprint) -> None:
    """Give settings that an earlier version saved their present names and values."""
    for side in ("low", "high"):
        former = saved.settings.pop(f"skpo.clip_{side}", None)
        if former is not None and saved.method == "skpo":
            saved.settings[f"actor_rollout_ref.actor.clip_ratio_{side}"] = former
            saved.settings["actor_rollout_ref.actor.policy_loss.loss_mode"] = "skpo"


def _contents(given: Iterable[Mapping[str, Any]]) -> tuple[Content, ...]:
    return tuple(Content(**item) for item in given)


def shown(value: Any, longest: int = 100) -> str:
    """Format a value for one line: JSON unless it is text, control characters escaped, cut where it is long."""
    return one_line(value if isinstance(value, str) and value else json.dumps(value), longest)


# ---------------------------------------------------------------- rules for settings


@dataclass(frozen=True)
class SettingRule:
    """The rule for a changed setting.

    Attributes:
        pattern: matches the whole dotted path.
        rule: refused or said.
        effect: what the change does; of a refused one, why.
    """

    pattern: str
    rule: Rule
    effect: str


_ACTOR = r"actor_rollout_ref\.actor"
_CURRICULUM = "skpo.curriculum.enable"
_EPOCH = "the epoch starts again"
_OPTIMIZER = rf"{_ACTOR}\.optim\.(lr|weight_decay|betas.*|override_optimizer_config.*)"

RULES = (
    SettingRule(r"skpo\.group_size", Rule.REFUSED, "the trackers count in groups of that size"),
    SettingRule(r"skpo\.tracker\.drift", Rule.REFUSED, "the trackers' drift has that unit"),
    SettingRule(r"model_engine", Rule.REFUSED, "another engine does not read these files"),
    SettingRule(rf"{_ACTOR}\.strategy", Rule.REFUSED, "another strategy does not read these files"),
    SettingRule(rf"{_ACTOR}\.optim\.(optimizer|optimizer_impl)", Rule.REFUSED, "the optimizer's state is another"),
    SettingRule(r"skpo\.seed", Rule.SAID, "without effect: the generator's state comes from the checkpoint"),
    SettingRule(r"skpo\.initial_length", Rule.SAID, "counts for prompts not visited yet"),
    SettingRule(re.escape(_CURRICULUM), Rule.SAID, _EPOCH),
    SettingRule(
        r"data\.(train_batch_size|gen_batch_size|shuffle|seed|sampler.*|custom_cls.*|train_max_samples|prompt_key"
        r"|filter_overlong_prompts)",
        Rule.SAID,
        _EPOCH,
    ),
)
"""The first that matches counts; a setting that none matches is said and applies from the next step."""

COMPARED = (
    *("algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.model", "actor_rollout_ref.rollout", "data", "reward"),
    *("skpo", "polarity", "model_engine", "share_prefixes", "packed_attention", "full_determinism"),
)
"""Parts of the config that a run depends on."""

NOT_COMPARED = re.compile(
    r"(.*\.)?_target_"
    # Compared by what is in the files.
    r"|actor_rollout_ref\.model\.(path|tokenizer_path|lora_(rank|alpha)|target_modules|exclude_modules|lora\..*)"
    r"|data\.(train_files|val_files|embedded|embedded_by|prepared|prepare\..*|source|val_source|val_benchmark|template|train_rows"
    r"|val_rows|skip_bad|prompt|answer|check|system|split)"
    r"|reward\.custom_reward_function\.(path|name)"
    # Derived from others, or names of others.
    r"|skpo\.clip_(low|high)|actor_rollout_ref\.rollout\.(n|prompt_length|response_length|custom\..*)|actor_rollout_ref\.actor\.rollout_n"
    # Where and how fast, not what.
    r"|.*\.(profiler|prometheus|external_lib)(\..*)?|reward\.(num_workers|reward_model\..*|sandbox_fusion\..*)"
    r"|actor_rollout_ref\.rollout\.(nnodes|n_gpus_per_node|agent\..*|gpu_memory_utilization|trace\..*)"
    r"|actor_rollout_ref\.actor\.checkpoint\..*|actor_rollout_ref\.actor\.optim\.total_training_steps"
)
"""Config paths below ``COMPARED`` whose value does not decide what a run is, or is compared otherwise."""


def is_compared(path: str) -> bool:
    """Tell whether training depends on the setting of a dotted path."""
    return path.startswith(COMPARED) and not NOT_COMPARED.fullmatch(path)


def compared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the values that training depends on from a plain config, by their dotted path."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        elif is_compared(path):
            found[path] = node

    walk(config, "")
    return found


# ---------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Difference:
    """One difference of a command from the run that it would resume.

    Attributes:
        what: config path or name.
        saved, now: both values, for people.
        rule: refused or said.
        effect: what the change does; of a refused one, how to keep the checkpoint's value.
        restarts_epoch: the position in the training data does not count any more.
        of_optimizer: the optimizer's checkpoint holds the former value.
    """

    what: str
    saved: str
    now: str
    rule: Rule
    effect: str
    restarts_epoch: bool = False
    of_optimizer: bool = False


def differences(saved: Fingerprint, now: Fingerprint) -> list[Difference]:
    """Compare a checkpoint's fingerprint with a command's; refused differences come first."""
    found: list[Difference] = []

    def add(what: str, before: Any, after: Any, rule: Rule, effect: str, restarts_epoch: bool = False) -> None:
        found.append(Difference(what, shown(before), shown(after), rule, effect, restarts_epoch))

    if saved.method != now.method:
        add("method", saved.method, now.method, Rule.REFUSED, f"give method={shown(saved.method)}")
    found += _model_differences(saved.model, now.model)
    if saved.lora != now.lora:
        before, after = saved.lora or {}, now.lora or {}
        names = sorted(name for name in before | after if before.get(name) != after.get(name))
        rank = "give the same actor_rollout_ref.model.lora_rank, lora_alpha, target_modules and exclude_modules"
        if not (before and after):
            names = ["lora_rank"]
            before, after = {"lora_rank": 0} | before, {"lora_rank": 0} | after
        for name in names:
            add(f"actor_rollout_ref.model.{name}", before.get(name), after.get(name), Rule.REFUSED, rank)
    curriculum = all(item.settings.get(_CURRICULUM) for item in (saved, now))
    found += _data_differences("data.train_files", saved.train, now.train, curriculum)
    found += _data_differences("data.val_files", saved.val, now.val, curriculum)
    if saved.reward.digest != now.reward.digest:
        effect = "its code is another and counts from the next step"
        add("reward", saved.reward.path, now.reward.path, Rule.SAID, effect)
    elif saved.reward.path != now.reward.path:
        add("reward", saved.reward.path, now.reward.path, Rule.SAID, "the same code")
    found += _setting_differences(saved, now, curriculum)
    for name in sorted(saved.versions.keys() | now.versions.keys()):
        old, new = saved.versions.get(name, "absent"), now.versions.get(name, "absent")
        if old != new:
            add(f"version of {shown(name)}", old, new, Rule.SAID, "the rest of the run uses it")
    return sorted(found, key=lambda difference: difference.rule is not Rule.REFUSED)


def _model_differences(saved: Model, now: Model) -> list[Difference]:
    key = "actor_rollout_ref.model.path"
    give = f"give {key}={shown(saved.path)}"
    shape = [name for name in saved.shape | now.shape if saved.shape.get(name) != now.shape.get(name)]
    if shape:
        before = ", ".join(f"{name}={shown(saved.shape.get(name))}" for name in shape)
        after = ", ".join(f"{name}={shown(now.shape.get(name))}" for name in shape)
        return [Difference(key, f"{shown(saved.path)} ({before})", f"{shown(now.path)} ({after})", Rule.REFUSED, give)]
    contents = [(getattr(saved, name), getattr(now, name), name) for name in ("config", "weights", "vocabulary")]
    changed = [name for before, after, name in contents if before and after and before != after]
    # Weights that are not on this machine yet are known by their name alone.
    unknown = not (saved.weights and now.weights) and saved.path != now.path
    if changed or unknown:
        note = f" (other {' and '.join(changed)})" if changed else ""
        same = saved.path == now.path
        way = "put the former files back" if same else give
        return [Difference(key, shown(saved.path), shown(now.path) + note, Rule.REFUSED, way)]
    found = []
    if saved.path != now.path:
        found.append(Difference(key, shown(saved.path), shown(now.path), Rule.SAID, "the same weights"))
    if saved.template != now.template:
        effect = "prompts are built with the new one from the next step"
        found.append(Difference("the model's chat template", "one", "another", Rule.SAID, effect))
    return found


def _data_differences(key: str, saved: Sequence[Content], now: Sequence[Content], curriculum: bool) -> list[Difference]:
    same_content = [item.digest for item in saved] == [item.digest for item in now]
    before, after = (" and ".join(map(str, files[:3])) + (" ..." if len(files) > 3 else "") for files in (saved, now))
    if same_content:
        moved = [item.path for item in saved] != [item.path for item in now]
        return [Difference(key, before, after, Rule.SAID, "the same content")] if moved else []
    if key == "data.val_files":
        effect = "earlier accuracies are of the former problems"
    elif curriculum:
        effect = "prompts are drawn from the new rows; trackers of ids that are gone stay unused"
    else:
        effect = _EPOCH
    if before == after:
        after += " with other content"
    return [Difference(key, before, after, Rule.SAID, effect, restarts_epoch=effect == _EPOCH)]


def _setting_differences(saved: Fingerprint, now: Fingerprint, curriculum: bool) -> list[Difference]:
    found = []
    for path in sorted(saved.settings.keys() | now.settings.keys()):
        before, after = saved.settings.get(path), now.settings.get(path)
        if before == after:  # null and absent are the same choice
            continue
        before, after = (item.settings.get(path, "absent") for item in (saved, now))
        rule = next((rule for rule in RULES if re.fullmatch(rule.pattern, path)), None)
        effect = rule.effect if rule else "it applies from the next step"
        restarts = effect == _EPOCH and not curriculum
        if effect == _EPOCH and curriculum:
            effect = "it applies from the next step"
        if rule and rule.rule is Rule.REFUSED:
            effect = f"{effect}, so give {path}={shown(before)}"
        optimizer = re.fullmatch(_OPTIMIZER, path) is not None
        if optimizer and now.settings.get("actor_rollout_ref.actor.strategy") not in ("fsdp", "fsdp2"):
            effect, optimizer = "without effect: this engine keeps the checkpoint's", False
        # Filtering by length decides which rows there are.
        if _FILTER.fullmatch(path) and not curriculum and _filters(saved, now):
            effect, restarts = _EPOCH, True
        kind = rule.rule if rule else Rule.SAID
        found.append(Difference(path, shown(before), shown(after), kind, effect, restarts, optimizer))
    return found


_FILTER = re.compile(
    r"data\.max_prompt_length|actor_rollout_ref\.model\.custom_chat_template|data\.apply_chat_template_kwargs(\..*)?"
)


def _filters(*fingerprints: Fingerprint) -> bool:
    return any(item.settings.get("data.filter_overlong_prompts") for item in fingerprints)


def restarts_epoch(found: Iterable[Difference]) -> bool:
    """Return whether the position in the training data is lost."""
    return any(difference.restarts_epoch for difference in found)


# ---------------------------------------------------------------- what a person reads


def refuse(checkpoint: Path, found: Sequence[Difference]) -> None:
    """Refuse to resume from a checkpoint of another run.

    Raises:
        ConfigError: naming both values of the first thing that is refused, and the way out.
    """
    refused = [difference for difference in found if difference.rule is Rule.REFUSED]
    if refused:
        first = refused[0]
        others = f" (also other: {', '.join(item.what for item in refused[1:5])})" if len(refused) > 1 else ""
        raise ConfigError(
            f"{checkpoint}: is of a run with {first.what} {first.saved}, this command has {first.now}{others}; "
            f"{first.effect}, or output_dir=<another folder> for a run of its own"
        )


def lines(checkpoint: Path, found: Sequence[Difference] | None, finished: bool) -> list[str]:
    """Say in one line each what a command changes; None stands for a checkpoint without a fingerprint."""
    if found is None:
        return [
            f"note: {checkpoint} has no fingerprint (an earlier version saved it), so its model, data, reward and "
            f"settings were not compared with this command's"
        ]
    said = []
    for item in found[:MOST_LINES]:
        effect = "the numbers below are the finished run's" if finished else item.effect
        said.append(f"note: {item.what}: {item.saved} in {checkpoint.name}, {item.now} in this command; {effect}")
    if len(found) > MOST_LINES:
        rest = ", ".join(item.what for item in found[MOST_LINES : MOST_LINES + 20])
        said.append(f"note: {len(found) - MOST_LINES} more settings differ: {rest}")
    return said
