"""Tell before training whether a segment's reward has a signal for a model and its data: minutes, no updates.

    python -m recipe.skpo.analysis.probe [probe.<size>=<n> ...] <the overrides of a training>

Per prompt, plain responses; segments as training takes them (split position, candidates, selection), half of them from
the lower and half from the upper half of the split range (``split=fixed``: from its two ends); K responses to each
[s, q], and G in the other skip modes.  From these: signal to noise of the segments' rewards, accuracy and length under
[s, q] against q, copies of s, groups of equal rewards, signs of the upstream advantage.  Writes ``probe.html``,
``probe.json`` and the draws; a killed probe resumes.  docs/method.md, section 16.

Sizes: probe.prompts, probe.segments (S, even), probe.continuations (K, at least 2 G), probe.seed, and probe.out, the
folder.  64 x 8 x 64; on the CPU platform 32 x 8 x 16.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf

from recipe.skpo.analysis.common import with_weights
from recipe.skpo.analysis.probe_page import page, verdict
from recipe.skpo.analysis.sign_consistency import (
    Prompts,
    SignConfig,
    draw_segments,
    monte_carlo_scores,
    signs,
    upstream_scores,
)
from recipe.skpo.checks import MODEL, ROLLOUT
from recipe.skpo.checks.options import Unread, check_unread
from recipe.skpo.checks.reward import BOUNDED
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.engine import FREE, EngineConfig
from recipe.skpo.evaluation.options import RewardFunction, require
from recipe.skpo.evaluation.problems import Judge, Problem, Reward, prompts_of, read_problems
from recipe.skpo.evaluation.results import check_same_config, json_bytes
from recipe.skpo.evaluation.sampling import (
    Completion,
    Request,
    Sampler,
    draw_stored,
    opened_by_first_draw,
    request_seed,
)
from recipe.skpo.main import Command, check, prepare, refusing, run_command
from recipe.skpo.method.segments import (
    Segment,
    begins_with,
    cut_segment,
    fixed_split_position,
    last_boundary,
    sample_split_position,
    select_segment,
)
from recipe.skpo.method.tracker import PromptTable
from recipe.skpo.method.variance import Parts, nested_parts
from recipe.skpo.output.files import write_atomic
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.task.model_files import load_tokenizer
from recipe.skpo.task.prompts import segment_prompt
from recipe.skpo.task.run_settings import Chat

SKIP_MODES = ("concat", "chat", "continual")
VISITS = (0, 1, 4)
"""Earlier visits of a prompt after which the sign of the upstream advantage is looked at."""
SIMULATED = 4000
"""Prompts of the simulation of signs."""
PREFIX = "probe."
_ITSELF = "the probe calls the reward function itself, one response at a time"
_ADAPTER = "the probe draws from the weights without an adapter; merge it into them, or leave it out"
UNREAD_BY_PROBE = [
    Unread("skpo.upstream_reward", "mc", "the probe measures the mean of the responses' rewards; leave it out"),
    Unread("data.custom_cls.path", None, "the probe reads the rows of the files themselves; leave it out"),
    Unread("reward.reward_manager.source", "register", f"{_ITSELF}; leave it out"),
    Unread("reward.reward_manager.name", "naive", _ITSELF, refused=False),
    Unread(f"{MODEL}.lora_adapter_path", None, _ADAPTER),
    Unread(f"{MODEL}.lora.adapter_path", None, _ADAPTER),
    Unread(
        "trainer.resume_from_path",
        None,
        f"the probe draws from {MODEL}.path; export the checkpoint and give its folder there",
        refused=False,
    ),
    Unread(f"{MODEL}.external_lib", None, "the probe's processes do not import it", refused=False),
    Unread(f"{ROLLOUT}.quantization", None, "the probe draws from the weights as they are", refused=False),
    Unread(f"{ROLLOUT}.qat.enable", False, "the probe draws from the weights as they are", refused=False),
    Unread(
        f"{ROLLOUT}.agent.agent_loop_manager_class",
        "recipe.skpo.rollout.manager.SkpoAgentLoopManager",
        "the probe draws as this one does; leave it out",
    ),
    Unread(f"{ROLLOUT}.agent.custom_async_server.path", None, "the probe asks vLLM itself; leave it out"),
]
"""Options of a training that would change what it draws, and that the probe does not read."""
UNREAD_IF_GIVEN = {
    "skpo.initial_length": "split positions are shares of the mean length of the prompt's plain responses",
    "skpo.seed": "the seed of every draw is probe.seed",
}
"""The same for options whose default is the model's own or does not matter."""
CONFIG = Path(__file__).parents[1] / "config"


