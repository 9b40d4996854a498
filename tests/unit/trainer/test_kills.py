"""A run killed at every point of a save, against the same run never killed; without Ray and models.

Real here: our trainer's saving, loading, prompts, trackers and metrics file, verl's part of a checkpoint and its data
loader, the start-up checks.  Made up: what the actor writes, and rewards, which depend on the weight, the prompt, the
split position and the seed, so that a difference anywhere shows in all that follows.  Every launch is a fork of this
process and ends by SIGKILL or by ``os._exit``.  ``tests/e2e/test_resume.py`` does a few of them with everything real.
"""

import itertools
import json
import os
import re
import signal
import traceback
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError

from data_prep.schema import Row, write_parquet
from recipe.skpo.ending import way_on
from recipe.skpo.method.rows import SEED_FIELD, SPLIT_FIELD
from recipe.skpo.output.best import kept_best
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.run_folder import MARKER, marked_step, stored_checkpoints
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.checkpoints import METRICS_FILE, SaveError, mark, missing_piece, repair_marker
from recipe.skpo.trainer.fingerprint import FILE_NAME as FINGERPRINT
from recipe.skpo.trainer.identity import fingerprint
from recipe.skpo.trainer.resume import ResumePlan, plan_resume
from recipe.skpo.trainer.state import FILE_NAME
from tests.e2e import killed as killing
from tests.e2e.killed import POINTS

pytestmark = pytest.mark.resume

STEPS, SAVE_EVERY = 7, 2
METRIC = "val-core/t/acc/mean@1"
ROWS, BATCH = 12, 4  # three steps per epoch


class Actor:
    """One number for a model; its files have the names of verl's FSDP engine."""

    def __init__(self) -> None:
        self.weight = 0.0

    def save_checkpoint(self, path: str, remote: None, step: int, max_ckpt_to_keep: None) -> None:
        assert remote is None and max_ckpt_to_keep is None, "verl removes nothing"
        Path(path).mkdir(parents=True, exist_ok=True)
        for start in ("model", "optim", "extra_state"):
            torch.save({"weight": self.weight}, Path(path) / f"{start}_world_size_1_rank_0.pt")

    def load_checkpoint(self, local_path: str, del_local_after_load: bool) -> None:
        self.weight = torch.load(Path(local_path) / "model_world_size_1_rank_0.pt")["weight"]


def make_trainer(config: Any) -> Any:
    from recipe.skpo.trainer.skpo import SkpoTrainer

    trainer = SkpoTrainer(config)
    trainer.tokenizer, trainer.processor = None, None
    trainer.use_critic, trainer.actor_rollout_wg, trainer.total_training_steps = False, Actor(), STEPS
    trainer.checkpoint_callback = SimpleNamespace(on_save=lambda **options: None)
    trainer.logger = SimpleNamespace(logger={})
    trainer._init_dataloader()
    trainer._load_checkpoint()
    trainer._open_metrics_file()
    return trainer


def plan(config: Any) -> ResumePlan:
    return plan_resume(config, SkpoSettings.from_config(config.skpo), lambda: fingerprint(config))


def train(config: Any) -> None:
    """What ``main`` and verl's loop do, from what is in the run's folder to its last step."""
    repair_marker(config)
    if plan(config).finished:
        return
    fingerprint(config).write(Path(config.output_dir))
    trainer = make_trainer(config)
    while trainer.global_steps < STEPS:
        trainer.global_steps += 1
        metrics: dict[str, float] = {}
        trainer.step(metrics, {})
        if trainer.global_steps % SAVE_EVERY == 0 or trainer.global_steps == STEPS:
            trainer._save_checkpoint()
            if trainer.validations:
                metrics |= trainer._validate()
        trainer.logger.logger["metrics_file"].log(metrics, trainer.global_steps)


def made_up_step(trainer: Any, metrics: dict[str, float], timing_raw: dict[str, float]) -> None:
    """Replace verl's method by what it changes, without a model."""
    batch = trainer._next_train_batch()
    trainer.on_sample_begin()
    visits = zip(batch.get("id").tolist(), batch[SPLIT_FIELD].tolist(), batch[SEED_FIELD].tolist(), strict=True)
    for index, (prompt_id, split, seed) in enumerate(visits):
        key = zlib.crc32(f"{prompt_id} {split} {seed} {trainer.actor_rollout_wg.weight}".encode())
        trainer.state.observe(prompt_id, key % 9 / 4 - 1, 4 + key % 40)
        trainer.actor_rollout_wg.weight += key / 2**32 - 0.5
        numbers = {"prompt": zlib.crc32(prompt_id.encode()), "split": split, "seed": seed, "key": key}
        metrics |= {f"{name}/{index}": value for name, value in numbers.items()}
    trainer.state.clock.advance(abs(trainer.actor_rollout_wg.weight))
    trainer.state.tokens_generated += 10


