"""Entry of the recipe: compose the config, check it, prepare what is embedded, launch verl, report.

    python -m recipe.skpo.main [Hydra overrides]

Everything that can be known to be wrong before a model is loaded stops the run here, in one line.
"""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import recipe.skpo.checks.resolvers  # noqa: F401  registers them
from data_prep.untrusted import error_line, one_line
from recipe.skpo.checks.command_line import one_sentence, reject_unknown_settings, resolve, sentence
from recipe.skpo.checks.config import (
    check_config,
    check_folders,
    check_loggers,
    check_method_settings,
    check_numbers,
)
from recipe.skpo.checks.data import check_data
from recipe.skpo.checks.engine import choose_engine, flash_attention_installed
from recipe.skpo.checks.environment import LOCKS, check_cluster, check_machine, check_packages
from recipe.skpo.checks.known_keys import check_keys, check_structure
from recipe.skpo.checks.memory import check_memory
from recipe.skpo.checks.model import check_model, check_prompt_lengths
from recipe.skpo.checks.model_engine import check_model_engine
from recipe.skpo.checks.options import check_options
from recipe.skpo.checks.paths import own_folder, readable, resolve_environment, resolve_paths
from recipe.skpo.checks.reward import check_reward
from recipe.skpo.checks.run_folder import run_folders
from recipe.skpo.devices import detect_platform
from recipe.skpo.ending import (
    Ending,
    Watch,
    WatchedRunner,
    begun,
    clean_shared_memory,
    last_words,
    shutting_down,
    way_on,
)
from recipe.skpo.errors import ConfigError, RunError, describe
from recipe.skpo.isolation.folder import FolderError
from recipe.skpo.isolation.run import IsolationError, choose_cluster, isolated
from recipe.skpo.output.console import CleanFormatter, replace_unprintable
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.page import write_report
from recipe.skpo.output.redaction import reject_secret_overrides, reject_secrets
from recipe.skpo.output.summary import summary
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.checkpoints import check_room, check_saving, repair_marker
from recipe.skpo.trainer.identity import fingerprint
from recipe.skpo.trainer.resume import plan_resume

logger = logging.getLogger(__name__)

SHOWING = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i")
"""Hydra's options that show something and start nothing."""

ENDING = Ending()
"""Why this command is to end, if it is."""


def chosen_platform(arguments: list[str]) -> str:
    """The platform that a command line chooses, before Hydra has read it; else the environment's."""
    given = [argument.partition("=")[2] for argument in arguments if argument.lstrip("+").startswith("platform=")]
    return given[-1] if given and given[-1] in LOCKS else os.environ["SKPO_PLATFORM"]


def check_environment() -> None:
    """Refuse variables of ours that cannot be used: Hydra would answer with a page about its search path.

    Raises:
        ConfigError: naming the variable, its value and what it may be.
    """
    platform, threads = os.environ.get("SKPO_PLATFORM", "cpu"), os.environ.get("SKPO_NUM_THREADS", "1")
    if platform not in ("cpu", "gpu"):
        raise ConfigError(f"SKPO_PLATFORM: is {platform!r} in the environment, must be cpu or gpu, or unset")
    if not threads.isdecimal() or int(threads) < 1:
        raise ConfigError(
            f"SKPO_NUM_THREADS: is {threads!r} in the environment, must be a whole number above 0, or unset"
        )
    for name in ("SKPO_CACHE", "TENSORBOARD_DIR"):
        folder = os.environ.get(name)
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            raise ConfigError(f"{name}: {folder} is a file; set it to a folder, or leave it unset")


def single_responses(config: DictConfig) -> None:
    """Give SPO the budget of the others: one response for each of G times as many prompts, in as many updates."""
    if config.method.name == "spo":
        size = config.skpo.group_size
        with open_dict(config):
            config.data.train_batch_size *= size
            config.actor_rollout_ref.actor.ppo_mini_batch_size *= size
            config.actor_rollout_ref.rollout.n = 1


