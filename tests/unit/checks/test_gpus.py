"""Runs on GPUs, checked on a machine without any: how many are used, what splits over them, what fits."""

import stat
from pathlib import Path
from typing import Any

import pytest

from recipe.skpo.checks import ACTOR, ROLLOUT, gpus, memory
from recipe.skpo.checks.config import check_config
from recipe.skpo.checks.engine import choose_engine
from recipe.skpo.checks.gpus import actor_ranks, check_token_budgets, visible_gpus
from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import SkpoSettings
from tests.conftest import _composed

MEGATRON = ["model_engine=megatron", f"{ACTOR}.megatron.tensor_model_parallel_size=4"]


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that this machine has GPUs of so many gigabytes."""

    def pretend(number: int, gigabytes: int = 80) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        _composed.cache_clear()
        for module in (gpus, memory):
            monkeypatch.setattr(module, "list_gpus", lambda: [gigabytes * 10**9] * number)

    yield pretend
    _composed.cache_clear()


@pytest.mark.parametrize(
    ("devices", "number"), [(None, 3), ("", 0), ("1", 1), ("0,2", 2), ("GPU-5,GPU-6", 2), ("0,1,2,3,4", 3)]
)
def test_gpus_are_counted_as_cuda_sees_them(devices: str | None, number: int, monkeypatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81559\\n81559\\n[N/A]\\n'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpus.list_gpus() == [81559 * 2**20, 81559 * 2**20, 0]
    assert visible_gpus({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}) == number


@pytest.mark.parametrize("method", ["skpo", "grpo", "spo"])
@pytest.mark.parametrize("number", range(1, 9))
def test_the_default_job_runs_on_any_number_of_gpus(number: int, method: str, with_gpus, compose_config) -> None:
    from recipe.skpo.main import scale_batch_for_spo

    with_gpus(number)
    config = compose_config("platform=gpu", f"method={method}")
    scale_batch_for_spo(config)
    check_config(config, SkpoSettings.from_config(config.skpo))
    used = config.trainer.n_gpus_per_node
    assert used == config.actor_rollout_ref.rollout.n_gpus_per_node
    if method == "skpo":
        assert used == [1, 2, 3, 4, 4, 6, 6, 6][number - 1], "36 rows per update"
    else:
        assert used == [1, 2, 2, 4, 4, 4, 4, 8][number - 1], "32 rows per update"


@pytest.mark.parametrize(
    ("world", "overrides", "sentence"),
    [
        ((1, 8), [], None),
        ((4, 8), [], None),
        ((8, 8), [], r"32 prompts of 9 rows are 288 rows per update, which do not split over 64 .*; set it to 64 "),
        ((12, 8), [], None),
        ((1, 7), [], r"288 rows per update, which do not split over 7 data-parallel ranks; set it to 35 "),
        ((1, 8), [f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2", "packed_attention=none"], "flash attention"),
        ((1, 8), [f"{ROLLOUT}.tensor_model_parallel_size=3"], r"servers of 3 GPUs do not split over 8 GPUs"),
        ((1, 6), MEGATRON, "do not split into groups"),
        ((8, 8), MEGATRON, None),
    ],
)
def test_the_papers_rows_split_over_the_ranks_or_are_refused(
    world, overrides, sentence, compose_config, monkeypatch
) -> None:
    monkeypatch.setattr("recipe.skpo.checks.engine.find_spec", lambda name: name)  # Megatron counts as installed
    size = [f"trainer.nnodes={world[0]}", f"trainer.n_gpus_per_node={world[1]}"]
    config = compose_config("platform=gpu", "model=qwen2_5_math_7b", "data=files", *size, *overrides)
    if sentence is None:
        check_config(config, SkpoSettings.from_config(config.skpo))
        assert actor_ranks(config).world == world[0] * world[1]
        return
    with pytest.raises(ConfigError, match=sentence):
        check_config(config, SkpoSettings.from_config(config.skpo))


@pytest.mark.parametrize(
    "spelling", [f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"]
)
def test_sequence_parallel_needs_flash_attention(spelling: str, compose_config) -> None:
    config = compose_config("platform=gpu", f"{spelling}=2", "packed_attention=none")
    choose_engine(config, flash_attention=True)
    with pytest.raises(ConfigError, match=r"ulysses_sequence_parallel_size: is 2, but .* needs flash attention"):
        choose_engine(config, flash_attention=False)


@pytest.mark.parametrize(
    ("overrides", "gigabytes"),
    [
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=40000"], None),
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=50000"], "2.5"),
        ([f"{ROLLOUT}.log_prob_max_token_len_per_gpu=100000"], "10.0"),
        ([f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=12"], "2.4"),
        # As good as unlimited, which a small step does not fill.
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=100000", "data.train_batch_size=1"], None),
    ],
)
def test_a_dense_mask_that_takes_gigabytes_is_refused(overrides: list[str], gigabytes: str, compose_config) -> None:
    sizes = ["data.max_prompt_length=1024", "data.max_response_length=3072", "data.train_batch_size=64"]
    config = compose_config("platform=cpu", *sizes, *overrides)
    if gigabytes is None:
        assert choose_engine(config, flash_attention=False).kind == "dense"
        return
    with pytest.raises(
        ConfigError, match=f"packed_attention: is dense, but the mask .* may take {gigabytes} GB, more than 2"
    ):
        choose_engine(config, flash_attention=False)


@pytest.mark.parametrize(
    ("name", "method", "longest"),
    [
        ("actor.ppo_max_token_len_per_gpu", "skpo", 1024 + 1536 + 3072),
        ("rollout.log_prob_max_token_len_per_gpu", "skpo", 1024 + 1536 + 3072),
        ("actor.ppo_max_token_len_per_gpu", "grpo", 1024 + 3072),
    ],
)
def test_token_budgets_hold_the_longest_row(name: str, method: str, longest: int, compose_config) -> None:
    def check(tokens: int, *more: str) -> None:
        model = ["model=llama3_2_3b_instruct", "data=files", f"method={method}"]
        check_token_budgets(compose_config("platform=gpu", *model, f"actor_rollout_ref.{name}={tokens}", *more))

    check(longest)
    with pytest.raises(ConfigError, match=f"{name}: is {longest - 1}, but the longest row has {longest} tokens"):
        check(longest - 1)
    check(longest - 1, f"{ROLLOUT}.max_model_len={longest - 1}")


def test_micro_batches_of_rows_are_honoured(compose_config) -> None:
    fixed = [f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3"]
    config = compose_config("platform=gpu", *fixed, f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=3")
    assert config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz is False
    check_config(config, SkpoSettings.from_config(config.skpo))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_determinism_seeds_every_request(platform: str, compose_config) -> None:
    config = compose_config(f"platform={platform}", "full_determinism=true")
    assert config.skpo.seed_requests is True
    config.skpo.seed_requests = False
    with pytest.raises(ConfigError, match="all siblings would be the same response"):
        check_config(config, SkpoSettings.from_config(config.skpo))


def test_llamas_template_prints_the_same_day_every_day(compose_config) -> None:
    config = compose_config("platform=gpu", "model=llama3_2_3b_instruct", "data=files")
    assert config.data.apply_chat_template_kwargs == {"date_string": "26 Jul 2024"}


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("billions", "number", "gigabytes", "overrides", "outcome"),
    [
        (0.135, 1, 80, [], "fits"),
        (1.5, 1, 80, [], "fits"),
        (3.2, 1, 80, [], "offloaded"),
        (3.2, 1, 141, [], "fits"),
        (7.6, 1, 80, [], "7.6B parameters on 1 GPUs of 80 GB need about"),
        (7.6, 8, 80, [], "fits"),
        (7.6, 1, 80, ["actor_rollout_ref.model.lora_rank=32", f"{ACTOR}.fsdp_config.model_dtype=bf16"], "fits"),
        (3.2, 1, 80, [f"{ROLLOUT}.gpu_memory_utilization=0.98"], "leave no room for the actor"),
    ],
)
def test_what_does_not_fit_is_offloaded_or_refused(
    billions, number, gigabytes, overrides: list[str], outcome: str, with_gpus, compose_config, monkeypatch, capsys
) -> None:
    with_gpus(number, gigabytes)
    monkeypatch.setattr(memory, "model_size", lambda config: memory.ModelSize(int(billions * 1e9), 152_000, 3584))
    config: Any = compose_config(
        "platform=gpu", "model=llama3_2_3b_instruct", "data=files", "packed_attention=varlen", *overrides
    )
    config.trainer.n_gpus_per_node = number
    if outcome in ("fits", "offloaded"):
        memory.check_memory(config)
        settings = config.actor_rollout_ref.actor.fsdp_config
        assert settings.param_offload is settings.optimizer_offload is (outcome == "offloaded")
        assert ("offloaded while vLLM generates" in capsys.readouterr().out) is (outcome == "offloaded")
        return
    with pytest.raises(ConfigError, match=outcome):
        memory.check_memory(config)


def test_the_size_of_a_model_comes_from_its_config(tmp_path: Path, compose_config) -> None:
    from tests.e2e.tiny import make_model

    path = make_model(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    config = compose_config("platform=gpu", f"actor_rollout_ref.model.path={path}")
    size = memory.model_size(config)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert (size.vocabulary, size.hidden) == (model.config.vocab_size, model.config.hidden_size)
