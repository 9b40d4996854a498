"""The nodes ``skpo:`` and ``polarity:`` of the config: typed, validated when they are read, defaults as in the paper.

Read once at each border (``main``, the trainer, a rollout worker) and passed on as a frozen record, so that a
misspelt key or a degenerate combination stops the run before anything is loaded.
"""

import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.skpo.errors import ConfigError

CHOICES = {
    "selection": ("median", "extreme", "first", "random"),
    "skip": ("concat", "chat", "continual", "unconditional"),
    "split": ("adaptive", "fixed", "boundary_token"),
    "upstream_reward": ("mc", "own"),
    "downstream_aggregation": ("group_token_mean", "token_mean"),
}
"""Setting to the values that it may have."""

BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "group_size": (lambda value: value >= 2, ">= 2 (a group of one has no advantage)"),
    "initial_length": (lambda value: value >= 1, ">= 1"),
    "seed": (lambda value: value >= 0, ">= 0"),
    "prompt_timeout_s": (lambda value: value > 0, "> 0"),
    "start_timeout_s": (lambda value: value > 0, "> 0"),
    "max_dropped_share": (lambda value: 0 <= value < 1, "inside [0, 1) (a step without prompts trains nothing)"),
    "weight_sync_timeout_s": (lambda value: value >= 1, ">= 1"),
    "max_logprob_gap": (lambda value: value is None or value > 0, "> 0, or null for no limit"),
    "poll_interval_s": (lambda value: value > 0, "> 0"),
    "trees_per_step": (lambda value: value >= 0, ">= 0"),
    "trees_per_validation": (lambda value: value >= 0, ">= 0"),
    "trees_max_mb": (lambda value: value > 0, "> 0"),
}
"""Setting to whether a value is within its bounds, and the bounds in words."""

HALF_LIVES = {"kl_steps": 8.0, "nats": 8.0, "logratio": 0.06}
"""Default half-life per unit of the drift: the paper's, and SPO's own for its log-ratio."""
DRIFTS = tuple(HALF_LIVES)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_one_of(value: str, known: tuple[str, ...], path: str) -> None:
    _require(value in known, f"{path}: must be one of {', '.join(known)}, got {value!r}")


_ESCAPE = re.compile(r"\\(?:([ntr\\'\"]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|(?P<other>.?))", re.S)


def unescaped(text: str, path: str) -> str:
    r"""Read the escapes of Python's strings in a text of the config, in which Hydra leaves them as they are.

    Args:
        text: the text; escapes are ``\n \t \r \\ \' \" \xNN \uNNNN \UNNNNNNNN``.
        path: of the setting, for the message.

    Raises:
        ConfigError: another character after a backslash, or the number of no character.
    """

    def character(match: re.Match[str]) -> str:
        _require(
            match[1] is not None,
            f"{path}: {text!r} holds a backslash before {match[2]!r}, which is not an escape; write \\\\ for a "
            f"backslash",
        )
        try:
            read = match[0].encode("ascii").decode("unicode_escape")
            read.encode("utf-8")
        except UnicodeError:
            raise ConfigError(f"{path}: {text!r} holds {match[0]}, which is not a character; mend it") from None
        return read

    return _ESCAPE.sub(character, text)


def _require_finite(record: Any, prefix: str) -> None:
    for item in fields(record):
        value = getattr(record, item.name)
        _require(
            not isinstance(value, float) or math.isfinite(value), f"{prefix}.{item.name}: must be finite, got {value}"
        )


@dataclass(frozen=True)
class TrackerSettings:
    """Constants of the KL-adaptive trackers (docs/method.md, section 6).

    Attributes:
        rho_min, rho_max: bounds of the retention per visit.
        half_life: drift after which an observation counts half, in the unit of ``drift``; 0.06 with logratio, if not
            given. With nats, give the KL of about eight steps.
        drift: how the policy's drift is measured: ``kl_steps`` or ``nats`` (``tracker.DriftClock``), or ``logratio``,
            SPO's mean of abs(log pi_then - log pi_now) over the prompt's previous segment, at one extra forward.
    """

    rho_min: float = 0.875
    rho_max: float = 0.96
    half_life: float = HALF_LIVES["kl_steps"]
    drift: str = "kl_steps"

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require_finite(self, "skpo.tracker")
        _require(
            0 <= self.rho_min <= self.rho_max <= 1,
            f"skpo.tracker: needs 0 <= rho_min <= rho_max <= 1, got rho_min={self.rho_min}, rho_max={self.rho_max}",
        )
        _require(self.half_life > 0, f"skpo.tracker.half_life: must be > 0, got {self.half_life}")
        _require_one_of(self.drift, DRIFTS, "skpo.tracker.drift")


