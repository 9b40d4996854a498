"""The ``skpo`` node: the paper's defaults, and one clear line for every value that cannot work."""

import math
import os
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import PolaritySettings, SkpoSettings, TrackerSettings, known_keys, unknown_keys


def test_values_of_a_hydra_node_are_read() -> None:
    node = {"group_size": "4", "split_high": "${half}", "tracker": {"half_life": 3, "drift": "nats"}}
    settings = SkpoSettings.from_config(OmegaConf.create({"skpo": node, "half": 0.4}).skpo)
    assert (settings.group_size, settings.tracker.half_life, settings.tracker.drift) == (4, 3.0, "nats")
    assert settings.split_high == 0.4
    assert settings.tracker.rho_min == 0.875  # what is not given keeps its default


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 1}, "skpo.group_size"),
    ({"group_size": 2.5}, "skpo.group_size"),
    ({"group_size": "many"}, "skpo.group_size"),
    ({"group_size": None}, "skpo.group_size"),
    ({"split_low": 0}, "skpo.split_low"),
    ({"split_low": 0.6}, "skpo.split_low"),
    ({"split_low": math.nan}, "skpo.split_low"),
    ({"split_low": "a sixth"}, "skpo.split_low"),
    ({"split_high": 1.0}, "skpo.split_high"),
    ({"split_high": 0.1}, "skpo.split_high"),
    ({"split_high": math.nan}, "skpo.split_high"),
    ({"selection": "extremes"}, "skpo.selection"),
    ({"skip": "unknown"}, "skpo.skip"),
    ({"initial_length": 0}, "skpo.initial_length"),
    ({"initial_length": "long"}, "skpo.initial_length"),
    ({"weight_up": -0.1}, "skpo.weight_up"),
    ({"weight_down": -0.1}, "skpo.weight_down"),
    ({"weight_up": math.nan}, "skpo.weight_up"),
    ({"clip_low": math.nan}, "skpo.clip_low"),
    ({"clip_high": "much"}, "skpo.clip_high"),
    ({"weight_up": 0, "weight_down": 0}, "skpo.weight_down"),
    ({"seed": -1}, "skpo.seed"),
    ({"seed": 0.5}, "skpo.seed"),
    ({"seed_requests": "perhaps"}, "skpo.seed_requests"),
    ({"prompt_timeout_s": 0}, "skpo.prompt_timeout_s"),
    ({"prompt_timeout_s": "an hour"}, "skpo.prompt_timeout_s"),
    ({"max_dropped_share": -0.1}, "skpo.max_dropped_share"),
    ({"max_dropped_share": 1}, "skpo.max_dropped_share: must be inside"),
    ({"weight_sync_timeout_s": 0}, "skpo.weight_sync_timeout_s: must be >= 1"),
    ({"start_timeout_s": 0}, "skpo.start_timeout_s: must be > 0"),
    ({"max_logprob_gap": 0}, "skpo.max_logprob_gap: must be > 0, or null"),
    ({"max_logprob_gap": math.nan}, "skpo.max_logprob_gap"),
    ({"poll_interval_s": 0}, "skpo.poll_interval_s"),
    ({"trees_per_step": -1}, "skpo.trees_per_step"),
    ({"trees_per_validation": -1}, "skpo.trees_per_validation"),
    ({"trees_max_mb": 0}, "skpo.trees_max_mb"),
    ({"trees_max_mb": math.inf}, "skpo.trees_max_mb"),
    ({"tracker": None}, "skpo.tracker"),
    ({"tracker": {"rho_min": 0.97}}, "skpo.tracker.*rho_min"),
    ({"tracker": {"rho_min": -0.1}}, "skpo.tracker.*rho_min"),
    ({"tracker": {"rho_max": 1.1}}, "skpo.tracker.*rho_max"),
    ({"tracker": {"rho_max": 0.5}}, "skpo.tracker.*rho_max"),
    ({"tracker": {"rho_max": math.nan}}, "skpo.tracker.*rho_max"),
    ({"tracker": {"half_life": 0}}, "skpo.tracker.half_life"),
    ({"tracker": {"half_life": math.nan}}, "skpo.tracker.half_life"),
    ({"tracker": {"drift": "days"}}, "skpo.tracker.drift.*kl_steps.*days"),
    ({"candidates": 0}, "skpo.candidates: must be between 1 and skpo.group_size=8"),
    ({"candidates": 9}, "skpo.candidates: must be between 1 and skpo.group_size=8.*got 9"),
    ({"group_size": 4, "candidates": 5}, "skpo.candidates.*skpo.group_size=4.*got 5"),
    ({"candidates": 1.5}, "skpo.candidates"),
    ({"candidates": 1, "selection": "extreme"}, "skpo.selection: extreme has nothing to choose"),
    ({"candidates": 1, "selection": "random"}, "skpo.selection: random has nothing to choose"),
    ({"split": "adaptiv"}, "skpo.split: must be one of adaptive, fixed, boundary_token, got 'adaptiv'"),
    ({"split": "boundary_token"}, "skpo.boundaries: name the strings or token ids"),
    ({"boundaries": ["."]}, "skpo.boundaries: has no effect with skpo.split=adaptive"),
    ({"split": "fixed", "boundaries": [3]}, "skpo.boundaries: has no effect with skpo.split=fixed"),
    ({"split": "boundary_token", "boundaries": [".", ""]}, "skpo.boundaries: '' is neither"),
    ({"split": "boundary_token", "boundaries": [-1]}, "skpo.boundaries: -1 is neither"),
    ({"split": "boundary_token", "boundaries": [1.5]}, "skpo.boundaries: 1.5 is neither"),
    ({"split": "boundary_token", "boundaries": [True]}, "skpo.boundaries: True is neither"),
    ({"split": "boundary_token", "boundaries": [["."]]}, "skpo.boundaries: .* is neither"),
    ({"split": "boundary_token", "boundaries": "."}, "skpo.boundaries"),
    ({"chat_quote": "{problem}"}, "skpo.chat_quote: must hold {segment} and {problem}"),
    ({"chat_quote": "{segment} {problem} {problem}"}, "skpo.chat_quote.*once each"),
    ({"chat_quote": "{segment} {problem} {answer}"}, "skpo.chat_quote"),
    ({"chat_quote": "{segment} {problem} {}"}, "skpo.chat_quote"),
    ({"chat_quote": "{segment} {problem"}, "skpo.chat_quote"),
    ({"upstream_reward": "mean"}, "skpo.upstream_reward: must be one of mc, own, got 'mean'"),
    ({"downstream_aggregation": "token-mean"}, "skpo.downstream_aggregation: must be one of group_token_mean, token_"),
    ({"skip": None}, "skpo.skip"),
    ({"curriculum": None}, "skpo.curriculum"),
    ({"curriculum": {"enable": "perhaps"}}, "skpo.curriculum.enable"),
    ({"curriculum": {"epsilon": 0}}, "skpo.curriculum.epsilon: must be > 0"),
    ({"curriculum": {"epsilon": math.nan}}, "skpo.curriculum.epsilon: must be finite"),
    ({"curriculum": {"weight": 1}}, "skpo.curriculum.weight: unknown key.*curriculum.epsilon"),
    ({"group": 8}, "skpo.group: unknown key.*group_size"),
    ({"tracker": {"rho": 0.9}}, "skpo.tracker.rho: unknown key.*tracker.rho_min"),
    ({"upstream": {"shrinkage": "some"}}, "skpo.upstream.shrinkage"),
    ({"upstream": {"shrinkage": True}, "weight_up": 0}, "skpo.upstream.shrinkage: needs skpo.weight_up above 0, got 0"),
    ({"upstream": {"shrinkage": True}, "upstream_reward": "own"}, "skpo.upstream.shrinkage: needs.*upstream_reward=mc"),
]


