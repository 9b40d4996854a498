"""File names on command lines and what a run is named after."""

import os
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from recipe.skpo.checks.paths import (
    FILES,
    MODEL,
    NAMES,
    TEMPLATE,
    Choices,
    job_name,
    overridden,
    readable,
    resolve_environment,
    resolve_paths,
)
from recipe.skpo.errors import ConfigError
from tests.conftest import REPOSITORY

OTHERS = {
    # Computed from others, or of parts that are refused or switched off.
    "trainer.default_hdfs_dir",
    "reward.reward_model.model_path",
    "actor_rollout_ref.rollout.prometheus.file",
    # A module's name.
    "reward_model.reward_loop_module_path",
}
OFF = ("critic.", "reward_model.", "custom_reward_function.", "distillation.", "skip.", "actor_rollout_ref.ref.")
COMPUTED = (
    ".profiler.",
    "global_tool_config",
    "data.tool_config_path",
    "data.function_tool_path",
    "quantization_config",
)


def test_every_file_that_the_config_names_is_known(compose_config) -> None:
    """A file that a later version of verl asks for must be resolved against the caller's folder too."""
    found = set()

    def walk(node, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else key)
        elif path.rpartition(".")[2].endswith(("path", "file", "files", "dir", "folder")):
            found.add(path)

    walk(OmegaConf.to_container(compose_config("platform=cpu")), "")
    left = {path for path in found if not path.startswith(OFF) and not any(part in path for part in COMPUTED)}
    assert left - set(NAMES) - set(FILES) - OTHERS == set()


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("actor_rollout_ref.model.path=~/model", "actor_rollout_ref.model.path=/home/me/model"),
        ("+data.source=~", "+data.source=/home/me"),
        ("data.train_files=[~/a.parquet,~/b.parquet]", "data.train_files=[/home/me/a.parquet,/home/me/b.parquet]"),
        ("data.val_files='~/a b.parquet'", "data.val_files='/home/me/a b.parquet'"),
        ("data.train_files=a (1).parquet", 'data.train_files="a (1).parquet"'),
        ("output_dir=runs/lr=1", 'output_dir="runs/lr=1"'),
        ("data.train_files=a.parquet,b.parquet", "data.train_files=a.parquet,b.parquet"),
        ("output_dir=a~b", 'output_dir="a~b"'),
        ("skpo.chat_quote='~/{segment}{problem}'", "skpo.chat_quote='~/{segment}{problem}'"),
        ("~trainer.logger", "~trainer.logger"),
        ("--cfg", "--cfg"),
    ],
)
def test_names_that_hydra_does_not_read(monkeypatch: pytest.MonkeyPatch, given: str, read: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert readable([given]) == [read]


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("data.train_files=a", {"data.train_files"}),
        ("data={train_files: a}", {"data.train_files", "data.source"}),
        ("data=files", set()),
        ("+data.source=a", {"data.source"}),
        ("data.train_rows=3", set()),
    ],
)
def test_which_keys_an_override_sets(override: str, keys: set[str]) -> None:
    assert {key for key in ("data.train_files", "data.source") if overridden(key, [override])} == keys


# ---------------------------------------------------------------- the config


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The caller's folder and the one that the training runs in."""
    caller, project = tmp_path / "caller", tmp_path / "project"
    for folder in (caller, project):
        (folder / "mine").mkdir(parents=True)
    monkeypatch.chdir(project)
    monkeypatch.setenv("SKPO_CALLER", str(caller))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return caller, project


def raw_config(**values):
    """A config as Hydra composes it, interpolations and all."""
    config = OmegaConf.create(
        {
            "output_dir": "outputs/${data.name}",
            "data": {"name": "x", "source": None, "cache": ".cache/${data.source}", "train_files": "${data.cache}/t"},
            "trainer": {"default_local_dir": "${output_dir}/checkpoints"},
            "actor_rollout_ref": {"model": {"path": "org/model", "custom_chat_template": None}},
        }
    )
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return config


@pytest.mark.parametrize(
    ("key", "value", "resolved"),
    [
        ("output_dir", None, "{project}/outputs/x"),
        ("output_dir", "runs/1", "{caller}/runs/1"),
        ("output_dir", "../${data.name}", "{home}/../x"),
        ("trainer.default_local_dir", None, "{project}/outputs/x/checkpoints"),
        ("trainer.default_local_dir", "/abs/./c/", "/abs/c"),
        ("data.train_files", None, "{project}/.cache/None/t"),
        ("data.train_files", "t.parquet", "{caller}/t.parquet"),
        ("data.train_files", ["t.parquet", "s3://bucket/t.parquet"], ["{caller}/t.parquet", "s3://bucket/t.parquet"]),
        ("data.train_files", "~/t.parquet", "{home}/t.parquet"),
        ("data.source", "mine", "{caller}/mine"),
        ("data.source", "openai/gsm8k", "openai/gsm8k"),
        ("data.source", "typo.jsonl", "{caller}/typo.jsonl"),
        (MODEL, "org/model", "org/model"),
        (MODEL, "mine", "{caller}/mine"),
        (MODEL, "./typo", "{caller}/typo"),
        (MODEL, "my/own/typo", "{caller}/my/own/typo"),
    ],
)
def test_what_a_name_is_relative_to(folders: tuple[Path, Path], key: str, value, resolved) -> None:
    caller, project = folders
    config = raw_config(**({key: value} if value else {}))
    resolve_paths(config, [f"{key}={value}"] if value else [])
    found = OmegaConf.select(config, key)
    if value == "../${data.name}":
        assert found == str(caller.parent / "x")
        return
    names = {"caller": caller, "project": project, "home": os.environ["HOME"]}
    expected = [item.format(**names) for item in ([resolved] if isinstance(resolved, str) else resolved)]
    assert ([found] if isinstance(found, str) else list(found)) == expected


