"""What a command changes of the run that it would resume: refused, said or honoured.

``matrix`` sends real command lines through Hydra and every start-up check; only the launch is replaced, by one that
leaves a checkpoint of step 4 where there is none.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from data_prep.schema import Row, write_parquet
from recipe.skpo import main
from recipe.skpo.checks.run_folder import locked
from recipe.skpo.errors import ConfigError
from recipe.skpo.output.run_folder import marked_step
from recipe.skpo.settings import SkpoSettings, known_keys
from recipe.skpo.trainer.checkpoints import mark
from recipe.skpo.trainer.fingerprint import (
    FILE_NAME,
    MOST_LINES,
    Content,
    Fingerprint,
    Model,
    Rule,
    differences,
    lines,
    refuse,
    restarts_epoch,
    shown,
)
from recipe.skpo.trainer.state import SkpoState
from tests.conftest import REPOSITORY, _write_model_folder, write_checkpoint

# ---------------------------------------------------------------- whole command lines


def write_data(path: Path, count: int, first: int = 0) -> Path:
    rows = [
        Row("skpo/arithmetic", [{"role": "user", "content": f"{n}?"}], "5", "math", "train", n, f"{n}?")
        for n in range(first, first + count)
    ]
    write_parquet(rows, path)
    return path


REWARD = "def reward(data_source, solution_str, ground_truth, extra_info=None, **more):\n    return 1.0\n"


@dataclass
class World:
    """Models, data and rewards to choose from, and what the commands of a test did.

    Attributes:
        folder: holds all of them; the folder of the caller.
        run: ``output_dir`` of every command.
        launched: folders of the runs that reached the launch.
    """

    folder: Path
    run: Path
    launched: list[Path]

    @classmethod
    def enter(cls, folder: Path, run: Path, patch: pytest.MonkeyPatch) -> "World":
        """Call from ``folder`` for as long as the patches last."""
        world = cls(folder, run, [])
        patch.chdir(folder)
        patch.setenv("SKPO_PLATFORM", "cpu")
        patch.delenv("SKPO_CALLER", raising=False)
        patch.setattr(sys, "argv", ["main"])
        patch.setattr(main, "launch", world.launch)
        patch.setattr(main, "report", lambda *arguments, **options: None)
        patch.setattr(main, "apply_platform", lambda config: None)
        return world

    def launch(self, config, done) -> None:
        """What a run leaves that is stopped after its first save."""
        output_dir, checkpoints = Path(config.output_dir), Path(config.trainer.default_local_dir)
        self.launched.append(output_dir)
        if marked_step(checkpoints) is None:
            step = checkpoints / "global_step_4"
            write_checkpoint(step, SkpoState(SkpoSettings.from_config(config.skpo), 64))
            shutil.copy(output_dir / FILE_NAME, step / FILE_NAME)
            mark(checkpoints, 4)

    def command(self, *overrides: str) -> str | None:
        """One command; returns the line that it was refused with."""
        from hydra.core.global_hydra import GlobalHydra

        default = {
            "data.train_files": "train.parquet",
            "data.val_files": "val.parquet",
            "actor_rollout_ref.model.path": "model",
            "output_dir": str(self.run),
            "trainer.total_training_steps": "8",
        }
        given = {override.partition("=")[0] for override in overrides}
        own = [f"{key}={value}" for key, value in default.items() if key not in given]
        fixed = ["hydra/hydra_logging=none", "hydra/job_logging=none", "platform=cpu", "data=files"]
        # An imported module has no config folder beside it, as far as Hydra is concerned.
        sys.argv[1:] = [*overrides, *own, *fixed, "--config-path", str(REPOSITORY / "recipe/skpo/config")]
        try:
            main.main()
        except SystemExit as error:
            assert isinstance(error.code, str) and len(error.code.splitlines()) == 1
            return error.code
        finally:
            GlobalHydra.instance().clear()
        return None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything to choose from, and ``run``, which stopped after step 4."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("world")
    for name in ("model", "other_weights", "other_shape", "moved"):
        _write_model_folder(folder / name, bos=None)
    save_file({"model.norm.weight": torch.full((16,), 2.0)}, folder / "other_weights/model.safetensors")
    described = json.loads((folder / "other_shape/config.json").read_text())
    (folder / "other_shape/config.json").write_text(json.dumps(described | {"vocab_size": 320}))
    write_data(folder / "train.parquet", 16)
    write_data(folder / "other.parquet", 24, first=8)
    write_data(folder / "val.parquet", 4, first=100)
    write_data(folder / "val2.parquet", 4, first=200)
    (folder / "reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        assert World.enter(folder, folder / "run", patch).command() is None
    return folder


@pytest.fixture
def world(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of the stopped run, and nothing launched yet."""
    shutil.copytree(prepared / "run", tmp_path / "run")
    return World.enter(prepared, tmp_path / "run", monkeypatch)


