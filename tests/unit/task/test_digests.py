"""Digests of models: other weights have another one, the same weights elsewhere do not."""

import shutil
from pathlib import Path

import pytest

from recipe.skpo.task.digests import model_digest

NAMES = ("model.safetensors", "config.json", "generation_config.json")


def test_a_folders_digest_is_of_what_is_loaded_from_it(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    first = model_digest(str(model_folder))
    (copy / "README.md").write_text("words")
    assert model_digest(str(copy)) == first
    for name in NAMES:
        path = copy / name
        before = path.read_bytes() if path.exists() else b"{}"
        path.write_bytes(before + b" ")
        assert model_digest(str(copy)) not in (None, first), name
        shutil.copytree(model_folder, copy, dirs_exist_ok=True)


@pytest.mark.parametrize("cached", ["config.json", "tokenizer_config.json"])
def test_a_hubs_name_is_told_by_the_commit_in_the_cache(
    cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_digest("org/name") is None and model_digest("no name: a/b/c") is None
    repository = tmp_path / "models--org--name"
    for commit in ("aaa", "bbb"):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / cached).write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        assert model_digest("org/name") == commit
