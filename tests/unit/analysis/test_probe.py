"""The probe: requests, numbers against known truth, verdicts, files, its command; with a sampler that has no model."""

import json
import math
import re
import sys
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf, open_dict

from data_prep.schema import Row, write_parquet
from recipe.skpo.analysis import probe as module
from recipe.skpo.analysis.probe import (
    Data,
    Drawn,
    Group,
    Probe,
    Setup,
    Sizes,
    expected_signs,
    measure,
    measured_signs,
    mode_numbers,
    run,
    tracked,
)
from recipe.skpo.analysis.probe_page import page, verdict
from recipe.skpo.checks.options import Unread
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.options import RewardFunction
from recipe.skpo.evaluation.problems import read_problems
from recipe.skpo.evaluation.sampling import Completion
from recipe.skpo.method.segments import Segment, skip_prompt
from recipe.skpo.settings import SkpoSettings, UpstreamSettings
from recipe.skpo.task.model_files import load_tokenizer
from recipe.skpo.task.prompts import automatic_bos, problem_tokens
from tests.unit.analysis.conftest import SOURCE, FakeSampler, replace_weights

G = 4
SIZES = Sizes(prompts=3, segments=4, continuations=8)


@pytest.fixture
def setup(compose_config, model_folder: Path) -> Setup:
    config = compose_config("platform=cpu", f"skpo.group_size={G}", f"actor_rollout_ref.model.path={model_folder}")
    return Setup.of(config, SkpoSettings.from_config(config.skpo))


@pytest.fixture
def make_probe(setup: Setup, problems_file: Path) -> Any:
    def make(sizes: Sizes = SIZES, **changes: Any) -> Probe:
        settings = {name: changes.pop(name) for name in list(changes) if not hasattr(setup, name)}
        own = replace(setup, settings=replace(setup.settings, **settings), **changes)
        return Probe(own, sizes, read_problems(problems_file, "x:", 3), "x")

    return make


# ---------------------------------------------------------------- sizes and setup