@dataclass(frozen=True)
class Sizes:
    """What is drawn.

    Attributes:
        prompts: of the training data, drawn with the seed.
        segments: S per prompt.
        continuations: K responses to each [s, q].
        seed: of every draw.
        out: folder; None is the training's output_dir with ``-probe`` behind it.
    """

    prompts: int = 64
    segments: int = 8
    continuations: int = 64
    seed: int = 1
    out: str | None = None

    @classmethod
    def of(cls, overrides: Sequence[str], platform: str, group_size: int) -> "Sizes":
        """Read ``probe.<name>=<value>``; a probe on CPUs is smaller by default.

        Raises:
            ConfigError: an unknown name or a value that cannot work.
        """
        defaults = cls(prompts=32, continuations=16) if platform == "cpu" else cls()
        values: dict[str, Any] = {"continuations": max(defaults.continuations, 2 * group_size)}
        for override in overrides:
            name, sign, text = override.removeprefix(PREFIX).partition("=")
            require(name in asdict(defaults), f"probe.{name}: unknown; known are {', '.join(asdict(defaults))}")
            value = text if name == "out" else yaml.safe_load(text)
            require(bool(sign and text), f"probe.{name}: has no value; give probe.{name}=<value>")
            require(name == "out" or type(value) is int, f"probe.{name}: is {text}, must be a whole number")
            values[name] = value
        sizes = replace(defaults, **values)
        least = {"prompts": 2, "segments": 4, "continuations": 2 * group_size, "seed": 0}
        for name, bound in least.items():
            found = getattr(sizes, name)
            require(found >= bound, f"probe.{name}: must be >= {bound}, got {found}")
        require(sizes.segments % 2 == 0, f"probe.segments: must be even, got {sizes.segments}")
        return sizes


@dataclass(frozen=True)
class Setup:
    """The model, how it is asked, and how long its texts may be.

    Attributes:
        model: folder or name.
        settings: the training's node ``skpo``.
        temperature, top_p, top_k: of every response.
        response_length, max_model_len: the training's limits in tokens.
        tokenizer: folder or name of the tokenizer.
        trust_remote_code: of model and tokenizer.
        chat: template and its options.
        reward: the training's reward.
        engine: how the model is served.
        vllm: further arguments of vLLM.
    """

    model: str
    settings: SkpoSettings
    temperature: float
    top_p: float
    top_k: int
    response_length: int
    max_model_len: int
    tokenizer: str
    trust_remote_code: bool
    chat: Chat
    reward: RewardFunction
    engine: EngineConfig
    vllm: dict[str, Any]

    @classmethod
    def of(cls, config: DictConfig, settings: SkpoSettings) -> "Setup":
        """Read a training's config, which is checked and resolved."""
        actor, platform = config.actor_rollout_ref, config.platform
        rollout, reward = actor.rollout, config.reward.custom_reward_function
        kwargs: Any = [
            OmegaConf.to_container(node) if OmegaConf.is_dict(node) else {}
            for node in (
                config.data.get("apply_chat_template_kwargs"),
                reward.get("reward_kwargs"),
                rollout.engine_kwargs.get("vllm"),
            )
        ]
        own = {"num_threads": platform.num_threads, "kv_cache_gib": platform.kv_cache_gib}
        return cls(
            model=actor.model.path,
            settings=settings,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=-1 if rollout.top_k is None else rollout.top_k,
            response_length=rollout.response_length,
            max_model_len=rollout.max_model_len,
            tokenizer=actor.model.get("tokenizer_path") or actor.model.path,
            trust_remote_code=bool(actor.model.get("trust_remote_code")),
            chat=Chat(actor.model.get("custom_chat_template"), kwargs[0]),
            reward=RewardFunction(reward.path, reward.name, kwargs[1]),
            engine=EngineConfig(
                platform=platform.name,
                dtype=rollout.dtype,
                max_model_len=rollout.max_model_len,
                max_num_seqs=rollout.max_num_seqs,
                max_num_batched_tokens=rollout.max_num_batched_tokens,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                tensor_parallel_size=rollout.tensor_model_parallel_size,
                prompts_per_call=32,
                **(own if platform.name == "cpu" else {}),
            ),
            # verl leaves out what is null, and raw_logprobs is vLLM's own default.
            vllm={"logprobs_mode": rollout.logprobs_mode or "raw_logprobs"}
            | {name: value for name, value in kwargs[2].items() if value is not None},
        )

    def load_tokenizer(self) -> Any:
        """Load the tokenizer with the training's chat template."""
        return load_tokenizer(self.tokenizer, self.chat, trust_remote_code=self.trust_remote_code)

    def open(self) -> Sampler:
        """Start vLLM."""
        return self.engine.open(self.model, **({"trust_remote_code": self.trust_remote_code} | self.vllm))