LR = "actor_rollout_ref.actor.optim.lr"
MATRIX: dict[str, tuple[tuple[str, ...], Rule, str]] = {
    "model": (
        ("actor_rollout_ref.model.path=other_weights",),
        Rule.REFUSED,
        "is of a run with actor_rollout_ref.model.path {0}/model, this command has {0}/other_weights (other weights); "
        "give actor_rollout_ref.model.path={0}/model, or output_dir=<another folder> for a run of its own",
    ),
    "shape": (
        ("actor_rollout_ref.model.path=other_shape",),
        Rule.REFUSED,
        "actor_rollout_ref.model.path {0}/model (vocab_size=261), this command has {0}/other_shape (vocab_size=320); ",
    ),
    "moved model": (("actor_rollout_ref.model.path=moved",), Rule.SAID, "{0}/moved in this command; the same weights"),
    "LoRA": (
        ("actor_rollout_ref.model.lora_rank=4",),
        Rule.REFUSED,
        "actor_rollout_ref.model.lora_rank 0, this command has 4; give the same actor_rollout_ref.model.lora_rank, ",
    ),
    "method": (("method=grpo",), Rule.REFUSED, "is of a run with method skpo, this command has grpo"),
    "method with another drift": (
        ("method=spo", "data.train_batch_size=1", "actor_rollout_ref.actor.ppo_mini_batch_size=1"),
        Rule.REFUSED,
        "with method skpo, this command has spo",
    ),
    "group size": (("skpo.group_size=4",), Rule.REFUSED, "skpo.group_size 8, this command has 4"),
    "optimizer": (
        ("actor_rollout_ref.actor.optim.optimizer=Adam",),
        Rule.REFUSED,
        "actor_rollout_ref.actor.optim.optimizer AdamW, this command has Adam; the optimizer's state is another, so",
    ),
    "reward": (
        ("reward.custom_reward_function.path=reward.py", "reward.custom_reward_function.name=reward"),
        Rule.SAID,
        "note: reward: pkg://reward_fns:compute_score in global_step_4, {0}/reward.py:reward in this command; ",
    ),
    "data": (
        ("data.train_files=other.parquet",),
        Rule.SAID,
        "note: data.train_files: {0}/train.parquet (16 rows) in global_step_4, {0}/other.parquet (24 rows) in this "
        "command; prompts are drawn from the new rows; trackers of ids that are gone stay unused",
    ),
    "data, no curriculum": (
        ("data.train_files=other.parquet", "skpo.curriculum.enable=false"),
        Rule.SAID,
        "note: skpo.curriculum.enable: true in global_step_4, false in this command; the epoch starts again",
    ),
    "validation data": (("data.val_files=val2.parquet",), Rule.SAID, "earlier accuracies are of the former problems"),
    "batch size": (
        ("data.train_batch_size=4",),
        Rule.SAID,
        "note: data.train_batch_size: 8 in global_step_4, 4 in this command; it applies from the next step",
    ),
    "ablation": (
        ("skpo.skip=continual",),
        Rule.SAID,
        "note: skpo.skip: concat in global_step_4, continual in this command; it applies from the next step",
    ),
    "learning rate": (
        (f"{LR}=5e-5",),
        Rule.SAID,
        f"note: {LR}: 1e-05 in global_step_4, 5e-05 in this command; it applies from the next step",
    ),
    "nothing but what may change": (("trainer.save_freq=1", "trainer.logger=console"), Rule.SAID, ""),
}
"""Case to the overrides of the second command, what becomes of it and what is read."""


@pytest.mark.parametrize("case", [*MATRIX, "sweep", "second process"])
def test_the_resume_matrix(world: World, capsys: pytest.CaptureFixture, case: str) -> None:
    run, checkpoint = world.run, world.run / "checkpoints/global_step_4"
    if case == "sweep":
        # Every job is a run of its own, and the same sweep again resumes each of them.
        for _ in range(2):
            assert world.command("-m", "skpo.skip=concat,continual", f"{LR}=1e-5") is None
        first = world.launched[:2]
        assert first == world.launched[2:] and len(set(first)) == 2
        assert [path.parent for path in first] == [run, run]
        assert "skip_concat-lr_1e-05" in first[0].name and "skip_continual-lr_1e-05" in first[1].name
        assert "note:" not in capsys.readouterr().out
        return
    if case == "second process":
        with locked(run):
            said = world.command()
        assert said and re.match(rf"error: output_dir: {run} is in use by the command with process \d+ on \S+,", said)
        assert not world.launched
        return
    overrides, rule, text = MATRIX[case]
    expected, before = text.format(world.folder), (run / "config.yaml").read_text()
    said = world.command(*overrides)
    if rule is Rule.REFUSED:
        assert said and said.startswith(f"error: {checkpoint}: ") and expected in said
        assert not world.launched and (run / "config.yaml").read_text() == before
    else:
        assert said is None and world.launched == [run]
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert any(expected in line for line in notes) if expected else not notes
        assert (Fingerprint.read(run) == Fingerprint.read(checkpoint)) is not bool(expected), "of this launch"