@pytest.mark.parametrize(
    ("given", "platform", "group_size", "sizes"),
    [
        ([], "gpu", 8, Sizes(64, 8, 64)),
        ([], "cpu", 8, Sizes(32, 8, 16)),
        ([], "cpu", 16, Sizes(32, 8, 32)),
        (["probe.prompts=5", "probe.out=a/b", "probe.seed=0"], "cpu", 8, Sizes(5, 8, 16, 0, "a/b")),
    ],
)
def test_sizes_are_those_given_or_of_the_platform(given: list[str], platform: str, group_size: int, sizes) -> None:
    assert Sizes.of(given, platform, group_size) == sizes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("probe.size=3", "probe.size: unknown; known are prompts, segments, continuations, seed, out"),
        ("probe.prompts=many", "probe.prompts: is many, must be a whole number"),
        ("probe.prompts=1", "probe.prompts: must be >= 2, got 1"),
        ("probe.segments=5", "probe.segments: must be even, got 5"),
        ("probe.segments=2", "probe.segments: must be >= 4, got 2"),
        ("probe.continuations=8", "probe.continuations: must be >= 16, got 8"),
        ("probe.out=", "probe.out: has no value; give probe.out=<value>"),
        ("probe.out", "probe.out: has no value"),
    ],
)
def test_sizes_that_cannot_work_are_refused(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sizes.of([given], "cpu", 8)


def test_the_model_is_asked_as_the_training_asks_it(compose_config) -> None:
    config = compose_config("platform=cpu", "skpo.skip=chat", "actor_rollout_ref.rollout.max_num_seqs=7")
    setup = Setup.of(config, SkpoSettings.from_config(config.skpo))
    assert (setup.temperature, setup.response_length, setup.settings.skip) == (0.6, 24, "chat")
    assert setup.max_model_len == config.actor_rollout_ref.rollout.max_model_len == 96 + 12 + 24
    assert (setup.engine.max_num_seqs, setup.engine.dtype, setup.engine.platform) == (7, "bfloat16", "cpu")
    assert setup.reward.path == "pkg://reward_fns"
    assert (setup.top_k, setup.vllm) == (-1, {"logprobs_mode": "processed_logprobs", "block_size": 32})


def test_what_training_samples_and_serves_with_reaches_vllm(compose_config, model_folder, monkeypatch) -> None:
    rollout, model = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
    config = compose_config(
        *("platform=cpu", f"{rollout}.top_k=40", f"{rollout}.logprobs_mode=raw_logprobs"),
        *(f"+{rollout}.engine_kwargs.vllm.kv_cache_dtype=fp8", f"{rollout}.response_length=7"),
        *(f"{model}.path=weights", f"{model}.tokenizer_path={model_folder}", f"{model}.trust_remote_code=true"),
    )
    setup = Setup.of(config, SkpoSettings.from_config(config.skpo))
    assert (setup.response_length, setup.load_tokenizer().name_or_path) == (7, str(model_folder))
    given: dict[str, Any] = {}
    monkeypatch.setattr(EngineConfig, "open", lambda self, model, **more: given.update(model=model, **more))
    setup.open()
    assert given == {
        "model": "weights",
        "trust_remote_code": True,
        "logprobs_mode": "raw_logprobs",
        "kv_cache_dtype": "fp8",
        "block_size": 32,
    }


# ---------------------------------------------------------------- requests


def test_split_positions_are_half_from_the_lower_and_half_from_the_upper_part_of_the_range(make_probe) -> None:
    sizes = replace(SIZES, segments=200)
    places = make_probe(sizes).places([60.0, 60.0, 60.0])
    assert [(place.prompt, place.number) for place in places] == [(p, n) for p in range(3) for n in range(200)]
    lower = {place.split for place in places if place.number < 100}
    upper = {place.split for place in places if place.number >= 100}
    assert lower == set(range(10, 21)) and upper == set(range(20, 31)), "L/6, L/3 and L/2 of 60 tokens"


def test_fixed_splits_are_at_the_ends_of_the_range_and_alternate_with_the_selection_as_in_training(make_probe) -> None:
    probe = make_probe(split="fixed", selection="extreme")
    places = probe.places([60.0] * 3)
    assert [(place.split, place.step % 2) for place in places[:4]] == [(10, 1), (10, 1), (30, 0), (30, 0)]
    cut = [Segment((n,), (-d,), d) for n, d in enumerate((0.5, 0.9, 0.1))]
    assert [probe.choose(place, cut).token_ids for place in places[:4]] == [(2,), (2,), (1,), (1,)]


@pytest.mark.parametrize("mode", ["concat", "chat", "continual", "unconditional"])
def test_each_mode_asks_as_training_does(make_probe, mode: str) -> None:
    probe = make_probe(top_k=40)
    tokens = tuple(probe.tokenizer("2 + 2 =", add_special_tokens=False)["input_ids"])
    (place, *_), segment = probe.places([12.0] * 3), Segment(tokens, (-0.1,) * len(tokens), 0.1)
    request = probe.responses(mode, place, segment, 5)
    question, prompt = list(probe.prompts[0]), list(request.prompt_ids)
    assert (request.n, request.temperature, request.top_k) == (5, 0.6, 40)
    assert request.max_tokens == (24 - len(tokens) if mode == "continual" else 24)
    wanted = {
        "concat": skip_prompt(tokens, question, automatic_bos(probe.tokenizer)),
        "continual": question + list(tokens),
        "unconditional": question,
    }
    if mode in wanted:
        assert prompt == wanted[mode]
    else:
        assert "Beginning of a solution:\n2 + 2 =\n\n0 + 0?" in probe.tokenizer.decode(prompt)


def test_a_prompt_without_room_is_refused(make_probe) -> None:
    with pytest.raises(ConfigError, match="max_model_len: 3 leaves no room for a response to a prompt of"):
        make_probe(max_model_len=3).plain()


def test_a_segment_is_the_median_candidate_cut_as_in_training(make_probe) -> None:
    probe = make_probe()
    place = replace(probe.places([12.0] * 3)[0], split=3)
    drawn = [Completion((n, n, n), "", "length", (-d,) * 3) for n, d in enumerate((0.9, 0.2, 0.5))]
    assert probe.choose(place, probe.cut(place, drawn)).token_ids == (2, 2, 2)
    assert probe.cut(place, [Completion((7, 8), "", "stop", (-1.0, -1.0))])[0].token_ids == (7,)
    boundary = make_probe(split="boundary_token", boundaries=[5])
    assert boundary.cut(place, [Completion((4, 5, 6), "", "length", (-1.0,) * 3)])[0].token_ids == (4, 5)


def test_a_continual_response_is_checked_and_counted_with_its_segment(make_probe) -> None:
    probe = make_probe()
    opening, rest = (tuple(probe.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("#### ", "2"))
    segment = Segment(opening, (-0.1,) * len(opening), 0.1)
    drawn = [Completion(rest, "2", "stop"), Completion((*opening, *rest), "#### 2", "stop")]
    group = probe.group(1, drawn, "continual", segment)
    assert group.right[0] and group.lengths[0] == len(opening) + len(rest)
    assert group.copied.tolist() == [False, True], "of what was generated"
    assert not probe.group(1, drawn[:1], "concat", segment).right[0]


# ---------------------------------------------------------------- numbers


def responses(rewards: Any, lengths: float = 10, copied: bool = False) -> Group:
    values = np.asarray(rewards, dtype=np.float64)
    same = np.ones(len(values))
    return Group(values, values > 0, same * lengths, same.astype(bool) & copied, "text")


def drawn(signal: float, plain: float = 0.5, prompts: int = 40, k: int = 64, seed: int = 0, **concat: Any) -> Drawn:
    """Eight segments per prompt with a known standard deviation of their values, in reward units."""
    rng = np.random.default_rng(seed)
    values = np.clip(rng.uniform(0.3, 0.7, (prompts, 1)) + signal / 2 * rng.choice([-1, 1], (prompts, 8)), 0, 1)
    rewards = 2.0 * (rng.uniform(size=(prompts, 8, k)) < values[:, :, None]) - 1
    own = {at: responses(row, **concat) for at, row in enumerate(rewards.reshape(-1, k))}
    few = [at for at in own if at % 8 in (0, 4)]
    other = {at: responses(own[at].rewards[:8]) for at in few}
    return Drawn(
        plain=[responses(2.0 * (rng.uniform(size=8) < plain) - 1) for _ in range(prompts)],
        chance=np.full(prompts * 8, 0.25),
        segments=[Segment((1, 2, 3, 4), (-0.1,) * 4, 0.1)] * (prompts * 8),
        splits=[4] * (prompts * 8),
        modes={"concat": own, "chat": other, "continual": other},
    )


@pytest.fixture
def numbers_of(setup: Setup) -> Any:
    eight = replace(setup, settings=replace(setup.settings, group_size=8))
    return lambda signal=0.3, **how: measure(drawn(signal, **how), eight, Sizes(segments=8))


def test_numbers_are_those_of_what_was_drawn(numbers_of) -> None:
    numbers = numbers_of(copied=True, lengths=5)
    found = numbers["signal"]
    assert found["low"] < 0.3 / found["noise"] < found["high"] and found["signal"] == pytest.approx(0.3, abs=0.05)
    for half in numbers["signal_by_split"].values():
        assert half["signal"] == pytest.approx(0.3, abs=0.08)
    assert numbers["modes"]["concat"]["groups"] == 320 and numbers["modes"]["chat"]["groups"] == 80
    assert (numbers["modes"]["concat"]["copied_share"], numbers["copy_chance"]) == (1.0, 0.25)
    assert numbers["skip_gap"]["length_share"] == 0.5
    assert numbers["token_share"] == pytest.approx(4 / (4 + 8 * 5))
    expected = numbers["modes"]["concat"]["accuracy"] - numbers["modes"]["q"]["accuracy"]
    assert numbers["skip_gap"]["accuracy"] == pytest.approx(expected)
    json.dumps(numbers)


def test_the_error_is_over_prompts_and_equal_groups_are_of_g_responses() -> None:
    groups = {0: responses([1, 1, -1]), 1: responses([-1, -1, 1]), 2: responses([1, 1, 1]), 3: responses([1, 1, 1])}
    found = mode_numbers(groups, [0, 0, 1, 1], 2)
    assert found["accuracy"] == pytest.approx(0.75) and found["accuracy_error"] == pytest.approx(0.25)
    assert found["all_equal_share"] == 1.0


def test_signs_are_right_where_segments_differ_and_tossed_where_they_do_not() -> None:
    rng = np.random.default_rng(0)
    values = np.tile(np.array([0.1, 0.9] * 4), (50, 1))
    rewards = 2.0 * (rng.uniform(size=(50, 8, 64)) < values[:, :, None]) - 1
    clear = measured_signs(rewards, 8)
    assert clear["mc"] > 0.99 and clear["skpo after 4"] > 0.95 > clear["mc equal"] > 0.8
    assert math.isnan(measured_signs(np.ones((2, 4, 8)), 4)["mc"])


def test_signs_of_equal_segments_are_right_by_half_of_those_that_are_not_0() -> None:
    rng = np.random.default_rng(0)
    same = measured_signs(2.0 * (rng.uniform(size=(2000, 8, 64)) < 0.5) - 1, 8)
    # Two means of 8 are equal in comb(16, 8) of 2^16 cases, a mean of 8 is 0 in comb(8, 4) of 2^8, 8 rewards in 2.
    zeros = {"skpo after 0": math.comb(8, 4) / 2**8, "skpo after 1": math.comb(16, 8) / 2**16, "mc equal": 2 / 2**8}
    for name, share in zeros.items():
        assert same[name] == pytest.approx((1 - share) / 2, abs=0.015), name


def test_expected_signs_are_above_those_against_a_noisy_truth() -> None:
    """With the concentration of ``sign_consistency`` that has this signal to noise."""
    rng = np.random.default_rng(1)
    mu = rng.uniform(0.1, 0.9, (300, 1))
    values = rng.beta(np.repeat(mu * 32, 8, axis=1), np.repeat((1 - mu) * 32, 8, axis=1))
    rewards = 2.0 * (rng.uniform(size=(300, 8, 16)) < values[:, :, None]) - 1
    measured, expected = measured_signs(rewards, 8), expected_signs(rewards, 8, 0.5, seed=1)
    assert measured.keys() == expected.keys()
    assert all(expected[name] > measured[name] for name in ("skpo after 4", "mc"))
    estimate = rng.binomial(8, values) / 8
    true = values - values.mean(axis=1, keepdims=True)
    direct = np.sign(estimate - estimate.mean(axis=1, keepdims=True)) == np.sign(true)
    assert expected["mc"] == pytest.approx(direct.mean(), abs=0.03)


@pytest.mark.parametrize(("rewards", "ratio"), [(np.ones((2, 4, 8)), math.nan), (np.full((2, 4, 8), 0.5), 1.0)])
def test_nothing_is_expected_without_a_signal_or_of_other_rewards(rewards: np.ndarray, ratio: float) -> None:
    assert expected_signs(rewards, 4, ratio, 0) == {}


def test_the_baseline_is_the_trackers() -> None:
    assert tracked(np.empty((2, 0))).tolist() == [0.0, 0.0]
    assert tracked(np.array([[0.5], [-1.0]])).tolist() == [0.5, -1.0]


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("how", "headline", "change"),
    [
        ({"signal": 0.0}, "Mostly noise", "skpo.weight_up=0.048"),
        ({"signal": 0.5}, "A clear signal", None),
        ({"signal": 0.26}, "Some signal", "skpo.weight_up"),
        ({"signal": 0.15, "k": 16, "prompts": 4}, "Not decided", "probe.prompts"),
        ({"plain": 0.9}, "Not as it is: the model does not answer", "skpo.skip"),
        ({"lengths": 4}, "Not as it is", "skpo.skip"),
        ({"signal": 0.5, "copied": True}, "A clear signal", "skpo.split_high: lower it, so that less is copied"),
    ],
    ids=str,
)
def test_the_verdict_follows_from_the_thresholds(numbers_of, how: dict, headline: str, change: str | None) -> None:
    judged = verdict(numbers_of(**how), SkpoSettings())
    assert judged["headline"].startswith(headline)
    assert any(line.startswith(change) for line in judged["changes"]) if change else not judged["changes"]


def test_where_a_model_does_not_read_s_q_the_best_other_mode_is_named(numbers_of) -> None:
    numbers = numbers_of(plain=0.9)
    numbers["modes"]["chat"]["accuracy"] = 0.8
    assert verdict(numbers, SkpoSettings())["changes"][0] == "skpo.skip=chat: accuracy 0.800 on the same prompts"
    numbers["modes"]["continual"]["accuracy"] = 0.85
    assert "but a segment decides the response" in verdict(numbers, SkpoSettings())["changes"][0]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (SkpoSettings(), ["weight_up=0.048", "upstream.shrinkage=true", "candidates=3", "curriculum.enable=true"]),
        (SkpoSettings(weight_up=0.04, candidates=3), ["curriculum.enable=true"]),
        (SkpoSettings(weight_up=0.0), ["candidates=3", "curriculum.enable=true"]),
        (SkpoSettings(upstream=UpstreamSettings(shrinkage=True)), ["candidates=3", "curriculum.enable=true"]),
        (SkpoSettings(group_size=2), ["weight_up=0.048", "upstream.shrinkage=true", "curriculum.enable=true"]),
    ],
    ids=["defaults", "small batch", "no upstream", "shrinkage", "groups of two"],
)
def test_what_is_advised_is_new_and_accepted(numbers_of, settings: SkpoSettings, advice: list[str]) -> None:
    numbers = numbers_of(0.0)
    numbers["modes"]["concat"]["all_equal_share"] = 0.9
    changes = " ".join(verdict(numbers, settings)["changes"])
    assert re.findall(r"skpo\.([\w.]+=[\w.]+)", changes) == advice
    for dotted in advice:
        # As if each were given.
        changed = OmegaConf.merge(asdict(settings), OmegaConf.from_dotlist([dotted]))
        SkpoSettings.from_config(changed)


