"""Checkpoints become folders that transformers and peft load as they are, through verl's merger, or nothing at all."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation import models
from recipe.skpo.evaluation.adapters import META
from recipe.skpo.export import command
from recipe.skpo.export.command import export, main, open_hub, push
from tests.conftest import move_checkpoints

FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
TOKENIZER = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def greedy(model: Any) -> list[int]:
    """16 greedy tokens after a short prompt."""
    inputs = torch.tensor([[5, 6, 7, 8]])
    return model.float().generate(inputs, do_sample=False, max_new_tokens=16, eos_token_id=None)[0].tolist()


def check_files(folder: Path, machine: Path) -> None:
    """Everybody can read the files, and no text in them names a folder of this machine."""
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path
        if path.suffix != ".safetensors":
            assert str(machine) not in path.read_text(encoding="utf-8"), path
    assert list(folder.parent.glob(".*")) == [], "nothing half done is left"


def test_the_whole_model_answers_as_the_trained_one(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "a folder/model"
    target.mkdir(parents=True)
    assert export(trained / "run", target) == target
    assert names(target) == sorted([*FILES, *TOKENIZER])
    check_files(target, trained)
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (target, trained / "reference"))
    assert model.dtype == torch.bfloat16 and reference.dtype == torch.float32
    assert greedy(model) == greedy(reference.bfloat16())
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert "step 3 of a run" in (target / "README.md").read_text()


@pytest.fixture(scope="module")
def lora(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run's folder with a checkpoint that has an adapter, as one rank saves it, and its model."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoConfig, LlamaForCausalLM

    run = tmp_path_factory.mktemp("lora") / "run"
    actor = run / "checkpoints/global_step_4/actor"
    shutil.copytree(model_folder, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(model_folder)).bfloat16()
    options: dict[str, Any] = {"r": 4, "lora_alpha": 24, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **options)).bfloat16().eval()
    torch.save(dict(adapted.state_dict()), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    (actor / META).write_text(json.dumps({"r": 4, "lora_alpha": 24, "task_type": "CAUSAL_LM"}))
    config = {"skpo": {}, "actor_rollout_ref": {"model": {"path": "org/base", "lora_rank": 4, "lora_alpha": 24}}}
    (run / "config.yaml").write_text(json.dumps(config))
    return run, adapted


def test_an_adapter_alone_and_merged_answer_as_the_trained_model(lora, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    run, adapted = lora
    with torch.no_grad():
        expected = adapted.float()(torch.arange(30)[None]).logits
        with adapted.disable_adapter():
            other = (adapted(torch.arange(30)[None]).logits - expected).abs().max()
    adapter, whole = (export(run, tmp_path / name, "4", name == "adapter") for name in ("adapter", "whole"))
    assert names(adapter) == sorted(ADAPTER)
    assert names(whole) == sorted([*FILES, *TOKENIZER])
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 24, sorted(config["target_modules"]))
    assert config["base_model_name_or_path"] == "org/base"
    torch.manual_seed(0)
    base = LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(whole).config).bfloat16()
    found = {
        "adapter": PeftModel.from_pretrained(base, str(adapter)),
        "whole": AutoModelForCausalLM.from_pretrained(whole),
    }
    for name, model in found.items():
        check_files(tmp_path / name, run)
        with torch.no_grad():
            gap = (model.float()(torch.arange(30)[None]).logits - expected).abs().max()
        # The adapter has the trained numbers; the merged weights are rounded to bfloat16.
        assert gap < (1e-5 if name == "adapter" else 0.02) * other


def test_a_checkpoint_with_the_whole_model_is_copied_without_code_and_links(run_copy: Path, tmp_path: Path) -> None:
    described = run_copy / "checkpoints/global_step_3/actor/huggingface"
    save_file({"weight": np.zeros(3, dtype=np.float32)}, described / "model.safetensors")
    (tmp_path / "of the reader.json").write_text("{}")
    (described / "secrets.json").symlink_to(tmp_path / "of the reader.json")
    (described / "modeling.py").write_text("raise SystemExit")
    target = export(run_copy, tmp_path / "model")
    assert names(target) == sorted([*FILES, *TOKENIZER])
    check_files(target, tmp_path)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_runs_own_template_is_in_the_tokenizer(run_copy: Path, tmp_path: Path, elsewhere: bool) -> None:
    from transformers import AutoTokenizer

    described = run_copy / "checkpoints/global_step_3/actor/huggingface"
    save_file({"weight": np.zeros(3, dtype=np.float32)}, described / "model.safetensors")
    model = {"custom_chat_template": "mine {{ messages[0]['content'] }}"}
    (run_copy / "config.yaml").write_text(json.dumps({"skpo": {}, "actor_rollout_ref": {"model": model}}))
    if elsewhere:
        move_checkpoints(run_copy, tmp_path / "disk")
    tokenizer = AutoTokenizer.from_pretrained(export(run_copy, tmp_path / "model"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False) == "mine q"


def test_what_cannot_be_exported_is_refused_in_one_line(trained, model_folder: Path, tmp_path: Path, capsys) -> None:
    run, file, full = trained / "run", tmp_path / "file", tmp_path / "full"
    file.write_text("")
    full.mkdir()
    (full / "mine").write_text("")
    for arguments, message in (
        ([run, "--to", full], f"--to: {full} holds mine; nothing is replaced, give another folder"),
        ([run, "--to", file], f"--to: {file} is a file; give a folder"),
        ([tmp_path / "none", "--to", tmp_path / "new"], "none is not a folder; give that of a run, such as"),
        (["org/model", "--to", tmp_path / "new"], "org/model is not a folder; give that of a run, such as"),
        ([model_folder, "--to", tmp_path / "new"], "is not a checkpoint of a run (.../global_step_N/actor); copy it"),
        ([run, "--to", tmp_path / "new", "--step", "7"], "has no checkpoint 7; give one of 3"),
        ([run, "--to", tmp_path / "new", "--step", "best"], "keeps no best checkpoint"),
        ([run, "--to", tmp_path / "new", "--adapter"], "has no LoRA adapter; leave it out to export the whole model"),
        ([run, "--to", tmp_path / "new", "--public"], "--public: is for --push; give both, or none"),
        ([run, "--to", tmp_path / "new", "--push", "me"], "--push: me is not the name of a repository; give <user"),
    ):
        assert main(list(map(str, arguments))) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert names(tmp_path) == ["file", "full"] and names(full) == ["mine"]


def test_a_failure_leaves_nothing(run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str], **_: Any) -> None:
        (Path(arguments[-1]) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(models.subprocess, "run", fail)
    with pytest.raises(OSError, match="No space"):
        export(run_copy, tmp_path / "new/model")
    assert names(tmp_path / "new") == []


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client of the hub, with the signatures of the real one."""
    import huggingface_hub

    made = create_autospec(huggingface_hub.HfApi, instance=True)
    made.create_repo.return_value = "https://huggingface.co/me/model"
    made.list_repo_files.return_value = [".gitattributes"]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@pytest.mark.parametrize("flags", [[], ["--public"]])
