"""No option of verl is accepted and then ignored: each row of the tables, and what the tables say is verl's default."""

import pytest
from omegaconf import OmegaConf, open_dict

from recipe.skpo.checks.config import METHOD_SETTINGS, check_method_settings
from recipe.skpo.checks.options import UNREAD, UNREAD_BY_SKPO, Unread, check_options
from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import RECORDS, known_keys

OTHER = {bool: lambda value: not value, float: lambda value: value + 0.5, int: lambda value: value + 1}
METHODS = ["skpo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "spo", "rloo"]


def other(default: object) -> object:
    return OTHER.get(type(default), lambda value: "another")(default)


@pytest.mark.parametrize("method", METHODS)
def test_what_we_set_ourselves_is_let_through(method: str, compose_config, capsys) -> None:
    check_options(compose_config("platform=cpu", f"method={method}"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", [*UNREAD, *UNREAD_BY_SKPO], ids=lambda option: option.path)
def test_an_option_that_nothing_reads_is_said_in_one_line(option: Unread, compose_config, capsys) -> None:
    config = compose_config("platform=cpu")
    with open_dict(config):
        OmegaConf.update(config, option.path, other(option.default), force_add=True)
    if option.refused:
        with pytest.raises(ConfigError) as error:
            check_options(config)
        said = str(error.value)
        assert said.startswith(f"{option.path}: is {other(option.default)}, but ")
    else:
        check_options(config)
        said = capsys.readouterr().out.rstrip("\n")
        assert said.startswith(f"note: {option.path}={other(option.default)} has no effect: ")
    assert "\n" not in said


@pytest.mark.parametrize("option", UNREAD_BY_SKPO, ids=lambda option: option.path)
def test_the_baselines_honour_what_only_skpo_does_not_read(option: Unread, compose_config) -> None:
    config = compose_config("platform=cpu", "method=grpo")
    with open_dict(config):
        OmegaConf.update(config, option.path, other(option.default), force_add=True)
    check_options(config)


def test_the_defaults_are_those_of_verl() -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        theirs = compose("ppo_trainer")
    for option in [*UNREAD, *UNREAD_BY_SKPO]:
        assert OmegaConf.select(theirs, option.path) in (None, option.default), option.path


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["critic.optim.lr=1e-5"], "critic.optim.lr: is set, but no method here has a critic"),
        (["++distillation.nnodes=1"], "distillation.nnodes: is set, but no method here has a teacher"),
        (["+trainer.v1.skpo.parameter_sync_step=2"], "trainer.v1.skpo.parameter_sync_step: is set, but it belongs to"),
    ],
)
def test_groups_that_nothing_reads_are_refused_by_the_command_line(overrides, sentence, compose_config) -> None:
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        check_options(compose_config("platform=cpu"), overrides)


ROLLOUT, BYPASS = "actor_rollout_ref.rollout", "algorithm.rollout_correction.bypass_mode=true"


@pytest.mark.parametrize(
    ("overrides", "refused", "sentence"),
    [
        ([BYPASS], True, None),
        ([BYPASS, "skpo.tracker.drift=logratio"], True, "leaves no log-probs of the actor"),
        ([BYPASS, f"{ROLLOUT}.top_p=0.9"], True, "every ratio would begin at the mass of the kept tokens"),
        ([BYPASS, f"{ROLLOUT}.top_k=50"], True, "every ratio would begin at the mass of the kept tokens"),
        ([BYPASS, f"{ROLLOUT}.logprobs_mode=raw_logprobs"], True, "would compare two temperatures"),
        ([f"{ROLLOUT}.top_p=0.9"], False, "top_p=0.9 is obeyed by vLLM alone"),
        ([f"{ROLLOUT}.top_k=50"], False, "top_k=50 is obeyed by vLLM alone"),
        ([f"{ROLLOUT}.logprobs_mode=raw_logprobs"], False, "d(s) is measured at temperature 1, not 0.6"),
        (["data.shuffle=false"], False, "skpo.curriculum draws the prompts"),
        (["data.seed=7"], False, "skpo.curriculum draws the prompts by skpo.seed"),
        (
            ["budget=tokens", "budget.tokens=9", "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine"],
            True,
            "not known",
        ),
        (
            ["budget=tokens", "budget.tokens=9", "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1"],
            True,
            "not known",
        ),
    ],
)
def test_combinations_that_contradict_each_other(overrides, refused: bool, sentence, compose_config, capsys) -> None:
    config = compose_config("platform=cpu", *overrides)
    if sentence is None or not refused:
        check_options(config)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (sentence is not None) and all(
            line.startswith("note: ") and sentence in line for line in lines
        )
        return
    with pytest.raises(ConfigError, match=sentence):
        check_options(config)


# ---------------------------------------------------------------- settings that a method would ignore


METHOD_PARTS = {
    "skpo": {"rollout", "objective", "tracker", "curriculum"},
    "spo": {"tracker", "curriculum"},
    "grpo": set(),
}


@pytest.mark.parametrize("method", METHOD_PARTS)
def test_a_setting_that_the_method_ignores_is_refused(compose_config, method: str) -> None:
    config = compose_config("platform=cpu", f"method={method}")
    for part, keys in METHOD_SETTINGS.items():
        for key in keys:
            for override in (f"skpo.{key}=1", f"+skpo.{key}.x=1", f"++skpo.{key}=1", f"~skpo.{key}"):
                if part in METHOD_PARTS[method]:
                    check_method_settings(config, [override])
                else:
                    with pytest.raises(ConfigError) as error:
                        check_method_settings(config, ["data.seed=1", override])
                    assert str(error.value) == f"skpo.{key}: has no effect with method={method}; leave it out"


@pytest.mark.parametrize("method", METHOD_PARTS)
def test_settings_of_every_method_and_other_options_pass(compose_config, method: str) -> None:
    config = compose_config("platform=cpu", f"method={method}")
    shared = ["group_size", "seed", "seed_requests", "poll_interval_s"]
    shared += ["prompt_timeout_s", "max_dropped_share", "weight_sync_timeout_s", "start_timeout_s", "max_logprob_gap"]
    check_method_settings(config, [f"skpo.{key}=1" for key in shared])
    check_method_settings(config, ["data.skpo.skip=1", "trainer.nnodes=1", f"method={method}", "~hydra.run.dir"])


def test_every_setting_has_a_part_or_is_read_by_every_method() -> None:
    """A setting added later must be put into METHOD_SETTINGS, or here if all methods read it."""
    listed = [key for keys in METHOD_SETTINGS.values() for key in keys]
    assert len(listed) == len(set(listed))
    top = {key for key in known_keys() if "." not in key} | set(RECORDS)
    shared = {"group_size", "seed", "seed_requests", "poll_interval_s"}
    shared |= {"prompt_timeout_s", "max_dropped_share", "weight_sync_timeout_s", "start_timeout_s", "max_logprob_gap"}
    assert top - set(listed) == shared
