"""The composed configs: the paper's values for the paper's models; what SKPO cannot train with is refused in one line.

Bad values below ``skpo`` are in test_settings.py.
"""

import re
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from data_prep import tiny
from recipe.skpo.checks.config import check_config
from recipe.skpo.checks.reward import check_reward
from recipe.skpo.errors import ConfigError
from recipe.skpo.main import scale_batch_for_spo
from recipe.skpo.settings import PolaritySettings, SkpoSettings, TrackerSettings, default_node
from reward_fns import compute_score

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = ("data=files", "data.train_files=/data/train.parquet", "data.val_files=[/data/a.parquet,/data/b.parquet]")
RUNS = {
    "cpu": ("platform=cpu",),
    "qwen": ("platform=gpu", "model=qwen2_5_math_7b", *FILES),
    "llama": ("platform=gpu", "model=llama3_2_3b_instruct", *FILES),
}
PAPER = ["qwen", "llama"]
MEGATRON = (*RUNS["qwen"], "model_engine=megatron")

# The paper's training set-up and its constants of the method.
PAPER_VALUES = {
    "data.train_batch_size": 128,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 3072,
    "trainer.total_training_steps": 500,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.optim.clip_grad": 1.0,
    "actor_rollout_ref.actor.optim.optimizer": "AdamW",
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 10,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
    "actor_rollout_ref.actor.optim.weight_decay": 0.1,
    "actor_rollout_ref.actor.optim.betas": [0.9, 0.999],
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.fsdp_config.dtype": "bfloat16",
    "actor_rollout_ref.rollout.dtype": "bfloat16",
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1,
    "algorithm.adv_estimator": "skpo",
    "algorithm.use_kl_in_reward": False,
    "skpo.group_size": 8,
    "skpo.split_low": 1 / 6,
    "skpo.split_high": 1 / 2,
    "skpo.selection": "median",
    "skpo.skip": "concat",
    "skpo.split": "adaptive",
    "skpo.upstream_reward": "mc",
    "skpo.downstream_aggregation": "group_token_mean",
    "skpo.candidates": None,
    "skpo.curriculum": {"enable": True, "epsilon": 0.05},
    "skpo.initial_length": 1024,
    "skpo.weight_up": 0.5,
    "skpo.weight_down": 0.5,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    "skpo.tracker": {"rho_min": 0.875, "rho_max": 0.96, "half_life": 8.0, "drift": "kl_steps"},
}


BARE_NULLS = {"skpo.candidates"}
"""Values of the paper that are null in the config; of all others null would mean that the key is gone."""


@pytest.fixture
def run_config(compose_config):
    """The config of one of RUNS, resolved."""
    return lambda name, *overrides: compose_config(*RUNS[name], *overrides)


def check(config) -> None:
    check_config(config, SkpoSettings.from_config(config.skpo))


# ---------------------------------------------------------------- composed values


@pytest.mark.parametrize("run", PAPER)
def test_the_paper_runs_have_the_papers_values(run_config, run: str) -> None:
    config = run_config(run)
    assert {path: OmegaConf.select(config, path, throw_on_missing=True) for path in PAPER_VALUES} == PAPER_VALUES
    assert all(path in BARE_NULLS or OmegaConf.select(config, path) is not None for path in PAPER_VALUES)


@pytest.mark.parametrize(
    ("run", "model", "context"),
    [
        ("qwen", "Qwen/Qwen2.5-Math-7B", 4096),  # what the model has been trained for
        ("llama", "meta-llama/Llama-3.2-3B-Instruct", 1024 + 1536 + 3072),
    ],
)
def test_the_paper_runs_train_the_papers_models(run_config, run: str, model: str, context: int) -> None:
    config = run_config(run)
    assert config.actor_rollout_ref.model.path == model
    assert config.actor_rollout_ref.rollout.max_model_len == context
    assert config.trainer.device == "cuda" and config.platform.name == "gpu"
    assert "embedded_model" not in config and "embedded" not in config.data, "nothing embedded is prepared"


def test_presets_change_the_objective_and_the_candidates(run_config) -> None:
    default, paper, small = (
        run_config("cpu", *preset).skpo for preset in ([], ["preset=paper"], ["preset=small_batch"])
    )
    assert default == paper
    assert {key for key in paper if paper[key] != small[key]} == {"weight_up", "candidates"}
    # |s| = L / 3 on average, |o| = L, G = 8.
    assert (small.weight_up, small.candidates) == (pytest.approx((1 / 3) / (1 / 3 + 8)), 3)
    assert run_config("cpu", "preset=small_batch", "skpo.weight_up=0.1").skpo.weight_up == 0.1
    check(run_config("cpu", "preset=small_batch"))


