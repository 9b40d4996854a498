"""What is only there to be looked at does not end the training."""

import logging
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipe.skpo.output.best_effort import BestEffort, BestEffortLogger

FULL = OSError(28, "No space left on device")


class Backend:
    """A logger of verl's that can write or cannot."""

    project = "p"

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.lines: list[tuple[Any, int]] = []

    def log(self, data: Any, step: int) -> None:
        if self.error is not None:
            raise self.error
        self.lines.append((data, step))

    def finish(self, exit_code: int = 0) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.faults
def test_a_logger_that_cannot_write_loses_its_lines_and_is_named_once(caplog) -> None:
    backend, effort = Backend(), BestEffort()
    guarded = BestEffortLogger("tensorboard", backend, effort)
    guarded.log(data={"a": 1}, step=1)
    backend.error = FULL
    with caplog.at_level(logging.WARNING):
        guarded.log(data={"a": 2}, step=2)
        backend.error = ConnectionError("no network")
        guarded.log(data={"a": 3}, step=3)
        guarded.finish(exit_code=0)
    backend.error = None
    guarded.log(data={"a": 4}, step=4)
    assert backend.lines == [({"a": 1}, 1), ({"a": 4}, 4)]
    assert [record.getMessage() for record in caplog.records] == [
        "logger tensorboard: not written (OSError: [Errno 28] No space left on device); the training continues, and "
        "later failures of it are not logged"
    ]
    assert guarded.project == "p"


def test_what_is_not_expected_is_raised() -> None:
    with pytest.raises(KeyError), BestEffort().attempt("trees", OSError):
        raise KeyError("a mistake of ours")


@pytest.mark.faults
def test_every_logger_of_a_run_is_guarded(monkeypatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from recipe.skpo.trainer.base import BaseTrainer

    trainer = object.__new__(BaseTrainer)
    trainer.output_dir, trainer.resumed_at, trainer.saved_metrics = tmp_path, 0, {}
    trainer.metrics_path = tmp_path / "metrics.jsonl"
    trainer.settings = SimpleNamespace(trees_max_mb=1.0, trees_per_validation=0)
    backend = Backend()
    backend.error = FULL
    names = {"trainer": {"project_name": "p", "experiment_name": "e"}}
    trainer.total_training_steps, trainer.config = 4, OmegaConf.create(names)
    trainer.logger = SimpleNamespace(logger={"tensorboard": backend})
    trainer._open_metrics_file()
    trainer._open_metrics_file()
    assert set(trainer.logger.logger) == {"tensorboard", "metrics_file", "progress", "collapse"}
    for logger in trainer.logger.logger.values():
        logger.log(data={"x": 1.0}, step=1)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "x": 1.0}\n'


@pytest.mark.faults
def test_a_dump_that_cannot_be_written_is_skipped(monkeypatch, caplog, tmp_path: Path) -> None:
    from recipe.skpo.trainer import base as base_trainer

    monkeypatch.setattr(base_trainer, "EFFORT", BestEffort())
    (tmp_path / "file").touch()
    arguments = (["q"], ["a"], ["5"], [1.0], {})
    with caplog.at_level(logging.WARNING):
        for folder in (tmp_path / "dumps", tmp_path / "file", tmp_path / "file"):
            base_trainer.BaseTrainer._write_generations(*arguments, str(folder), 3)
    assert (tmp_path / "dumps/3.jsonl").is_file()
    assert len([record for record in caplog.records if "rollout_data_dir" in record.getMessage()]) == 1