def test_a_data_set_is_cached_by_where_its_source_is(folders: tuple[Path, Path]) -> None:
    """The same relative name in two folders is two sources."""
    config = raw_config(**{"data.source": "mine"})
    resolve_paths(config, ["data.source=mine"])
    assert str(folders[0] / "mine") in config.data.train_files


def test_a_template_may_be_a_file(folders: tuple[Path, Path]) -> None:
    (folders[0] / "t.jinja").write_text("{{ messages }} γ", encoding="utf-8")
    for given, text in {"t.jinja": "{{ messages }} γ", "{{ messages }}": "{{ messages }}"}.items():
        config = raw_config(**{TEMPLATE: given})
        resolve_paths(config, [])
        assert OmegaConf.select(config, TEMPLATE) == text
    with pytest.raises(ConfigError, match=rf"{TEMPLATE}: {folders[0]}/none.jinja cannot be read"):
        resolve_paths(raw_config(**{TEMPLATE: "none.jinja"}), [])


def test_folders_in_variables_are_the_callers(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKPO_CACHE", "cache")
    monkeypatch.setenv("TENSORBOARD_DIR", "/tb")
    resolve_environment()
    assert (os.environ["SKPO_CACHE"], os.environ["TENSORBOARD_DIR"]) == (str(folders[0] / "cache"), "/tb")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "smollm2_135m-arithmetic-skpo"),
        (["skpo.skip=chat", "platform=cpu", "trainer.total_training_steps=9"], "smollm2_135m-arithmetic-skpo"),
        (["data=gsm8k", "method=grpo"], "smollm2_135m-gsm8k-grpo"),
        (["data=gsm8k", "data.val_rows=9"], "smollm2_135m-gsm8k-skpo"),
        (["data=gsm8k", "data.train_rows=9"], r"smollm2_135m-gsm8k-[0-9a-f]{6}-skpo"),
        (["data=mine", "data.prompt=q"], r"smollm2_135m-mine-[0-9a-f]{6}-skpo"),
        ([f"{MODEL}=Qwen/Qwen3-4B"], r"Qwen3-4B-[0-9a-f]{6}-arithmetic-skpo"),
        ([f"{MODEL}=/a/my model/"], r"my_model-\w{6}-arithmetic-skpo"),
        (["data=files", "data.train_files=/b/t v2.parquet"], r"smollm2_135m-t_v2-\w{6}-skpo"),
        (["data=files", "data.train_files=[/a/t.parquet,/b/u.parquet]"], r"smollm2_135m-t-\w{6}-skpo"),
    ],
)
def test_a_run_is_named_after_what_it_trains(compose_config, overrides: list[str], name: str) -> None:
    config = compose_config(*readable(overrides))
    folder = config.output_dir
    assert re.fullmatch(f"outputs/{name}", folder), folder
    assert config.trainer.experiment_name == folder.removeprefix("outputs/")
    assert config.trainer.default_local_dir == f"{folder}/checkpoints"


def test_equal_last_parts_are_no_equal_names() -> None:
    def name(model: str, data: str) -> str:
        config = OmegaConf.create(
            {"actor_rollout_ref": {"model": {"path": model}}, "data": {"train_files": data}},
        )
        return Choices("m", "files", "skpo", (f"{MODEL}={model}", f"data.train_files={data}")).name(config)

    names = {name(f"/{m}/checkpoint", f"/{d}/train.parquet") for m in "ab" for d in "ab"}
    assert len(names) == 4


def test_a_job_of_a_sweep_keeps_its_name_when_it_is_resumed() -> None:
    job = ["skpo.skip=concat", "actor_rollout_ref.actor.optim.lr=1e-05", "output_dir=x", "platform=cpu"]
    name = job_name(job)
    assert name.startswith("skip_concat-lr_1e-05-")
    assert job_name([*job, "trainer.total_training_steps=900", "trainer.logger=console"]) == name
    others = {job_name([*job, more]) for more in ("skpo.seed=2", "skpo.seed=3", "model=x", "data.train_files=/a/b c")}
    assert len(others | {name}) == 5
    assert all(re.fullmatch(r"[\w.-]+", other, re.ASCII) for other in others)


def test_hydra_writes_nothing_of_its_own() -> None:
    hydra = yaml.safe_load((REPOSITORY / "recipe/skpo/config/skpo_trainer.yaml").read_text())["hydra"]
    assert (hydra["run"]["dir"], hydra["output_subdir"]) == (".", None)