@dataclass(frozen=True)
class CurriculumSettings:
    """Prioritised sampling of prompts (docs/method.md, section 13).

    Attributes:
        enable: draw prompts by weight; off means verl's shuffled epochs.
        epsilon: added to every weight, so that no prompt is out of reach.
    """

    enable: bool = True
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        _require_finite(self, "skpo.curriculum")
        _require(
            self.epsilon > 0,
            f"skpo.curriculum.epsilon: must be > 0 (a solved prompt would never be seen again), got {self.epsilon}",
        )


@dataclass(frozen=True)
class UpstreamSettings:
    """Options of the upstream objective that are not in the paper (docs/method.md, section 16).

    Attributes:
        shrinkage: multiply each upstream advantage by the estimated share of signal in its variance.
    """

    shrinkage: bool = False


@dataclass(frozen=True)
class SkpoSettings:
    """Everything SKPO adds to verl's config.

    Attributes:
        group_size: G, downstream siblings per prompt.
        candidates: upstream candidates per prompt, 1 to G; None means G.
        split: where candidates are cut: ``adaptive`` (the paper: t_q uniform on [split_low, split_high] x mean response
            length), ``fixed`` (the two ends of that range in turn, by step) or ``boundary_token`` (at the last boundary
            at or before the adaptive t_q).
        split_low, split_high: the range, in shares of the mean response length.
        boundaries: token ids and strings at which ``boundary_token`` cuts.  A config may write escapes (``unescaped``).
        selection: which candidate is kept: ``median`` (the paper), ``extreme``, ``first``, ``random``; see
            ``segments.select_segment``.
        skip: what the siblings continue: ``concat`` (the paper: the tokens of s, then those of the templated q),
            ``chat`` (q's template with s quoted inside the user turn), ``continual`` (q, then s as the hard beginning
            of the response), ``unconditional`` (q alone).
        chat_quote: the user turn of ``chat``, with {segment} and {problem}.  A config may write escapes.
        upstream_reward: R_I: ``mc`` (the paper: mean of the siblings' rewards) or ``own`` (the reward of the chosen
            candidate's own completed response).
        downstream_aggregation: ``group_token_mean`` (eq. 5: 1 / sum_i |o_i| per prompt, mean over prompts) or
            ``token_mean`` (over all downstream tokens of the update).
        initial_length: mean response length in tokens assumed for a prompt never visited.
        weight_up, weight_down: weights of the two objectives.
        clip_low, clip_high: former names of ``actor.clip_ratio_low`` and ``clip_ratio_high``; None if not given.
        upstream: options of the upstream objective that are not in the paper.
        tracker: constants of the trackers.
        curriculum: prioritised sampling of prompts.
        seed: of every random draw of the trainer (split positions, request seeds).
        seed_requests: give every sampled request its own seed, so that a run can be repeated.  Costs a generator
            per request in the sampler: off in the GPU platform's config.
        prompt_timeout_s: seconds that one prompt may take from q to its rewards before it is dropped; a batch in which
            no prompt ends for that long and a minute stops the run.
        max_dropped_share: largest share of a batch's prompts that may be dropped; more stop the run, and so does a
            batch without any prompt left.
        weight_sync_timeout_s: seconds within which the inference server must acknowledge a bucket of weights, fall
            asleep or wake up.
        max_logprob_gap: mean difference in nats per token between the log-probs of rollout and actor above which the
            run stops, since the servers cannot have the actor's weights then; None for no limit.
        start_timeout_s: seconds that the start may take, from the command's Ray to the first weights in the servers.
        poll_interval_s: seconds between two polls of verl's replay buffer for finished prompts.
        trees_per_step: rollout trees (candidates, segment, responses, rewards) stored per step for people to read.
        trees_per_validation: so many of the newest trees go to the loggers with each validation: wandb, mlflow and
            trackio get a table, tensorboard a text.
        trees_max_mb: bound of all stored trees in megabytes; over it, steps are removed so that the rest stays even.
    """

    group_size: int = 8
    candidates: int | None = None
    split: str = "adaptive"
    split_low: float = 1 / 6
    split_high: float = 1 / 2
    boundaries: list[Any] = field(default_factory=list)
    selection: str = "median"
    skip: str = "concat"
    chat_quote: str = "Beginning of a solution:\n{segment}\n\n{problem}"
    upstream_reward: str = "mc"
    downstream_aggregation: str = "group_token_mean"
    initial_length: int = 1024
    weight_up: float = 0.5
    weight_down: float = 0.5
    clip_low: float | None = None
    clip_high: float | None = None
    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    tracker: TrackerSettings = field(default_factory=TrackerSettings)
    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    seed: int = 1
    seed_requests: bool = True
    prompt_timeout_s: float = 1800.0
    max_dropped_share: float = 0.5
    weight_sync_timeout_s: float = 300.0
    max_logprob_gap: float | None = 0.5
    start_timeout_s: float = 3600.0
    poll_interval_s: float = 2.0
    trees_per_step: int = 1
    trees_per_validation: int = 4
    trees_max_mb: float = 64.0

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: naming the setting, what it must be, and its value.
        """
        _require_finite(self, "skpo")
        for name, (holds, what) in BOUNDS.items():
            value = getattr(self, name)
            _require(holds(value), f"skpo.{name}: must be {what}, got {value}")
        for name, known in CHOICES.items():
            _require_one_of(getattr(self, name), known, f"skpo.{name}")
        _require(
            0 < self.split_low <= self.split_high < 1,
            f"skpo.split_low, skpo.split_high: need 0 < split_low <= split_high < 1, "
            f"got {self.split_low} and {self.split_high}",
        )
        _require(
            self.weight_up >= 0 and self.weight_down >= 0 and self.weight_up + self.weight_down > 0,
            f"skpo.weight_up, skpo.weight_down: must be >= 0 and not both 0, "
            f"got {self.weight_up} and {self.weight_down}",
        )
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse values that would be ignored or would equal another choice."""
        _require(
            self.candidates is None or 1 <= self.candidates <= self.group_size,
            f"skpo.candidates: must be between 1 and skpo.group_size={self.group_size}, or null for as many; "
            f"got {self.candidates}",
        )
        _require(
            self.candidate_count > 1 or self.selection in ("median", "first"),
            f"skpo.selection: {self.selection} has nothing to choose from with skpo.candidates=1; leave it at median",
        )
        _require(
            not self.upstream.shrinkage or (self.upstream_reward == "mc" and self.weight_up > 0),
            "skpo.upstream.shrinkage: needs skpo.weight_up above 0, got 0; leave shrinkage out"
            if self.upstream_reward == "mc"
            else "skpo.upstream.shrinkage: needs skpo.upstream_reward=mc, because the noise of a segment's reward is "
            "estimated from the rewards that it is the mean of; leave one of them out",
        )
        _require(
            (self.split == "boundary_token") == bool(self.boundaries),
            "skpo.boundaries: name the strings or token ids to cut at, with skpo.split=boundary_token"
            if self.split == "boundary_token"
            else f"skpo.boundaries: has no effect with skpo.split={self.split}; set skpo.split=boundary_token",
        )
        for boundary in self.boundaries:
            usable = (isinstance(boundary, str) and boundary) or (type(boundary) is int and boundary >= 0)
            _require(bool(usable), f"skpo.boundaries: {boundary!r} is neither a token id nor a non-empty string")
        try:
            names = sorted(name for _, name, _, _ in string.Formatter().parse(self.chat_quote) if name is not None)
        except ValueError as error:
            names = [str(error)]
        _require(
            names == ["problem", "segment"],
            f"skpo.chat_quote: must hold {{segment}} and {{problem}}, once each, got {self.chat_quote!r}",
        )

    @property
    def candidate_count(self) -> int:
        """Upstream candidates per prompt."""
        return self.group_size if self.candidates is None else self.candidates

    @classmethod
    def from_config(cls, node: DictConfig | Mapping[str, Any]) -> "SkpoSettings":
        """Read the settings in a config's ``skpo`` node.

        Raises:
            ConfigError: an unknown key, a value of the wrong type, or one out of range.
        """
        settings = _read(cls, node, "skpo", RECORDS)
        boundaries = [
            unescaped(item, "skpo.boundaries") if isinstance(item, str) else item for item in settings.boundaries
        ]
        return replace(settings, boundaries=boundaries, chat_quote=unescaped(settings.chat_quote, "skpo.chat_quote"))


