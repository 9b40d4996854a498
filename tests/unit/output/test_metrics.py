"""Metrics by role, and the metrics file across resumes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipe.skpo.method.rows import CandidateRecord, Rows, TokenCounts
from recipe.skpo.output.glossary import described
from recipe.skpo.output.metrics import MetricsFile, read_lines, read_steps, rollout_metrics, update_metrics
from tests.support.rows import make_record, make_rows

# ---------------------------------------------------------------- per step, by role


def record(
    deviation: float, early: tuple[bool, ...], boundaries: tuple[bool | None, ...] = (None,) * 4, **changes: Any
):
    pairs = zip(early, boundaries, strict=True)
    candidates = tuple(CandidateRecord(np.array([5]), 1, deviation, ended, cut) for ended, cut in pairs)
    return make_record(candidates=candidates, **changes)


ONE_OF_FOUR, THREE_OF_FOUR, ALL = (True, False, False, False), (True, True, True, False), (True,) * 4
RESPONSE = TokenCounts(7, 50, 10)
ADVANTAGES = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 99.0])


def two_prompts(**changes: Any) -> Rows:
    """Two prompts of two siblings; of the second, one sibling failed; one padding row copies a segment."""
    records = [
        record(0.5, ONE_OF_FOUR),
        RESPONSE,
        RESPONSE,
        record(1.5, THREE_OF_FOUR, split_position=20, cached=25, seconds=4.0),
        replace(RESPONSE, generated=9),
        None,
        record(0.5, ONE_OF_FOUR, generated=10**6, seconds=1e6),
    ]
    fields = {
        "upstream": [True, False, False, True, False, False, True],
        "prompts": [0, 0, 0, 1, 1, 1, 2],
        "lengths": [4, 10, 20, 6, 30, 0, 99],
        "rewards": [0.0, 1.0, -1.0, 1.0, 1.0, 0.0, 99.0],
        "padding": [False] * 6 + [True],
        "records": records,
    }
    return make_rows(**fields | changes)


@pytest.fixture
def published() -> dict[str, float]:
    return rollout_metrics(two_prompts(), ADVANTAGES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skpo/upstream/reward/mean", 0.5),
        ("skpo/upstream/advantage/mean", 0.0),
        ("skpo/upstream/advantage/std", 1.0),
        ("skpo/upstream/length/mean", 5.0),
        ("skpo/upstream/tokens_generated", 80.0),
        ("skpo/upstream/tokens_prefilled", 200.0),
        ("skpo/upstream/prefix_cache/hit_rate", 0.5),
        ("skpo/upstream/split_position/mean", 15.0),
        ("skpo/upstream/deviation/mean", 1.0),
        ("skpo/upstream/early_finish_share", 0.5),
        ("skpo/upstream/seconds/mean", 3.0),
        ("skpo/downstream/seconds/mean", 6.0),
        ("skpo/downstream/reward/mean", 1 / 3),
        ("skpo/downstream/advantage/mean", 0.0),
        ("skpo/downstream/advantage/std", math.sqrt(2 / 3)),
        ("skpo/downstream/length/mean", 20.0),
        ("skpo/downstream/tokens_generated", 23.0),
        ("skpo/downstream/tokens_prefilled", 150.0),
        ("skpo/downstream/prefix_cache/hit_rate", 0.2),
        ("skpo/downstream/all_equal_share", 0.5),
        ("skpo/downstream/copied_share", 0.5),
    ],
)
def test_metric_is_taken_over_the_valid_rows_of_its_role(published: dict[str, float], name: str, value: float) -> None:
    assert published[name] == pytest.approx(value)


def test_every_published_metric_is_checked_above(published: dict[str, float]) -> None:
    (mark,) = test_metric_is_taken_over_the_valid_rows_of_its_role.pytestmark  # type: ignore[attr-defined]
    assert set(published) == {name for name, _ in mark.args[1]}
    assert {type(value) for value in published.values()} == {float}


def test_the_share_of_segments_at_a_boundary_is_there_where_boundaries_are_looked_for() -> None:
    rows = two_prompts()
    for row, shares in ((0, ONE_OF_FOUR), (3, THREE_OF_FOUR), (6, ALL)):
        rows.records[row] = record(0.5, ONE_OF_FOUR, shares)  # type: ignore[index]
    published = rollout_metrics(rows, ADVANTAGES)
    assert published["skpo/upstream/boundary_share"] == 0.5 and all(map(described, published))


def test_padding_alone_publishes_nothing_and_without_prefilled_tokens_the_hit_rate_is_zero() -> None:
    assert rollout_metrics(two_prompts(padding=[True] * 7), ADVANTAGES) == {}
    rows = two_prompts()
    rows = replace(rows, records=[noted and replace(noted, prefilled=0, cached=0) for noted in rows.records])
    assert rollout_metrics(rows, ADVANTAGES)["skpo/upstream/prefix_cache/hit_rate"] == 0.0


def phase_sums(name: str, tokens: float, low: float, high: float, kl: float, loss: float) -> dict[str, float]:
    values = {"tokens": tokens, "clipped_low": low, "clipped_high": high, "kl": kl, "loss": loss}
    return {f"skpo/{name}/{key}_sum": value for key, value in values.items()}


def test_sums_of_the_update_become_shares_per_trained_token() -> None:
    sums = {
        "skpo/loss": -0.5,
        **phase_sums("upstream", 10, 1, 2, 0.5, -0.2),
        **phase_sums("downstream", 40, 4, 0, 1, -0.3),
    }
    metrics, step_kl = update_metrics(sums)
    assert metrics == pytest.approx(
        {
            "skpo/loss": -0.5,
            "skpo/upstream/loss": -0.2,
            "skpo/upstream/ratio_clipped_low_share": 0.1,
            "skpo/upstream/ratio_clipped_high_share": 0.2,
            "skpo/upstream/kl": 0.05,
            "skpo/downstream/loss": -0.3,
            "skpo/downstream/ratio_clipped_low_share": 0.1,
            "skpo/downstream/ratio_clipped_high_share": 0.0,
            "skpo/downstream/kl": 0.025,
            "skpo/policy_kl": 0.03,
        }
    )
    assert step_kl == pytest.approx(1.5 / 50)
    metrics, step_kl = update_metrics(dict.fromkeys(sums, 0.0))
    assert set(metrics.values()) == {0.0} and step_kl == 0.0, "without a trained token"


def test_names_hold_nothing_that_verl_reduces_by(published: dict[str, float]) -> None:
    from verl.trainer.ppo.v1.utils import MetricsAggregator

    sums = {"skpo/loss": 0.0, **phase_sums("upstream", 1, 0, 0, 0, 0), **phase_sums("downstream", 1, 0, 0, 0, 0)}
    names = [*published, *update_metrics(sums)[0]]
    for name in names:
        assert not [word for word in ("max", "min", "sum", "total") if word in name], name
        assert MetricsAggregator()._get_aggregation_type(name) == "weighted_avg", name
    # And these words are still what verl looks for.
    found = [MetricsAggregator()._get_aggregation_type(f"x/{word}") for word in ("max", "min", "sum", "total")]
    assert found == ["max", "min", "sum", "sum"]


# ---------------------------------------------------------------- the metrics file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def steps(path: Path) -> list[float]:
    return [line["step"] for line in read_lines(path)]


def test_each_step_is_one_line_that_is_on_disk_at_once(path: Path) -> None:
    file = MetricsFile(path, resumed_at=0)
    file.log({"skpo/loss": -0.5, "val-core/x/acc/mean@1": 0.25}, step=1)
    assert path.read_text(encoding="utf-8") == '{"step": 1, "skpo/loss": -0.5, "val-core/x/acc/mean@1": 0.25}\n'
    file.log({}, step=2)
    assert read_lines(path)[1] == {"step": 2}


def test_values_that_are_no_numbers_are_left_out(path: Path) -> None:
    values = {"tensor": torch.tensor(2.0), "none": None, "text": "abc", "list": [1], "vector": torch.ones(2), "int": 3}
    MetricsFile(path, resumed_at=0).log(values, step=1)
    assert read_lines(path) == [{"step": 1, "tensor": 2.0, "int": 3.0}]


def write_steps(path: Path, last: int) -> None:
    file = MetricsFile(path, resumed_at=0)
    for step in range(1, last + 1):
        file.log({"x": step}, step)


@pytest.mark.parametrize(("resumed_at", "kept"), [(3, [1, 2, 3]), (0, []), (7, [1, 2, 3, 4, 5])])
def test_a_resume_keeps_the_lines_up_to_its_step(path: Path, resumed_at: int, kept: list[int]) -> None:
    write_steps(path, 5)
    file = MetricsFile(path, resumed_at)
    assert steps(path) == kept
    file.log({"x": 40}, step=resumed_at + 1)
    assert read_lines(path)[-1] == {"step": resumed_at + 1, "x": 40.0}
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_is_not_there_has_no_lines(path: Path) -> None:
    assert read_lines(path) == []
    MetricsFile(path, resumed_at=7)
    assert path.read_text(encoding="utf-8") == ""


def test_a_line_cut_off_by_a_kill_is_left_out_and_does_not_swallow_the_next_one(path: Path) -> None:
    write_steps(path, 3)
    whole, cut_off = path.read_text(encoding="utf-8"), '{"step": 4, "x": 4.0}'
    for size in range(1, len(cut_off)):
        path.write_text(whole + cut_off[:size], encoding="utf-8")
        assert steps(path) == [1, 2, 3]
    MetricsFile(path, resumed_at=3).log({"x": 4}, step=4)
    assert steps(path) == [1, 2, 3, 4]


def test_lines_with_unicode_line_ends_or_half_a_character_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    line = {"step": 1, "text": "one\u2028two\x85three"}
    path.write_bytes((json.dumps(line, ensure_ascii=False) + '\n{"step": 2, "text": "é').encode()[:-1])
    assert read_lines(path) == [line]


def test_lines_of_a_step_are_one_record_and_the_later_value_counts(tmp_path: Path) -> None:
    lines = ['{"step": 2, "a": 1, "c": 9}', '{"step": 1, "a": 5}', '{"step": 2, "a": 3, "b": 4}', '["no record"]']
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, '{"a": 1}', '{"step": 2.5}']))
    assert read_steps(tmp_path / "m.jsonl") == [{"step": 1, "a": 5}, {"step": 2, "a": 3, "b": 4, "c": 9}]