@dataclass(frozen=True)
class Data:
    """The problems that the training draws from.

    Attributes:
        files: parquet files.
        prompt_key: column of the prompts.
        most: rows that the training takes; all if not above 0.
        seed: of these rows; None takes the first ones.
        longest: tokens of a prompt, where longer ones are left out; None where there are none.
    """

    files: tuple[str, ...]
    prompt_key: str = "prompt"
    most: int = -1
    seed: int | None = None
    longest: int | None = None

    @classmethod
    def of(cls, config: DictConfig, seed: int) -> "Data":
        """Read a training's config; without a seed of its own, its choice of rows is as good as any of ``seed``."""
        data = config.data
        own = seed if data.seed is None else data.seed
        return cls(
            files=(data.train_files,) if isinstance(data.train_files, str) else tuple(data.train_files),
            prompt_key=data.prompt_key,
            most=data.get("train_max_samples", -1),
            seed=own if data.shuffle else None,
            longest=data.max_prompt_length if data.filter_overlong_prompts else None,
        )

    @property
    def where(self) -> str:
        """Begin a message about the files."""
        return f"data.train_files: {', '.join(self.files)}"

    def problems(self, setup: Setup) -> list[Problem]:
        """Read the problems that verl's data set keeps: first so many of the rows, of them those not too long."""
        every = [
            problem
            for file in self.files
            for problem in read_problems(Path(file), "data.train_files:", prompt_key=self.prompt_key)
        ]
        if 0 < self.most < len(every):
            rows = np.arange(self.most)
            if self.seed is not None:
                rows = np.random.default_rng(self.seed).choice(len(every), self.most, replace=False)
            every = [every[row] for row in sorted(rows)]
        if self.longest is None:
            return every
        prompts = prompts_of(every, setup.load_tokenizer(), self.where)
        return [problem for problem, ids in zip(every, prompts, strict=True) if len(ids) <= self.longest]


# ---------------------------------------------------------------- draws


@dataclass(frozen=True)
class Place:
    """One segment's place.

    Attributes:
        prompt: number of its prompt.
        number: its own.
        step: step of the training that it stands for, by which ``split=fixed`` and ``selection=extreme`` alternate.
        split: its split position t in tokens.
    """

    prompt: int
    number: int
    step: int
    split: int

    def key(self, kind: str) -> str:
        """Name a request about this segment."""
        return f"{self.prompt}/{self.number}/{kind}"