def apply_platform(config: DictConfig) -> None:
    """Set the environment that the platform needs, here and for Ray's workers."""
    os.environ.setdefault("TENSORBOARD_DIR", str(Path(config.output_dir).resolve() / "tensorboard"))
    # verl prints and dumps what the model wrote; under a locale without its characters that would end the worker.
    os.environ["PYTHONUTF8"] = "1"
    variables = {name: os.environ[name] for name in ("TENSORBOARD_DIR", "PYTHONUTF8")}
    if config.platform.name == "cpu":
        from recipe.skpo import cpu

        variables |= cpu.apply_environment(cpu.environment(config.platform.num_threads, config.platform.kv_cache_gib))
        # Hydra's search path has imported verl already, at a time when nothing had chosen the platform.
        from recipe.skpo.cpu import verl_plugin

        verl_plugin.activate()
    choose_cluster(config.ray_kwargs.ray_init)
    with open_dict(config):
        libraries = config.actor_rollout_ref.model.get("external_lib") or []
        libraries = [libraries] if isinstance(libraries, str) else list(libraries)
        libraries += ["recipe.skpo.trainer.weight_sync_registration", "recipe.skpo.engine.backends"]
        engine = choose_engine(config, flash_attention=flash_attention_installed())
        config.packed_attention, config.share_prefixes = engine.kind, engine.share
        if engine.device is not None:
            # A device of its own in verl's registry of engines is how another engine is chosen.
            chosen = {
                "VERL_ENGINE_DEVICE": engine.device,
                "SKPO_PACKED_ATTENTION": engine.kind,
                "SKPO_SHARE_PREFIXES": str(int(engine.share)),
            }
            os.environ |= chosen
            variables |= chosen
            libraries.append(engine.library)
        elif engine.reason is not None:
            print(f"note: the actor's rows are not packed by this recipe: {engine.reason}")
        config.actor_rollout_ref.model.external_lib = libraries
        options = config.actor_rollout_ref.model.override_config
        if "attn_implementation" not in options and not flash_attention_installed():
            # verl asks for flash attention by default, which is a package of its own to build.
            options.attn_implementation = "sdpa"
        # A Ray that is already running does not inherit this process's environment.
        runtime_env = config.ray_kwargs.ray_init.runtime_env
        runtime_env.env_vars = {**variables, **(runtime_env.get("env_vars") or {})}


def prepare_data(config: DictConfig) -> None:
    """Make the data set's files if one of them is to be used and not there yet."""
    folder = config.data.get("embedded") or config.data.get("prepared")
    files = [f"{folder}/train.parquet", f"{folder}/val.parquet"] if folder else []
    if not any(file in (config.data.train_files, config.data.val_files) and not Path(file).exists() for file in files):
        return
    if config.data.get("embedded"):
        from data_prep import arithmetic

        arithmetic.prepare(Path(folder))
    else:
        from data_prep.training import TrainingData, prepare_training

        choices: Any = OmegaConf.to_container(config.data.prepare)
        prepare_training(Path(folder), TrainingData(**choices))


def prepare_model(config: DictConfig) -> None:
    """Make the embedded model if it is the one to train and not there yet."""
    path = config.actor_rollout_ref.model.path
    if path == config.get("embedded_model"):
        from data_prep import smollm2

        smollm2.prepare(Path(path))


def keep_warnings() -> None:
    """Give our loggers a handler of their own, as verl does with its own: vLLM's import silences root below ERROR."""
    handler = logging.StreamHandler()
    handler.setFormatter(CleanFormatter("%(levelname)s:%(asctime)s:%(message)s"))
    ours = logging.getLogger("recipe.skpo")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(os.environ.get("VERL_LOGGING_LEVEL", "INFO"))


def launch(config: DictConfig) -> None:
    """Hand the checked config to verl."""
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    if config.platform.name == "cpu":
        from recipe.skpo import cpu

        cpu.check_active()
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError, TypeError) as error:
        sys.exit(error_line(f"verl refuses the config: {one_line(error) or type(error).__name__}"))

    class SkpoTaskRunner(TaskRunnerV1.__ray_actor_class__):  # type: ignore[name-defined,misc]
        """verl's runner; importing our trainers registers them inside the actor's process."""

        def run(self, config: DictConfig) -> None:
            keep_warnings()
            import recipe.skpo.trainer.baselines  # noqa: F401
            import recipe.skpo.trainer.skpo  # noqa: F401
            from recipe.skpo.isolation import messages

            messages.create_key()
            if config.platform.name == "cpu":
                from recipe.skpo import cpu

                cpu.check_active()
            try:
                super().run(config)
            except Exception as error:
                # Said here: what led to an error does not cross the border of Ray's processes.
                step, said = getattr(self.trainer, "global_steps", 0), describe(error)
                raise RunError(f"in step {step}: {said}" if step and f"step {step}" not in said else said) from error

    watch = Watch(ENDING, begun(config), config.skpo.start_timeout_s)

    def ready() -> None:
        ENDING.install()
        check_cluster(config, ray.nodes())
        watch.start()

    try:
        with isolated(config), clean_shared_memory(config.platform.name == "cpu"), shutting_down(watch):
            run_ppo(config, task_runner_class=WatchedRunner(ray.remote(SkpoTaskRunner), ready))
    except (FolderError, IsolationError) as error:
        sys.exit(error_line(error))
    except SystemExit as error:
        # Ray's own handler, from when it starts to when ours are back.
        if error.code != signal.SIGTERM:
            raise
        ENDING.number = signal.SIGTERM
        ENDING.leave(way_on(config))
    except KeyboardInterrupt:
        ENDING.leave(way_on(config))
    except ConfigError as error:
        sys.exit(error_line(error))
    except Exception as error:  # process border: whatever ended the run, the last line says how to go on
        traceback.print_exc()
        sys.exit(last_words(error, watch.died, config))