@pytest.mark.parametrize(("prompt", "tokens"), [(96, 4096), (5000, 5000 + 12 + 24)])
def test_a_cpu_reads_prompts_whole(run_config, prompt: int, tokens: int) -> None:
    rollout = run_config("cpu", f"data.max_prompt_length={prompt}").actor_rollout_ref.rollout
    assert (rollout.enable_chunked_prefill, rollout.max_num_batched_tokens) == (False, tokens)


@pytest.mark.parametrize("run", RUNS)
def test_skpo_is_what_verl_is_told_to_run(run_config, run: str) -> None:
    config = run_config(run)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert rollout.n == config.skpo.group_size + 1
    assert config.algorithm.adv_estimator == config.trainer.v1.trainer_mode == "skpo"
    assert config.trainer.use_v1 is True
    assert rollout.name == "vllm" and rollout.calculate_log_probs is True
    assert rollout.agent.agent_loop_manager_class == "recipe.skpo.rollout.manager.SkpoAgentLoopManager"
    assert config.reward.custom_reward_function.path == "pkg://reward_fns"
    assert (rollout.prompt_length, rollout.response_length) == (
        config.data.max_prompt_length,
        config.data.max_response_length,
    )
    assert actor.use_dynamic_bsz and actor.ppo_max_token_len_per_gpu >= rollout.max_model_len
    assert rollout.log_prob_use_dynamic_bsz
    assert rollout.scheduling_policy == "priority"
    check(config)
    check(run_config(run, "algorithm.rollout_correction.bypass_mode=true"))


@pytest.mark.parametrize("run", RUNS)
def test_verl_accepts_actor_and_rollout(run_config, run: str) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.config import FSDPActorConfig, RolloutConfig

    config = run_config(run)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert isinstance(actor, FSDPActorConfig) and isinstance(rollout, RolloutConfig)
    assert tuple(actor.optim.betas) == (0.9, 0.999)
    assert rollout.n == config.skpo.group_size + 1
    assert not need_critic(config) and not need_reference_policy(config)
    validate_config(config, use_reference_policy=False, use_critic=False)


def test_megatron_is_verls_own_engine_group(compose_config, monkeypatch) -> None:
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import McoreActorConfig

    monkeypatch.setattr("recipe.skpo.checks.engine.find_spec", lambda name: name)
    config = compose_config(*MEGATRON)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor, McoreActorConfig) and actor.strategy == "megatron"
    assert (actor.optim.lr, actor.optim.weight_decay, actor.optim.clip_grad) == (1e-6, 0.1, 1.0)
    check(config)


@pytest.mark.parametrize("run", RUNS)
def test_no_padding_rows_in_the_default_shapes(run_config, run: str) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    config = run_config(run)
    trainer = SimpleNamespace(config=config, use_critic=False, global_steps=1)
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    rows = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert rows % PPOTrainer._get_required_batch_multiple(trainer, ranks) == 0
    assert PPOTrainer._get_required_batch_multiple(trainer, ranks) % ranks == 0


def test_cpu_and_embedded_model_are_the_default(compose_config, monkeypatch) -> None:
    monkeypatch.delenv("SKPO_PLATFORM", raising=False)
    config = compose_config()
    assert (config.platform.name, config.trainer.device) == ("cpu", "cpu")
    assert config.actor_rollout_ref.model.path == config.embedded_model
    assert config.data.train_files.startswith(config.data.embedded)
    assert config.output_dir == "outputs/smollm2_135m-arithmetic-skpo"


DATA_SETS = ("gsm8k", "math", "dapo_math")


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("model", ["smollm2_135m", "qwen2_5_math_7b"])
def test_a_data_set_is_prepared_into_a_folder_of_its_choices(compose_config, model: str, data: str) -> None:
    config = compose_config(f"model={model}", f"data={data}")
    check(config)
    assert config.data.prepare.name == data and "embedded" not in config.data
    assert config.data.train_files == f"{config.data.prepared}/train.parquet"
    assert config.data.val_files == f"{config.data.prepared}/val.parquet"
    assert config.output_dir == f"outputs/{model}-{data}-skpo"
    folders = {config.data.prepared}
    for choice in ("source=/x", "template=boxed", "train_rows=9", "val_rows=9", "skip_bad=true", "prepare.seed=2"):
        folders.add(compose_config(f"model={model}", f"data={data}", f"data.{choice}").data.prepared)
    assert len(folders) == 7