@dataclass(frozen=True)
class Group:
    """The checked responses to one prompt in one mode.

    Attributes:
        rewards: float64 (responses,).
        right: bool (responses,).
        lengths: tokens of the whole responses, (responses,).
        copied: whether what was generated begins with all of the segment, bool (responses,).
        first: text of the first response.
    """

    rewards: np.ndarray
    right: np.ndarray
    lengths: np.ndarray
    copied: np.ndarray
    first: str


class Probe:
    """Turns problems into requests, and their completions into groups."""

    def __init__(self, setup: Setup, sizes: Sizes, problems: Sequence[Problem], where: str) -> None:
        self.setup, self.sizes, self.problems = setup, sizes, problems
        self.tokenizer = setup.load_tokenizer()
        self.prompts = prompts_of(problems, self.tokenizer, where)
        self.judge = Judge(Reward(setup.reward), self.tokenizer)
        self.judge.reward.check_truths(problems, where)
        self.rng = np.random.default_rng(sizes.seed)

    def request(self, key: str, prompt: Sequence[int], most: int, count: int) -> Request:
        """Make a request for ``count`` completions of at most ``most`` tokens."""
        most = min(most, self.setup.max_model_len - len(prompt))
        if most < 1:
            raise ConfigError(
                f"actor_rollout_ref.rollout.max_model_len: {self.setup.max_model_len} leaves no room for a response "
                f"to a prompt of {len(prompt)} tokens; raise it"
            )
        seed = request_seed(self.sizes.seed, key, count)
        how = (self.setup.temperature, self.setup.top_p, self.setup.top_k)
        return Request(key, tuple(prompt), most, seed, count, *how)

    def plain(self) -> list[Request]:
        """Return one request per problem for G responses to q."""
        count, most = self.setup.settings.group_size, self.setup.response_length
        return [self.request(f"{n}/plain", prompt, most, count) for n, prompt in enumerate(self.prompts)]

    def places(self, lengths: Sequence[float]) -> list[Place]:
        """Draw the split positions, given the mean plain length of each problem in tokens.

        The first half of a problem's segments is from the lower half of the split range, the rest from the upper half;
        with ``split=fixed`` from the lower end, which odd steps take, and from the upper end.
        """
        settings, count = self.setup.settings, self.sizes.segments
        low, high = settings.split_low, settings.split_high
        halves = [(low, (low + high) / 2), ((low + high) / 2, high)]
        places = []
        for prompt, length in enumerate(lengths):
            for number in range(count):
                upper, step = number >= count // 2, number + 1
                if settings.split == "fixed":
                    step = 2 * number + 1 + upper
                    split = fixed_split_position(length, step, low, high)
                else:
                    split = sample_split_position(length, self.rng, *halves[upper])
                places.append(Place(prompt, number, step, split))
        return places

    def candidates(self, place: Place) -> Request:
        """Return the request for a segment's candidates."""
        count = self.setup.settings.candidate_count
        return self.request(place.key("candidates"), self.prompts[place.prompt], place.split, count)

    def cut(self, place: Place, drawn: Sequence[Completion]) -> list[Segment]:
        """Cut the candidates as training does."""
        settings, boundary = self.setup.settings, None
        if settings.split == "boundary_token":
            texts = [item for item in settings.boundaries if isinstance(item, str)]
            ids = [item for item in settings.boundaries if isinstance(item, int)]
            boundary = partial(last_boundary, boundary_ids=ids, boundary_texts=texts, decode=self.decode)
        return [
            cut_segment(item.token_ids, item.logprobs, place.split, item.finish_reason == "stop", boundary)
            for item in drawn
        ]

    def choose(self, place: Place, cut: Sequence[Segment]) -> Segment:
        """Choose among a place's candidates as training does."""
        deviations, selection = [segment.deviation for segment in cut], self.setup.settings.selection
        return cut[select_segment(deviations, selection, place.step, self.sizes.seed + place.number)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode without clean-up, so that the text of a prefix is a prefix of the text."""
        return str(self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    def responses(self, mode: str, place: Place, segment: Segment, count: int) -> Request:
        """Return the request for the responses to one segment in one skip mode."""
        question, messages = self.prompts[place.prompt], self.problems[place.prompt].messages
        quote, most = self.setup.settings.chat_quote, self.setup.response_length
        prompt = segment_prompt(mode, segment.token_ids, question, messages, self.tokenizer, quote)
        if mode == "continual":
            # The whole response, s included, has the budget of a plain one.
            most = max(1, most - len(segment.token_ids))
        return self.request(place.key(mode), prompt, most, count)

    def group(self, number: int, drawn: Sequence[Completion], mode: str = "", segment: Segment | None = None) -> Group:
        """Check the responses to problem ``number``; a continual response counts with its segment."""
        start = segment.token_ids if segment is not None else ()
        opening = start if mode == "continual" else ()
        whole = [[*opening, *item.token_ids] for item in drawn]
        problem = self.problems[number]
        checked = [self.judge(problem, self.prompts[number], ids) for ids in whole]
        for _, found in checked:
            require(
                -1 <= found.score <= 1,
                f"reward: returned {found.score:g} for problem {problem.id}, and method=skpo {BOUNDED}; scale it",
            )
        return Group(
            rewards=np.array([verdict.score for _, verdict in checked], dtype=np.float64),
            right=np.array([verdict.right for _, verdict in checked]),
            lengths=np.array([len(ids) for ids in whole]),
            copied=np.array([bool(start) and begins_with(item.token_ids, start) for item in drawn]),
            first=checked[0][0],
        )


@dataclass(frozen=True)
class Drawn:
    """All that was drawn.

    Attributes:
        plain: one group per prompt.
        chance: per segment, share of the prompt's plain responses that begin with it, float64 (segments,).
        segments: of all prompts, in the order of the places.
        splits: their split positions.
        modes: skip mode to number of a segment to its group.
    """

    plain: list[Group]
    chance: np.ndarray
    segments: list[Segment]
    splits: list[int]
    modes: dict[str, dict[int, Group]]


def draw(probe: Probe, store: Path, sample: Callable[[Sequence[Request]], list[list[Completion]]]) -> Drawn:
    """Draw all groups, stored ones from the store."""
    settings, sizes = probe.setup.settings, probe.sizes

    def drawn(requests: Sequence[Request]) -> list[list[Completion]]:
        found = draw_stored(requests, store, sample, probe.setup.engine.prompts_per_call, partial(print, flush=True))
        return [found[request.key] for request in requests]

    plain = drawn(probe.plain())
    places = probe.places([float(np.mean([len(item.token_ids) for item in items])) for items in plain])
    candidates = drawn([probe.candidates(place) for place in places])
    cut = [probe.cut(place, items) for place, items in zip(places, candidates, strict=True)]
    require(
        settings.split != "boundary_token" or any(segment.at_boundary for segments in cut for segment in segments),
        f"skpo.boundaries: none of {settings.boundaries} is in any candidate, so that skpo.split=boundary_token cuts "
        f"as skpo.split=adaptive does; name what the model writes",
    )
    chosen = [probe.choose(place, segments) for place, segments in zip(places, cut, strict=True)]
    modes: dict[str, dict[int, Group]] = {}
    # The other modes are asked about one segment of each half of the split range.
    few = [at for at, place in enumerate(places) if place.number in (0, sizes.segments // 2)]
    for mode in dict.fromkeys([settings.skip, *SKIP_MODES]):
        own = mode == settings.skip
        asked = range(len(places)) if own else few
        count = sizes.continuations if own else settings.group_size
        answers = drawn([probe.responses(mode, places[at], chosen[at], count) for at in asked])
        modes[mode] = {
            at: probe.group(places[at].prompt, items, mode, chosen[at])
            for at, items in zip(asked, answers, strict=True)
        }
    return Drawn(
        plain=[probe.group(number, items) for number, items in enumerate(plain)],
        chance=np.array(
            [
                np.mean([begins_with(item.token_ids, segment.token_ids) for item in plain[place.prompt]])
                for place, segment in zip(places, chosen, strict=True)
            ]
        ),
        segments=chosen,
        splits=[place.split for place in places],
        modes=modes,
    )


# ---------------------------------------------------------------- numbers


def mode_numbers(groups: Mapping[int, Group], prompts: Sequence[int], size: int) -> dict[str, float]:
    """Average one mode's groups; ``prompts`` has the prompt of each, ``size`` is G.

    Returns:
        Accuracy with its standard error over prompts, length in tokens, share of copies, and the share of groups of
        the first G responses whose rewards are all equal.
    """
    listed = list(groups.values())
    per_prompt = {
        prompt: float(np.mean([group.right.mean() for group, of in zip(listed, prompts, strict=True) if of == prompt]))
        for prompt in dict.fromkeys(prompts)
    }
    accuracies = np.array(list(per_prompt.values()))
    return {
        "accuracy": float(accuracies.mean()),
        "accuracy_error": float(accuracies.std(ddof=1) / np.sqrt(len(accuracies))),
        "length": float(np.mean([group.lengths.mean() for group in listed])),
        "copied_share": float(np.mean([group.copied.mean() for group in listed])),
        "all_equal_share": float(np.mean([len(set(group.rewards[:size])) == 1 for group in listed])),
        "groups": len(listed),
    }


def components(parts: Parts, seed: int) -> dict[str, float]:
    """Estimate signal and noise with the interval of their ratio, as standard deviations of the reward."""
    found = parts.components(seed)
    return {
        "signal": float(np.sqrt(max(0.0, found.signal))),
        "noise": float(np.sqrt(found.noise)),
        "signal_to_noise": found.signal_to_noise,
        "low": found.low,
        "high": found.high,
    }


def measured_signs(rewards: np.ndarray, group_size: int) -> dict[str, float]:
    """Compare signs of advantages from the first rewards of each segment with those from its other rewards.

    The truth is the mean of K - G rewards minus that mean over the prompt's segments.  It is noisy itself, so that the
    shares are below those against the true values; an estimate of 0 is not right.

    Args:
        rewards: (prompts, segments, K).
        group_size: G.

    Returns:
        Estimator to share of right signs: ``skpo after n`` earlier visits of the prompt, and Monte Carlo, group
        relative over the prompt's segments, with as many rewards per prompt as one visit (``mc equal``) and with G
        per segment (``mc``).
    """
    _, segments, _ = rewards.shape
    truth = rewards[:, :, group_size:].mean(axis=2)
    truth = truth - truth.mean(axis=1, keepdims=True)

    def right(estimate: np.ndarray, true: np.ndarray) -> float:
        told = signs(true) != 0
        return float((signs(estimate) == signs(true))[told].mean()) if told.any() else float("nan")

    def monte_carlo(count: int) -> float:
        means = rewards[:, :, :count].mean(axis=2)
        return right(means - means.mean(axis=1, keepdims=True), truth)

    means, found = rewards[:, :, :group_size].mean(axis=2), {}
    for visits in (count for count in VISITS if count < segments):
        estimates, trues = [], []
        # Every segment is once the one after the visits to those before it.
        for last in range(segments):
            order = [(last - visits + step) % segments for step in range(visits)]
            estimates.append(means[:, last] - tracked(means[:, order]))
            trues.append(truth[:, last])
        found[f"skpo after {visits}"] = right(np.stack(estimates), np.stack(trues))
    return found | {"mc equal": monte_carlo(max(1, group_size // segments)), "mc": monte_carlo(group_size)}


def tracked(rewards: np.ndarray) -> np.ndarray:
    """Return the baseline in [-1, 1] that a tracker has after visits with these rewards, (prompts, visits)."""
    table = PromptTable()
    for prompt, visits in enumerate(rewards):
        for reward in visits:
            table.visit(str(prompt), (reward + 1) / 2, 1.0, 0.0)
    return np.array([2 * table.value(str(prompt)) - 1 for prompt in range(len(rewards))])


def expected_signs(rewards: np.ndarray, group_size: int, signal_to_noise: float, seed: int) -> dict[str, float]:
    """Simulate the shares of right signs against the true values, with the measured values and signal to noise.

    As ``sign_consistency``: a prompt's value is one of the measured ones, its segments are Beta distributed around it
    with the concentration G / (signal to noise)^2.

    Args:
        rewards: -1 or +1, (prompts, segments, K).
        group_size: G.
        signal_to_noise: measured, above 0.
        seed: of the simulation.

    Returns:
        As ``measured_signs``; empty without a signal, or where rewards have other values.
    """
    if not signal_to_noise > 0 or not np.isin(rewards, (-1, 1)).all():
        return {}
    prompts, segments, count = rewards.shape
    rng = np.random.default_rng(seed)
    least = 0.5 / (segments * count)
    shares = np.clip((rewards.mean(axis=(1, 2)) + 1) / 2, least, 1 - least)
    value = shares[rng.integers(prompts, size=SIMULATED)]
    concentration = np.full(SIMULATED, group_size / signal_to_noise**2)
    true = draw_segments(value, concentration, segments, rng)
    simulated = Prompts(value, concentration, true, np.zeros(SIMULATED, dtype=int))
    config = SignConfig(prompts=SIMULATED, group_size=segments, visits=max(VISITS) + 1, responses=group_size, drift=0)
    found = {
        f"skpo after {visit}": float(np.nanmean(scores.right))
        for estimator, visit, scores in upstream_scores(config, simulated, 0.0, rng)
        if estimator == "skpo" and visit in VISITS
    }
    for name, samples in (("mc equal", max(1, group_size // segments)), ("mc", group_size)):
        found[name] = float(np.nanmean(monte_carlo_scores(simulated, samples, rng).right))
    return found


def measure(drawn: Drawn, setup: Setup, sizes: Sizes) -> dict[str, Any]:
    """Compute every number of the probe."""
    settings, count = setup.settings, sizes.segments
    own = drawn.modes[settings.skip]
    rewards = np.stack([group.rewards for group in own.values()]).reshape(len(drawn.plain), count, -1)
    halves = {"lower half": rewards[:, : count // 2], "upper half": rewards[:, count // 2 :]}
    signal = components(nested_parts(rewards, settings.group_size), sizes.seed)
    modes = {"q": mode_numbers(dict(enumerate(drawn.plain)), range(len(drawn.plain)), settings.group_size)}
    for mode, groups in drawn.modes.items():
        modes[mode] = mode_numbers(groups, [at // count for at in groups], settings.group_size)
    plain = np.array([group.right.mean() for group in drawn.plain])
    under = np.stack([group.right.mean() for group in own.values()]).reshape(-1, count).mean(axis=1)
    difference = under - plain
    lengths = [len(segment.token_ids) for segment in drawn.segments]
    own_length = modes[settings.skip]["length"]
    return {
        "signal": signal | {"value": float(rewards.mean()), "between_prompts": float(rewards.mean(axis=(1, 2)).std())},
        "signal_by_split": {
            name: components(nested_parts(part, settings.group_size), sizes.seed) for name, part in halves.items()
        },
        "modes": modes,
        "skip": settings.skip,
        "skip_gap": {
            "accuracy": float(difference.mean()),
            "error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
            "length_share": own_length / modes["q"]["length"],
        },
        "copy_chance": float(drawn.chance.mean()),
        "segment_length": float(np.mean(lengths)),
        "token_share": float(np.mean(lengths) / (np.mean(lengths) + settings.group_size * own_length)),
        "signs": {
            "measured": measured_signs(rewards, settings.group_size),
            "expected": expected_signs(rewards, settings.group_size, signal["signal_to_noise"], sizes.seed),
        },
    }


def examples(probe: Probe, drawn: Drawn, count: int = 3) -> list[dict[str, Any]]:
    """Collect texts of the first prompts for people: problem, segment, and the first response in every mode."""
    found = []
    for number in range(min(count, len(probe.problems))):
        at = number * probe.sizes.segments
        texts = {mode: groups[at].first for mode, groups in drawn.modes.items()}
        segment = probe.tokenizer.decode(list(drawn.segments[at].token_ids), skip_special_tokens=True)
        problem, answers = probe.problems[number], {"q": drawn.plain[number].first} | texts
        fields = {"problem": problem.text, "answer": str(problem.ground_truth), "segment": segment}
        found.append({**fields, "responses": answers})
    return found


# ---------------------------------------------------------------- the command


def check_read(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse options of the training that the probe would ignore, or say that they have no effect on it."""
    check_unread(config, UNREAD_BY_PROBE)
    for name in dict.fromkeys(override.lstrip("+").partition("=")[0] for override in overrides):
        if name in UNREAD_IF_GIVEN:
            print(f"note: {name} has no effect on the probe: {UNREAD_IF_GIVEN[name]}")


def chosen_problems(data: Data, setup: Setup, sizes: Sizes) -> list[Problem]:
    """Draw the problems of a probe from those of the training, in their order."""
    every = data.problems(setup)
    count = min(sizes.prompts, len(every))
    require(count >= 2, f"data.train_files: {len(every)} problem is too few for a probe; give two or more")
    places = np.random.default_rng(sizes.seed).choice(len(every), count, replace=False)
    return [every[place] for place in sorted(places)]


def run(
    setup: Setup, sizes: Sizes, data: Data, out: Path, open_sampler: Callable[[], Sampler] | None = None
) -> list[Path]:
    """Draw, measure, judge, write; returns the files.  ``open_sampler`` None starts vLLM."""
    problems = chosen_problems(data, setup, sizes)
    probe = Probe(setup, sizes, problems, data.where)
    asked = {"setup": setup, "sizes": replace(sizes, out=None), "data": data}
    judging = [f"setup.reward.reward_kwargs.{name}" for name in setup.reward.reward_kwargs]
    ours = ("weight_up", "weight_down", "upstream.shrinkage")
    free = (*(f"setup.{name}" for name in FREE), *judging, *(f"setup.settings.{name}" for name in ours))
    check_same_config(out, with_weights(asked, {"model": setup.model}), free)
    with opened_by_first_draw(open_sampler or setup.open) as sample:
        drawn = draw(probe, out / "draws.jsonl", sample)
    numbers = measure(drawn, setup, sizes)
    drawn_sizes = {"prompts": len(problems), "segments": sizes.segments, "continuations": sizes.continuations}
    result: dict[str, Any] = {
        "model": setup.model,
        "data": list(data.files),
        "sizes": drawn_sizes | {"group_size": setup.settings.group_size},
        "verdict": verdict(numbers, setup.settings),
        "numbers": numbers,
        "examples": examples(probe, drawn),
    }
    contents = {"probe.json": json_bytes(result), "probe.html": page(result).encode()}
    for name, content in contents.items():
        write_atomic(out / name, content)
    for line in result["verdict"]["findings"]:
        print(f"- {line}")
    print(result["verdict"]["headline"])
    return [out / name for name in contents]


def main() -> None:
    """Run the command line."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    own = [word for word in sys.argv[1:] if word.startswith(PREFIX)]
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith(PREFIX)]

    @hydra.main(version_base=None, config_path=str(CONFIG), config_name="skpo_trainer")
    def job(config: DictConfig) -> None:
        command = Command.of(config)
        with refusing(command):
            settings = check(config, command)
            require(
                config.method.name == "skpo", f"method: is {config.method.name}; leave it out, the probe is of skpo"
            )
            check_read(config, command.overrides)
            sizes = Sizes.of(own, config.platform.name, settings.group_size)
            prepare(config, command)
            out = Path(sizes.out or f"{config.output_dir}-probe")
            for path in run(Setup.of(config, settings), sizes, Data.of(config, sizes.seed), out):
                print(path)

    run_command(job)


if __name__ == "__main__":
    main()
