"""verl's filter of long prompts, without counting them again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import open_dict
from transformers import AutoTokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset, get_dataset_class

from data_prep.schema import Row, write_parquet
from recipe.skpo.checks.model import check_prompt_lengths
from recipe.skpo.trainer.dataset import CountedDataset, counted_dataset

QUESTIONS = [f"{'many ' * (number * 7 % 5)}{number}?" for number in range(12)]


@pytest.fixture
def config(compose_config: Callable[..., Any], tmp_path: Path, model_folder: Path) -> Any:
    config = compose_config("platform=cpu", "data=files")
    files = []
    for name, questions in (("a", QUESTIONS[:7]), ("b", QUESTIONS[7:])):
        rows = [Row("s", [{"role": "user", "content": text}], "5", "m", "train", 0, text) for text in questions]
        write_parquet(rows, tmp_path / f"{name}.parquet")
        files.append(str(tmp_path / f"{name}.parquet"))
    config.data.train_files, config.data.val_files = files, files[:1]
    config.actor_rollout_ref.model.path = str(model_folder)
    config.data.filter_overlong_prompts, config.data.train_batch_size = True, 1
    with open_dict(config):
        config.data.filter_overlong_prompts_workers = 1
    return config


def read(config: Any, kind: type[RLHFDataset], most: int = -1) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    return kind(config.data.train_files, tokenizer, config.data, max_samples=most).dataframe["id"][:]


def test_it_keeps_what_verl_keeps_and_counts_only_what_the_check_has_not(config: Any, monkeypatch) -> None:
    counted: list[int] = []
    upstream = RLHFDataset.maybe_filter_out_long_prompts

    def counting(self: RLHFDataset, dataframe: Any = None) -> Any:
        counted.append(len(dataframe))
        return upstream(self, dataframe)

    limits = (20, 31, 37, 50)
    verls = []
    for limit in limits:
        config.data.max_prompt_length = limit
        verls.append(read(config, RLHFDataset))
    assert {len(kept) for kept in verls} >= {0, 12} and len({len(kept) for kept in verls}) > 3
    monkeypatch.setattr(RLHFDataset, "maybe_filter_out_long_prompts", counting)
    assert read(config, CountedDataset) == verls[-1] and counted == [12], "no check has run"
    check_prompt_lengths(config)
    for limit, kept in zip(limits, verls, strict=True):
        config.data.max_prompt_length = limit
        assert read(config, CountedDataset) == kept
    assert counted == [12]
    read(config, CountedDataset, most=3)
    config.data.apply_chat_template_kwargs = {"enable_thinking": False}
    read(config, CountedDataset)
    assert counted == [12, 3, 12], "other rows, another template"


def test_verl_makes_it_unless_the_user_names_a_class(config: Any, tmp_path: Path) -> None:
    before = config.data.custom_cls
    with counted_dataset(config):
        assert get_dataset_class(config.data) is CountedDataset
    assert config.data.custom_cls == before and get_dataset_class(config.data) is RLHFDataset
    (tmp_path / "mine.py").write_text("from torch.utils.data import Dataset\nclass Mine(Dataset): ...\n")
    config.data.custom_cls = {"path": str(tmp_path / "mine.py"), "name": "Mine"}
    with counted_dataset(config):
        assert get_dataset_class(config.data).__name__ == "Mine"
