"""A model card says what a run was, without secrets, paths of a machine, or Markdown of strangers."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.skpo.export.card import Card, without_paths
from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.trainer.fingerprint import Content, Fingerprint, Model

SECRET = "hf_" + "b" * 34
CONFIG: dict[str, Any] = {
    "skpo": {"group_size": 8, "seed": 1},
    "actor_rollout_ref": {
        "model": {"path": "org/base", "lora_rank": 8, "lora_alpha": 16},
        "actor": {"optim": {"lr": 1e-5}},
        "rollout": {"val_kwargs": {"temperature": 0}},
    },
    "data": {"apply_chat_template_kwargs": {"enable_thinking": False, "place": "/home/me/x", "mark": "```"}},
}


@pytest.fixture
def actor(tmp_path: Path) -> Path:
    """The last checkpoint of a run, and its run's files."""
    folder = tmp_path / "home/me/runs/run/checkpoints/global_step_4/actor"
    folder.mkdir(parents=True)
    data = Content("/home/me/runs/data/train.parquet", "d" * 32, 512)
    Fingerprint(
        method="skpo",
        model=Model("/home/me/base", None, None, None, None, {}),
        lora=None,
        reward=Content("/home/me/my rewards/mine.py:score", "e" * 32),
        train=(data,),
        val=(Content("/home/me/|val|<b>.parquet", None),),
        settings={},
        versions={"verl": "0.9.1", "verl-skpo": "0123456789ab"},
    ).write(folder.parent)
    file = MetricsFile(run_of(folder) / "metrics.jsonl", resumed_at=0)
    for step, acc in ((0, 0.25), (2, 0.5), (4, 0.625)):
        file.log({"val-core/org/maths/acc/mean@1": acc, "val-aux/org/maths/reward/mean@1": 2 * acc - 1}, step)
    return folder


def run_of(actor: Path) -> Path:
    return actor.parents[2]


def card(actor: Path, config: dict[str, Any] | None = None, adapter: bool = False) -> str:
    (run_of(actor) / "config.yaml").write_text(json.dumps(CONFIG if config is None else config))
    return Card.read(actor, run_of(actor), "run-global_step_4", adapter).text()


def test_a_card_has_method_data_numbers_and_versions(actor: Path) -> None:
    text = card(actor)
    matter = yaml.safe_load(text.split("---")[1])
    assert (matter["library_name"], matter["base_model"]) == ("transformers", "org/base")
    assert "trained by skpo with verl-skpo: step 4 of a run" in text
    for row in (
        "| base model | org/base |",
        f"| train data | train.parquet, 512 rows, sha256 {'d' * 32}... |",
        r"| val data | \|val\|\<b\>.parquet |",
        "| reward | mine.py:score |",
        "| responses per prompt (G) | 8 |",
        "| learning rate | 1e-05 |",
        "| LoRA rank | 8 |",
        "| verl | 0.9.1 |",
        "| commit of verl-skpo | 0123456789ab |",
        "## Validation (greedy)",
        "| data | | step 0 | step 4 |",
        "| org/maths | accuracy | 0.250 | 0.625 |",
    ):
        assert f"{row}\n" in text
    assert "home" not in text and "/me" not in text


def test_a_run_without_an_earlier_validation_has_one_column(actor: Path) -> None:
    MetricsFile(run_of(actor) / "metrics.jsonl", resumed_at=0).log({"val-core/x/acc/mean@1": 0.5}, 4)
    assert "| data | | step 4 |\n|---|---|---|\n| x | accuracy | 0.500 |\n" in card(actor)


def test_the_snippet_of_a_card_is_python_with_the_runs_options(actor: Path) -> None:
    for adapter in (False, True):
        text = card(actor, adapter=adapter)
        assert text.count("```") == 2
        snippet = text.split("```")[1].removeprefix("python\n")
        (call,) = (
            node
            for node in ast.walk(ast.parse(snippet))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tokenizer.apply_chat_template"
        )
        (options,) = (ast.literal_eval(word.value) for word in call.keywords if word.arg is None)
        assert options == {"enable_thinking": False, "place": "x", "mark": "```"}
        assert ("PeftModel.from_pretrained(base, folder)" in snippet) == adapter
        assert ("from_pretrained('org/base')" in snippet) == adapter


def test_a_card_hides_secrets(actor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    options = {"hub_token": "x" * 12, "text": SECRET, "other": "see 0123456789abcdef"}
    text = card(actor, CONFIG | {"data": {"apply_chat_template_kwargs": options}})
    assert SECRET not in text and "xxxx" not in text and "0123456789abcdef" not in text
    assert text.count("(hidden)") >= 3


def test_a_checkpoint_of_which_nothing_is_known_has_a_card(tmp_path: Path) -> None:
    actor = tmp_path / "global_step_7/actor"
    actor.mkdir(parents=True)
    text = Card.read(actor, None, "global_step_7", adapter=False).text()
    assert "step 7 of a run" in text and "base_model" not in text and "Validation" not in text


def test_folders_of_paths_are_left_out_and_names_stay() -> None:
    for text, left in (
        ("/home/u/x/train.parquet", "train.parquet"),
        ("see /home/a/b, and ~me/c/d", "see b, and d"),
        ('{"a": "/home/x/y", "b": "org/m"}', '{"a": "y", "b": "org/m"}'),
        ("file:///home/a/b.py", "b.py"),
        ("a:/home/q/r", "a:r"),
        ("//home/x/z", "z"),
        *((name, name) for name in ("org/model", "pkg://reward_fns", "https://h/x/y", "1/2", "./x/y")),
    ):
        assert without_paths(text) == left