def launch(config: Any, point: str | None = None, step: int = 0) -> int:
    """Train in a fork, with a kill built in if ``point`` is given; 0, or minus the signal that ended it."""
    log = Path(f"{config.output_dir}.log")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if point is not None:
                killing.install(point, step, os.getpid())
            train(config)
            code = 0
        except BaseException:
            log.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    assert not log.exists(), log.read_text(encoding="utf-8")
    return os.WEXITSTATUS(status)


def kill(config: Any, point: str, step: int) -> Path:
    """Train until the kill; returns the folder of checkpoints."""
    assert launch(config, point, step) == -signal.SIGKILL, f"{point} at {step}: it ended well"
    return Path(config.trainer.default_local_dir)


@pytest.fixture(scope="module")
def make_config(compose_config, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """The config of a run in a folder of its own; ``curriculum`` on or off."""
    from transformers import AutoTokenizer
    from verl.trainer.ppo.v1 import trainer_base
    from verl.utils.dataset.rl_dataset import RLHFDataset

    import recipe.skpo.trainer.skpo  # noqa: F401  once, before the first fork

    folder, numbers = tmp_path_factory.mktemp("runs"), itertools.count()
    files = {}
    for role, size in {"train": ROWS, "val": ROWS, "other": ROWS, "small": BATCH}.items():
        files[role] = folder / f"{role}.parquet"
        rows = [
            Row("t", [{"role": "user", "content": f"{role} {n}"}], "1", "none", role, n, f"{role} {n}")
            for n in range(size)
        ]
        write_parquet(rows, files[role])

    def make(curriculum: bool = True, keep: int | None = 2, best: str | None = None) -> Any:
        config = compose_config("platform=cpu", "data=files", "skpo.group_size=2")
        config.data.train_files, config.data.val_files = str(files["train"]), str(files["val"])
        config.data.train_batch_size, config.data.max_response_length = BATCH, 64
        config.actor_rollout_ref.model.path = str(model_folder)
        config.skpo.curriculum.enable = curriculum
        config.output_dir = str(folder / f"run {next(numbers)}")
        config.trainer.default_local_dir = f"{config.output_dir}/checkpoints"
        config.trainer.total_training_steps, config.trainer.max_actor_ckpt_to_keep = STEPS, keep
        config.trainer.keep_best = best
        return config

    # Read once for all forks.
    data, tokenizer = make().data, AutoTokenizer.from_pretrained(model_folder)
    read = {str(file): RLHFDataset(str(file), tokenizer, data) for file in files.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_base.PPOTrainer, "step", made_up_step)
        # The first validated step is the best one, so that it is the oldest when the run ends.
        patch.setattr(trainer_base.PPOTrainer, "_validate", lambda trainer: {METRIC: -float(trainer.global_steps)})
        patch.setattr(trainer_base, "create_rl_dataset", lambda file, *arguments, **options: read[file])
        patch.setattr(killing, "GENERATING_S", 0.0)
        yield make


def result(config: Any) -> dict[str, Any]:
    last = Path(config.trainer.default_local_dir) / f"global_step_{STEPS}"
    with np.load(last / FILE_NAME) as archive:
        state = {name: archive[name].tolist() for name in archive.files if name != "meta"}
        state["meta"] = json.loads(str(archive["meta"]))
    return {
        "metrics": read_lines(Path(config.output_dir) / "metrics.jsonl"),
        "state": state,
        "weight": torch.load(last / "actor/model_world_size_1_rank_0.pt"),
    }


@pytest.fixture(scope="module")
def unbroken(make_config) -> Callable[[bool], dict[str, Any]]:
    """Result of a run that was not killed, with the curriculum or without."""

    @cache
    def run(curriculum: bool) -> dict[str, Any]:
        config = make_config(curriculum)
        assert launch(config) == 0
        return result(config)

    return run


each_order = pytest.mark.parametrize("curriculum", [True, False], ids=["curriculum", "shuffled"])


@each_order
def test_a_run_killed_at_every_point_is_the_run_that_never_was(make_config, unbroken, curriculum: bool) -> None:
    expected, config = dict(unbroken(curriculum)), make_config(curriculum)
    assert [line["step"] for line in expected["metrics"]] == list(range(1, STEPS + 1))
    checkpoints = Path(config.trainer.default_local_dir)
    # All but the last point let the same save be tried again.
    for step, points in (
        (2, POINTS[:-1]),
        (3, ["generation"]),
        (4, POINTS[1:-1]),
        (STEPS, ["torn_state", "torn_data", "torn_marker"]),
    ):
        saved = (step - 1) // SAVE_EVERY * SAVE_EVERY or None
        for point in points:
            kill(config, point, step)
            if point == "torn_marker":
                assert (checkpoints / MARKER).read_text() == ""
            else:
                assert marked_step(checkpoints) == saved, f"{point} at {step}"
    # The last kill came after everything was trained: nothing is left to do, and the line of the step was not logged.
    assert repair_marker(config) == STEPS and plan(config).finished
    found = result(config)
    assert found.pop("metrics") == expected.pop("metrics")[:-1]
    assert found == expected
    assert list(stored_checkpoints(checkpoints)) == [6, 7]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["global_step_6", "global_step_7", MARKER]
    for step in (6, 7):
        names = sorted(path.name for path in (checkpoints / f"global_step_{step}").iterdir())
        assert names == ["actor", "data.pt", FINGERPRINT, FILE_NAME, METRICS_FILE]


def test_the_best_checkpoint_outlives_every_kill(make_config) -> None:
    config = make_config(keep=1, best=METRIC)
    run = Path(config.output_dir)
    write_atomic(run / "config.yaml", OmegaConf.to_yaml(config))
    for step in (4, 6):
        for point in POINTS[1:-1]:
            checkpoints = kill(config, point, step)
            validations, best = kept_best(run) or pytest.fail("the run has no validation")
            assert best == 2 and max(validations.values) < step
            assert missing_piece(checkpoints / "global_step_2", config) is None, f"{point} at {step}"
    assert launch(config) == 0
    assert list(stored_checkpoints(checkpoints)) == [2, STEPS]
    # Steps 4 and 6 were saved and killed before they were validated.
    assert (kept_best(run) or pytest.fail("no validation"))[0].values == {2: -2.0, 7: -7.0}


@each_order
def test_a_kill_right_after_a_save(make_config, unbroken, curriculum: bool) -> None:
    expected, config = dict(unbroken(curriculum)), make_config(curriculum)
    for step in (2, 4, 6, STEPS):
        assert marked_step(kill(config, "after_marker", step)) == step
    assert plan(config).finished
    # The kill came before the step was logged.  Nobody has opened the file since the last one.
    found = result(config)
    assert found.pop("metrics") == expected.pop("metrics")[:-1]
    assert found == expected


def test_one_checkpoint_is_enough_to_survive_a_kill(make_config, unbroken) -> None:
    """With one to keep, the old one goes when the new one counts and not before."""
    config = make_config(keep=1)
    for point in POINTS[:-1]:
        folder = kill(config, point, 4)
        assert 2 in stored_checkpoints(folder)
    assert launch(config) == 0
    assert result(config) == unbroken(True)
    assert list(stored_checkpoints(folder)) == [STEPS]


def test_going_back_to_an_older_checkpoint_makes_it_the_one_that_counts(make_config, unbroken) -> None:
    """A kill while step 6 is saved for the second time must not leave a mark on half of the old and half of the new."""
    config = make_config(keep=None)
    assert launch(config) == 0
    folder = Path(config.trainer.default_local_dir)
    assert list(stored_checkpoints(folder)) == [2, 4, 6, 7], "all are kept where no number is given"
    back = config.copy()
    back.trainer.resume_mode, back.trainer.resume_from_path = "resume_path", str(folder / "global_step_4")
    kill(back, "torn_actor", 6)
    assert marked_step(folder) == 4
    assert launch(config) == 0
    assert result(config) == unbroken(True)


@each_order
@pytest.mark.parametrize("other", ["other", "small"])
def test_other_training_data_are_read_from_their_beginning(make_config, other: str, curriculum: bool) -> None:
    """The checkpoint is two batches into the epoch; the other file is as large, or has one batch."""
    config, fresh = make_config(curriculum), make_config(curriculum)
    kill(config, "after_marker", 2)
    for changed in (config, fresh):
        changed.data.train_files = str(Path(changed.data.train_files).with_name(f"{other}.parquet"))
        assert launch(changed) == 0

    def prompts(run: Any, steps: range) -> list[list[float]]:
        found = {line["step"]: [line[f"prompt/{n}"] for n in range(BATCH)] for line in result(run)["metrics"]}
        return [found[step] for step in steps]

    assert len(result(config)["metrics"]) == STEPS
    if not curriculum:
        assert prompts(config, range(3, 6)) == prompts(fresh, range(1, 4))


@pytest.mark.parametrize("rate", [1e-5, 2e-5])
def test_a_changed_learning_rate_reaches_every_worker(make_config, tmp_path: Path, monkeypatch, rate: float) -> None:
    from recipe.skpo.trainer import base as base_trainer

    calls = tmp_path / "calls"
    remote = SimpleNamespace(remote=lambda function: calls.write_text(function.__name__))
    monkeypatch.setattr(base_trainer.ray, "get", list)
    monkeypatch.setattr(Actor, "workers", [SimpleNamespace(__ray_call__=remote)], raising=False)
    config = make_config()
    kill(config, "after_marker", 2)
    config.actor_rollout_ref.actor.optim.lr = rate
    assert launch(config) == 0
    assert calls.exists() is (rate != 1e-5)


def test_a_new_start_and_another_runs_checkpoint_leave_no_old_mark(make_config) -> None:
    """A run that resumes from somebody else's checkpoint marks its own folder alone."""
    source, fork = make_config(keep=None), make_config()
    assert launch(source) == 0
    theirs, ours = Path(source.trainer.default_local_dir), Path(fork.trainer.default_local_dir)
    fork.trainer.resume_mode, fork.trainer.resume_from_path = "resume_path", str(theirs / "global_step_4")
    ours.mkdir(parents=True)
    mark(ours, 99)
    kill(fork, "generation", 5)
    assert marked_step(theirs) == STEPS and marked_step(ours) is None
    source.trainer.resume_mode = "disable"
    kill(source, "generation", 1)
    assert marked_step(theirs) is None and list(stored_checkpoints(theirs)) == [2, 4, 6, 7]


# ---------------------------------------------------------------- a full disk


def full_disk(place: str, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the next save fail in one place, as a full disk does; returns what its message says of the cause."""
    if place == "no room":
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        return " has no room: "
    if place == "actor":  # torch hides the cause
        error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 228224 vs 228112\nmore")

        def save(*arguments: Any, **options: Any) -> None:
            Actor().save_checkpoint(*arguments, **options)
            raise RayTaskError("save_checkpoint", "Traceback ...", error)

        monkeypatch.setattr(trainer.actor_rollout_wg, "save_checkpoint", save)
        return " could not be written (RuntimeError: [enforce fail at inline_container.cc:672]"
    file = {"trackers": FILE_NAME, "data": "data.pt", "mark": MARKER}[place]
    real = os.open if place == "trackers" else open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if file in str(path):
            raise OSError(28, "No space left on device", str(path))
        return real(path, *arguments, **options)

    if place == "trackers":
        monkeypatch.setattr(trainer.state, "save", lambda folder: refuse(folder / FILE_NAME))
    elif place == "data":
        real_save = torch.save
        monkeypatch.setattr(
            torch, "save", lambda what, path: refuse(path) if file in str(path) else real_save(what, path)
        )
    else:
        monkeypatch.setattr("builtins.open", refuse)
    return " could not be written (OSError: [Errno 28] No space left on device"


@pytest.mark.faults
@pytest.mark.parametrize("place", ["no room", "trackers", "actor", "data", "mark"])
def test_a_full_disk_is_named_and_the_run_goes_on_from_the_last_whole_checkpoint(
    make_config, unbroken, monkeypatch, place: str
) -> None:
    config = make_config()
    folder = Path(config.trainer.default_local_dir)
    trainer = make_trainer(config)
    with monkeypatch.context() as patch:
        with pytest.raises(SaveError) as error:
            while trainer.global_steps < STEPS:
                trainer.global_steps += 1
                metrics: dict[str, float] = {}
                trainer.step(metrics, {})
                if trainer.global_steps == 4:
                    said = full_disk(place, trainer, patch)
                if trainer.global_steps % SAVE_EVERY == 0:
                    trainer._save_checkpoint()
                trainer.logger.logger["metrics_file"].log(metrics, trainer.global_steps)
        message = str(error.value)
        assert message.startswith(f"the checkpoint of step 4{said}")
        assert re.search(rf"{folder} has [\d,]+ bytes free, a checkpoint takes about [\d,]+; make room$", message)
        assert len(message.splitlines()) == 1
        if place != "mark":
            assert way_on(config) == "the same command resumes from step 2"
            assert list(stored_checkpoints(folder)) == [2], "the half of one takes no room"
    train(config)
    assert result(config) == unbroken(True)
