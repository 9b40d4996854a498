"""The warning of a collapse: fires where reward under [s, q] rises at the cost of plain responses, and nowhere else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recipe.skpo.output.collapse import DOWNSTREAM_REWARD, LENGTH, CollapseWarning, collapse, skip_gap
from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.output.page import page
from recipe.skpo.output.summary import summary

HELD_OUT = "val-aux/skpo/arithmetic/reward/mean@1"
Series = Sequence[tuple[float | None, float | None, float | None]]

DEFAULT_RUN: Series = [
    (None, None, -0.359375),
    (-0.1875, 14.546875, None),
    (0.03125, 14.140625, None),
    (-0.15625, 13.625, 0.5),
    (0.53125, 13.328125, None),
    (0.1875, 13.5625, None),
    (0.78125, 13.03125, 0.6875),
    (0.5625, 13.0, None),
    (0.75, 12.65625, None),
    (0.90625, 11.984375, 0.828125),
    (0.9375, 12.5, None),
    (0.6875, 12.5, None),
    (0.96875, 12.515625, 0.984375),
]
"""Downstream reward, mean response length and held-out reward of the default run, from step 0."""


def lines(series: Series) -> list[dict[str, Any]]:
    return [
        {"step": step}
        | {
            name: value
            for name, value in zip((DOWNSTREAM_REWARD, LENGTH, HELD_OUT), values, strict=True)
            if value is not None
        }
        for step, values in enumerate(series)
    ]


def made(rewards: Sequence[float], lengths: Sequence[float], held_out: Sequence[float], every: int = 5) -> Series:
    """A run that validates at step 0 and every few steps; rewards and lengths go evenly from first to second."""
    steps = every * (len(held_out) - 1)
    noise = [0.04, -0.03, 0.01, -0.04, 0.03]

    def course(ends: Sequence[float], step: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * step / steps

    return [
        (
            None if step == 0 else course(rewards, step) + noise[step % 5],
            None if step == 0 else course(lengths, step),
            held_out[step // every] if step % every == 0 else None,
        )
        for step in range(steps + 1)
    ]


UNFAMILIAR = made((-0.68, -0.2), (28, 4), (-0.36, -0.4, -0.6, -0.85))
"""A base model that does not know [s, q]: answers of four tokens, and the reward under [s, q] rises."""


@pytest.mark.parametrize(
    "series",
    [
        UNFAMILIAR,
        made((-0.3, 0.3), (20, 20), (-0.3, -0.7)),
        made((-0.3, 0.3), (40, 4), (-0.3, -0.3, -0.31)),
        made((-0.3, 0.8), (20, 18), (-0.3, 0.4, 0.1, -0.1)),
    ],
    ids=["unfamiliar", "one interval", "short answers", "after a gain"],
)
def test_a_collapse_is_seen(series: Series) -> None:
    assert collapse(lines(series)) is not None


@pytest.mark.parametrize(
    "series",
    [
        DEFAULT_RUN,
        *(DEFAULT_RUN[: step + 1] for step in (3, 6, 9)),
        made((-0.3, 0.8), (20, 4), (-0.3, 0.0, 0.4)),
        made((-0.3, 0.3), (20, 20), (-0.3, -0.35, -0.32)),
        made((0.3, -0.3), (20, 4), (0.3, 0.0, -0.3)),
        made((-0.3, 0.3), (20, 4), (-0.3,)),
        made((-0.3, 0.3), (20, 4), (-0.3, -0.9), every=1),
        [],
    ],
    ids=["default", "3", "6", "9", "shorter and better", "noise", "all fall", "one validation", "one step", "nothing"],
)
def test_other_runs_are_none(series: Series) -> None:
    assert collapse(lines(series)) is None


def test_the_warning_says_what_was_seen_and_where_to_read() -> None:
    assert collapse(lines(UNFAMILIAR)) == (
        "since step 0 the reward under [s, q] rose (-0.58 -> -0.26) while the held-out reward of plain responses did "
        "not (-0.36 -> -0.85; response length 23 -> 7 tokens): what is learned does not reach plain responses; stop "
        "the run, and see section 16 of docs/method.md"
    )


def test_it_is_said_once_when_it_is_first_seen_and_stands_in_summary_and_page(tmp_path: Path, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    file, warning = MetricsFile(path, 0), CollapseWarning(path)
    said = []
    for line in lines(UNFAMILIAR):
        step = line.pop("step")
        file.log(line, step)
        warning.log(line, step)
        if out := capsys.readouterr().out:
            said.append((step, out))
    ((step, text),) = said
    assert step == 10 and text.startswith("warning: since step 0 the reward under [s, q] rose")
    assert "warning      since step 0 the reward under [s, q] rose" in summary(tmp_path)
    assert "Warning: since step 0" in page(tmp_path)


def test_the_gap_is_the_reward_under_s_q_minus_that_of_plain_responses() -> None:
    validation = {HELD_OUT: 0.5, "val-aux/other/reward/mean@4": 0.0, "val-core/other/acc/mean@4": 0.9}
    steps = [{HELD_OUT: 0.0, DOWNSTREAM_REWARD: -1.0}, {DOWNSTREAM_REWARD: 0.5}, {DOWNSTREAM_REWARD: 1.0}]
    assert skip_gap(steps, validation) == 0.5, "rewards from before the last validation do not count"
    assert skip_gap(steps[:1], validation) is None
    assert skip_gap(steps, {"val-core/other/acc/mean@4": 0.9}) is None
