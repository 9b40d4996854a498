"""``recipe.skpo.main`` with a SIGKILL built in: python -m tests.e2e.killed <point> <step> [overrides].

The trainer runs in a Ray actor, so the runner that ``main.launch`` hands to verl is replaced by one that wraps a
function in the actor's process first.  The wrapped function kills the launching process, then its own; Ray's
processes follow within seconds, as after a SIGKILL from outside.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = (
    "generation",
    "before_state",
    "torn_state",
    "after_state",
    "torn_actor",
    "torn_data",
    "before_marker",
    "torn_marker",
    "after_marker",
)
"""Where a run can be killed, in the order in which a step comes by."""
GENERATING_S = 0.5


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def install(point: str, step: int, launcher: int) -> None:
    """Wrap what runs at ``point`` so that it kills when the trainer is at ``step``."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from recipe.skpo.trainer import base as base_trainer
    from recipe.skpo.trainer import state

    trainer_class = base_trainer.BaseTrainer

    def kill() -> None:
        for process in (launcher, os.getpid()):
            os.kill(process, signal.SIGKILL)

    def wrap(owner: Any, name: str, before: Callable | None = None, after: Callable | None = None) -> None:
        """Call ``before(trainer)`` and ``after(trainer)`` around the method, at the step."""
        real = getattr(owner, name)

        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            if before and self.global_steps == step:
                before(self)
            result = real(self, *arguments, **options)
            if after and self.global_steps == step:
                after(self)
            return result

        setattr(owner, name, method)

    def checkpoint(trainer: Any) -> Path:
        return trainer._checkpoint_folder()

    def kill_in_generation(trainer: Any) -> None:
        # The prompts of the step are with the rollout by now; what a few of them generated is lost.
        time.sleep(GENERATING_S)
        kill()

    def kill_in_state(trainer: Any) -> None:
        real = state.np.savez

        def half(file: Any, **arrays: Any) -> None:
            real(file, **arrays)
            file.flush()
            os.ftruncate(file.fileno(), file.tell() // 2)
            kill()

        state.np.savez = half

    def kill_in_actor(trainer: Any) -> None:
        real = trainer.actor_rollout_wg.save_checkpoint

        def half(path: str, *arguments: Any, **options: Any) -> None:
            real(path, *arguments, **options)
            cut_in_half(next(Path(path).glob("optim_*")))
            kill()

        trainer.actor_rollout_wg.save_checkpoint = half

    def kill_with(change: Callable[[Any], None]) -> Callable[[Any], None]:
        def after(trainer: Any) -> None:
            change(trainer)
            kill()

        return after

    def marker(trainer: Any) -> Path:
        return checkpoint(trainer).parent / "latest_checkpointed_iteration.txt"

    # verl's part as a whole, then what it had not written yet is taken back.
    markers: list[str | None] = []

    def note_marker(trainer: Any) -> None:
        path = marker(trainer)
        markers.append(path.read_text() if path.exists() else None)

    def restore_marker(trainer: Any) -> None:
        text = markers[-1]
        if text is None:
            marker(trainer).unlink()
        else:
            marker(trainer).write_text(text)

    def torn_data(trainer: Any) -> None:
        restore_marker(trainer)
        cut_in_half(checkpoint(trainer) / "data.pt")

    if point == "generation":
        wrap(trainer_class, "on_sample_begin", before=kill_in_generation)
    elif point == "before_state":
        wrap(trainer_class, "_save_checkpoint", before=lambda trainer: kill())
    elif point == "torn_state":
        wrap(trainer_class, "_save_checkpoint", before=kill_in_state)
    elif point == "after_state":
        wrap(PPOTrainerSync, "_save_checkpoint", before=lambda trainer: kill())
    elif point == "torn_actor":
        wrap(trainer_class, "_save_checkpoint", before=kill_in_actor)
    elif point == "after_marker":
        wrap(trainer_class, "_save_checkpoint", after=lambda trainer: kill())
    else:
        changes = {
            "torn_data": torn_data,
            "before_marker": restore_marker,
            "torn_marker": lambda trainer: marker(trainer).write_text(""),
        }
        wrap(PPOTrainerSync, "_save_checkpoint", before=note_marker, after=kill_with(changes[point]))


def main() -> None:
    point, step = sys.argv[1], int(sys.argv[2])
    assert point in POINTS, f"unknown point {point}"
    sys.argv[1:3] = []
    launcher = os.getpid()

    from recipe.skpo import main as recipe
    from recipe.skpo.ending import WatchedRunner

    real_launch = recipe.launch

    def launch(config: Any, *done: int) -> None:
        # Not earlier: the platform must have been chosen before this is imported.
        import ray
        from verl.trainer import main_ppo

        real_run = main_ppo.run_ppo

        def run_ppo(config: Any, task_runner_class: Any) -> None:
            class Killed(task_runner_class.actor_class.__ray_actor_class__):
                def run(self, config: Any) -> None:
                    from tests.e2e.killed import install

                    install(point, step, launcher)
                    super().run(config)

            real_run(config, task_runner_class=WatchedRunner(ray.remote(Killed), task_runner_class.ready))

        main_ppo.run_ppo = run_ppo
        real_launch(config, *done)

    recipe.launch = launch
    # An imported module has no config folder beside it, as far as Hydra is concerned.
    sys.argv += ["--config-path", str(Path(recipe.__file__).parent / "config")]
    recipe.main()


if __name__ == "__main__":
    main()