RECORDS: dict[str, type] = {
    "upstream": UpstreamSettings,
    "tracker": TrackerSettings,
    "curriculum": CurriculumSettings,
}
"""The nodes below ``skpo`` that are records of their own."""


@dataclass(frozen=True)
class PolaritySettings:
    """Entropy polarity on top of any method's advantages (docs/method.md, section 17); ``method=papo`` turns it on.

    Attributes:
        enable: reweight the advantages of tokens that expand the policy's entropy against those that contract it.
        strength: lambda, inside [0, 1): how far weights move from 1; 0 changes no bit and still logs the metrics.
        target: entropy that the policy is to have, in nats per token above 0, or ``ema``: its own moving average.
        decay: share of that average that a step keeps, inside [0, 1).
    """

    enable: bool = False
    strength: float = 0.5
    target: Any = "ema"
    decay: float = 0.9

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("strength", "decay"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"polarity.{name}: must be inside [0, 1), got {value}")
        number = type(self.target) in (int, float) and 0 < self.target < math.inf
        _require(
            number or self.target == "ema",
            f"polarity.target: must be ema, or an entropy above 0 in nats per token, got {self.target!r}",
        )

    @property
    def entropy(self) -> float | None:
        """The target as a number; None for the moving average."""
        return None if self.target == "ema" else float(self.target)

    @classmethod
    def from_config(cls, node: DictConfig | Mapping[str, Any]) -> "PolaritySettings":
        """Read the settings in a config's ``polarity`` node.

        Raises:
            ConfigError: an unknown key, a value of the wrong type, or one out of range.
        """
        return _read(cls, node, "polarity", {})