def test_a_folder_is_uploaded_private_unless_told_otherwise(
    hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, flags: list[str]
) -> None:
    monkeypatch.setattr(command, "export", lambda run, to, *options: hub.exported(run, to) and Path(to))
    hub.exported = lambda run, to: hub.whoami.assert_called_once() is None
    assert main(["run", "--to", str(tmp_path), "--push", "me/model", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == ["https://huggingface.co/me/model", str(tmp_path)]
    hub.create_repo.assert_called_once_with(repo_id="me/model", private=not flags, exist_ok=True)
    ((), sent) = hub.upload_folder.call_args
    assert (sent["repo_id"], sent["folder_path"]) == ("me/model", tmp_path)


ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER]
OF_ANOTHER_BASE = [
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.model"),
    *("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    "additional_chat_templates/tool_use.jinja",
]
OF_THE_USER = [".gitattributes", "LICENSE.txt", "scores.json", "step_4/config.json", "step_4/model.safetensors"]


@pytest.mark.parametrize("uploaded", [[*FILES, *TOKENIZER], ADAPTER])
def test_an_upload_leaves_nothing_by_which_another_model_is_loaded(hub, tmp_path: Path, uploaded: list[str]) -> None:
    from huggingface_hub.utils import filter_repo_objects

    there = {*FILES, *ADAPTER, *OF_ANOTHER_BASE, *OF_THE_USER}
    hub.list_repo_files.return_value = sorted(there)
    push(hub, tmp_path, "me/model")
    patterns = hub.upload_folder.call_args.kwargs["delete_patterns"]
    removed = set(filter_repo_objects(there, allow_patterns=patterns))
    assert (there - removed) | set(uploaded) == {*uploaded, *OF_THE_USER}


def test_without_a_login_nothing_is_converted(hub, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "export", lambda *arguments: pytest.fail("it was converted"))
    hub.whoami.side_effect = RuntimeError("Token is required")
    assert main(["run", "--to", str(tmp_path / "new"), "--push", "me/model"]) == 1
    assert "error: --push: the hub cannot be used (Token is required); log in with `hf" in capsys.readouterr().err


def test_the_real_client_offline_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    with pytest.raises(ConfigError, match=r"--push: the hub cannot be used \(.*; log in with `hf auth login`") as error:
        open_hub("me/model")
    assert "\n" not in str(error.value) and "hf_aa" not in str(error.value)


def test_an_upload_that_fails_says_that_the_folder_is_whole(hub, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "export", lambda run, to, *options: Path(to))
    hub.upload_folder.side_effect = OSError("connection reset")
    assert main(["run", "--to", str(tmp_path), "--push", "me/model"]) == 1
    by_hand = f"`hf upload me/model {tmp_path}` uploads it and removes nothing"
    assert f"{tmp_path} is whole: {by_hand}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="connection reset"):
        push(hub, tmp_path, "me/model")
