"""Rollout trees: what is stored of a rollout, what happens on a resume, and the bound of the folder."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.skpo.method.rows import CandidateRecord, Transcript
from recipe.skpo.output.trees import (
    FOLDER,
    LONGEST_TEXT,
    TREE_SCHEMA,
    TreeStore,
    read_trees,
    rollout_tree,
    spread,
    stored_steps,
    tree_index,
)
from tests.support.rows import make_record, make_rows


def a_tree(step: int = 1, text: str = "text") -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": text,
        "problem": text,
        "answer": text,
        "split_position": 4,
        "candidates": [{"text": text, "rest": text, "deviation": 0.5, "ended_early": True, "chosen": True}],
        "segment": {"text": text, "reward": 0.25, "baseline": -0.5, "advantage": 1.5},
        "skip_prompt": text,
        "responses": [{"text": text, "reward": 1.0, "advantage": -0.5, "length": 3, "answer": None}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / FOLDER


def all_trees(output_dir: Path) -> list[dict[str, Any]]:
    return list(read_trees(tree_index(output_dir)))


def store_steps(folder: Path, steps: Iterable[int], max_mb: float = 64.0, resumed_at: int = 0) -> TreeStore:
    """A store with one tree of each step."""
    store = TreeStore(folder, max_mb, resumed_at)
    for step in steps:
        store.write(step, [a_tree(step)])
    return store


# ---------------------------------------------------------------- one tree


def letters(token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    return ("" if skip_special_tokens else "<s>") + "".join(chr(token) for token in token_ids)


CANDIDATES = (
    CandidateRecord(np.array([97, 98]), 2, 0.1, False),
    CandidateRecord(np.array([99, 100]), 1, 0.4, True),
)


def the_tree(candidates: tuple[CandidateRecord, ...], chosen: int, decode=letters) -> dict[str, Any]:
    """The tree of a segment in row 1, with a failed response in row 2 and two others."""
    rows = make_rows(
        upstream=[False, True, False, False, False],
        prompts=[0, 1, 1, 1, 1],
        lengths=[9, 1, 0, 1, 2],
        rewards=[9, 0.25, 0, 1, -1],
        prompt_ids=["other", *["train-3"] * 4],
        records=[None, make_record(split_position=2, candidates=candidates, chosen=chosen), None, None, None],
        openings=[0, 0, 1, 0, 0],
    )
    story = Transcript("3 + 4?", "7", [99, 113], [[55], [56, 57]], ["7", None])
    advantages, baselines = torch.tensor([9, 0.5, 0, 2, -2]), torch.tensor([9, -0.5, 0, 0, 0])
    return rollout_tree(12, rows, 1, advantages, baselines, story, decode)


def test_tree_shows_candidates_chosen_segment_and_responses() -> None:
    assert the_tree(CANDIDATES, chosen=1) == {
        "step": 12,
        "prompt_id": "train-3",
        "problem": "3 + 4?",
        "answer": "7",
        "split_position": 2,
        "candidates": [
            {"text": "ab", "rest": "", "deviation": 0.1, "ended_early": False, "chosen": False},
            {"text": "c", "rest": "d", "deviation": 0.4, "ended_early": True, "chosen": True},
        ],
        "segment": {"text": "c", "reward": 0.25, "baseline": -0.5, "advantage": 0.5},
        "skip_prompt": "<s>cq",
        "responses": [
            {"text": "7", "reward": 1.0, "advantage": 2.0, "length": 1, "answer": "7"},
            {"text": "89", "reward": -1.0, "advantage": -2.0, "length": 2, "answer": None},
        ],
    }


def test_the_rest_is_what_stands_behind_the_kept_text() -> None:
    """Decoded alone, sentencepiece drops a leading space; a cut inside of a character spells it differently."""

    def strip(token_ids: Sequence[int], **options: Any) -> str:
        return letters(token_ids).lstrip(" ")

    (tree,) = the_tree((replace(CANDIDATES[1], token_ids=np.array([99, 32, 100])),), 0, strip)["candidates"]
    assert (tree["text"], tree["rest"]) == ("c", " d")

    def utf8(token_ids: Sequence[int], **options: Any) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    candidate = replace(CANDIDATES[1], token_ids=np.array([99, 0xC3, 0xA9, 100]), kept=2)
    (tree,) = the_tree((candidate,), 0, utf8)["candidates"]
    assert (tree["text"], tree["rest"]) == ("c\ufffd", "\ufffdd")


def test_the_schema_says_what_every_column_is(folder: Path) -> None:
    def described(fields: Iterable[pa.Field]) -> None:
        for field in fields:
            assert field.metadata[b"description"], field.name
            inner = field.type.value_type if pa.types.is_list(field.type) else field.type
            described(inner if pa.types.is_struct(inner) else [])

    store_steps(folder, [1])
    schema = pq.read_schema(stored_steps(folder)[1])
    assert schema.equals(TREE_SCHEMA, check_metadata=False)
    described(schema)


# ---------------------------------------------------------------- the folder


def test_trees_come_back_as_they_were_in_the_order_of_steps(folder: Path) -> None:
    assert tree_index(folder.parent) == []
    trees = [a_tree(3), a_tree(12, 'null \x00 quote " é 😀'), a_tree(12, ""), a_tree(1_000_000, "a\ud83db")]
    store = TreeStore(folder, 64.0, 0)
    for step in (1_000_000, 4, 12, 3):
        store.write(step, [tree for tree in trees if tree["step"] == step])
    names = [f"step_{step}.parquet" for step in ("000003", "000012", "1000000")]
    assert [path.name for path in sorted(folder.iterdir())] == names, "a step without trees writes nothing"
    assert all_trees(folder.parent) == [*trees[:3], a_tree(1_000_000, "a\\ud83db")]


def test_only_the_requested_places_are_read(folder: Path) -> None:
    store = TreeStore(folder, 64.0, 0)
    for step in (1, 2):
        store.write(step, [a_tree(step, str(number)) for number in range(3)])
    index = tree_index(folder.parent)
    found = [(tree["step"], tree["problem"]) for tree in read_trees([index[0], index[2], index[4]])]
    assert found == [(1, "0"), (1, "2"), (2, "1")]


def test_a_longer_text_is_cut_with_a_mark(folder: Path) -> None:
    store = TreeStore(folder, 64.0, 0)
    store.write(1, [a_tree(1, "x" * LONGEST_TEXT), a_tree(1, "y" * 1_000_000)])
    whole, cut = all_trees(folder.parent)
    assert whole == a_tree(1, "x" * LONGEST_TEXT)
    assert cut["responses"][0]["text"] == "y" * LONGEST_TEXT + " [cut here: 1000000 characters in all]"
    assert cut["candidates"][0]["rest"] == cut["problem"] == cut["responses"][0]["text"]


@pytest.mark.parametrize("resumed_at", [0, 2, 9])
def test_steps_after_the_checkpoint_are_removed_on_a_resume(folder: Path, resumed_at: int) -> None:
    store_steps(folder, range(1, 6))
    (folder / ".step_000004.parquet.4711").write_bytes(b"left by a kill")
    (folder / "notes.txt").write_text("mine")
    store = TreeStore(folder, 64.0, resumed_at)
    assert list(stored_steps(folder)) == list(range(1, min(resumed_at, 5) + 1))
    assert {path.name for path in folder.iterdir() if path.suffix != ".parquet"} == {"notes.txt"}
    store.write(4, [a_tree(4, "again")])
    assert all_trees(folder.parent)[min(resumed_at, 3)]["problem"] == "again"


def test_a_file_is_whole_or_absent(folder: Path, monkeypatch) -> None:
    store = store_steps(folder, [1])

    def killed(table: pa.Table, where: Any, **options: Any) -> None:
        where.write(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr("recipe.skpo.output.trees.pq.write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(1, [a_tree(1, "after")])
    assert all_trees(folder.parent) == [a_tree(1)]


@pytest.mark.parametrize("kept", [0, 200])
def test_a_damaged_file_is_left_out_and_said(folder: Path, caplog, kept: int) -> None:
    store_steps(folder, (1, 2, 3))
    path = stored_steps(folder)[2]
    content = path.read_bytes()
    third = len(content) // 3
    # Cut off, or with a good footer and spoilt data.
    path.write_bytes(content[:100] if kept else content[:4] + b"\xff" * third + content[4 + third :])
    with caplog.at_level(logging.WARNING):
        assert [tree["step"] for tree in all_trees(folder.parent)] == [1, 3]
    assert str(path) in caplog.text


# ---------------------------------------------------------------- the bound


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_over_the_bound_the_steps_that_are_left_stay_even(folder: Path) -> None:
    store_steps(folder, [1])
    bound = 20.5 * size(folder) / 1e6
    store = TreeStore(folder, bound, 0)
    for step in range(1, 201):
        store.write(step, [a_tree(step)])
        assert len(stored_steps(folder)) == min(step, 20) and size(folder) <= bound * 1e6
    steps = list(stored_steps(folder))
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert (steps[0], steps[-1]) == (1, 200)
    assert max(gaps) <= 2 * 199 / 19, f"{steps} leave a hole"
    assert min(gaps[:-1]) >= 199 / 19 / 2, f"{steps} crowd"


def test_a_write_looks_at_no_other_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_steps(folder, range(1, 11))
    store = TreeStore(folder, 10.5 * size(folder) / 10 / 1e6, 10)
    with monkeypatch.context() as patch:
        for name in ("glob", "iterdir", "stat"):
            patch.setattr(Path, name, None)
        for step in (11, 12):
            store.write(step, [a_tree(step)])
    assert len(stored_steps(folder)) == 10


def test_a_lower_bound_holds_from_the_next_step_on(folder: Path) -> None:
    store_steps(folder, range(1, 41))
    store_steps(folder, [41], 20.5 * size(folder) / 40 / 1e6, resumed_at=40)
    assert len(stored_steps(folder)) == 20


def test_the_newest_step_is_kept_whatever_its_size(folder: Path) -> None:
    store_steps(folder, (1, 2, 3), max_mb=1e-6)
    assert list(stored_steps(folder)) == [3]


@settings(max_examples=200, deadline=None)
@given(total=st.integers(0, 300), count=st.integers(1, 50))
def test_a_spread_goes_evenly_from_first_to_last(total: int, count: int) -> None:
    shown = spread(total, count)
    assert len(shown) == min(total, count) and shown == sorted(set(shown))
    if total > 0:
        assert shown[0] == 0
    if total > 0 and count > 1:
        assert shown[-1] == total - 1
        gaps = [later - earlier for earlier, later in pairwise(shown)]
        assert not gaps or max(gaps) - min(gaps) <= 1