def case(node: dict[str, Any]) -> str:
    return str(node).replace(" ", "")


@pytest.mark.parametrize(("node", "message"), BAD_VALUES, ids=[case(node) for node, _ in BAD_VALUES])
def test_a_value_that_cannot_work_is_refused_in_one_line_that_names_it(node: dict[str, Any], message: str) -> None:
    for given in (node, OmegaConf.create(node)):
        with pytest.raises(ConfigError, match=message) as caught:
            SkpoSettings.from_config(given)
        assert os.linesep not in str(caught.value)


@pytest.mark.parametrize("key", known_keys())
def test_every_key_has_a_value_that_is_refused(key: str) -> None:
    """A setting added later belongs into BAD_VALUES."""
    record, _, name = key.rpartition(".")
    assert [node for node, _ in BAD_VALUES if name in ((node.get(record) or {}) if record else node)]


@pytest.mark.parametrize(
    "node",
    [
        {"group_size": 2},
        {"split_low": 0.5, "split_high": 0.5},
        {"split_high": 0.999},
        {"initial_length": 1},
        {"weight_up": 0},
        {"weight_down": 0},
        {"seed": 0},
        {"trees_per_step": 0},
        {"tracker": {"rho_min": 0, "rho_max": 1}},
        {"tracker": {"rho_min": 0.9, "rho_max": 0.9}},
        {"candidates": 1},
        {"candidates": 1, "selection": "first"},
        {"candidates": 2, "selection": "random"},
        {"group_size": 4, "candidates": 4, "selection": "extreme"},
        {"split": "boundary_token", "boundaries": [0, "\n\n", "</plan>", 128009]},
        {"chat_quote": "{problem}{segment}"},
        {"chat_quote": "{{{segment}}} {problem}"},
        {"curriculum": {"enable": False, "epsilon": 1e-9}},
        {"tracker": {"drift": "logratio", "half_life": 0.06}},
    ],
    ids=case,
)
def test_values_at_the_edge_are_accepted(node: dict[str, Any]) -> None:
    SkpoSettings.from_config(node)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"\n", "\n"),
        ("\n", "\n"),
        (r"\n\n", "\n\n"),
        (r"\t", "\t"),
        (r"\r\n", "\r\n"),
        (r"\\n", r"\n"),
        (r"\\frac", r"\frac"),
        (r"\u3002", "。"),
        (r"\U0001F600", "😀"),
        (r"\x2e", "."),
        (r"\"", '"'),
        ("。", "。"),
    ],
    ids=repr,
)
def test_texts_are_read_with_pythons_escapes(written: str, read: str) -> None:
    settings = SkpoSettings.from_config({"split": "boundary_token", "boundaries": [written, 5]})
    assert settings.boundaries == [read, 5]
    quoted = SkpoSettings.from_config({"chat_quote": f"{{segment}}{written}{{problem}}"})
    assert quoted.chat_quote == f"{{segment}}{read}{{problem}}"


