"""Entry of the recipe: compose the config, then check, prepare, inspect, launch and report, each entered once.

    python -m recipe.skpo.main [Hydra overrides]

Whatever can be known to be wrong before a model is loaded stops the run here, in one line.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import recipe.skpo.checks.resolvers  # noqa: F401  registers them
from data_prep.training import TrainingData, prepare_training
from data_prep.untrusted import error_line
from recipe.skpo.checks.command_line import one_sentence, reject_unknown_settings, resolve, sentence
from recipe.skpo.checks.config import check_config, check_folders, check_method_settings, check_numbers
from recipe.skpo.checks.data import check_data
from recipe.skpo.checks.environment import LOCKS, check_machine, check_packages, check_variables
from recipe.skpo.checks.known_keys import check_keys, check_structure
from recipe.skpo.checks.loss import check_loss
from recipe.skpo.checks.memory import check_memory
from recipe.skpo.checks.model import check_model, check_prompt_lengths
from recipe.skpo.checks.paths import own_folder, readable, resolve_environment, resolve_paths
from recipe.skpo.checks.reward import check_reward
from recipe.skpo.checks.run_folder import run_folders
from recipe.skpo.devices import detect_platform
from recipe.skpo.errors import ConfigError
from recipe.skpo.launch import ENDING, apply_platform, launch
from recipe.skpo.output.console import replace_unprintable
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.page import write_report
from recipe.skpo.output.progress import opening
from recipe.skpo.output.redaction import reject_secret_overrides, reject_secrets
from recipe.skpo.output.run_folder import FOLDER_NOTE
from recipe.skpo.output.summary import summary
from recipe.skpo.settings import PolaritySettings, SkpoSettings
from recipe.skpo.trainer.checkpoints import check_room, check_saving, repair_marker
from recipe.skpo.trainer.identity import fingerprint
from recipe.skpo.trainer.resume import ResumePlan, plan_resume

logger = logging.getLogger(__name__)

SHOWING = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i")
"""Hydra's options that show something and start nothing."""


@dataclass(frozen=True)
class Command:
    """A command line as Hydra read it.

    Attributes:
        given: the composed config in plain types, interpolations unresolved.
        choices: config group to its choice.
        overrides: arguments that set something.
    """

    given: dict[str, Any]
    choices: Any
    overrides: list[str]

    @classmethod
    def of(cls, config: DictConfig) -> "Command":
        """Read the command line that composed ``config``; an interpolation in an override is resolved here."""
        hydra_config = HydraConfig.get()
        given: Any = OmegaConf.to_container(config)
        overrides: Any = OmegaConf.to_container(hydra_config.overrides.task)
        return cls(given, hydra_config.runtime.choices, overrides)


# ---------------------------------------------------------------- the stages


def check(config: DictConfig, command: Command) -> SkpoSettings:
    """Refuse what the config alone shows to be wrong, and resolve it in place.

    Raises:
        ConfigError: one sentence that names the key and the fix.
    """
    check_structure(command.given, command.choices)
    # Before the config is resolved: other values are computed from these.
    settings = SkpoSettings.from_config(config.skpo)
    PolaritySettings.from_config(config.polarity)
    check_method_settings(config, command.overrides)
    check_numbers(config)
    own_folder(config, command.overrides)
    resolve_paths(config, command.overrides)
    resolve(config, command.overrides)
    reject_secrets(OmegaConf.to_container(config))
    scale_batch_for_spo(config)
    check_config(config, settings, command.overrides)
    check_saving(config)
    check_folders(config)
    check_machine(config)
    return settings


def prepare(config: DictConfig, command: Command) -> None:
    """Choose the platform, make the embedded data and model where they are missing, and check data, reward and model.

    Raises:
        ConfigError, DataError: one sentence that names the key, file or row, and the fix.
    """
    apply_platform(config)
    check_keys(command.given, command.choices)
    check_loss(config)
    check_reward(config)
    prepare_data(config)
    check_data(config)
    prepare_model(config)
    check_model(config)
    check_prompt_lengths(config)
    check_memory(config)


def inspect(config: DictConfig, settings: SkpoSettings, held: ExitStack) -> ResumePlan:
    """Lock the run's folders, find what to resume from, and note there what the run is.

    Args:
        config: checked.
        settings: its ``skpo`` node.
        held: keeps the folders locked until the command ends.

    Raises:
        ConfigError, StateError: one sentence that names the folder or file, and the fix.
    """
    output_dir = Path(config.output_dir)
    held.enter_context(run_folders(output_dir, Path(config.trainer.default_local_dir)))
    repaired = repair_marker(config)
    if repaired is not None:
        print(f"note: the last save was killed while it was marked as done; resuming from step {repaired}")
    identity = cache(lambda: fingerprint(config))
    plan = plan_resume(config, settings, identity)
    for line in plan.notes():
        print(line)
    if not plan.finished:
        check_room(config)
        try:
            identity().write(output_dir)
            write_atomic(output_dir / "config.yaml", OmegaConf.to_yaml(config))
        except OSError as error:
            raise ConfigError(f"output_dir: {error}") from error
    return plan


