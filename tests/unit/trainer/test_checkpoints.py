"""Which checkpoint counts, whether it is whole, which ones are removed; whole runs with kills are in test_kills.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipe.skpo.errors import ConfigError
from recipe.skpo.output.best import Validations
from recipe.skpo.output.run_folder import MARKER, marked_step, stored_checkpoints
from recipe.skpo.trainer.checkpoints import (
    DATA_FILE,
    METRICS_FILE,
    check_room,
    expected_bytes,
    mark,
    missing_piece,
    newest_whole,
    remove_checkpoint,
    remove_older,
    stored_bytes,
)
from recipe.skpo.trainer.state import FILE_NAME
from tests.conftest import write_checkpoint


@pytest.fixture
def config(compose_config):
    return compose_config("platform=cpu", "data=files")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Whole checkpoints of steps 2, 4 and 10, and what a kill left of step 6."""
    for step in (2, 4, 6, 10):
        write_checkpoint(tmp_path / f"global_step_{step}")
    (tmp_path / "global_step_6" / DATA_FILE).unlink()
    return tmp_path


def test_checkpoints_come_in_the_order_of_steps(root: Path) -> None:
    (root / "global_step_x").mkdir()
    (root / "global_step_7").write_text("a file")
    assert list(stored_checkpoints(root)) == [2, 4, 6, 10]


@pytest.mark.parametrize(
    ("newest", "keep", "left"),
    [
        (10, 2, [4, 10]),
        (10, 1, [10]),
        (10, 3, [2, 4, 10]),
        (10, None, [2, 4, 6, 10]),
        (9, 1, [4, 10]),
        (3, 1, [2, 4, 6, 10]),
        (5, 1, [4, 6, 10]),
    ],
)
def test_the_last_whole_ones_are_kept(root: Path, newest: int, keep: int | None, left: list[int]) -> None:
    remove_older(root, newest, keep)
    assert list(stored_checkpoints(root)) == left


@pytest.mark.parametrize(("keep", "left"), [(1, [2, 10]), (2, [2, 4, 10]), (3, [2, 4, 10])])
def test_the_best_of_the_whole_ones_is_kept_beside_the_last(root: Path, keep: int, left: list[int]) -> None:
    validations = Validations("val")
    for step, value in {0: 9.0, 2: 5.0, 4: 4.0, 6: 8.0, 10: 1.0}.items():
        validations.add(step, {"val": value})
    remove_older(root, 10, keep, validations)
    assert list(stored_checkpoints(root)) == left


def test_files_of_others_stay_in_a_removed_checkpoint(root: Path) -> None:
    folder = root / "global_step_2"
    (folder / "merged").mkdir()
    (folder / "merged/model.safetensors").write_text("mine")
    (folder / METRICS_FILE).write_text("{}")
    (folder / f".{FILE_NAME}.123").write_text("left by a kill")
    remove_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == ["merged"]
    assert (folder / "merged/model.safetensors").read_text() == "mine"
    remove_checkpoint(root / "global_step_99")