@pytest.mark.parametrize("changed", [True, False])
def test_a_finished_run_says_what_differs(world: World, capsys: pytest.CaptureFixture, changed: bool) -> None:
    end = "trainer.total_training_steps=4"
    assert world.command(end, *([f"{LR}=5e-5"] if changed else [])) is None
    out = capsys.readouterr().out
    assert "this run is finished" in out and not world.launched
    line = f"note: {LR}: 1e-05 in global_step_4, 5e-05 in this command; the numbers below are the finished run's"
    assert (line in out) is changed
    if changed:
        said = world.command(end, "actor_rollout_ref.model.path=other_weights")
        assert said and "(other weights)" in said and "this run is finished" not in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_resumes_and_says_so(world: World, capsys: pytest.CaptureFixture) -> None:
    checkpoint = world.run / "checkpoints/global_step_4"
    (checkpoint / FILE_NAME).unlink()
    assert world.command() is None and world.launched == [world.run]
    assert f"note: {checkpoint} has no fingerprint (an earlier version saved it), so" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override", ["data.train_files=none.parquet", "skpo.group_size=1", "trainer.resume_mode=resume_path"]
)
def test_a_refused_command_leaves_nothing_behind(world: World, tmp_path: Path, override: str) -> None:
    before = sorted(world.folder.iterdir())
    assert world.command(override, f"output_dir={tmp_path}/new/run")
    assert sorted(world.folder.iterdir()) == before and not (tmp_path / "new").exists()


def test_a_launch_replaces_links_in_its_folder(world: World, tmp_path: Path) -> None:
    names = ("config.yaml", FILE_NAME)
    for name in names:
        shutil.copy(world.run / name, tmp_path / name)
        (world.run / name).unlink()
        (world.run / name).symlink_to(tmp_path / name)
    before = [(tmp_path / name).read_bytes() for name in names]
    assert world.command("trainer.save_freq=3") is None
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert "save_freq: 3" in (world.run / "config.yaml").read_text()


# ---------------------------------------------------------------- the comparison alone


@pytest.fixture
def one() -> Fingerprint:
    shape = {"vocab_size": 260, "tie_word_embeddings": True}
    return Fingerprint(
        method="grpo",
        model=Model("/a", "c", "w", "v", "t", shape),
        lora={"lora_rank": 8, "lora_alpha": 16},
        reward=Content("r.py:f", "r"),
        train=(Content("t.parquet", "t", 10),),
        val=(Content("v.parquet", "v", 5),),
        settings={"data.train_batch_size": 8, "skpo.curriculum.enable": False, "skpo.split": "adaptive"},
        versions={"verl": "0.9.1"},
    )


def with_model(**changes) -> Callable[[Fingerprint], Fingerprint]:
    return lambda item: replace(item, model=replace(item.model, **changes))


def with_setting(name: str, value: object) -> Callable[[Fingerprint], Fingerprint]:
    return lambda item: replace(item, settings=item.settings | {name: value})


@pytest.mark.parametrize(
    "path",
    [
        "data.max_prompt_length",
        "data.apply_chat_template_kwargs.enable_thinking",
        "actor_rollout_ref.model.custom_chat_template",
    ],
)
def test_whatever_changes_the_length_of_prompts_restarts_the_epoch_of_filtered_rows(
    one: Fingerprint, path: str
) -> None:
    filtering = with_setting("data.filter_overlong_prompts", True)(one)
    assert restarts_epoch(differences(filtering, with_setting(path, 5)(filtering)))
    assert not restarts_epoch(differences(one, with_setting(path, 5)(one)))


