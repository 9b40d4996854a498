"""Whether what a run learns under [s, q] reaches plain responses: ``skip_gap``, and the warning of a collapse.

A policy can raise its reward under [s, q], which it is trained on, while its plain responses become worse.  Then the
downstream reward alone looks like progress (docs/method.md, section 16).
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from recipe.skpo.output.console import say
from recipe.skpo.output.metrics import plain_numbers, read_steps

DOWNSTREAM_REWARD, LENGTH = "skpo/downstream/reward/mean", "skpo/downstream/length/mean"
_HELD_OUT = re.compile(r"val-(?:core|aux)/.+/reward/mean@\d+")

LOST_SHARE = 0.25
"""Share of the best held-out reward, counted from -1, whose loss is a fall."""
LEAST_LOSS = 0.1
"""No smaller loss of reward is a fall, whatever the best was."""
RISE = 2.0
"""Standard errors from which the downstream reward counts as risen."""
SHORTENED = 0.5
"""Share of their former length below which responses have collapsed."""

Line = Mapping[str, Any]
"""The metrics of a step, and its number as ``step``."""


def held_out_reward(line: Line) -> float | None:
    """Return the mean reward of plain held-out responses, over the data sources; None without a validation."""
    found = [value for name, value in plain_numbers(line).items() if _HELD_OUT.fullmatch(name)]
    return fmean(found) if found else None


def skip_gap(steps: Sequence[Line], validation: Line) -> float | None:
    """Return the downstream reward of the steps since the previous validation, minus the held-out reward of this one.

    Args:
        steps: every step so far, by rising step.
        validation: the metrics of the validation that follows them.

    Returns:
        The difference of the means; None without such a step or a held-out reward.
    """
    plain = held_out_reward(validation)
    last = max((place for place, line in enumerate(steps) if held_out_reward(line) is not None), default=-1)
    rewards = _column(steps[last + 1 :], DOWNSTREAM_REWARD)
    return fmean(rewards) - plain if rewards and plain is not None else None


def collapse(steps: Sequence[Line]) -> str | None:
    """Say that the run drifts into a collapse; None if it does not.

    The last validation is compared with the best one before it, and the steps before each with each other.  It is a
    collapse if the downstream reward rose while the held-out reward fell, or did not rise and the responses became less
    than half as long.

    Args:
        steps: every step so far with its validation, by rising step.
    """
    validated = [(place, plain) for place, line in enumerate(steps) if (plain := held_out_reward(line)) is not None]
    if len(validated) < 2:
        return None
    best, (last, now) = max(range(len(validated) - 1), key=lambda number: validated[number][1]), validated[-1]
    reference, before = validated[best]
    # A validation before the first step is followed by its interval.
    start, end = (validated[best - 1][0], reference) if best else (reference, validated[1][0])
    early, late = steps[start + 1 : end + 1], steps[validated[-2][0] + 1 : last + 1]
    if late == early:
        early, late = early[: len(early) // 2], late[len(late) // 2 :]
    rewards = _column(early, DOWNSTREAM_REWARD), _column(late, DOWNSTREAM_REWARD)
    lengths = _column(early, LENGTH), _column(late, LENGTH)
    if not (_rose(*rewards) and all(lengths)):
        return None
    fell = before - now > max(LEAST_LOSS, LOST_SHARE * (before + 1))
    shorter = fmean(lengths[1]) < SHORTENED * fmean(lengths[0]) and now <= before
    if not (fell or shorter):
        return None
    return (
        f"since step {steps[reference]['step']} the reward under [s, q] rose ({_course(rewards, '+.2f')}) while the "
        f"held-out reward of plain responses did not ({before:+.2f} -> {now:+.2f}; response length "
        f"{_course(lengths, '.0f')} tokens): what is learned does not reach plain responses; stop the run, and see "
        f"section 16 of docs/method.md"
    )


def _column(lines: Sequence[Line], name: str) -> list[float]:
    return [float(line[name]) for line in lines if name in line]


def _rose(early: Sequence[float], late: Sequence[float]) -> bool:
    if min(len(early), len(late)) < 2:
        return False
    error = math.sqrt(variance(early) / len(early) + variance(late) / len(late))
    return fmean(late) - fmean(early) > RISE * error


def _course(values: tuple[Sequence[float], Sequence[float]], form: str) -> str:
    return f"{fmean(values[0]):{form}} -> {fmean(values[1]):{form}}"


class CollapseWarning:
    """A logger of verl's kind that says the first collapse.

    Args:
        path: the metrics file, which must be logged to before.
    """

    def __init__(self, path: Path) -> None:
        """Start without a warning."""
        self.path, self.said = path, False

    def log(self, data: Line, step: int) -> None:
        """Look at the run so far after each validation."""
        if not self.said and held_out_reward(data) is not None and (found := collapse(read_steps(self.path))):
            self.said = True
            say(f"warning: {found}")
