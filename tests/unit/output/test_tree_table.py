"""Rollout trees in the loggers: real tensorboard and wandb read back, mlflow and trackio as fakes of their one call."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recipe.skpo.output.best_effort import BestEffort, BestEffortLogger
from recipe.skpo.output.tree_table import COLUMNS, LONGEST_CELL, NAME, as_block, log_trees, without_markdown

HOSTILE = (
    "![x](http://host/a.png) <img src=http://host/b.png>\r<script>alert(1)</script>\x1b[2J\u202e\n"
    "```\n[link](http://host)\n# heading\n| a | b |\n|---|---|\n| c | d |\n\udcff"
)


def a_tree(step: int = 7, text: str = "so 2 + 3\nis <5>", answer: str | None = "5") -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": "p1",
        "problem": f"2 + 3? {text}",
        "answer": "5",
        "segment": {"text": f"first {text}", "reward": 0.5, "baseline": 0.0, "advantage": 1.0},
        "responses": [
            {"text": f"{text} #### 5", "reward": 1.0, "advantage": 1.0, "length": 3, "answer": answer},
            {"text": "no", "reward": -1.0, "advantage": -1.0, "length": 1, "answer": None},
        ],
    }


ROWS = [
    [7, "p1", "2 + 3? so 2 + 3\nis <5>", "5", "first so 2 + 3\nis <5>", 0.5, "so 2 + 3\nis <5> #### 5", 1.0, "5"],
    [7, "p1", "2 + 3? so 2 + 3\nis <5>", "5", "first so 2 + 3\nis <5>", 0.5, "no", -1.0, ""],
]


@pytest.fixture
def tensorboard(tmp_path: Path, monkeypatch):
    """verl's adapter, and a function that reads the texts of its event file: step to Markdown."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from verl.utils.tracking import _TensorboardAdapter

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))

    def read(name: str = NAME) -> dict[int, str]:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        tensors = events.Tensors(f"{name}/text_summary")
        return {event.step: event.tensor_proto.string_val[0].decode() for event in tensors}

    return _TensorboardAdapter("p", "e"), read


def page_of(markdown: str) -> str:
    """The HTML that tensorboard makes of a text."""
    from tensorboard import plugin_util

    return plugin_util.markdown_to_safe_html(markdown)


def test_tensorboard_shows_problem_segment_responses_and_rewards(tensorboard) -> None:
    adapter, read = tensorboard
    log_trees({"tensorboard": adapter, "console": object()}, [a_tree()], 10, BestEffort())
    shown = read()
    assert list(shown) == [10]
    page = page_of(shown[10])
    titles = ["Problem, step 7", "Ground truth", "Segment, mean reward +0.50", "Response, reward +1.00"]
    for title in [*titles, "Response, reward -1.00"]:
        assert f"<strong>{title}</strong>" in page
    assert "so 2 + 3\nis &lt;5&gt; #### 5" in page


def harmless(page: str) -> bool:
    return not any(f"<{tag}" in page for tag in ("img", "a ", "a>", "script", "h1", "table")) and "\x1b" not in page


def test_text_of_a_model_is_inert_in_tensorboard(tensorboard) -> None:
    adapter, read = tensorboard
    assert not harmless(page_of(HOSTILE))
    log_trees({"tensorboard": adapter}, [a_tree(text=HOSTILE)], 10, BestEffort())
    page = page_of(read()[10])
    assert harmless(page) and page.count("&lt;script&gt;alert(1)") == 3