def report(output_dir: Path, minutes: float | None = None) -> None:
    """Print the summary and write the page; what of it cannot be made does not fail a run that is finished."""
    try:
        print(summary(output_dir, minutes))
        print(f"  report       {write_report(output_dir)}")
    except Exception:  # process border: the run and everything it wrote are good
        logger.exception("no report.html; `python -m recipe.skpo.output.page %s` tries again", output_dir)


@hydra.main(version_base=None, config_path="config", config_name="skpo_trainer")
def run(config: DictConfig) -> None:
    """Check, prepare, train, report."""
    with ExitStack() as held:
        held.enter_context(_own_environment())
        _run(config, held)


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


def _run(config: DictConfig, held: ExitStack) -> None:
    started = time.monotonic()
    command = HydraConfig.get()
    # As they were written: an interpolation in one of them is resolved when it is read from here.
    given: Any = OmegaConf.to_container(config)
    overrides: Any = OmegaConf.to_container(command.overrides.task)
    try:
        check_structure(given, command.runtime.choices)
        # Before everything is resolved: other values are computed from these.
        settings = SkpoSettings.from_config(config.skpo)
        check_method_settings(config, overrides)
        check_numbers(config)
        own_folder(config, overrides)
        resolve_paths(config, overrides)
        resolve(config, overrides)
        reject_secrets(OmegaConf.to_container(config))
        single_responses(config)
        check_model_engine(config)
        check_config(config, settings)
        check_saving(config)
        check_options(config, overrides)
        check_folders(config)
        check_loggers(config)
        check_machine(config)
        apply_platform(config)
        check_keys(given, command.runtime.choices)
        check_reward(config)
        prepare_data(config)
        check_data(config)
        prepare_model(config)
        check_model(config)
        check_prompt_lengths(config)
        if config.platform.name == "gpu":
            check_memory(config)
        output_dir = Path(config.output_dir)
        # Until the command ends.
        held.enter_context(run_folders(output_dir, Path(config.trainer.default_local_dir)))
        repaired = repair_marker(config)
        if repaired is not None:
            print(f"note: the last save was killed while it was marked as done; going on from step {repaired}")
        identity = cache(lambda: fingerprint(config))
        plan = plan_resume(config, settings, identity)
        for line in plan.notes():
            print(line)
        if not plan.finished:
            check_room(config)
    except OmegaConfBaseException as error:  # some of these are ValueErrors too
        sys.exit(error_line(sentence(error, overrides)))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(error_line(error))
    if plan.finished:
        limit = "budget.tokens" if config.budget.match == "tokens" else "trainer.total_training_steps"
        print(
            f"this run is finished; for another one give output_dir=<folder>, to go on {limit}="
            f"<more than {OmegaConf.select(config, limit)}>"
        )
        report(output_dir)
        return
    try:
        identity().write(output_dir)
        write_atomic(output_dir / "config.yaml", OmegaConf.to_yaml(config))
    except OSError as error:
        sys.exit(error_line(f"output_dir: {error}"))
    launch(config)
    report(output_dir, minutes=(time.monotonic() - started) / 60)


def main() -> None:
    """Command line."""
    replace_unprintable()
    os.environ.setdefault("SKPO_PLATFORM", detect_platform())
    sys.argv[1:] = readable(sys.argv[1:])
    resolve_environment()
    try:
        reject_secret_overrides(sys.argv[1:])
        reject_unknown_settings(sys.argv[1:])
        check_environment()
        if not any(argument.partition("=")[0] in SHOWING for argument in sys.argv[1:]):
            check_packages(chosen_platform(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(error_line(error))
    try:
        with ENDING.handling(), one_sentence(run.__wrapped__, sys.argv[1:]):
            run()
    except KeyboardInterrupt:
        ENDING.leave("the same command goes on from what has been saved")


if __name__ == "__main__":
    main()