def test_a_mark_is_one_number_and_replaced_as_a_whole(tmp_path: Path, monkeypatch) -> None:
    assert marked_step(tmp_path) is None
    mark(tmp_path, 12)
    assert (marked_step(tmp_path), (tmp_path / MARKER).read_text()) == (12, "12")

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError):
            mark(tmp_path, 13)
    assert marked_step(tmp_path) == 12
    mark(tmp_path, None)
    mark(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_verl_reads_the_mark(root: Path) -> None:
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    mark(root, 4)
    assert find_latest_ckpt_path(str(root)) == str(root / "global_step_4")


def test_only_what_a_resume_loads_must_be_there(config, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "global_step_2")
    assert missing_piece(folder, config) is None
    (folder / "actor/extra_state_world_size_1_rank_0.pt").unlink()
    assert missing_piece(folder, config) == "actor/extra_state_world_size_1_rank_0.pt is missing or cut off"
    config.actor_rollout_ref.actor.checkpoint.load_contents = ["model", "optimizer"]
    assert missing_piece(folder, config) is None


def test_every_ranks_files_must_be_there(config, tmp_path: Path) -> None:
    config.trainer.nnodes, config.trainer.n_gpus_per_node = 2, 2
    folder = write_checkpoint(tmp_path / "global_step_2", ranks=4)
    assert missing_piece(folder, config) is None
    (folder / "actor/optim_world_size_4_rank_3.pt").unlink()
    assert missing_piece(folder, config) == "actor/optim_world_size_4_rank_3.pt is missing or cut off"
    config.trainer.nnodes = 1
    assert missing_piece(folder, config) == (
        "actor/ was saved by 4 rank(s), this run has 2 (trainer.nnodes * trainer.n_gpus_per_node)"
    )


def test_another_engines_files_are_not_looked_into(config, tmp_path: Path) -> None:
    config.actor_rollout_ref.actor.strategy = "megatron"
    folder = write_checkpoint(tmp_path / "global_step_2")
    for file in (folder / "actor").iterdir():
        file.unlink()
    assert missing_piece(folder, config) is None
    (folder / "actor").rmdir()
    assert missing_piece(folder, config) == "actor/ is missing"


def test_the_newest_whole_one_has_our_state_too(config, root: Path) -> None:
    assert newest_whole(root, config) == 10
    (root / "global_step_10" / FILE_NAME).unlink()
    assert newest_whole(root, config) == 4
    assert newest_whole(root / "nothing", config) is None


@pytest.mark.parametrize("link", ["", "actor", DATA_FILE])
def test_what_a_link_leads_to_is_not_removed(root: Path, tmp_path_factory: pytest.TempPathFactory, link: str) -> None:
    folder, elsewhere = root / "global_step_2", tmp_path_factory.mktemp("elsewhere")
    (folder / link).rename(elsewhere / "theirs")
    (folder / link).symlink_to(elsewhere / "theirs")
    before = sorted(elsewhere.rglob("*"))
    remove_checkpoint(folder)
    assert sorted(elsewhere.rglob("*")) == before and not folder.is_symlink() and not folder.exists()


# ---------------------------------------------------------------- room on the disk


@pytest.fixture
def sized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Config of a run whose model has 1,000,000 numbers, and a way to say how much of the disk is free."""
    import torch
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    parts = {
        "model-1.safetensors": torch.zeros(600, 1000, dtype=torch.bfloat16),
        "model-2.safetensors": torch.zeros(400_000),
    }
    for name, weights in parts.items():
        save_file({"w": weights}, model / name)
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"path": str(model)}, "actor": {"fsdp_config": {"model_dtype": "fp32"}}},
            "trainer": {
                "default_local_dir": str(tmp_path / "out/checkpoints"),
                "max_actor_ckpt_to_keep": 2,
                "save_freq": 5,
            },
        }
    )

    def free(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=size))

    return config, free


def test_a_first_checkpoint_without_room_is_refused_at_the_start(sized, capsys) -> None:
    config, free = sized
    free(11_999_999)
    with pytest.raises(ConfigError) as error:
        check_room(config)
    assert str(error.value) == (
        f"trainer.default_local_dir: {config.trainer.default_local_dir} has 11,999,999 bytes free, a checkpoint takes "
        "about 12,000,000; make room, give another output_dir, or save none with trainer.save_freq=-1"
    )
    free(12_000_000)
    check_room(config)
    assert capsys.readouterr().out.endswith("and 2 are kept; a save without room will end the run\n")
    free(24_000_000)
    check_room(config)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"actor_rollout_ref.actor.fsdp_config.model_dtype": "bf16"}, 6_000_000),
        ({"actor_rollout_ref.model.lora_rank": 8}, 4_000_000),
        ({"actor_rollout_ref.model.path": "org/model"}, None),
    ],
)
def test_what_a_checkpoint_takes_follows_the_model(sized, change: dict[str, Any], expected: int | None) -> None:
    config, free = sized
    for key, value in change.items():
        OmegaConf.update(config, key, value, force_add=True)
    assert expected_bytes(config) == expected
    free(0)
    if expected is None:
        check_room(config)


def test_a_checkpoint_that_is_there_tells_the_size_and_takes_no_more_room_when_replaced(sized) -> None:
    config, free = sized
    folder = Path(config.trainer.default_local_dir)
    write_checkpoint(folder / "global_step_5")
    (folder / "global_step_5/actor/extra.bin").write_bytes(b"x" * 5000)
    size = stored_bytes(folder / "global_step_5")
    assert expected_bytes(config) == size > 5000
    free(size - 1)
    with pytest.raises(ConfigError, match=f"takes about {size:,};"):
        check_room(config)
    write_checkpoint(folder / "global_step_10")
    check_room(config)
    config.trainer.max_actor_ckpt_to_keep = None
    with pytest.raises(ConfigError, match="bytes free"):
        free(0)
        check_room(config)
    config.trainer.save_freq = -1
    check_room(config)
    config.trainer.keep_best = "val-core/x"
    with pytest.raises(ConfigError, match="bytes free"):
        check_room(config)