def test_wandb_gets_a_row_per_response(tmp_path: Path, monkeypatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.init(project="p", name="e", dir=tmp_path)
    try:
        log_trees({"wandb": BestEffortLogger("wandb", wandb, BestEffort())}, [a_tree()], 10, BestEffort())
    finally:
        wandb.finish()
    (path,) = tmp_path.rglob("*.table.json")
    table = json.loads(path.read_text(encoding="utf-8"))
    assert (table["columns"], table["data"]) == (list(COLUMNS), ROWS)


def test_mlflow_gets_an_artifact_per_validation(monkeypatch) -> None:
    logged: dict[str, Any] = {}
    mlflow = ModuleType("mlflow")
    mlflow.log_table = lambda data, artifact_file: logged.update({artifact_file: data})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    log_trees({"mlflow": object()}, [a_tree()], 10, BestEffort())
    (table,) = logged.values()
    assert list(logged) == ["trees/000010.json"] and list(table) == list(COLUMNS)
    assert [list(row) for row in zip(*table.values(), strict=True)] == ROWS


class Trackio:
    """Stands for verl's adapter, whose module makes tables of data frames."""

    def __init__(self) -> None:
        self.trackio = SimpleNamespace(Table=lambda dataframe: dataframe)
        self.logged: list[tuple[dict[str, Any], int]] = []

    def log(self, data: dict[str, Any], step: int) -> None:
        self.logged.append((data, step))


def test_trackio_gets_the_same_rows_without_markdown() -> None:
    backend = Trackio()
    log_trees({"trackio": backend}, [a_tree(), a_tree(8, HOSTILE)], 10, BestEffort())
    ((data, step),) = backend.logged
    table = data[NAME]
    assert (step, list(table.columns), len(table)) == (10, list(COLUMNS), 4)
    assert table.response[0] == "so 2 \\+ 3\nis \\<5\\> \\#\\#\\#\\# 5" and list(table.reward) == [1.0, -1.0] * 2
    assert "\\!\\[x\\]\\(http\\:\\/\\/host" in table.segment[2] and "\\<script\\>" in table.segment[2]


def test_a_text_is_cut_in_its_middle_and_every_line_of_it_stays_in_its_block() -> None:
    text = "begins " + "x" * 10 * LONGEST_CELL + " ends"
    cut = without_markdown(text)
    assert len(cut) < LONGEST_CELL + 20 and cut.startswith("begins x") and cut.endswith("x ends")
    for ending in "\r\v\f\x1c\x85\u2028":
        assert as_block(f"a{ending}# b") == "    a\n    # b"


def test_a_logger_that_does_not_take_the_table_costs_one_warning(tensorboard, caplog, monkeypatch) -> None:
    adapter, read = tensorboard
    monkeypatch.setitem(sys.modules, "mlflow", None)
    effort, loggers = BestEffort(), {"mlflow": object(), "wandb": object(), "tensorboard": adapter}
    with caplog.at_level(logging.WARNING):
        for step in (10, 20):
            log_trees(loggers, [a_tree()], step, effort)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("the training continues" in line for line in said)
    assert said[0].startswith("trees in logger wandb: not written (AttributeError: ")
    assert said[1].startswith("trees in logger mlflow: not written (ModuleNotFoundError: ")
    assert list(read()) == [10, 20]


# ---------------------------------------------------------------- verl's own option


def test_validation_responses_of_verl_are_inert_too(tensorboard, monkeypatch) -> None:
    from recipe.skpo.trainer.base import InertGenerations

    sent: list[Any] = []
    trackio = ModuleType("trackio")
    trackio.Trace = lambda messages, metadata: messages  # type: ignore[attr-defined]
    trackio.log = lambda data, step: sent.append(data["val/generations"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    _, read = tensorboard
    InertGenerations("p", "e").log(["tensorboard", "trackio"], [("2 + 3?", HOSTILE, 1.0)], 10)
    page = page_of(read("val/generations")[10])
    assert harmless(page.replace("<h3>", "")) and "2 + 3?" in page and "[link](http://host)" in page
    assert sent[0][0][1]["content"] == without_markdown(HOSTILE)


def test_validation_responses_that_cannot_be_logged_do_not_end_the_run(caplog, monkeypatch) -> None:
    from omegaconf import OmegaConf

    from recipe.skpo.trainer import base

    monkeypatch.setattr(base, "EFFORT", BestEffort())
    monkeypatch.setitem(sys.modules, "swanlab", None)
    trainer = object.__new__(base.BaseTrainer)
    trainer.config = OmegaConf.create({"trainer": {"log_val_generations": 1, "logger": ["swanlab"]}})
    trainer.validation_generations_logger, trainer.global_steps = base.InertGenerations("p", "e"), 3
    trainer._maybe_log_val_generations(inputs=["q"], outputs=["a"], scores=[1.0])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("trainer.log_val_generations: not written (ModuleNotFoundError: ")
