"""What a command resumes from: found out once, before a model is loaded."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from recipe.skpo.errors import ConfigError
from recipe.skpo.isolation.pickles import check_pickles
from recipe.skpo.output.best import Validations
from recipe.skpo.output.run_folder import MARKER, marked_step, stored_checkpoints
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.checkpoints import DATA_FILE, missing_piece, newest_whole
from recipe.skpo.trainer.fingerprint import Difference, Fingerprint, differences, lines, refuse
from recipe.skpo.trainer.state import SkpoState, require_state_file


@dataclass(frozen=True)
class ResumePlan:
    """The checkpoint that a run continues from.

    Attributes:
        checkpoint: its folder; None for a fresh start.
        changes: how the command differs from the run that saved it; None if it has no fingerprint.
        limit: key of the setting that ended the run there; "" if it has not ended.
    """

    checkpoint: Path | None = None
    changes: tuple[Difference, ...] | None = ()
    limit: str = ""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return bool(self.limit)

    @property
    def step(self) -> int:
        """The step that the run continues after; 0 for a fresh start."""
        return _step(self.checkpoint) if self.checkpoint else 0

    def notes(self) -> list[str]:
        """Say in one line each what the command changes."""
        return lines(self.checkpoint, self.changes, self.finished) if self.checkpoint else []


def plan_resume(config: DictConfig, settings: SkpoSettings, identity: Callable[[], Fingerprint]) -> ResumePlan:
    """Find the checkpoint to resume from, and refuse one that is not whole, of another run, or damaged.

    Args:
        config: resolved.
        settings: its ``skpo`` node.
        identity: gathers the command's fingerprint; called only if there is one to compare with.

    Raises:
        ConfigError: naming the folder, the missing piece and a checkpoint that is whole; or a file that would run more
            than verl saves.
        StateError: naming the file.
    """
    folder = resume_folder(config)
    if folder is None:
        return ResumePlan()
    require_state_file(folder)
    missing = missing_piece(folder, config)
    if missing is not None:
        other = newest_whole(folder.parent, config)
        fix = (
            f"resume from {folder.parent}/global_step_{other} by trainer.resume_mode=resume_path "
            f"trainer.resume_from_path=<that folder>"
            if other is not None
            else "start again with trainer.resume_mode=disable and another output_dir"
        )
        raise ConfigError(f"{folder}: cannot be resumed from: {missing}; {fix}")
    saved = Fingerprint.read(folder)
    changes = tuple(differences(saved, identity())) if saved else None
    refuse(folder, changes or ())
    state = SkpoState(settings, config.data.max_response_length)
    state.load(folder)
    # In verl's order of loading; other engines have files of other kinds.
    check_pickles([*sorted((folder / "actor").glob("*.pt")), folder / DATA_FILE], config.get("trusted_globals") or ())
    return ResumePlan(folder, changes, _limit(config, _step(folder), state.tokens_generated))


def _limit(config: DictConfig, step: int, tokens: int) -> str:
    """Return the key of the setting that ends the run at a step after so many generated tokens, "" if none does."""
    trainer, most = config.trainer, config.budget.tokens
    if most is not None and tokens >= most:
        return "budget.tokens"
    if trainer.total_training_steps is not None and step >= trainer.total_training_steps:
        return "trainer.total_training_steps"
    if trainer.stop_after_no_gain is not None:
        validations = Validations(trainer.keep_best).read(Path(config.output_dir) / "metrics.jsonl", step)
        if validations.without_gain() >= trainer.stop_after_no_gain:
            return "trainer.stop_after_no_gain"
    return ""


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("global_step_"))


def resume_folder(config: DictConfig) -> Path | None:
    """Return the checkpoint folder that verl will resume from, None for a fresh start.

    Raises:
        ConfigError: an unknown mode, a path that is not a checkpoint, or a marker file that names no step or a lost
            one.
    """
    trainer = config.trainer
    if trainer.resume_mode not in ("auto", "disable", "resume_path"):
        raise ConfigError(f"trainer.resume_mode: is {trainer.resume_mode}, must be auto, disable or resume_path")
    if trainer.resume_mode == "resume_path":
        folder = Path(str(trainer.resume_from_path))
        if not re.fullmatch(r"global_step_\d+", folder.name) or not folder.is_dir():
            raise ConfigError(
                f"trainer.resume_from_path: {folder} is not a folder named global_step_<N>; give one of "
                f"trainer.default_local_dir"
            )
        return folder
    if trainer.resume_mode == "disable":
        return None
    root = Path(trainer.default_local_dir)
    step = marked_step(root)
    if step is None:
        return None
    folder = root / f"global_step_{step}"
    if not folder.is_dir():
        there = ", ".join(path.name for path in stored_checkpoints(root).values()) or "no checkpoint"
        raise ConfigError(
            f"{root / MARKER}: names {folder.name}, which is not there (there is {there}); write the number of a whole "
            f"one into it, or remove it to start again"
        )
    return folder