def test_rewards_that_are_all_equal_have_a_verdict_and_a_page(setup: Setup) -> None:
    same = drawn(0.0, plain=2.0)
    same = replace(
        same, modes={mode: {at: responses(np.ones(64)) for at in groups} for mode, groups in same.modes.items()}
    )
    numbers = measure(same, setup, Sizes(segments=8))
    judged = verdict(numbers, setup.settings)
    assert judged["headline"].startswith("No signal") and any(
        "100% of the groups" in line for line in judged["findings"]
    )


@pytest.mark.parametrize(("lower", "upper", "advice"), [(0.2, 0.8, "skpo.split_low"), (0.8, 0.2, "skpo.split_high")])
def test_the_split_range_moves_to_where_the_signal_is(numbers_of, lower: float, upper: float, advice: str) -> None:
    numbers = numbers_of(0.5)
    for name, middle in (("lower half", lower), ("upper half", upper)):
        numbers["signal_by_split"][name] |= {"low": middle - 0.1, "high": middle + 0.1}
    assert any(line.startswith(advice) for line in verdict(numbers, SkpoSettings())["changes"])


# ---------------------------------------------------------------- files


def answer(prompt: str, seed: int) -> str:
    """Some right answers and some wrong ones, of different lengths."""
    return "so " * (seed % 3) + f"#### {2 * (seed % 3)}"


