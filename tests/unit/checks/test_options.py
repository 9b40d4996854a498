"""No option of verl is accepted and then ignored: each row of the tables, and what the tables say is verl's default."""

import pytest
from omegaconf import OmegaConf, open_dict

from recipe.skpo.checks import ACTOR, CORRECTION, MODEL, ROLLOUT
from recipe.skpo.checks.config import METHOD_SETTINGS, check_config, check_method_settings
from recipe.skpo.checks.engine import check_polarity, choose_engine
from recipe.skpo.checks.loss import check_loss
from recipe.skpo.checks.options import UNREAD, UNREAD_BY_SKPO, Unread, check_options
from recipe.skpo.errors import ConfigError
from recipe.skpo.main import scale_batch_for_spo
from recipe.skpo.settings import RECORDS, SkpoSettings, known_keys

METHODS = ["skpo", "grpo", "grpo_curriculum", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "spo", "rloo", "papo"]


def other(default: object) -> object:
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "another"


def with_option(config, option: Unread):
    with open_dict(config):
        OmegaConf.update(config, option.path, other(option.default), force_add=True)
    return config


@pytest.mark.parametrize("method", METHODS)
def test_what_we_set_ourselves_is_let_through(method: str, compose_config, capsys) -> None:
    check_options(compose_config("platform=cpu", f"method={method}"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", [*UNREAD, *UNREAD_BY_SKPO], ids=lambda option: option.path)
def test_an_option_that_nothing_reads_is_said_in_one_line(option: Unread, compose_config, capsys) -> None:
    config = with_option(compose_config("platform=cpu"), option)
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
    check_options(with_option(compose_config("platform=cpu", "method=grpo"), option))


def test_the_defaults_are_those_of_verl() -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        theirs = compose("ppo_trainer")
    for option in [*UNREAD, *UNREAD_BY_SKPO]:
        assert OmegaConf.select(theirs, option.path) in (None, option.default), option.path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("critic.optim.lr=1e-5", "but no method here has a critic"),
        ("++distillation.nnodes=1", "but no method here has a teacher"),
        ("actor_rollout_ref.ref.fsdp_config.param_offload=true", "but there is no reference policy without"),
        ("+trainer.v1.skpo.parameter_sync_step=2", "but it belongs to verl's asynchronous trainers"),
    ],
)
def test_groups_that_nothing_reads_are_refused_by_the_command_line(override: str, said: str, compose_config) -> None:
    key = override.lstrip("+").partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}: is set, {said}"):
        check_options(compose_config("platform=cpu"), [override])


IMPORTANCE = f"{CORRECTION}.rollout_is=token"