_Record = TypeVar("_Record")


def _read(cls: type[_Record], node: Any, path: str, records: Mapping[str, type]) -> _Record:
    """Read a node of the config as a record, which may have ``records`` of its own below."""
    try:
        resolve = isinstance(node, DictConfig)
        plain: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if resolve else node
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{path}: must be a mapping of settings, is {plain!r}")
    for name in records:
        if not isinstance(plain.get(name, {}), Mapping):
            raise ConfigError(f"{path}.{name}: must be a mapping of settings, is {plain[name]!r}")
    known = _keys(cls, records)
    for key in _unknown(plain, known, records):
        raise ConfigError(f"{path}.{key}: unknown key; known are {', '.join(known)}")
    try:
        schema = OmegaConf.structured(cls)
        for record in (schema, *(schema[name] for name in records)):  # frozen dataclasses come as read-only nodes
            OmegaConf.set_readonly(record, False)
        settings = OmegaConf.to_object(OmegaConf.merge(schema, plain))
    except OmegaConfBaseException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ConfigError):
            raise cause from None
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}.{getattr(error, 'full_key', None) or '?'}: {reason}") from None
    assert isinstance(settings, cls)
    return settings


def _keys(cls: Any, records: Mapping[str, Any]) -> list[str]:
    top = [item.name for item in fields(cls) if item.name not in records]
    return top + [f"{name}.{item.name}" for name, record in records.items() for item in fields(record)]


def _unknown(node: Mapping[str, Any], known: Iterable[str], records: Iterable[str]) -> list[str]:
    given = [key for key in node if key not in set(records)]
    given += [f"{name}.{key}" for name in records for key in (node.get(name) or {})]
    return [key for key in given if key not in set(known)]


def known_keys() -> list[str]:
    """Return the dotted keys below ``skpo``."""
    return _keys(SkpoSettings, RECORDS)


def unknown_keys(node: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in ``node`` that the settings of ``skpo`` do not have."""
    return _unknown(node, known_keys(), RECORDS)


def default_node() -> dict[str, Any]:
    """Return the node ``skpo`` of the config: the defaults of the records, and the half-life that follows the drift."""
    node: Any = OmegaConf.to_container(OmegaConf.structured(SkpoSettings))
    node["tracker"]["half_life"] = "${skpo_half_life:${skpo.tracker.drift}}"
    return node
