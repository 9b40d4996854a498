"""The summary at the end of a run, from the files that the run wrote."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from omegaconf import OmegaConf
from pyarrow.parquet import write_table

from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.output.summary import (
    certainty,
    change,
    decoding,
    held_out,
    render_tree,
    summary,
    wilson_interval,
    write_sample_trees,
)
from recipe.skpo.output.trees import FOLDER, TreeStore
from tests.conftest import move_checkpoints

SOURCE = "skpo/arithmetic"


def validation(acc: float, well_formed: float | None = None, source: str = SOURCE) -> dict[str, float]:
    """Names as verl writes them: the core variable apart from the others."""
    line = {f"val-core/{source}/acc/mean@1": acc, f"val-aux/{source}/reward/mean@1": 2 * acc - 1}
    return line if well_formed is None else line | {f"val-aux/{source}/well_formed/mean@1": well_formed}


def tree(step: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": "train-9",
        "problem": "3 + 4?",
        "answer": "7",
        "split_position": 12,
        "candidates": [
            {"text": "first", "rest": "", "deviation": 0.125, "ended_early": False, "chosen": False},
            {"text": "second\nline", "rest": " and more", "deviation": 0.25, "ended_early": True, "chosen": True},
        ],
        "segment": {"text": "second\nline", "reward": -0.5, "baseline": 0.75, "advantage": -1.25},
        "skip_prompt": "second\nline3 + 4?",
        "responses": [
            {"text": "seven", "reward": 1.0, "advantage": 1.5, "length": 1, "answer": "7"},
            {"text": "eight", "reward": -1.0, "advantage": -0.5, "length": 1, "answer": None},
        ],
    } | changes


def store_trees(output_dir: Path, steps: Iterable[int]) -> None:
    store = TreeStore(output_dir / FOLDER, max_mb=64.0, resumed_at=0)
    for step in steps:
        store.write(step, [tree(step)])


# ---------------------------------------------------------------- held-out numbers


@pytest.mark.parametrize(
    ("line", "numbers"),
    [
        (
            {"step": 4, "skpo/loss": 1.0} | validation(0.3, 0.6),
            {SOURCE: {"acc": 0.3, "well_formed": 0.6, "acc_of_well_formed": pytest.approx(0.5)}},
        ),
        (validation(0.0, 0.0), {SOURCE: {"acc": 0.0, "well_formed": 0.0, "acc_of_well_formed": 0.0}}),
        (validation(0.3), {SOURCE: {"acc": 0.3}}),
        # An accuracy of 1 that equals the mean reward stays one.
        (validation(1.0) | {f"val-aux/{SOURCE}/score/mean@1": 1.0}, {SOURCE: {"acc": 1.0}}),
        (
            validation(0.3) | validation(0.75, source="math") | validation(0.5, source="a/b/c"),
            {SOURCE: {"acc": 0.3}, "math": {"acc": 0.75}, "a/b/c": {"acc": 0.5}},
        ),
        (
            validation(0.3) | {f"val-aux/{SOURCE}/acc/std@8": 0.46, f"val-aux/{SOURCE}/acc/best@8/mean": 0.9},
            {SOURCE: {"acc": 0.3}},
        ),
        ({"step": 1, "critic/score/mean": 0.5, "acc/mean@1": 0.5, f"val-core/{SOURCE}/acc/best@8/mean": 0.9}, {}),
    ],
)
def test_held_out_numbers_of_every_source_are_read(line: dict[str, float], numbers: dict[str, Any]) -> None:
    assert held_out(line) == numbers


@pytest.mark.parametrize(
    "line",
    [
        {f"val-core/{SOURCE}/reward/mean@1": -0.5},
        # As former releases wrote it.
        {f"val-core/{SOURCE}/acc/mean@1": -0.5, f"val-aux/{SOURCE}/reward/mean@1": -0.5},
        {f"val-core/{SOURCE}/reward/mean@4": -0.5, f"val-aux/{SOURCE}/score/mean@4": -0.5},
    ],
    ids=["number", "number of a former release", "record without acc"],
)
def test_the_mean_reward_is_given_where_no_acc_is_reported(line: dict[str, float], tmp_path: Path) -> None:
    assert held_out(line) == {SOURCE: {"reward": -0.5}}
    MetricsFile(tmp_path / "metrics.jsonl", resumed_at=0).log(line, step=0)
    text = summary(tmp_path)
    assert row(text, "mean reward") == ["-0.500", "-0.500"] and "accuracy" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0, "top_p": 1.0, "n": 1}, "greedy"),
        ({"temperature": 0.6, "top_k": 1}, "greedy"),
        ({"temperature": 0.6, "top_p": 0.95, "n": 4}, "temperature 0.6, top-p 0.95, mean of 4"),
        ({"temperature": 1.0, "top_k": 20, "do_sample": False}, "temperature 1, top-k 20"),
        ({"temperature": 0, "n": 2}, "greedy, mean of 2"),
        ({"temperature": "hot"}, ""),
        ({}, ""),
        (None, ""),
    ],
    ids=str,
)
def test_the_words_for_decoding_follow_the_settings(tmp_path: Path, options: dict | None, words: str) -> None:
    assert decoding(tmp_path) == "", "without a config"
    OmegaConf.save({"actor_rollout_ref": {"rollout": {"val_kwargs": options}}}, tmp_path / "config.yaml")
    assert decoding(tmp_path) == words


# ---------------------------------------------------------------- the summary


def run(output_dir: Path) -> Path:
    """A run of 4 steps, validated before, in the middle and after."""
    file = MetricsFile(output_dir / "metrics.jsonl", resumed_at=0)
    file.log(validation(0.1, 0.2), step=0)
    file.log({"skpo/loss": 0.1}, step=1)
    file.log(validation(0.9, 0.9), step=2)
    file.log({"skpo/loss": 0.1}, step=3)
    file.log({"skpo/loss": 0.1, **validation(0.45, 0.9)}, step=4)
    for step in (2, 4, 10):
        (output_dir / "checkpoints" / f"global_step_{step}").mkdir(parents=True)
    store_trees(output_dir, range(5))
    (output_dir / "config.yaml").write_text("actor_rollout_ref: {rollout: {val_kwargs: {temperature: 0, n: 1}}}")
    return output_dir


def row(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def test_summary_shows_the_numbers_before_and_after_and_where_everything_lies(tmp_path: Path) -> None:
    text = summary(run(tmp_path), minutes=7.5)
    assert f"{tmp_path.name}: 4 steps, 7.5 in this one, its start included" in text
    assert row(text, f"held-out {SOURCE}, greedy") == ["step", "0", "step", "4"]
    assert row(text, "accuracy among well-formed") == ["0.500", "0.500"]
    assert row(text, "share of well-formed answers") == ["0.200", "0.900"]
    assert row(text.replace("accuracy among", "among"), "accuracy") == ["0.100", "0.450"]
    assert row(text, "checkpoint") == [str(tmp_path / "checkpoints" / "global_step_10")]  # not by the alphabet
    assert row(text, "metrics") == [str(tmp_path / "metrics.jsonl")]
    assert row(text, "three trees") == [str(tmp_path / "sample_trees.txt")]


def test_a_checkpoint_elsewhere_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (folder / "config.yaml").write_text("{}")
    move_checkpoints(folder, tmp_path / "disk")
    assert row(summary(folder), "checkpoint") == [str(tmp_path / "disk/global_step_10")]


def test_the_best_step_is_named_where_it_was_kept(tmp_path: Path) -> None:
    folder, metric = run(tmp_path), f"val-core/{SOURCE}/acc/mean@1"
    assert "\n  best " not in summary(folder)
    OmegaConf.save(OmegaConf.create({"trainer": {"keep_best": metric}}), folder / "config.yaml")
    assert f"\n  best         step 2, 1 validation ago: {metric} 0.900\n" in summary(folder)
    MetricsFile(folder / "metrics.jsonl", resumed_at=4).log(validation(0.95), step=10)
    assert f"\n  best         step 10: {metric} 0.950\n" in summary(folder)


def test_a_source_that_was_not_there_before_has_no_number_before(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_at=0)
    file.log(validation(0.1), step=0)
    file.log(validation(0.5, source="math"), step=1)
    assert row(summary(tmp_path, 1.0), "accuracy") == ["nan", "0.500"]


def test_a_run_that_wrote_nothing_still_has_a_summary(tmp_path: Path) -> None:
    text = summary(tmp_path, minutes=0.0)
    assert f"{tmp_path.name}: 0 steps" in text
    assert "held-out" not in text and "checkpoint" not in text and "trees" not in text


def test_the_summary_says_whether_it_learned_and_what_it_cost(tmp_path: Path) -> None:
    val = tmp_path / "val.parquet"
    write_table(pa.table({"data_source": [SOURCE] * 100 + ["other"] * 4}), val)
    config = {"data": {"val_files": [str(val)], "val_max_samples": -1}}
    OmegaConf.save(config, tmp_path / "config.yaml")
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_at=0)
    file.log(validation(0.3) | {"timing_s/testing": 30.0}, step=0)
    for step, (equal, value) in enumerate([(0.0, 0.5), (0.5, 0.75)], start=1):
        cost = {"skpo/tokens/generated": 1500, "skpo/downstream/tokens_generated": 1000, "timing_s/step": 15.0}
        tracker = {"value/mean": value, "effective_count/mean": step, "drift/mean": 0.1, "prompts_seen": 8 * step}
        tracker = {f"skpo/tracker/{name}": number for name, number in tracker.items()}
        shares = {"skpo/downstream/all_equal_share": equal}
        file.log(cost | tracker | shares | (validation(0.5) if step == 2 else {}), step=step)
    text = summary(tmp_path, minutes=2.0)
    assert "2 steps, 1.0 minutes of steps and validations in all launches; 2.0 in this one" in text
    assert row(text, "accuracy")[2:] == ["95%", "interval", "0.404", "to", "0.596"]
    assert row(text, "change") == ["rose", "(+0.200", "+-", "0.133)"]
    assert "15 s and 1,500 generated tokens a step, 1.50 x those" in text
    assert "in 25% of the groups, whose rewards were equal (0% -> 50%)" in text
    assert "16 prompts, value 0.50 -> 0.75, effective count 1.00 -> 2.00, drift 0.1 -> 0.1" in text


def test_an_accuracy_that_is_not_a_share_has_no_interval() -> None:
    assert certainty(0.5, 5.0, 8) == certainty(0.5, math.nan, 8) == certainty(0.5, 1.0, None) == (None, None)
    interval, changed = certainty(-1.0, 0.0, 10)
    assert interval == wilson_interval(0.0, 10) and changed is None


def test_a_small_change_is_not_called_one() -> None:
    assert change(0.5, 0.6, 20).startswith("no change that 20 problems could show")
    assert change(0.6, 0.2, 100).startswith("fell")
    assert wilson_interval(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))


# ---------------------------------------------------------------- trees


def test_tree_reads_from_problem_to_responses() -> None:
    assert render_tree(tree()).splitlines() == [
        "step 3   problem: 3 + 4?   answer: 7",
        "  upstream candidates, cut at t_q = 12",
        "     d=0.125  'first'",
        "  -> d=0.250  'second\\nline'  (ended early)",
        "  segment reward -0.50, advantage -1.25",
        "  downstream responses to [segment, problem]",
        "     +1  A=+1.50  'seven'",
        "     -1  A=-0.50  'eight'",
    ]


@pytest.mark.parametrize(("written", "shown"), [(7, ["1", "4", "7"]), (3, ["1", "2", "3"]), (1, ["1"])])
def test_trees_from_first_to_last_are_written(tmp_path: Path, written: int, shown: list[str]) -> None:
    store_trees(tmp_path, range(1, written + 1))
    target = write_sample_trees(tmp_path, count=3)
    assert target is not None
    assert [line.split()[1] for line in target.read_text().splitlines() if line.startswith("step")] == shown


def test_without_trees_nothing_is_written(tmp_path: Path) -> None:
    assert write_sample_trees(tmp_path) is None and list(tmp_path.iterdir()) == []
    store_trees(tmp_path, [])
    assert write_sample_trees(tmp_path) is None
