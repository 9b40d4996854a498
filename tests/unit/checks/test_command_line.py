"""What is refused of a command line: one sentence each, before anything is prepared or launched."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from recipe.skpo.checks import ACTOR, MODEL, ROLLOUT
from recipe.skpo.checks.command_line import one_sentence, reject_unknown_settings, sentence
from recipe.skpo.checks.engine import check_model_engine
from recipe.skpo.checks.known_keys import MOVED, OPTIONAL
from recipe.skpo.errors import ConfigError
from recipe.skpo.settings import known_keys

DTYPE = f"{ROLLOUT}.dtype: is {{}}, must be bfloat16 or float32 on the CPU platform"
FORMER = "is a former key that verl no longer reads; give"
REWARD = "reward.custom_reward_function"

REFUSED = {
    # settings of SKPO
    "+skpo.tracker.nope=1": "skpo.tracker.nope: unknown key; known are group_size, ",
    "skpo={group_size: 1}": "skpo.group_size: must be >= 2",
    "skpo.group_size=many": "skpo.group_size: ",
    "skpo.split_high=null": "skpo.split_high: ",
    "skpo.tracker=5": "skpo.tracker: ",
    "skpo.split=boundary_token": "skpo.boundaries: name the strings or token ids",
    r'skpo.split=boundary_token skpo.boundaries=["\d"]': r"skpo.boundaries: '\\d' holds a backslash",
    "method=grpo skpo.skip=chat": "skpo.skip: has no effect with method=grpo; leave it out",
    # combinations
    "algorithm.use_kl_in_reward=true": "algorithm.use_kl_in_reward: is True, must be False: rewards stay plain; for a",
    "trainer.resume_mode=resume_path": "trainer.resume_from_path: ",
    "budget=tokens": "budget.tokens: is None; give the number of tokens",
    "data=files": "data.train_files: is not set; name a parquet file",
    # keys that verl had
    "custom_reward_function.path=my.py": f"custom_reward_function.path: {FORMER} {REWARD}.path=my.py",
    "+custom_reward_function.reward_kwargs.x=1": f"{REWARD[7:]}.reward_kwargs.x: {FORMER} {REWARD}.reward_kwargs.x=1",
    "reward_model.reward_manager=dapo": f"reward_model.reward_manager: {FORMER} reward.reward_manager.name=dapo",
    "+reward_model.strategy=fsdp": f"reward_model.strategy: {FORMER} reward.reward_model.strategy=fsdp",
    "sandbox_fusion.url=http://x": f"sandbox_fusion.url: {FORMER} reward.sandbox_fusion.url=http://x",
    f"{ACTOR}.grad_clip=0.5": f"{ACTOR}.grad_clip: {FORMER} {ACTOR}.optim.clip_grad=0.5",
    "data.reward_fn_key=source": "data.reward_fn_key: is source, but verl's V1 trainer does not read it; call the",
    # keys that verl never had
    "trainer.total_steps=4": "trainer.total_steps: unknown key; the nearest known is trainer.total_training_steps",
    "+trainer.total_steps=4": "trainer.total_steps: unknown key; the nearest known is trainer.total_training_steps",
    "+trainer={total_steps: 4}": "trainer.total_steps: unknown key; the nearest known is trainer.total_training_steps",
    "~trainer.total_steps": "trainer.total_steps: unknown key; the nearest known is trainer.total_training_steps",
    "trainer.total_step=4": "trainer.total_step: unknown key; the nearest known is trainer.total_training_steps",
    "trainer.training_step=4": "trainer.training_step: unknown key; the nearest known is trainer.total_training_steps",
    "trainer.save_freqs=4": "trainer.save_freqs: unknown key; the nearest known is trainer.save_freq",
    "actor.optim.lr=1e-5": f"actor.optim.lr: unknown key; the nearest known is {ACTOR}.optim.lr",
    "trainer.train_batch_size=8": "trainer.train_batch_size: unknown key; the nearest known is data.train_batch_size",
    "+ray_kwargs.ray_init.adress=auto": "ray_kwargs.ray_init.adress: unknown key; the nearest known is ray_kwargs",
    f"+{ROLLOUT}.temprature=1": f"{ROLLOUT}.temprature: unknown key; the nearest known is {ROLLOUT}.temperature",
    "metod=grpo": "metod: unknown key; the nearest known is method",
    "+foo/bar=baz": "foo/bar: unknown key; --cfg job prints the known ones",
    f"{REWARD}.reward_kwargs.mine=1": f"{REWARD}.reward_kwargs.mine: is not in the config yet; add it with a +",
    "~trainer.logger": "trainer.logger: is read and cannot be taken out by ~trainer.logger; give it a value",
    "+trainer.nnodes=2": "trainer.nnodes: is in the config already; leave out the + in front of it",
    "trainer=5": "trainer: is 5, must be a group of keys",
    # groups
    "platform=tpu": "platform: 'tpu' is unknown; known are cpu, gpu",
    "method=baseline": "method: 'baseline' is unknown; known are cispo, ",
    "data=prepared": "data: 'prepared' is unknown; known are arithmetic, code, ",
    "data=legacy_data": "data: 'legacy_data' is unknown; known are arithmetic, code, ",
    "model=hf_model": "model: 'hf_model' is unknown; known are llama3_2_3b_instruct, qwen2_5_math_7b, smollm2_135m",
    "output_dir=~nobody_here/x": "output_dir: ~nobody_here/x names the home folder of an unknown user; give its path",
    "method=null": "method=null: a group needs the name of one of its choices",
    "~method": "method: cannot be taken out; give one of its choices",
    "+platform=cpu": "platform: is chosen twice; leave out the + in front of it",
    "model_engine=megatron": "model_engine: is megatron, which needs GPUs; leave it out on the CPU platform",
    # values
    f"{ROLLOUT}.dtype=bf16": DTYPE.format("'bf16'"),
    f"{ROLLOUT}.dtype=float16": DTYPE.format("'float16'"),
    f"{ROLLOUT}.dtype=null": DTYPE.format("None"),
    f"platform=gpu {ROLLOUT}.dtype=bf16": f"{ROLLOUT}.dtype: is 'bf16', must be one of auto, half, ",
    "data.max_prompt_length=abc": "data.max_prompt_length: is 'abc', must be a whole number of at least 1",
    "trainer.total_training_steps=abc": "trainer.total_training_steps: is 'abc', must be a whole number",
    "trainer.logger=null": "trainer.logger: is null; name loggers, such as [console,tensorboard], or give [] for none",
    "output_dir=???": "output_dir: has no value (???); give one by output_dir=<value>",
    # what refers to something
    "output_dir=${oc.env:NOT_SET_HERE}/x": "output_dir: the environment variable NOT_SET_HERE is not set; set it, or",
    "data.seed=${oc.env:NOT_SET_HERE}": "data.seed: the environment variable NOT_SET_HERE is not set; set it, or",
    "output_dir=${data.sed}": "output_dir: refers to data.sed, which the config does not have; the nearest known is ",
    "output_dir=${nope:1}": "output_dir: ${nope:...} is unknown; oc.env, oc.select and oc.decode are known",
    "output_dir=${output_dir}/x": "output_dir: refers to itself; give a value",
    # what cannot be read
    "a=[1,": "a: [1, has [ without ]; close it",
    "trainer.logger=[console": "trainer.logger: [console has [ without ]; close it",
    "output_dir=${oc.env:X": "output_dir: ${oc.env:X has { without }; close it",
    'output_dir="x': 'output_dir: "x has a quotation mark without its second one; close it',
    "trainer.project_name=~/mine": "trainer.project_name: ~/mine is not read as a home folder; write ",
    f"{MODEL}.path=a,b": f"{MODEL}.path: a,b can be read in several ways; write [a,b] for a list",
    "trainer.project_name=a=b": "trainer.project_name: a=b cannot be read; quote it",
    "trainer.project_name=#x": "trainer.project_name: #x cannot be read at '#'; quote it",
    "skpo.group_size=range(2,4)": "skpo.group_size: range(2,4) means several runs; give --multirun, or one value",
    "seed": "seed: is not key=value; write seed=<value>",
    "--config-name=nope": "nope: Cannot find primary config 'nope'",
}
"""Arguments of the command, each starting with an option or a key, to how its message starts."""

OPEN_KEYS = [
    "+data.apply_chat_template_kwargs.enable_thinking=false",
    "+data.chat_template_func=mine",
    f"+{ROLLOUT}.engine_kwargs.vllm.swap_space=1",
    f"+{ROLLOUT}.custom.mine=1",
    f"+{MODEL}.override_config.attention_dropout=0.1",
    "+ray_kwargs.ray_init.namespace=mine",
    "+ray_kwargs.ray_init.runtime_env.env_vars.MINE=1",
    f"+{REWARD}.reward_kwargs.answer_format=boxed",
    "reward.sandbox_fusion.url=http://x",
    f"{MODEL}.lora_rank=8",
]
"""Overrides of keys that another program reads, or that verl reads without naming them in its config."""


def words(line: str) -> list[str]:
    """The arguments of a line: a blank begins a new one where a key or a group follows."""
    return re.split(r" (?=[\w.]+=)", line) if "{" not in line else [line]


@pytest.fixture
def command(command_line) -> Callable[..., str | None]:
    """Run the command up to its checks of files; returns its message, None where it has none."""
    return lambda *arguments: command_line(*arguments).message


@pytest.mark.parametrize("line", REFUSED)
def test_a_line_is_refused_in_one_sentence(command, line: str) -> None:
    message = command(*words(line))
    assert message is not None, "it was launched"
    assert message.startswith(f"error: {REFUSED[line]}")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("override", OPEN_KEYS)
def test_keys_that_somebody_reads_pass(command, override: str) -> None:
    assert command(override) is None


def test_a_config_file_of_ones_own_has_known_keys_too(command, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()

    def with_key(key: str) -> str | None:
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\ntrainer: {{{key}: 4}}\n")
        return command("--config-dir", str(tmp_path), "+experiment=mine")

    unknown = "error: trainer.total_steps: unknown key; the nearest known is trainer.total_training_steps"
    assert with_key("total_steps") == unknown
    assert with_key("total_training_steps") is None


def test_a_choice_of_ones_own_may_have_the_keys_of_its_group(command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mine = tmp_path / "data" / "team.yaml"
    mine.write_text("defaults: [/_shared/prepared@_here_, _self_]\nprepare: {name: math}\n")
    assert command("--config-dir", str(tmp_path), "data=team") is None
    mine.write_text("defaults: [/_shared/prepared@_here_, _self_]\nprepare: {name: math}\ntrain_batchsize: 4\n")
    message = command("--config-dir", str(tmp_path), "data=team")
    assert message == "error: data.train_batchsize: unknown key; the nearest known is data.train_batch_size"


def test_every_job_of_a_sweep_is_checked(command) -> None:
    message = command("-m", "skpo.group_size=4,1")
    assert message is not None and message.startswith("error: skpo.group_size: must be >= 2")


def test_an_error_of_the_training_keeps_its_traceback(monkeypatch) -> None:
    def task() -> None:
        raise HydraException("in the training")

    with pytest.raises(HydraException), one_sentence(task, []):
        task()
    with pytest.raises(SystemExit, match="error: before it"), one_sentence(task, []):
        raise HydraException("before it")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(HydraException), one_sentence(task, []):
        raise HydraException("before it")


def test_a_reader_that_has_seen_enough_is_not_an_error(capfd) -> None:
    with pytest.raises(SystemExit) as stopped, one_sentence(lambda: None, []):
        raise BrokenPipeError(32, "Broken pipe")
    assert stopped.value.code == 1
    os.write(1, b"nobody reads this")
    assert not capfd.readouterr().out


# ---------------------------------------------------------------- the tables agree with verl


def test_former_keys_are_still_in_verls_config_and_the_new_ones_too(compose_config) -> None:
    config = compose_config()
    for old, new in MOVED.items():
        if not old.endswith("reward_kwargs"):
            OmegaConf.select(config, old.rpartition(".")[0] or old, throw_on_missing=True)
            assert OmegaConf.select(config, new.rpartition(".")[0] or new) is not None, new


def test_optional_keys_are_read_by_verl() -> None:
    import verl

    source = "\n".join(path.read_text() for path in Path(verl.__path__[0]).rglob("*.py"))
    for key in (key for keys in OPTIONAL.values() for key in keys):
        assert f'"{key}"' in source or f".{key}" in source, key


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
@pytest.mark.parametrize("key", ["nope", "tracker.nope", "group_sizes", "tracker.rho_min.x"])
def test_unknown_settings_are_refused_with_all_that_are_known(prefix: str, key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^skpo\.{key}: unknown key; known are group_size, .*tracker\.drift.*curriculum\.epsilon$"
    ):
        reject_unknown_settings(["trainer.nnodes=1", f"{prefix}skpo.{key}=1"])


def test_known_settings_and_other_arguments_pass() -> None:
    overrides = [f"skpo.{key}=1" for key in known_keys()]
    reject_unknown_settings([*overrides, "--cfg", "job", "skpo.tracker={rho_min: 0.9}", "data.skpo.nope=1"])


@pytest.mark.parametrize("engine", ["megatron", "torchtitan", "veomni"])
def test_an_engine_that_is_not_installed(monkeypatch, engine: str) -> None:
    monkeypatch.setattr("recipe.skpo.checks.engine.find_spec", lambda name: None)
    config = SimpleNamespace(model_engine=engine, platform=SimpleNamespace(name="gpu"))
    with pytest.raises(ConfigError, match=rf"^model_engine: {engine} needs the package \S+, which is not installed"):
        check_model_engine(config)  # type: ignore[arg-type]


def test_an_error_without_a_rule_is_its_first_lines() -> None:
    error = ValueError("something new\nand a page about it")
    error.__cause__ = KeyError("its cause")
    assert sentence(error) == "something new; 'its cause'"
