"""Prompt lengths: counted together as one by one, kept under what decides them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from recipe.skpo.task.prompt_lengths import count_tokens, lengths_file, read_lengths, write_lengths

TEXTS = ["", "a b", "<|im_start|>user\né<|im_end|>", "<s>" * 3]


def test_all_at_once_counts_as_one_by_one(bos_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bos_model_folder)
    slow: Any = lambda text, **options: tokenizer(text, **options)  # noqa: E731
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves its options in the backend
    assert count_tokens(TEXTS, tokenizer) == count_tokens(TEXTS, slow) == [0, 3, 9, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given["data"].write_bytes(b"other"),
        lambda given: given.update(column="question"),
        lambda given: given.update(options={"enable_thinking": False}),
        lambda given: setattr(given["tokenizer"], "chat_template", "{{ bos_token }}"),
        lambda given: given["tokenizer"].add_tokens(["1 + 1"]),
    ],
)
def test_what_decides_them_is_in_the_name(bos_model_folder: Path, tmp_path: Path, change: Any) -> None:
    data = tmp_path / "train.parquet"
    data.write_bytes(b"rows")
    tokenizer = AutoTokenizer.from_pretrained(bos_model_folder)
    given = {"data": data, "column": "prompt", "tokenizer": tokenizer, "options": {}}
    before = lengths_file(**given)
    tokenizer.pad_token = "</s>"  # as verl does
    tokenizer(["a", "bcd"], padding=True)
    assert lengths_file(**given) == before is not None
    change(given)
    assert lengths_file(**given) != before


def test_nothing_is_kept_where_a_digest_does_not_decide(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = "{{ strftime_now('%d') }}"
    assert lengths_file(tmp_path, "prompt", tokenizer, {}) is None
    assert (
        lengths_file(tmp_path, "prompt", SimpleNamespace(is_fast=True, chat_template="", special_tokens_map={}), {})
        is None
    )


def test_what_is_damaged_is_counted_again(tmp_path: Path) -> None:
    kept = tmp_path / "new" / "lengths.npy"
    assert read_lengths(kept) is None
    write_lengths(kept, np.arange(3, dtype=np.int32))
    found = read_lengths(kept)
    assert found is not None and found.tolist() == [0, 1, 2] and list(kept.parent.iterdir()) == [kept]
    for damage in (kept.read_bytes()[:-1], b"", b"text"):
        kept.write_bytes(damage)
        assert read_lengths(kept) is None
    np.save(kept, np.array([{}]), allow_pickle=True)
    assert read_lengths(kept) is None
    write_lengths(kept / "below a file" / "lengths.npy", np.zeros(1, np.int32))