def report(output_dir: Path, minutes: float | None = None) -> None:
    """Print the summary and write the page; an error in them does not fail a run that is finished."""
    try:
        print(summary(output_dir, minutes))
        print(f"  report       {write_report(output_dir)}")
    except Exception:  # process border: the run and everything it wrote are good
        logger.exception("no report.html; `python -m recipe.skpo.output.page %s` tries again", output_dir)


# ---------------------------------------------------------------- their parts


def scale_batch_for_spo(config: DictConfig) -> None:
    """Give SPO the budget of the others: one response for each of G times as many prompts, in as many updates."""
    if config.method.name == "spo":
        size = config.skpo.group_size
        with open_dict(config):
            config.data.train_batch_size *= size
            config.actor_rollout_ref.actor.ppo_mini_batch_size *= size
            config.actor_rollout_ref.rollout.n = 1


def prepare_data(config: DictConfig) -> None:
    """Make the data set's files if one of them is to be used and not there yet."""
    folder = config.data.get("embedded") or config.data.get("prepared")
    files = [f"{folder}/train.parquet", f"{folder}/val.parquet"] if folder else []
    if not any(file in (config.data.train_files, config.data.val_files) and not Path(file).exists() for file in files):
        return
    if config.data.get("embedded"):
        import_module(f"data_prep.{config.data.embedded_by}").prepare(Path(folder))
    else:
        choices: Any = OmegaConf.to_container(config.data.prepare)
        prepare_training(Path(folder), TrainingData(**choices))


def prepare_model(config: DictConfig) -> None:
    """Make the embedded model if it is the one to train and not there yet."""
    path = config.actor_rollout_ref.model.path
    if path == config.get("embedded_model"):
        import_module(f"data_prep.{config.embedded_by}").prepare(Path(path))


def chosen_platform(arguments: list[str]) -> str:
    """Return the platform that a command line chooses, before Hydra has read it; else the environment's."""
    given = [argument.partition("=")[2] for argument in arguments if argument.lstrip("+").startswith("platform=")]
    return given[-1] if given and given[-1] in LOCKS else os.environ["SKPO_PLATFORM"]


@contextmanager
def _own_environment() -> Iterator[None]:
    """Keep variables that a job of a sweep sets from the next one."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextmanager
def refusing(command: Command) -> Iterator[None]:
    """End the command with one line where something cannot work."""
    try:
        yield
    except OmegaConfBaseException as error:  # some of these are ValueErrors too
        sys.exit(error_line(sentence(error, command.overrides)))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(error_line(error))


# ---------------------------------------------------------------- the command


# The whole path: Hydra looks for a relative one in a package where the caller is a console script.
@hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="skpo_trainer")
def run(config: DictConfig) -> None:
    """Run one job: check, prepare, inspect, launch, report."""
    started, command = time.monotonic(), Command.of(config)
    with ExitStack() as held:
        held.enter_context(_own_environment())
        with refusing(command):
            settings = check(config, command)
            prepare(config, command)
            plan = inspect(config, settings, held)
        output_dir = Path(config.output_dir)
        if note := os.environ.get(FOLDER_NOTE):
            write_atomic(Path(note), str(output_dir))
        if plan.finished:
            print(
                f"this run is finished; give output_dir=<folder> for another one, or {plan.limit}="
                f"<more than {OmegaConf.select(config, plan.limit)}> to continue it"
            )
            report(output_dir)
            return
        print(opening(config, plan.step))
        launch(config, plan.step)
        report(output_dir, minutes=(time.monotonic() - started) / 60)


def main() -> None:
    """Run the command line."""
    run_command(run)


def run_command(job: Any) -> None:
    """Check the command line and hand it to a function that ``hydra.main`` has wrapped."""
    replace_unprintable()
    os.environ.setdefault("SKPO_PLATFORM", detect_platform())
    sys.argv[1:] = readable(sys.argv[1:])
    resolve_environment()
    try:
        reject_secret_overrides(sys.argv[1:])
        reject_unknown_settings(sys.argv[1:])
        check_variables()
        if not any(argument.partition("=")[0] in SHOWING for argument in sys.argv[1:]):
            check_packages(chosen_platform(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(error_line(error))
    try:
        with ENDING.handling(), one_sentence(job.__wrapped__, sys.argv[1:]):
            job()
    except KeyboardInterrupt:
        ENDING.leave("the same command resumes from the last checkpoint")


if __name__ == "__main__":
    main()
