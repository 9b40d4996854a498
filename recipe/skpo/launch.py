"""From the checked config to a training: environment and engine, verl's runner, and the last line of an early end."""

import os
import signal
import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from data_prep.untrusted import error_line, one_line
from recipe.skpo import cpu
from recipe.skpo.checks.engine import choose_engine, flash_attention_installed
from recipe.skpo.checks.environment import check_cluster
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
from recipe.skpo.isolation.run import choose_cluster, isolated
from recipe.skpo.output.console import VARIABLE, Screen, configure_logging
from recipe.skpo.output.run_folder import log_file

ENDING = Ending()
"""Why this command is to end, if it is."""


def apply_platform(config: DictConfig) -> None:
    """Set the environment that the platform and the actor's engine need, here and for Ray's workers."""
    os.environ.setdefault("TENSORBOARD_DIR", str(Path(config.output_dir).resolve() / "tensorboard"))
    # verl prints and dumps what the model wrote; under a locale without its characters that would end the worker.
    os.environ["PYTHONUTF8"] = "1"
    variables = {name: os.environ[name] for name in ("TENSORBOARD_DIR", "PYTHONUTF8")}
    if config.platform.name == "cpu":
        variables |= cpu.apply_environment(cpu.environment(config.platform.num_threads, config.platform.kv_cache_gib))
        # Hydra's search path has imported verl already, at a time when nothing had chosen the platform.
        from recipe.skpo.cpu import verl_plugin

        verl_plugin.activate()
    choose_cluster(config.ray_kwargs.ray_init)
    with open_dict(config):
        variables |= _apply_engine(config)
        # A Ray that is already running does not inherit this process's environment.
        runtime_env = config.ray_kwargs.ray_init.runtime_env
        runtime_env.env_vars = {VARIABLE: config.console, **variables, **(runtime_env.get("env_vars") or {})}


def _apply_engine(config: DictConfig) -> dict[str, str]:
    """Choose the actor's engine and attention; return the variables by which its workers learn of them."""
    model, chosen = config.actor_rollout_ref.model, {}
    libraries = model.get("external_lib") or []
    libraries = [libraries] if isinstance(libraries, str) else list(libraries)
    libraries += ["recipe.skpo.trainer.weight_sync_registration", "recipe.skpo.engine.backends"]
    if config.platform.name == "cpu":
        libraries.append("recipe.skpo.cpu.offloading")
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
        libraries.append(engine.library)
    if engine.reason is not None:
        print(f"note: the actor's rows are not packed by this recipe: {engine.reason}")
    model.external_lib = libraries
    if "attn_implementation" not in model.override_config and not flash_attention_installed():
        # verl's default is flash attention, which is a package of its own to build.
        model.override_config.attn_implementation = "sdpa"
    return chosen


def launch(config: DictConfig, done: int = 0) -> None:
    """Hand the checked config to verl; an early end exits with one line that says how to continue.

    Args:
        config: prepared.
        done: steps that the checkpoint to resume from has.
    """
    log, short = log_file(config.output_dir), config.console == "short"
    tokens = OmegaConf.select(config, "budget.tokens")
    steps = config.trainer.total_training_steps if tokens is None else None
    watch = Watch(ENDING, begun(config), config.skpo.start_timeout_s)
    try:
        with Screen(log, steps, done) if short else nullcontext():
            _train(config, watch)
    except ConfigError as error:
        sys.exit(error_line(error))
    except SystemExit as error:
        # Ray's own handler, from when it starts to when ours are back.
        if error.code != signal.SIGTERM:
            raise
        ENDING.number = signal.SIGTERM
        ENDING.leave(way_on(config))
    except KeyboardInterrupt:
        ENDING.leave(way_on(config))
    except Exception as error:  # process border: whatever ended the run, the last line says how to continue
        with suppress(OSError), log.open("a", encoding="utf-8") if short else nullcontext(sys.stderr) as file:
            traceback.print_exc(file=file)
        if short:
            print(f"note: all that the run's processes printed is in {log}", file=sys.stderr)
        sys.exit(last_words(error, watch.died, config))


def _train(config: DictConfig, watch: Watch) -> None:
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    if config.platform.name == "cpu":
        cpu.check_active()
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"verl refuses the config: {one_line(error) or type(error).__name__}") from error

    class SkpoTaskRunner(TaskRunnerV1.__ray_actor_class__):  # type: ignore[name-defined,misc]
        """verl's runner; importing our trainers registers them inside the actor's process."""

        def run(self, config: DictConfig) -> None:
            configure_logging()
            import recipe.skpo.trainer.baselines  # noqa: F401
            import recipe.skpo.trainer.skpo  # noqa: F401
            from recipe.skpo.isolation import messages

            messages.create_key()
            if config.platform.name == "cpu":
                cpu.check_active()
            try:
                super().run(config)
            except Exception as error:
                # Said here: the causes of an error do not cross the border of Ray's processes.
                step, said = getattr(self.trainer, "global_steps", 0), describe(error)
                raise RunError(f"in step {step}: {said}" if step and f"step {step}" not in said else said) from error

    def ready() -> None:
        ENDING.install()
        check_cluster(config, ray.nodes())
        watch.start()

    with isolated(config), clean_shared_memory(config.platform.name == "cpu"), shutting_down(watch):
        run_ppo(config, task_runner_class=WatchedRunner(ray.remote(SkpoTaskRunner), ready))