def probed(setup: Setup, problems_file: Path, out: Path, fail_after: int | None = None, **sizes: Any) -> Any:
    sampler = FakeSampler(load_tokenizer(setup.tokenizer), answer, fail_after)
    run(setup, replace(SIZES, **sizes), Data((str(problems_file),)), out, lambda: sampler)
    return sampler


def test_a_killed_probe_resumes_and_a_finished_one_needs_no_model(setup: Setup, problems_file: Path, tmp_path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    calls = probed(setup, problems_file, whole).calls
    with pytest.raises(KeyboardInterrupt):
        probed(setup, problems_file, halves, fail_after=2)
    assert not (halves / "probe.json").exists()
    assert len(probed(setup, problems_file, halves).calls) == len(calls) - 2
    assert (halves / "probe.json").read_bytes() == (whole / "probe.json").read_bytes()
    run(setup, SIZES, Data((str(problems_file),)), whole, lambda: pytest.fail("starts a model"))  # type: ignore[arg-type]
    result = json.loads((whole / "probe.json").read_text())
    assert result["sizes"] == {"prompts": 3, "segments": 4, "continuations": 8, "group_size": G}
    assert len(result["examples"]) == 3 and set(result["examples"][0]["responses"]) == {
        "q",
        "concat",
        "chat",
        "continual",
    }


def test_other_weights_judge_the_same_draws_and_other_segments_do_not(
    setup: Setup, problems_file: Path, tmp_path
) -> None:
    probed(setup, problems_file, tmp_path)
    lighter = replace(setup, settings=replace(setup.settings, weight_up=0.1))
    assert not probed(lighter, problems_file, tmp_path).calls
    with pytest.raises(ConfigError, match=r"config.json: was made with setup.settings.selection='median', now it is"):
        probed(replace(setup, settings=replace(setup.settings, selection="first")), problems_file, tmp_path)


def test_draws_are_of_one_model_and_its_data_whatever_the_paths_are(
    setup: Setup, problems_file: Path, own_model: Path, tmp_path
) -> None:
    own = replace(setup, model=str(own_model))
    probed(own, problems_file, tmp_path / "out")
    rows = [
        Row(SOURCE, [{"role": "user", "content": f"{n} + {n + 1}?"}], str(2 * n + 1), "math", "val", n, f"{n}")
        for n in range(6)
    ]
    before = problems_file.read_bytes()
    write_parquet(rows, problems_file)
    with pytest.raises(ConfigError, match=r"completions of '0/plain' are of another prompt or sampling, because the"):
        probed(own, problems_file, tmp_path / "out")
    problems_file.write_bytes(before)
    replace_weights(own_model)
    with pytest.raises(
        ConfigError, match=r"made with weights.model='\w+', now it is '\w+'; give another output folder"
    ):
        probed(own, problems_file, tmp_path / "out")


def test_boundaries_that_nobody_writes_are_refused_as_in_training(setup: Setup, problems_file: Path, tmp_path) -> None:
    settings = replace(setup.settings, split="boundary_token", boundaries=["XYZ"])
    with pytest.raises(ConfigError, match=r"skpo.boundaries: none of \['XYZ'\] is in any candidate"):
        probed(replace(setup, settings=settings), problems_file, tmp_path)
    probed(replace(setup, settings=replace(settings, boundaries=["so"])), problems_file, tmp_path / "found")


def test_rewards_that_training_refuses_are_refused(make_probe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def points(solution_str, **_):\n    return float(len(solution_str))\n")
    probe = make_probe(reward=RewardFunction(str(tmp_path / "mine.py"), "points", {}))
    with pytest.raises(ConfigError, match=r"reward: returned \d+ for problem .*, and method=skpo needs rewards within"):
        probe.group(0, [Completion((5, 6, 7), "", "stop")])


def test_the_page_shows_verdict_and_numbers_and_a_models_text_as_text(numbers_of) -> None:
    numbers = numbers_of(0.0)
    text = "<script>alert(1)</script>"
    example = {"problem": text, "answer": "4", "segment": text, "responses": {"q": text, "concat": text}}
    sizes = {"prompts": 40, "segments": 8}
    result = {"model": text, "data": [text], "sizes": sizes, "numbers": numbers}
    result["verdict"] = verdict(numbers, SkpoSettings())
    made = page(result | {"examples": [example]})
    assert "<script" not in made and "default-src 'none'" in made
    assert made.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6
    for line in (
        result["verdict"]["headline"],
        "SKPO, after 4 visits",
        "[s, q] (concat), of this training",
        "upper half",
    ):
        assert escape(line) in made


def test_problems_are_drawn_with_the_seed_and_kept_in_order(setup: Setup, problems_file: Path) -> None:
    def ids(seed: int) -> list[str]:
        data = Data((str(problems_file),))
        return [problem.text for problem in module.chosen_problems(data, setup, replace(SIZES, seed=seed))]

    assert ids(1) == ids(1) == sorted(ids(1)) and len(ids(1)) == 3
    assert len({tuple(ids(seed)) for seed in range(8)}) > 1
    with pytest.raises(ConfigError, match=r"train_files: 0 problem is too few"):
        module.chosen_problems(Data(()), setup, SIZES)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.train_max_samples=3"],
        ["data.train_max_samples=3", "data.seed=5"],
        ["data.train_max_samples=4", "data.shuffle=false"],
        ["data.filter_overlong_prompts=true", "data.max_prompt_length=LIMIT"],
        ["data.train_max_samples=4", "data.filter_overlong_prompts=true", "data.max_prompt_length=LIMIT"],
        ["data.prompt_key=question"],
    ],
    ids=" ".join,
)
def test_problems_are_those_of_the_trainings_own_data_set(
    compose_config, setup: Setup, tmp_path: Path, overrides: list[str]
) -> None:
    from verl.utils.dataset.rl_dataset import RLHFDataset

    texts = [f"{n} + {n}{' ' + 'so ' * n}?" for n in range(6)]
    path, tokenizer = tmp_path / "train.parquet", setup.load_tokenizer()
    write_parquet(
        [
            Row(SOURCE, [{"role": "user", "content": text}], str(2 * n), "math", "train", n, text)
            for n, text in enumerate(texts)
        ],
        path,
    )
    if "data.prompt_key=question" in overrides:
        table = pq.read_table(path)
        asked = table["prompt"]
        pq.write_table(table.set_column(table.schema.get_field_index("prompt"), "question", asked), path)
    limit = len(problem_tokens(tokenizer, [{"role": "user", "content": texts[3]}]))
    config = compose_config(
        *("platform=cpu", f"data.train_files={path}", "data.train_max_samples=-1"),
        *(override.replace("LIMIT", str(limit)) for override in overrides),
    )
    verls = RLHFDataset([str(path)], tokenizer, config.data, max_samples=config.data.train_max_samples)
    ours = Data.of(config, seed=1).problems(setup)
    assert len(ours) in (3, 4, 6) and {problem.id for problem in ours} <= {str(id) for id in verls.dataframe["id"]}
    assert len(ours) == len(verls.dataframe)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Any:
    """Run the command up to its draws; returns the arguments of ``run``, or the message of a refusal."""
    from hydra.core.global_hydra import GlobalHydra

    from recipe.skpo import main

    def call(*arguments: str) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SKPO_PLATFORM", "cpu")
        for name in ("check_packages", "check_machine"):
            monkeypatch.setattr(main, name, lambda *given: None)
        found: list[Any] = []
        monkeypatch.setattr(module, "prepare", lambda config, command: None)
        monkeypatch.setattr(module, "run", lambda *given: found.append(given) or [Path("x/probe.html")])
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        monkeypatch.setattr(sys, "argv", ["probe", *arguments, *quiet])
        try:
            module.main()
        except SystemExit as error:
            return error.code
        finally:
            GlobalHydra.instance().clear()
        return found[0] if found else capsys.readouterr().out

    return call


