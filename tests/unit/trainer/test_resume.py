"""What a command resumes from: the plan, and what is refused before a model is loaded."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipe.skpo.errors import ConfigError
from recipe.skpo.output.run_folder import MARKER
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.checkpoints import DATA_FILE, repair_marker
from recipe.skpo.trainer.identity import fingerprint
from recipe.skpo.trainer.resume import plan_resume, resume_folder
from recipe.skpo.trainer.state import FILE_NAME, SkpoState, StateError
from tests.conftest import write_checkpoint


@pytest.fixture
def config(compose_config, model_folder: Path):
    config = compose_config("platform=cpu", "data=files")
    config.actor_rollout_ref.model.path = str(model_folder)
    return config


def resume(config):
    """``plan_resume`` with the default settings."""
    return plan_resume(config, SkpoSettings(), lambda: fingerprint(config))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and len(message.splitlines()) == 1
    return message


@pytest.fixture
def checkpoints(config, tmp_path: Path) -> Path:
    """A run's checkpoint folder with steps 5 and 10, state included; verl's marker names step 10."""
    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        write_checkpoint(folder / f"global_step_{step}")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    config.trainer.default_local_dir = str(folder)
    return folder


def test_a_run_resumes_where_verl_will(config, checkpoints: Path) -> None:
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    assert config.trainer.resume_mode == "auto"
    assert resume_folder(config) == Path(find_latest_ckpt_path(str(checkpoints))) == checkpoints / "global_step_10"
    resume(config)


def test_a_checkpoint_of_another_format_is_refused_before_anything_starts(config, checkpoints: Path) -> None:
    path = checkpoints / "global_step_10" / FILE_NAME
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["meta"] = np.array(str(arrays["meta"]).replace('"format": 5', '"format": 2'))
    np.savez(path, **arrays)
    with pytest.raises(StateError) as error:
        resume(config)
    assert one_line(error).startswith(f"{path}: has format 2, this version of verl-skpo reads 3 to 5; resume with")


def test_without_a_marker_verl_starts_again(config, checkpoints: Path) -> None:
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    (checkpoints / MARKER).unlink()
    assert resume_folder(config) is None and find_latest_ckpt_path(str(checkpoints)) is None
    resume(config)


def test_a_marker_without_its_folder_is_refused(config, checkpoints: Path) -> None:
    """verl would start again, over the metrics of what was trained."""
    (checkpoints / "global_step_10").rename(checkpoints / "elsewhere")
    with pytest.raises(ConfigError) as error:
        resume(config)
    message = one_line(error)
    assert message.startswith(
        f"{checkpoints / MARKER}: names global_step_10, which is not there (there is global_step_5)"
    )
    assert "remove it to start again" in message


def test_a_checkpoint_without_our_state_is_refused(config, checkpoints: Path) -> None:
    (checkpoints / "global_step_10" / FILE_NAME).unlink()
    with pytest.raises(StateError) as error:
        resume(config)
    message = one_line(error)
    assert message.startswith(f"{checkpoints}/global_step_10: holds no {FILE_NAME}")
    assert "trainer.resume_mode=disable" in message

    config.trainer.resume_mode = "disable"
    assert resume_folder(config) is None
    resume(config)


def test_an_older_checkpoint_can_be_named(config, checkpoints: Path) -> None:
    (checkpoints / "global_step_10" / FILE_NAME).unlink()
    config.trainer.resume_mode = "resume_path"
    config.trainer.resume_from_path = str(checkpoints / "global_step_5")
    resume(config)
    (checkpoints / "global_step_5" / FILE_NAME).unlink()
    with pytest.raises(StateError) as error:
        resume(config)
    assert one_line(error).startswith(f"{checkpoints}/global_step_5: holds no")


@pytest.mark.parametrize(
    "given",
    # verl only logs an unknown mode and then fails on a name that was never set.
    [{"resume_mode": "resume_path", "resume_from_path": None}, {"resume_mode": "always"}],
)
def test_a_resume_without_a_path_or_a_known_mode_is_refused(config, checkpoints: Path, given: dict) -> None:
    config.trainer.update(given)
    with pytest.raises((ConfigError, StateError)) as error:
        resume(config)
    assert f"trainer.{list(given)[-1]}" in one_line(error)


@pytest.mark.parametrize("content", ["ten", "10 5", "-3", "1.5"])
def test_a_damaged_marker_is_refused_by_name(config, checkpoints: Path, content: str) -> None:
    (checkpoints / MARKER).write_text(content)
    assert repair_marker(config) is None
    with pytest.raises(ConfigError) as error:
        resume(config)
    assert one_line(error).startswith(f"{checkpoints / MARKER}: holds {content!r} and no step")


@pytest.mark.parametrize("content", [b"", b"\n", b"\0\0"], ids=repr)
def test_a_marker_that_a_kill_left_empty_gets_the_last_whole_checkpoint(config, checkpoints: Path, content) -> None:
    (checkpoints / MARKER).write_bytes(content)
    # Left by an earlier kill in the middle of a save.
    (write_checkpoint(checkpoints / "global_step_15") / DATA_FILE).write_bytes(b"PK")
    assert repair_marker(config) == 10
    assert (checkpoints / MARKER).read_text() == "10"
    assert resume_folder(config) == checkpoints / "global_step_10"
    assert repair_marker(config) is None, "done once"
    assert not list(checkpoints.glob(f".{MARKER}*"))


def test_an_empty_marker_without_a_whole_checkpoint_is_refused(config, checkpoints: Path) -> None:
    for step in (5, 10):
        (checkpoints / f"global_step_{step}" / DATA_FILE).unlink()
    (checkpoints / MARKER).write_text("")
    assert repair_marker(config) is None
    with pytest.raises(ConfigError, match="holds '' and no step"):
        resume(config)


@pytest.mark.parametrize("mode", ["disable", "resume_path"])
def test_a_marker_that_is_not_read_is_not_repaired(config, checkpoints: Path, mode: str) -> None:
    (checkpoints / MARKER).write_text("")
    config.trainer.resume_mode = mode
    assert repair_marker(config) is None and (checkpoints / MARKER).read_text() == ""


# ---------------------------------------------------------------- is there anything left to do


@pytest.mark.parametrize(
    ("last", "budget", "finished"),
    [(9, None, True), (10, None, True), (11, None, False), (None, None, False)]
    + [(None, 4999, True), (None, 5000, True), (None, 5001, False)],
)
def test_a_run_is_finished_at_its_last_step_or_when_its_tokens_are_spent(
    config, checkpoints: Path, last: int | None, budget: int | None, finished: bool
) -> None:
    state = SkpoState(SkpoSettings(), 64)
    state.tokens_generated = 5000
    state.save(checkpoints / "global_step_10")
    config.trainer.total_training_steps, config.budget.tokens = last, budget
    assert resume(config).finished is finished


@pytest.mark.parametrize(("limit", "finished"), [(None, False), (2, True), (3, False)])
def test_a_run_that_stopped_without_gain_stays_so_until_more_is_allowed(
    config, checkpoints: Path, tmp_path: Path, limit: int | None, finished: bool
) -> None:
    metric = "val-core/x/acc/mean@1"
    config.output_dir, config.trainer.keep_best, config.trainer.stop_after_no_gain = str(tmp_path), metric, limit
    # The validation of step 15 belongs to a step that is trained again.
    lines = [{"step": step, metric: value} for step, value in ((0, 0.1), (4, 0.5), (8, 0.4), (10, 0.5), (15, 0.1))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert resume(config).limit == ("trainer.stop_after_no_gain" if finished else "")


def test_a_fresh_run_is_not_finished(config, tmp_path: Path) -> None:
    config.trainer.default_local_dir = str(tmp_path / "nothing")
    config.trainer.total_training_steps, config.budget.tokens = 1, 1
    assert not resume(config).finished
