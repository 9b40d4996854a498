"""The ``skpo:`` node of the config: typed, validated when it is read, defaults as in the paper (SPEC sections 2 to 7).

Read once at each border (``main``, the trainer, a rollout worker) and passed on as a frozen record, so that a
misspelt key or a degenerate combination stops the run before anything is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.skpo.tracker import DriftClock

SELECTIONS = ("median",)
SKIPS = ("concat",)


class ConfigError(ValueError):
    """A config value that cannot work; the message names its path and the fix in one line."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_finite(record: Any, prefix: str) -> None:
    for item in fields(record):
        value = getattr(record, item.name)
        _require(
            not isinstance(value, float) or math.isfinite(value), f"{prefix}.{item.name}: must be finite, got {value}"
        )


@dataclass(frozen=True)
class TrackerSettings:
    """Constants of the KL-adaptive trackers, SPEC section 4.

    Attributes:
        rho_min, rho_max: bounds of the retention per visit.
        half_life: drift after which an observation counts half, in the unit of ``drift``.
        drift: how the policy's drift is measured, see ``tracker.DriftClock``.
    """

    rho_min: float = 0.875
    rho_max: float = 0.96
    half_life: float = 8.0
    drift: str = "kl_steps"

    def __post_init__(self) -> None:
        _require_finite(self, "skpo.tracker")
        _require(
            0 <= self.rho_min <= self.rho_max <= 1,
            f"skpo.tracker: needs 0 <= rho_min <= rho_max <= 1, got rho_min={self.rho_min}, rho_max={self.rho_max}",
        )
        _require(self.half_life > 0, f"skpo.tracker.half_life: must be > 0, got {self.half_life}")
        units = DriftClock.UNITS
        _require(self.drift in units, f"skpo.tracker.drift: must be one of {', '.join(units)}, got {self.drift!r}")


@dataclass(frozen=True)
class SkpoSettings:
    """Everything SKPO adds to verl's config.

    Attributes:
        group_size: G, upstream candidates and downstream siblings per prompt.
        split_low, split_high: the split position is uniform on [split_low, split_high] x mean response length.
        selection: which candidate is kept.
        skip: how the segment and the problem are joined.
        initial_length: mean response length in tokens assumed for a prompt never visited.
        weight_up, weight_down: weights of the two objectives.
        clip_low, clip_high: e_low and e_high of both objectives.
        tracker: constants of the trackers.
        seed: of every random draw of the trainer (split positions, request seeds).
        seed_requests: give every sampled request its own seed, so that a run can be repeated.  Costs a generator
            per request in the sampler: off in the GPU platform's config.
        prompt_timeout_s: seconds that one prompt may take from q to its stored rows before it is dropped.
        poll_interval_s: seconds between two looks of verl's replay buffer at what has finished.
        trees_per_step: rollout trees (candidates, segment, responses, rewards) stored per step for people to read.
        trees_max_mb: bound of all stored trees in megabytes; over it, steps are removed so that the rest stays even.
    """

    group_size: int = 8
    split_low: float = 1 / 6
    split_high: float = 1 / 2
    selection: str = "median"
    skip: str = "concat"
    initial_length: int = 1024
    weight_up: float = 0.5
    weight_down: float = 0.5
    clip_low: float = 0.2
    clip_high: float = 0.28
    tracker: TrackerSettings = field(default_factory=TrackerSettings)
    seed: int = 1
    seed_requests: bool = True
    prompt_timeout_s: float = 1800.0
    poll_interval_s: float = 2.0
    trees_per_step: int = 1
    trees_max_mb: float = 64.0

    def __post_init__(self) -> None:
        _require_finite(self, "skpo")
        _require(
            self.group_size >= 2,
            f"skpo.group_size: must be >= 2 (a group of one has no advantage), got {self.group_size}",
        )
        _require(
            0 < self.split_low <= self.split_high < 1,
            f"skpo.split_low, skpo.split_high: need 0 < split_low <= split_high < 1, "
            f"got {self.split_low} and {self.split_high}",
        )
        _require(
            self.selection in SELECTIONS,
            f"skpo.selection: must be one of {', '.join(SELECTIONS)}, got {self.selection!r}",
        )
        _require(self.skip in SKIPS, f"skpo.skip: must be one of {', '.join(SKIPS)}, got {self.skip!r}")
        _require(self.initial_length >= 1, f"skpo.initial_length: must be >= 1, got {self.initial_length}")
        _require(
            self.weight_up >= 0 and self.weight_down >= 0 and self.weight_up + self.weight_down > 0,
            f"skpo.weight_up, skpo.weight_down: must be >= 0 and not both 0, "
            f"got {self.weight_up} and {self.weight_down}",
        )
        _require(0 < self.clip_low < 1, f"skpo.clip_low: must be inside (0, 1), got {self.clip_low}")
        _require(self.clip_high > 0, f"skpo.clip_high: must be > 0, got {self.clip_high}")
        _require(self.seed >= 0, f"skpo.seed: must be >= 0, got {self.seed}")
        _require(self.prompt_timeout_s > 0, f"skpo.prompt_timeout_s: must be > 0, got {self.prompt_timeout_s}")
        _require(self.poll_interval_s > 0, f"skpo.poll_interval_s: must be > 0, got {self.poll_interval_s}")
        _require(self.trees_per_step >= 0, f"skpo.trees_per_step: must be >= 0, got {self.trees_per_step}")
        _require(self.trees_max_mb > 0, f"skpo.trees_max_mb: must be > 0, got {self.trees_max_mb}")

    @classmethod
    def from_config(cls, node: DictConfig | Mapping[str, Any]) -> "SkpoSettings":
        """The settings in a config's ``skpo`` node.

        Raises:
            ConfigError: an unknown key, a value of the wrong type, or one out of range.
        """
        try:
            resolve = isinstance(node, DictConfig)
            plain: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if resolve else node
        except OmegaConfBaseException as error:
            raise ConfigError(f"skpo: {str(error).splitlines()[0]}") from None
        if not isinstance(plain, Mapping):
            raise ConfigError(f"skpo: must be a mapping of settings, is {plain!r}")
        if not isinstance(plain.get("tracker", {}), Mapping):
            raise ConfigError(f"skpo.tracker: must be a mapping of settings, is {plain['tracker']!r}")
        for key in unknown_keys(plain):
            raise ConfigError(f"skpo.{key}: unknown key; known are {', '.join(known_keys())}")
        try:
            schema = OmegaConf.structured(cls)
            for record in (schema, schema.tracker):  # frozen dataclasses come as read-only nodes
                OmegaConf.set_readonly(record, False)
            settings = OmegaConf.to_object(OmegaConf.merge(schema, plain))
        except OmegaConfBaseException as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, ConfigError):
                raise cause from None
            reason = str(error).splitlines()[0]
            raise ConfigError(f"skpo.{getattr(error, 'full_key', None) or '?'}: {reason}") from None
        assert isinstance(settings, cls)
        return settings


def known_keys() -> list[str]:
    """Dotted keys below ``skpo``."""
    top = [item.name for item in fields(SkpoSettings) if item.name != "tracker"]
    return top + [f"tracker.{item.name}" for item in fields(TrackerSettings)]


def unknown_keys(node: Mapping[str, Any]) -> list[str]:
    """Dotted keys in ``node`` that the settings do not have."""
    known = set(known_keys())
    flat = [key if key != "tracker" else None for key in node]
    nested = [f"tracker.{key}" for key in (node.get("tracker") or {})]
    return [key for key in [*flat, *nested] if key is not None and key not in known]
