"""One line per step and per validation, for people (``output.console``)."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.untrusted import one_line
from recipe.skpo.output.console import say
from recipe.skpo.output.metrics import mean, plain_numbers
from recipe.skpo.output.run_folder import log_file
from recipe.skpo.output.summary import held_out

PHASES = {"gen": "rollout", "old_log_prob": "old log-probs", "update_actor": "update", "save_checkpoint": "save"}
"""What of a step's seconds is shown: verl's name to ours."""


def opening(config: DictConfig, done: int) -> str:
    """Say what will run and where it goes.

    Args:
        config: resolved.
        done: steps that the checkpoint to resume from has.
    """
    data, trainer, actor = config.data, config.trainer, config.actor_rollout_ref
    tokens = OmegaConf.select(config, "budget.tokens")
    steps = trainer.total_training_steps
    end = f"{trainer.total_epochs} epochs" if steps is None else f"{steps} steps"
    if tokens is not None:
        end = f"{tokens:,} generated tokens"
    files = data.train_files if isinstance(data.train_files, str) else f"{data.train_files[0]}, ..."
    rows = f"{config.packed_attention}, shared prompts computed {'once' if config.share_prefixes else 'for each row'}"
    lines = {
        "model": actor.model.path,
        "data": f"{files}: {end} of {data.train_batch_size} prompts x {actor.rollout.n} rows",
        "runs on": f"{config.platform.name}, {trainer.nnodes} x {trainer.n_gpus_per_node} ranks; attention {rows}",
        "folder": config.output_dir,
        "log": f"{log_file(config.output_dir)} (all that verl, Ray and vLLM print; console=full shows it here)",
    }
    begins = f"resuming from step {done} of {end}" if done else "starting Ray, the model and vLLM"
    return "\n".join([config.method.name, *(f"  {name:<8} {value}" for name, value in lines.items()), begins])


def step_line(metrics: Mapping[str, float], step: int, of: str, left: float | None = None) -> str:
    """Compose the line of a training step.

    Args:
        metrics: of the step; what it lacks is left out.
        step: its number.
        of: what the run ends with, such as ``/12``.
        left: seconds until then.
    """

    def number(label: str, name: str, form: str) -> str | None:
        return f"{label} {metrics[name]:{form}}" if name in metrics else None

    ours = "skpo/downstream/reward/mean" in metrics
    lengths = [
        f"{metrics[f'skpo/{phase}/length/mean']:.1f}"
        for phase in ("upstream", "downstream")
        if f"skpo/{phase}/length/mean" in metrics
    ] or [f"{metrics[name]:.1f}" for name in ("response_length/mean",) if name in metrics]
    seconds = metrics.get("timing_s/step", 0.0)
    phases = ", ".join(
        f"{label} {metrics[f'timing_s/{name}']:.3g}" for name, label in PHASES.items() if f"timing_s/{name}" in metrics
    )
    parts = [
        f"step {step}{of}",
        number("reward", "skpo/downstream/reward/mean" if ours else "critic/score/mean", "+.2f"),
        number("equal groups", "skpo/downstream/all_equal_share", ".0%"),
        f"tokens {' + '.join(lengths)}" if lengths else None,
        number("value", "skpo/tracker/value/mean", ".2f"),
        number("KL", "skpo/policy_kl" if ours else "actor/ppo_kl", ".4f"),
        f"{seconds:.3g} s" + (f" ({phases})" if phases else ""),
        f"{_clock(left)} left" if left is not None else None,
    ]
    return "  ".join(part for part in parts if part)


def validation_line(metrics: Mapping[str, Any], step: int) -> str | None:
    """Compose the line of a validation; None if the step has none."""
    found = [f"{one_line(source)} {_validated(numbers)}" for source, numbers in held_out(dict(metrics)).items()]
    return f"validation after step {step}: {'; '.join(found)}" if found else None


def _validated(numbers: Mapping[str, float]) -> str:
    if "acc" not in numbers:
        return f"mean reward {numbers['reward']:+.3f}"
    formed = f", well-formed {numbers['well_formed']:.3f}" if "well_formed" in numbers else ""
    return f"accuracy {numbers['acc']:.3f}{formed}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class ProgressLines:
    """A logger of verl's kind that says these lines.

    Args:
        steps: of the run; None if it ends by tokens.
        tokens: that the run may generate; None if it ends by steps.
    """

    def __init__(self, steps: int | None, tokens: int | None = None) -> None:
        """Start without a step."""
        self.steps, self.tokens = steps, tokens
        self.seconds: list[float] = []

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Say the lines of one step."""
        numbers = plain_numbers(data)
        if "timing_s/step" in numbers:
            self.seconds.append(numbers["timing_s/step"])
            of, left = f"/{self.steps}", None
            if self.tokens is not None:
                of = f" ({numbers.get('skpo/tokens/generated_so_far', 0):,.0f} of {self.tokens:,} tokens)"
            elif self.steps is not None:
                left = mean(self.seconds) * (self.steps - step)
            say(step_line(numbers, step, of, left))
        validated = validation_line(numbers, step)
        if validated is not None:
            say(validated)
