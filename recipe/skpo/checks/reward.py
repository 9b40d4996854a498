"""Start-up checks of the reward function: it is loaded, bound and called before a model is."""

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.schema import DataError
from recipe.skpo.errors import ConfigError, brief
from recipe.skpo.task.rewards import VERLS_ARGUMENTS, RewardCall, RewardError, Verdict
from reward_fns import OUR_REWARD, check_options

WHERE = "reward.custom_reward_function"

_TRIAL_S = 300.0
"""Seconds that a call before the start may take at most; it may load something first."""


def is_ours(config: DictConfig) -> bool:
    """Return whether the reward is the one of this recipe."""
    reward = config.reward.custom_reward_function
    return bool(reward.path == OUR_REWARD and reward.name == "compute_score")


def check_reward(config: DictConfig) -> RewardCall:
    """Refuse a reward that cannot be loaded or called as verl does, and options that nobody would read.

    The file may import anything, verl included, so the platform must have been applied.
    """
    reward = config.reward.custom_reward_function
    if not reward.path:
        raise ConfigError(
            f"{WHERE}.path: is not set; give a python file, or {OUR_REWARD} for the rewards of this recipe"
        )
    given = reward.get("reward_kwargs", {})
    if not OmegaConf.is_dict(given):
        raise ConfigError(
            f"{WHERE}.reward_kwargs: is {given!r}, must be a record such as {{key: value}}; or leave it out"
        )
    kwargs: Any = OmegaConf.to_container(given)
    try:
        call = _loaded(reward.path, reward.name, json.dumps(kwargs, default=str))
        _check_manager(config)
        if config.reward.reward_manager.source == "register":
            call.check_signature()
    except RewardError as error:
        raise ConfigError(
            f"{WHERE}: {error}; give a python file or pkg://module by {WHERE}.path, and by {WHERE}.name a function in "
            f"it that takes {', '.join(VERLS_ARGUMENTS)}"
        ) from error
    if is_ours(config):
        check_options(**kwargs)
    return call


@lru_cache(maxsize=8)  # importing a function may take long, or do something
def _loaded(path: str, name: str, kwargs: str) -> RewardCall:
    return RewardCall(path, name, json.loads(kwargs))


def _check_manager(config: DictConfig) -> None:
    from verl.trainer.ppo.reward import resolve_reward_manager_cls

    manager = config.reward.reward_manager
    try:
        resolve_reward_manager_cls(config)
    except Exception as error:  # a process border: the manager may be somebody's own
        raise ConfigError(
            f"reward.reward_manager: {manager.name} cannot be loaded ({brief(error)}); give one of verl's, such as "
            f"naive or dapo"
        ) from error
    overlong = OmegaConf.select(config, "reward.reward_kwargs.overlong_buffer_cfg.enable")
    if manager.name == "dapo" and overlong and "tracker" in config.method.uses:
        raise ConfigError(
            f"reward.reward_kwargs.overlong_buffer_cfg.enable: is true, which takes rewards below -1, and "
            f"method={config.method.name} {BOUNDED}; set it to false, or choose method=dapo"
        )


BOUNDED = "needs rewards within [-1, 1], which its value tracker maps to [0, 1]"


@dataclass(frozen=True)
class Sample:
    """A row to try the reward on.

    Attributes:
        where: file and row, for messages.
        trains: it is a training row, whose reward a tracker may see.
    """

    where: str
    trains: bool
    data_source: str
    ground_truth: Any
    extra_info: Mapping[str, Any]


def try_reward(config: DictConfig, call: RewardCall, samples: Iterable[Sample]) -> None:
    """Call the reward on real rows with an empty response, and look at what it returns.

    A reward manager of the user's own may call it in another way, so nothing is tried then.
    """
    if config.reward.reward_manager.source != "register":
        return
    noted: set[str] = set()
    for sample in samples:
        verdict = _tried(config, call, sample)
        if sample.trains and "tracker" in config.method.uses and not -1 <= verdict.score <= 1:
            raise ConfigError(
                f"{WHERE}: {call.label} returns {verdict.score:g} for {sample.where} and an empty response, and "
                f"method={config.method.name} {BOUNDED}; scale it, or choose a method without a tracker (method=grpo)"
            )
        for key, reason in verdict.left_out.items():
            if key not in noted:
                noted.add(key)
                print(f"note: {WHERE}: {call.label} returns {key!r} ({reason}), which has no mean and is left out")


def _tried(config: DictConfig, call: RewardCall, sample: Sample) -> Verdict:
    """Call once in a thread of its own: a function that hangs is left behind."""
    result: list[Verdict | BaseException] = []
    # verl's managers add these two.
    extra_info = {**sample.extra_info, "num_turns": 2, "rollout_reward_scores": {}}

    def run() -> None:
        try:
            result.append(call(sample.data_source, "", sample.ground_truth, extra_info))
        except BaseException as error:  # a process border: the function is somebody's own
            result.append(error)

    limit = min(config.skpo.prompt_timeout_s, _TRIAL_S)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    on = f"{sample.where} and an empty response"
    if not result:
        raise ConfigError(
            f"{WHERE}: {call.label} has not returned after {limit:g} s for {on}; put a bound on what it waits for"
        )
    (outcome,) = result
    if isinstance(outcome, RewardError):
        raise ConfigError(
            f"{WHERE}: {call.label}: {outcome}, for {on}; return a number, or a dict with the number as 'score'"
        ) from outcome
    if isinstance(outcome, BaseException):
        raise ConfigError(f"{WHERE}: {call.label} fails for {on} ({brief(outcome)}); mend it, or the row") from outcome
    return outcome


def try_every_truth(call: RewardCall, rows: Iterable[tuple[str, str, Any]]) -> None:
    """Let the reward of this recipe check an answer to every row: its place, data source and ground truth."""
    tried: set[tuple[str, str]] = set()
    for where, data_source, truth in rows:
        key = (data_source, repr(truth))
        if key in tried:
            continue
        try:
            call(data_source, "", truth, {})
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: {error}") from error
        tried.add(key)