@pytest.mark.parametrize(
    "overrides",
    [
        [
            f"{ACTOR}.entropy_coeff=0.01",
            f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm",
            f"{ACTOR}.loss_scale_factor=9",
        ],
        [f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_type=mse", f"{ACTOR}.kl_loss_coef=0.1"],
        [f"{ACTOR}.calculate_entropy=true", f"{ACTOR}.loss_agg_mode=token-sum"],
        [f"{ACTOR}.use_kl_loss=true", "actor_rollout_ref.ref.fsdp_config.param_offload=true"],
        [IMPORTANCE, f"{CORRECTION}.rollout_is_threshold=3.0", f"{CORRECTION}.rollout_is_batch_normalize=true"],
        [f"{ACTOR}.clip_ratio_low=0.1", f"{ACTOR}.clip_ratio_high=0.4"],
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["skpo", "grpo", "spo"])
def test_terms_of_verls_loss_are_honoured(method: str, overrides: list[str], compose_config, capsys) -> None:
    config = compose_config("platform=cpu", f"method={method}", *overrides)
    scale_batch_for_spo(config)
    check_config(config, SkpoSettings.from_config(config.skpo), overrides)
    check_loss(config)
    said = capsys.readouterr().out.splitlines()
    modes = [item.partition("=")[2] for item in overrides if "loss_agg_mode" in item and method == "skpo"]
    assert said == [
        f"note: {ACTOR}.loss_agg_mode={mode} is obeyed by entropy bonus and KL loss alone: the objective has "
        f"skpo.downstream_aggregation"
        for mode in modes
    ]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["skpo.clip_low=0.1", f"{ACTOR}.clip_ratio_low=0.3"],
            "skpo.clip_low: is 0.1, but {}.clip_ratio_low is 0.3; g",
        ),
        ([f"{ACTOR}.clip_ratio_low=1.0"], "{}.clip_ratio_low: is 1.0, must be a number inside (0, 1)"),
        (["skpo.clip_low=0"], "{}.clip_ratio_low: is 0, must be a number inside (0, 1)"),
        ([f"{ACTOR}.clip_ratio_high=-0.28"], "{}.clip_ratio_high: is -0.28, must be a number above 0"),
        ([f"{ACTOR}.clip_ratio_high=nan"], "{}.clip_ratio_high: is nan, must be a number above 0"),
        ([f"{ACTOR}.clip_ratio_high=null"], "{}.clip_ratio_high: is None, must be a number above 0"),
        (["method=grpo", f"{ACTOR}.policy_loss.loss_mode=skpo"], "{}.policy_loss.loss_mode: is skpo, must be one of "),
        (["method=spo", f"{ACTOR}.policy_loss.loss_mode=vanila"], "{}.policy_loss.loss_mode: is vanila, must be one "),
        ([f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_type=k4"], "{}.kl_loss_type: is k4, must be kl, abs, mse or "),
        ([f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_type=full"], "{}.kl_loss_type: is full, must be kl, abs, mse"),
        ([f"{CORRECTION}.rollout_is=geometric"], "rollout_is: is geometric, must be token, sequence or null"),
        ([IMPORTANCE, f"{CORRECTION}.rollout_is_threshold=-1"], "rollout_is_threshold: is -1, must be an upper bound"),
        ([IMPORTANCE, f"{CORRECTION}.rollout_is_threshold='2.0_1.0'"], "rollout_is_threshold: is "),
    ],
    ids=str,
)
def test_what_verls_loss_would_fail_on_is_refused_before_a_model_is_loaded(overrides, sentence, compose_config) -> None:
    config = compose_config("platform=cpu", *overrides)
    with pytest.raises(ConfigError) as refused:
        check_loss(config)
    said = str(refused.value)
    assert sentence.format(ACTOR) in said and len(said.splitlines()) == 1


def test_the_former_names_of_the_clip_range_count_for_one_release(compose_config, capsys) -> None:
    config = compose_config("platform=cpu", "skpo.clip_low=0.1", "skpo.clip_high=0.3", f"{ACTOR}.clip_ratio_high=0.3")
    check_loss(config)
    actor = config.actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.1, 0.3)
    assert capsys.readouterr().out.splitlines() == [
        f"note: skpo.clip_{side} is a former name of {ACTOR}.clip_ratio_{side}, and the next release will not know it"
        for side in ("low", "high")
    ]


BYPASS, RAW = f"{CORRECTION}.bypass_mode=true", f"{ROLLOUT}.logprobs_mode=raw_logprobs"
TOKENS, OPTIM = ("budget=tokens", "budget.tokens=9"), f"{ACTOR}.optim"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([BYPASS, "skpo.tracker.drift=logratio"], "leaves no log-probs of the actor"),
        ([BYPASS, f"{ROLLOUT}.top_p=0.9"], "every ratio would begin at the mass of the kept tokens"),
        ([BYPASS, f"{ROLLOUT}.top_k=50"], "every ratio would begin at the mass of the kept tokens"),
        ([BYPASS, RAW], "would compare two temperatures"),
        ([BYPASS, IMPORTANCE], "nothing is left to correct"),
        ([IMPORTANCE, RAW], "every weight would compare two temperatures"),
        ([*TOKENS, f"{OPTIM}.lr_scheduler_type=cosine"], "lr_scheduler_type: is cosine, but .* not known"),
        ([*TOKENS, f"{OPTIM}.lr_warmup_steps_ratio=0.1"], "lr_warmup_steps_ratio: is 0.1, but .* not known"),
    ],
)
def test_options_that_contradict_each_other_are_refused(overrides: list[str], sentence: str, compose_config) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_options(compose_config("platform=cpu", *overrides))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (BYPASS, None),
        (f"{ROLLOUT}.top_p=0.9", "top_p=0.9 is obeyed by vLLM alone"),
        (f"{ROLLOUT}.top_k=50", "top_k=50 is obeyed by vLLM alone"),
        (RAW, "d(s) is measured at temperature 1, not 0.6"),
        ("data.shuffle=false", "skpo.curriculum draws the prompts"),
        ("data.seed=7", "data.seed=7 chooses the prompts of data.train_max_samples alone"),
        ("data.train_max_samples=-1 data.seed=7", "data.seed=7 has no effect: skpo.curriculum draws the prompts"),
    ],
)
def test_what_is_honoured_in_one_place_only_is_said(override: str, sentence, compose_config, capsys) -> None:
    check_options(compose_config("platform=cpu", *override.split()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (sentence is not None)
    assert all(line.startswith("note: ") and sentence in line for line in lines)


# ---------------------------------------------------------------- settings that a method would ignore


METHOD_PARTS = {
    "skpo": {"rollout", "objective", "tracker", "curriculum"},
    "spo": {"tracker", "curriculum"},
    "grpo": set(),
}
SHARED = {
    *("group_size", "seed", "seed_requests", "poll_interval_s", "prompt_timeout_s", "max_dropped_share"),
    *("weight_sync_timeout_s", "start_timeout_s", "max_logprob_gap"),
}
"""Settings that every method reads."""


@pytest.mark.parametrize("method", METHOD_PARTS)
def test_a_setting_that_the_method_ignores_is_refused(compose_config, method: str) -> None:
    config = compose_config("platform=cpu", f"method={method}")
    check_method_settings(config, [*(f"skpo.{key}=1" for key in SHARED), "data.skpo.skip=1", "trainer.nnodes=1"])
    for part, keys in METHOD_SETTINGS.items():
        for key in keys:
            for override in (f"skpo.{key}=1", f"+skpo.{key}.x=1", f"++skpo.{key}=1", f"~skpo.{key}"):
                if part in METHOD_PARTS[method]:
                    check_method_settings(config, [override])
                else:
                    with pytest.raises(ConfigError) as error:
                        check_method_settings(config, ["data.seed=1", override])
                    assert str(error.value) == f"skpo.{key}: has no effect with method={method}; leave it out"


def test_every_setting_has_a_part_or_is_read_by_every_method() -> None:
    """A setting added later must be put into METHOD_SETTINGS, or into SHARED."""
    listed = [key for keys in METHOD_SETTINGS.values() for key in keys]
    assert len(listed) == len(set(listed))
    assert {key for key in known_keys() if "." not in key} | set(RECORDS) == set(listed) | SHARED
    assert not SHARED & set(listed)


# ---------------------------------------------------------------- entropy polarity


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["actor_rollout_ref.model.use_fused_kernels=true"],
            "polarity.enable: is true, but actor_rollout_ref.model.use_fused_kernels is true, which never has",
        ),
        (
            [f"{CORRECTION}.bypass_mode=true"],
            f"polarity.enable: is true, but {CORRECTION}.bypass_mode is true, so that no old log-probs",
        ),
        (
            [f"{ACTOR}.strategy=megatron"],
            f"polarity.enable: is true, but {ACTOR}.strategy is megatron, and only fsdp and fsdp2 give",
        ),
    ],
)
@pytest.mark.parametrize("method", ["skpo", "papo"])
def test_polarity_is_refused_where_nothing_gives_the_slopes(
    method: str, overrides: list[str], said: str, compose_config
) -> None:
    chosen = ["platform=cpu", f"method={method}", *overrides]
    config = compose_config(*chosen, "polarity.enable=true")
    with pytest.raises(ConfigError) as error:
        check_config(config, SkpoSettings.from_config(config.skpo))
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    check_polarity(compose_config(*chosen, "polarity.enable=false"))