@pytest.mark.parametrize("written", [r"\d", r"\boxed", "end\\", r"\x2", r"\ud800", r"\UFFFFFFFF"])
def test_another_backslash_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=r"^skpo\.boundaries: .* holds .*, which is not "):
        SkpoSettings.from_config({"split": "boundary_token", "boundaries": [written]})


@pytest.mark.parametrize(
    "node",
    [
        {"tracker": 5},
        {"curriculum": False},
        None,
        5,
        OmegaConf.create({"seed": "${nope}"}),
        OmegaConf.create({"seed": "???"}),
        {"weight_up": math.inf},
    ],
    ids=["tracker_is_a_number", "curriculum_is_a_switch", "null", "number", "interpolation", "mandatory", "infinite"],
)
def test_a_node_of_the_wrong_shape_is_refused_in_one_line(node: Any) -> None:
    with pytest.raises(ConfigError, match=r"skpo"):
        SkpoSettings.from_config(node)


def test_constructing_the_record_itself_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        SkpoSettings(group_size=1)
    with pytest.raises(ConfigError, match="half_life"):
        TrackerSettings(half_life=-1.0)


def test_known_and_unknown_keys_are_dotted() -> None:
    assert "tracker.half_life" in known_keys() and "tracker" not in known_keys()
    assert "curriculum.epsilon" in known_keys() and "curriculum" not in known_keys()
    assert unknown_keys({"group_size": 4, "tracker": {"rho_min": 0.9}}) == []
    assert unknown_keys({"gruop_size": 4, "tracker": {"tau": 8}}) == ["gruop_size", "tracker.tau"]


@pytest.mark.parametrize(("candidates", "count"), [(None, 6), (1, 1), (4, 4), (6, 6)])
def test_candidates_are_as_many_as_the_group_unless_said_otherwise(candidates: int | None, count: int) -> None:
    assert SkpoSettings(group_size=6, candidates=candidates).candidate_count == count


# ---------------------------------------------------------------- polarity


@pytest.mark.parametrize(("target", "entropy"), [("ema", None), (2, 2.0), (0.25, 0.25)])
def test_the_target_of_polarity_is_a_number_or_the_average(target: object, entropy: float | None) -> None:
    settings = PolaritySettings.from_config(OmegaConf.create({"enable": True, "target": target}))
    assert (settings.enable, settings.strength, settings.entropy, settings.decay) == (True, 0.5, entropy, 0.9)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"strength": 1}, r"polarity.strength: must be inside \[0, 1\), got 1"),
        ({"strength": -0.1}, "polarity.strength"),
        ({"strength": math.nan}, "polarity.strength"),
        ({"strength": "much"}, "polarity.strength"),
        ({"decay": 1.0}, "polarity.decay: must be inside"),
        ({"target": "mean"}, "polarity.target: must be ema, or an entropy above 0 in nats per token, got 'mean'"),
        ({"target": 0}, "polarity.target"),
        ({"target": math.inf}, "polarity.target"),
        ({"target": True}, "polarity.target"),
        ({"target": None}, "polarity.target"),
        ({"enable": "perhaps"}, "polarity.enable"),
        ({"lambda": 0.5}, "polarity.lambda: unknown key; known are enable, strength, target, decay"),
        ("on", "polarity: must be a mapping of settings"),
    ],
)
def test_values_of_polarity_that_cannot_work_are_refused(node: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}") as error:
        PolaritySettings.from_config(node)
    assert len(str(error.value).splitlines()) == 1