@pytest.mark.parametrize(("platform", "per_node"), [("gpu", 8), ("cpu", 1)])
def test_workers_grow_with_the_nodes_unless_their_number_is_given(compose_config, platform: str, per_node: int) -> None:
    def numbers(*overrides: str) -> tuple[int, int]:
        config = compose_config(f"platform={platform}", *FILES, *overrides)
        return config.actor_rollout_ref.rollout.agent.num_workers, config.reward.num_workers

    assert numbers() == (per_node, per_node)
    assert numbers("trainer.nnodes=4") == (4 * per_node, 4 * per_node)
    assert numbers("trainer.nnodes=4", "reward.num_workers=3") == (4 * per_node, 3)
    assert numbers("trainer.nnodes=4", "actor_rollout_ref.rollout.agent.num_workers=5") == (5, 4 * per_node)


def test_gsm8k_with_the_embedded_model_has_sizes_of_its_own(compose_config) -> None:
    config = compose_config("data=gsm8k")
    sizes = (config.data.train_batch_size, config.data.max_prompt_length, config.data.max_response_length)
    assert sizes == (4, 320, 160) and config.data.val_rows == 32
    assert config.actor_rollout_ref.model.path == config.embedded_model
    assert config.actor_rollout_ref.rollout.max_model_len == 320 + 80 + 160
    paper = compose_config("platform=gpu", "model=qwen2_5_math_7b", "data=gsm8k")
    assert (paper.data.train_batch_size, paper.data.max_prompt_length) == (128, 1024)
    assert paper.data.val_rows == 256
    assert compose_config("data=gsm8k", "data.max_prompt_length=400").data.max_prompt_length == 400


def test_the_tiny_model_trains_on_its_own_task_unless_data_is_given(compose_config) -> None:
    config = compose_config("model=tiny")
    assert config.data.train_files == f"{config.data.embedded}/train.parquet" and config.data.embedded_by == "steps"
    assert config.actor_rollout_ref.model.path == config.embedded_model
    assert config.output_dir == "outputs/tiny-steps-skpo"
    check(config)
    other = compose_config("model=tiny", "data=arithmetic", "method=grpo")
    assert other.data.embedded_by == "arithmetic" and other.output_dir == "outputs/tiny-arithmetic-grpo"
    mine = compose_config("model=tiny", "data=mine")
    assert mine.data.train_batch_size < config.data.train_batch_size
    assert mine.data.max_prompt_length > config.data.max_prompt_length
    assert mine.actor_rollout_ref.rollout.max_model_len <= tiny.CONTEXT_TOKENS


def test_programs_are_generated_or_prepared_from_a_source_within_days(compose_config) -> None:
    config = compose_config("model=tiny", "data=code", "data.from_date=2024-08-01")
    assert (config.data.prepare.name, config.data.prepare.from_date) == ("code", "2024-08-01")
    assert config.output_dir != "outputs/tiny-code-skpo"
    generated = compose_config("model=tiny", "data=code")
    assert generated.output_dir == "outputs/tiny-code-skpo" and generated.data.prepared != config.data.prepared
    assert generated.data.max_prompt_length == 320 and generated.data.val_rows == 8
    check(generated)