@pytest.mark.parametrize(
    ("override", "enabled", "said"),
    [
        (
            "polarity.strength=0.3",
            False,
            "polarity.strength: has no effect without polarity.enable=true; give that, too",
        ),
        ("polarity.target=1.5", False, "polarity.target: has no effect without"),
        ("polarity.decay=0.5", True, "polarity.decay: has no effect with polarity.target=1.5; leave it out"),
        ("polarity.enable=false", False, None),
        ("polarity.strength=0.3", True, None),
    ],
)
def test_an_option_of_polarity_that_nothing_reads_is_refused(
    override: str, enabled: bool, said: str | None, compose_config
) -> None:
    config = compose_config("platform=cpu", f"polarity.enable={str(enabled).lower()}", "polarity.target=1.5")
    if said is None:
        check_method_settings(config, [override])
        return
    with pytest.raises(ConfigError) as error:
        check_method_settings(config, [override])
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("packed", "flash_attention", "device", "with_polarity"),
    [("varlen", False, "packed", "packed"), ("none", False, None, "slopes"), ("auto", True, None, "slopes")],
)
def test_polarity_has_an_engine_of_its_own_where_verls_would_compute_the_rows(
    packed: str, flash_attention: bool, device: str | None, with_polarity: str, compose_config
) -> None:
    rows = (f"packed_attention={packed}", "share_prefixes=auto", f"{MODEL}.use_remove_padding=true")
    for enable, wanted in (("false", device), ("true", with_polarity)):
        config = compose_config("platform=cpu", *rows, f"polarity.enable={enable}")
        choice = choose_engine(config, flash_attention=flash_attention)
        assert choice.device == wanted
        assert (choice.library is None) == (wanted is None)