def test_the_command_takes_sizes_and_the_overrides_of_a_training(command) -> None:
    setup, sizes, data, out = command("probe.prompts=7", "skpo.skip=chat", "preset=small_batch")
    assert (sizes.prompts, sizes.continuations) == (7, 16)
    assert (setup.settings.skip, setup.settings.candidates) == ("chat", 3)
    assert data.files[0].endswith("arithmetic/train.parquet") and data.most == 40
    assert out.name == "smollm2_135m-arithmetic-skpo-probe"
    assert command("probe.out=here")[3] == Path("here")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method=grpo"], "error: method: is grpo; leave it out, the probe is of skpo"),
        (["probe.prompt=7"], "error: probe.prompt: unknown; known are prompts"),
        (["skpo.skipp=chat"], "error: skpo.skipp: unknown key"),
        (["data.max_response_length=0"], "error: data.max_response_length: is 0, must be"),
        (["skpo.upstream_reward=own"], "error: skpo.upstream_reward: is own, but the probe measures the mean of"),
        (["actor_rollout_ref.model.lora_adapter_path=a"], "error: actor_rollout_ref.model.lora_adapter_path: is"),
        (["data.custom_cls.path=a.py"], "error: data.custom_cls.path: is"),
        (
            ["reward.reward_manager.source=importlib"],
            "error: reward.reward_manager.source: is importlib, but the probe",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused_in_one_line(command, arguments: list[str], said: str) -> None:
    assert command(*arguments).startswith(said)


def test_help_says_what_it_draws_and_writes(command) -> None:
    said = command("--help")
    assert "probe.continuations" in said and "probe.html" in said


@pytest.mark.parametrize("option", module.UNREAD_BY_PROBE, ids=lambda option: option.path)
def test_an_option_that_the_probe_does_not_read_is_refused_or_said(option: Unread, compose_config, capsys) -> None:
    config = compose_config("platform=cpu")
    assert OmegaConf.select(config, option.path) in (None, option.default)
    module.check_read(config, [])
    assert capsys.readouterr().out == ""
    with open_dict(config):
        OmegaConf.update(config, option.path, "another", force_add=True)
    if option.refused:
        with pytest.raises(ConfigError, match=f"^{re.escape(option.path)}: is another, but the probe .*; "):
            module.check_read(config, [])
    else:
        module.check_read(config, [])
        assert capsys.readouterr().out.startswith(f"note: {option.path}=another has no effect: the probe")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("skpo.initial_length=99", "note: skpo.initial_length has no effect on the probe: split positions are shares"),
        ("skpo.seed=3", "note: skpo.seed has no effect on the probe: the seed of every draw is probe.seed"),
    ],
)
def test_what_the_probe_does_not_read_is_said(command, capsys, given: str, said: str) -> None:
    command()
    assert "note: " not in capsys.readouterr().out
    command(given)
    assert said in capsys.readouterr().out