def test_the_answer_format_reaches_the_reward(compose_config) -> None:
    from verl.trainer.ppo.reward import get_custom_reward_fn

    key = "reward.custom_reward_function.reward_kwargs.answer_format"
    verdicts = []
    for answer_format in ("any", "boxed"):
        score = get_custom_reward_fn(compose_config(f"+{key}={answer_format}"))
        assert score is not None
        result = score(data_source="openai/gsm8k", solution_str="#### 7", ground_truth="7", extra_info={})
        verdicts.append(result["score"])
    assert verdicts == [1.0, -1.0]
    kwargs = key.rpartition(".")[0]
    for override, message in (
        (f"+{key}=loose", f"{key}: 'loose' is unknown; known are any, boxed, gsm8k, line"),
        (f"+{kwargs}.thought_marks=[a]", f"{kwargs}.thought_marks: .* is unknown; give auto, none, or the opening"),
        (
            f"+{kwargs}.answer_formt=any",
            f"{kwargs}.answer_formt: is unknown; known are answer_format, thought_marks",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_reward(compose_config(override))
    check_reward(compose_config(f'+{kwargs}.thought_marks=["<plan>","</plan>"]'))


def test_every_run_has_a_folder_of_its_own(run_config) -> None:
    config = run_config("llama")
    assert re.fullmatch(r"outputs/llama3_2_3b_instruct-train-[0-9a-f]{6}-skpo", config.output_dir)
    assert config.trainer.default_local_dir == f"{config.output_dir}/checkpoints"


@pytest.mark.parametrize("run", RUNS)
def test_group_size_and_lengths_carry_over(run_config, run: str) -> None:
    changed = ("skpo.group_size=4", "data.max_prompt_length=100", "data.max_response_length=61", "skpo.split_high=0.25")
    config = run_config(run, *changed)
    assert config.actor_rollout_ref.rollout.n == 5
    if run != "qwen":  # which states its context
        assert config.actor_rollout_ref.rollout.max_model_len == 100 + 15 + 61


# ---------------------------------------------------------------- methods

METHODS = ["skpo", "grpo", "grpo_curriculum", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "spo", "rloo", "papo"]

# Per method: what its paper has, by the actor's keys as verl reads them; what is not named is GRPO's.
GRPO = {
    "policy_loss.loss_mode": "vanilla",
    "loss_agg_mode": "seq-mean-token-mean",
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "loss_scale_factor": None,
}
ACTORS = {
    "grpo": {},
    "grpo_curriculum": {},
    "dr_grpo": {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 3072},
    "dapo": {"loss_agg_mode": "token-mean", "clip_ratio_high": 0.28},
    "gspo": {"policy_loss.loss_mode": "gspo", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    "cispo": {
        "policy_loss.loss_mode": "cispo",
        "loss_agg_mode": "token-mean",
        "clip_ratio_low": 10.0,
        "clip_ratio_high": 0.28,
    },
    "sapo": {"policy_loss.loss_mode": "sapo", "tau_pos": 1.0, "tau_neg": 1.05},
    "spo": {"loss_agg_mode": "token-mean", "clip_ratio_high": 0.28},
    "rloo": {"loss_agg_mode": "token-mean"},
    "papo": {"clip_ratio_high": 0.28},
}
ESTIMATORS = {"skpo": "skpo", "spo": "skpo", "rloo": "rloo"}
TRAINERS = {"skpo": "skpo", "spo": "skpo_spo"}


def test_every_method_file_is_tested_here() -> None:
    files = {path.stem for path in (REPOSITORY / "recipe/skpo/config/method").glob("*.yaml")}
    assert files == set(METHODS) == {"skpo", *ACTORS}


@pytest.mark.parametrize("run", ["cpu", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_and_passes_the_checks(run_config, method: str, run: str) -> None:
    from verl.utils.config import validate_config

    config = run_config(run, f"method={method}")
    scale_batch_for_spo(config)
    check(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert config.method.name == method
    assert config.algorithm.adv_estimator == ESTIMATORS.get(method, "grpo")
    assert config.trainer.v1.trainer_mode == TRAINERS.get(method, "skpo_baseline")
    assert config.output_dir.endswith(f"-{method}")
    rollout, skpo = config.actor_rollout_ref.rollout, method == "skpo"
    assert rollout.n == (9 if skpo else 1 if method == "spo" else 8)
    worker = "SkpoAgentLoopManager" if skpo else "RolloutManager"
    assert rollout.agent.agent_loop_manager_class == f"recipe.skpo.rollout.manager.{worker}"
    longest = config.data.max_response_length + (config.data.max_response_length // 2 if skpo else 0)
    assert rollout.max_model_len == config.data.max_prompt_length + longest


@pytest.mark.parametrize("method", ACTORS)
def test_verl_reads_the_methods_loss(run_config, method: str) -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    config = run_config("llama", f"method={method}")
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    expected = GRPO | ACTORS[method]
    assert {key: reduce(getattr, key.split("."), actor) for key in expected} == expected
    get_policy_loss_fn(actor.policy_loss.loss_mode)
    assert not actor.use_kl_loss and actor.entropy_coeff == 0
    assert config.algorithm.norm_adv_by_std_in_grpo is (method != "dr_grpo")
    assert config.algorithm.filter_groups.enable is (method == "dapo")
    assert PolaritySettings.from_config(config.polarity) == PolaritySettings(enable=method == "papo")


def test_dapo_filters_groups_and_punishes_overlong_responses(run_config) -> None:
    config = run_config("llama", "method=dapo")
    assert config.algorithm.filter_groups.metric == "acc"
    assert "acc" in compute_score("skpo/arithmetic", "#### 5", "5"), "which the reward reports"
    assert config.reward.reward_manager.name == "dapo"
    overlong = config.reward.reward_kwargs.overlong_buffer_cfg
    assert config.reward.reward_kwargs.max_resp_len == 3072
    assert (overlong.enable, overlong.len, overlong.penalty_factor) == (True, 614, 1.0)


def test_verls_overlong_punishment_is_built_from_the_config(run_config, model_folder) -> None:
    """verl's DAPO reward manager refuses a config that it cannot use."""
    from transformers import AutoTokenizer
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    config = run_config("cpu", "method=dapo")
    manager = get_reward_manager_cls("dapo")(
        config=config, tokenizer=AutoTokenizer.from_pretrained(model_folder), compute_score=lambda **given: 1.0
    )
    assert manager.max_resp_len == 24
    assert (manager.overlong_buffer_cfg.enable, manager.overlong_buffer_cfg.len) == (True, 4)


def test_methods_differ_in_nothing_but_what_they_are(run_config) -> None:
    """Data, model, schedule, budget of responses and logging are those of SKPO."""
    # verl counts rows per prompt in the critic's node too, which nobody reads.
    own = {"method", "output_dir", "algorithm", "actor_rollout_ref", "reward", "skpo", "polarity", "critic"}
    skpo = OmegaConf.to_container(run_config("llama"))
    for method in ACTORS:
        other = OmegaConf.to_container(run_config("llama", f"method={method}"))
        for config in (other, skpo):
            for key in ("experiment_name", "default_local_dir", "v1"):
                config["trainer"].pop(key, None)
        assert {k: v for k, v in other.items() if k not in own} == {k: v for k, v in skpo.items() if k not in own}
        assert other["actor_rollout_ref"]["model"] == skpo["actor_rollout_ref"]["model"]
        assert other["actor_rollout_ref"]["actor"]["optim"] == skpo["actor_rollout_ref"]["actor"]["optim"]
        for key in ("temperature", "top_p", "response_length", "prompt_length", "val_kwargs"):
            assert other["actor_rollout_ref"]["rollout"][key] == skpo["actor_rollout_ref"]["rollout"][key]
        tracker = {"half_life": 0.06, "drift": "logratio"} if method == "spo" else {}
        assert other["skpo"] == {**skpo["skpo"], "tracker": {**skpo["skpo"]["tracker"], **tracker}}


@pytest.mark.parametrize(
    ("drift", "given", "half_life"),
    [("kl_steps", None, 8.0), ("nats", None, 8.0), ("logratio", None, 0.06), ("logratio", 3, 3.0)],
)
def test_the_half_life_follows_the_drift_unless_it_is_given(run_config, drift: str, given, half_life: float) -> None:
    overrides = [] if given is None else [f"skpo.tracker.half_life={given}"]
    config = run_config("cpu", f"skpo.tracker.drift={drift}", *overrides)
    assert SkpoSettings.from_config(config.skpo).tracker == TrackerSettings(drift=drift, half_life=half_life)


@pytest.mark.parametrize(("method", "prompts", "rows"), [("skpo", 1, 5), ("grpo", 1, 4), ("spo", 4, 1)])
def test_spo_gets_the_budget_of_the_others(run_config, method: str, prompts: int, rows: int) -> None:
    config = run_config("llama", f"method={method}", "skpo.group_size=4")
    scale_batch_for_spo(config)
    assert config.data.train_batch_size == prompts * 128
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size == prompts * 32, "in as many updates"
    assert config.actor_rollout_ref.rollout.n == rows


def test_a_token_budget_is_no_limit_of_steps(run_config) -> None:
    config = run_config("llama", "method=grpo", "budget=tokens", "budget.tokens=5000")
    check(config)
    assert (config.budget.match, config.budget.tokens) == ("tokens", 5000)
    assert config.trainer.total_training_steps == 1_000_000
    config = run_config("llama", "method=grpo")
    assert (config.budget.match, config.budget.tokens) == ("steps", None)


# ---------------------------------------------------------------- settings are written once


def test_a_settings_default_is_written_once(run_config) -> None:
    """In the record; the files of the groups hold other values only."""
    assert SkpoSettings.from_config(run_config("llama").skpo) == replace(SkpoSettings(), seed_requests=False)
    defaults = flat(default_node())
    for file in (REPOSITORY / "recipe/skpo/config").rglob("*.yaml"):
        node = OmegaConf.to_container(OmegaConf.load(file), resolve=False).get("skpo", {})
        assert not flat(node).items() & defaults.items(), file


def flat(node: dict, prefix: str = "") -> dict[str, str]:
    """Dotted key to value, as text."""
    pairs = [
        flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
        for key, value in node.items()
    ]
    return {key: value for pair in pairs for key, value in pair.items()}


# ---------------------------------------------------------------- refused settings

OF_EVERY_METHOD = [
    ("algorithm.use_kl_in_reward", True),
    ("algorithm.rollout_correction.rollout_rs", "token_k1"),
    ("data.dataloader_num_workers", 2),
    ("data.train_batch_size", 100),
    ("reward.reward_model.enable", True),
    ("trainer.use_v1", False),
    ("trainer.v1.trainer_mode", "sync"),
    ("trainer.v1.trainer_mode", "separate_async"),
    ("actor_rollout_ref.rollout.calculate_log_probs", False),
    ("budget.tokens", 5000),  # with budget=steps
]
OF_SKPO = [
    ("algorithm.adv_estimator", "grpo"),
    ("algorithm.filter_groups.enable", True),
    ("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla"),
    ("actor_rollout_ref.actor.shuffle", True),
    ("actor_rollout_ref.rollout.n", 8),
    ("actor_rollout_ref.rollout.max_model_len", 1024 + 1536),
    ("actor_rollout_ref.rollout.max_model_len", None),  # the rollout computes with it
]
REFUSED = [
    *((method, *case) for method in ("skpo", "grpo", "spo") for case in OF_EVERY_METHOD),
    *(("skpo", *case) for case in OF_SKPO),
    *((method, "trainer.v1.trainer_mode", "skpo") for method in ("grpo", "spo")),
]


@pytest.mark.parametrize(("method", "path", "value"), REFUSED)
def test_what_a_method_cannot_train_with_is_refused(run_config, method: str, path: str, value: object) -> None:
    config = run_config("llama", f"method={method}")
    OmegaConf.update(config, path, value, force_add=True)
    with pytest.raises(ConfigError) as refused:
        check(config)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and str(value) in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.gen_batch_size=128",),  # a batch at a time
        (f"actor_rollout_ref.rollout.max_model_len={1024 + 1536 + 1}",),
        ("method=grpo", "actor_rollout_ref.rollout.max_model_len=2000"),
        ("method=grpo", "algorithm.filter_groups.enable=true"),
        ("method=grpo", "data.gen_batch_size=16"),
        ("skpo.curriculum.enable=false", "data.gen_batch_size=16"),
        ("skpo.curriculum.enable=false", "trainer.v1.sampler.sync_refill_failed_groups=true"),
    ],
    ids=str,
)
def test_what_can_be_trained_with_passes(run_config, overrides: tuple[str, ...]) -> None:
    check(run_config("llama", *overrides))


@pytest.mark.parametrize("tokens", [None, 0, -5, 1.5, "many", True])
def test_a_token_budget_needs_its_tokens(run_config, tokens: object) -> None:
    config = run_config("llama", "method=grpo", "budget=tokens", "budget.tokens=5000")
    config.budget.tokens = tokens
    with pytest.raises(ConfigError, match=rf"^budget\.tokens: is {tokens}; give the number of tokens") as refused:
        check(config)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "value"), [("data.gen_batch_size", 16), ("trainer.v1.sampler.sync_refill_failed_groups", True)]
)
def test_the_curriculum_draws_whole_batches(run_config, path: str, value: object) -> None:
    config = run_config("llama")
    OmegaConf.update(config, path, value)
    with pytest.raises(ConfigError, match=rf"^skpo\.curriculum\.enable: must be false.*{path}"):
        check(config)


@pytest.mark.parametrize(("run", "said"), [("qwen", True), ("llama", False), ("cpu", False)])
def test_a_shortened_response_budget_is_said(run_config, run: str, said: bool, capsys) -> None:
    check(run_config(run))
    out = capsys.readouterr().out
    assert ("a response has 1536 of data.max_response_length=3072 tokens" in out) is said
    assert len(out.splitlines()) == int(said)