@pytest.mark.parametrize(
    ("change", "rules", "epoch"),
    [
        (lambda item: item, [], False),
        (with_model(shape={"vocab_size": 260, "tie_word_embeddings": False}, config="d"), [Rule.REFUSED], False),
        (with_model(vocabulary="other"), [Rule.REFUSED], False),
        (with_model(path="/b", weights=None), [Rule.REFUSED], False),
        (with_model(weights=None), [], False),
        (with_model(template="other"), [Rule.SAID], False),
        (lambda item: replace(item, lora={"lora_rank": 8, "lora_alpha": 32}), [Rule.REFUSED], False),
        (lambda item: replace(item, lora=None), [Rule.REFUSED], False),
        (lambda item: replace(item, train=(Content("t.parquet", "u", 10),)), [Rule.SAID], True),
        (lambda item: replace(item, train=item.train * 2), [Rule.SAID], True),
        (lambda item: replace(item, train=(Content("elsewhere.parquet", "t", 10),)), [Rule.SAID], False),
        (lambda item: replace(item, reward=Content("r.py:f", "s")), [Rule.SAID], False),
        (lambda item: replace(item, versions={"verl": "0.9.1", "torch": "2"}), [Rule.SAID], False),
        (with_setting("data.train_batch_size", 4), [Rule.SAID], True),
        (with_setting("skpo.curriculum.enable", True), [Rule.SAID], True),
        (with_setting("skpo.split", "fixed"), [Rule.SAID], False),
        (with_setting("a.key.of.tomorrow", 1), [Rule.SAID], False),
    ],
)
def test_every_difference_has_a_rule(one: Fingerprint, change, rules: list[Rule], epoch: bool) -> None:
    found = differences(one, change(one))
    assert [item.rule for item in found] == rules
    assert restarts_epoch(found) is epoch
    for line in lines(Path("global_step_4"), found, finished=False):
        assert line.isprintable() and line.startswith("note: ")
    if Rule.REFUSED in rules:
        with pytest.raises(ConfigError) as error:
            refuse(Path("global_step_4"), found)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("strategy", ["fsdp2", "megatron"])
def test_a_changed_learning_rate_is_honoured_where_it_can_be(one: Fingerprint, strategy: str) -> None:
    before = with_setting("actor_rollout_ref.actor.strategy", strategy)(with_setting(LR, 1e-5)(one))
    (found,) = differences(before, with_setting(LR, 2e-5)(before))
    assert (
        found.of_optimizer is (strategy == "fsdp2")
        and found.effect.startswith("without effect") is not found.of_optimizer
    )


def test_the_curriculum_needs_no_position(one: Fingerprint) -> None:
    drawing = with_setting("skpo.curriculum.enable", True)(one)
    assert not restarts_epoch(differences(drawing, with_setting("data.train_batch_size", 4)(drawing)))


def test_hundreds_of_differences_are_a_dozen_lines(one: Fingerprint) -> None:
    other = replace(one, settings=one.settings | {f"x.{n}": n for n in range(300)})
    said = lines(Path("c"), differences(one, other), finished=False)
    assert len(said) == MOST_LINES + 1 and said[-1].startswith("note: 288 more settings differ: ")


@pytest.mark.parametrize("value", ["\x1b[31m", "a\nb", "x" * 10_000, ["\u202e"], None, ""], ids=repr)
def test_what_is_shown_is_one_short_line(value: object) -> None:
    assert shown(value).isprintable() and 0 < len(shown(value)) < 120


def test_a_fingerprint_is_read_as_it_was_written(one: Fingerprint, tmp_path: Path) -> None:
    assert Fingerprint.read(tmp_path) is None
    one.write(tmp_path)
    assert Fingerprint.read(tmp_path) == one


def test_a_clip_range_that_was_saved_under_its_former_names_is_the_same(one: Fingerprint, tmp_path: Path) -> None:
    actor = "actor_rollout_ref.actor"
    names = ("clip_ratio_low", "clip_ratio_high", "policy_loss.loss_mode")
    former = {"skpo.clip_low": 0.2, "skpo.clip_high": 0.28}
    before = former | {f"{actor}.{name}": value for name, value in zip(names, (0.2, 0.2, "vanilla"), strict=True)}
    after = {f"{actor}.{name}": value for name, value in zip(names, (0.2, 0.28, "skpo"), strict=True)}
    saved = replace(one, method="skpo", settings=one.settings | before)
    saved.write(tmp_path)
    read = Fingerprint.read(tmp_path)
    assert read is not None and differences(read, replace(saved, settings=one.settings | after)) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1}', b"\xff\xfe", b'{"format": 9' + b"9" * 5000, b"[" * 10**6],
    ids=lambda content: str(content[:16]),
)
def test_a_damaged_fingerprint_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as the fingerprint of a run") as error:
        Fingerprint.read(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_every_setting_of_the_recipe_is_compared(compose_config) -> None:
    """Each is refused or said: none may be missing from the fingerprint."""
    from omegaconf import OmegaConf

    from recipe.skpo.trainer.fingerprint import compared_settings

    found = compared_settings(OmegaConf.to_container(compose_config("platform=cpu")))
    aliases = {"skpo.clip_low", "skpo.clip_high"}
    assert {f"skpo.{key}" for key in known_keys()} - aliases <= set(found)
    assert not aliases & set(found) and found["actor_rollout_ref.actor.clip_ratio_high"] == 0.28
