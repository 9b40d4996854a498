"""Data files and prompt lengths: what is accepted and what is noted; what is refused is in test_bad_input.py."""

import time
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.schema import DataError, Row, write_parquet
from recipe.skpo.checks import model
from recipe.skpo.checks.data import check_data
from recipe.skpo.checks.model import check_prompt_lengths
from recipe.skpo.checks.reward import check_reward
from recipe.skpo.task import prompt_lengths

OURS = "skpo/arithmetic"


def write_rows(path: Path, questions: list[str], split: str = "train") -> Path:
    rows = [
        Row(OURS, [{"role": "user", "content": question}], "5", "math", split, index, question)
        for index, question in enumerate(questions)
    ]
    write_parquet(rows, path)
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.parquet", [f"{n} + 1?" for n in range(8)])


@pytest.fixture
def val(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "val.parquet", ["20 + 1?"], "val")


@pytest.fixture
def config(compose_config, train: Path, val: Path, model_folder: Path):
    """A config with which every check passes."""
    config = compose_config("platform=cpu", "data=files")
    config.data.train_files, config.data.val_files = str(train), str(val)
    config.data.train_batch_size, config.data.max_prompt_length = 4, 96
    config.actor_rollout_ref.model.path = str(model_folder)
    return config


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and len(message.splitlines()) == 1
    return message


# ---------------------------------------------------------------- files


def test_a_data_source_of_ones_own_passes_with_a_reward_of_ones_own(config, tmp_path: Path, train: Path) -> None:
    pq.write_table(with_column("data_source", lambda n: ["my/source"] * n)(pq.read_table(train)), train)
    own_reward(config, tmp_path, "return 1.0")
    check_data(config)


def test_rows_count_over_all_training_files(config, tmp_path: Path) -> None:
    config.data.train_batch_size = 9
    more = write_rows(tmp_path / "more.parquet", ["30 + 1?"])
    config.data.train_files = [config.data.train_files, str(more)]
    check_data(config)


def test_a_training_prompt_in_the_held_out_file_is_noted(config, train: Path, tmp_path: Path, capsys) -> None:
    """Training accuracy is a fair thing to ask for; only the trackers need unique ids."""
    check_data(config)
    assert not capsys.readouterr().out, "nothing to say of good files"
    both = write_rows(tmp_path / "both.parquet", ["3 + 1?", "20 + 1?", "5 + 1?"], "val")
    for files, count in ((str(train), "8 of the 8"), (str(both), "2 of the 3")):
        config.data.val_files = files
        check_data(config)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"note: {count} prompts of data.val_files are in data.train_files too")


def with_column(name: str, values: Callable[[int], Any]) -> Callable[[pa.Table], pa.Table]:
    """Replace a column, or add it."""

    def change(table: pa.Table) -> pa.Table:
        column = values(table.num_rows)
        column = column if isinstance(column, pa.Array) else pa.array(column)
        if name in table.column_names:
            return table.set_column(table.column_names.index(name), name, column)
        return table.append_column(name, column)

    return change


GOOD_FILES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "truths as integers": (with_column("reward_model", lambda n: [{"ground_truth": k} for k in range(n)]), ""),
    "truths as floats": (with_column("reward_model", lambda n: [{"ground_truth": k / 2} for k in range(n)]), ""),
    "truths as decimals": (with_column("reward_model", lambda n: [{"ground_truth": Decimal(k)} for k in range(n)]), ""),
    "a category of pandas": (with_column("data_source", lambda n: pa.array([OURS] * n).dictionary_encode()), ""),
    "large texts of polars": (with_column("id", lambda n: pa.array(map(str, range(n)), pa.large_string())), ""),
    "an index of pandas": (with_column("__index_level_0__", lambda n: list(range(n))), ""),
    "extra_info that is null": (with_column("extra_info", pa.nulls), ""),
    "no extra_info": (lambda table: table.drop_columns(["extra_info", "ability"]), ""),
    "arguments of a tool": (
        with_column("extra_info", lambda n: [{"index": k, "tools_kwargs": {"a": 1}} for k in range(n)]),
        "data.train_files: ",
    ),
    "images of no row": (with_column("images", lambda n: [[] for _ in range(n)]), ""),
    "videos that are null": (with_column("videos", pa.nulls), ""),
    "verl's one agent": (with_column("agent_name", lambda n: ["single_turn_agent"] * n), ""),
    "a reference solution": (with_column("output", lambda n: ["5"] * n), "nobody reads the column(s) 'output' of"),
    "reference answers": (with_column("responses", lambda n: [["5"]] * n), "nobody reads the column(s) 'responses' of"),
    "a nested column": (with_column("meta", lambda n: [{"a": [1]}] * n), "nobody reads the column(s) 'meta' of"),
    "dates and bytes": (with_column("day", lambda n: [date(2026, 1, 1)] * n), "nobody reads the column(s) 'day' of"),
    "names of verl's": (with_column("trace", lambda n: [True] * n), "nobody reads the column(s) 'trace' of"),
}
"""What a file may be, and what is said of it."""


@pytest.mark.parametrize("name", GOOD_FILES)
def test_files_of_other_libraries_and_with_more_columns_pass(config, train: Path, name: str, capsys) -> None:
    change, note = GOOD_FILES[name]
    pq.write_table(change(pq.read_table(train)), train)
    check_data(config)
    said = capsys.readouterr().out
    assert said.startswith(f"note: {note}") and said.count("\n") == 1 if note else not said


def test_files_that_differ_in_what_verl_can_join_pass(config, train: Path, tmp_path: Path) -> None:
    """A field that is null in one, a column that one has not, columns in another order."""
    other = write_rows(tmp_path / "other.parquet", ["30 + 1?", "31 + 1?"])
    table = with_column("extra_info", lambda n: [{"index": None, "level": "hard"}] * n)(pq.read_table(other))
    pq.write_table(table.drop_columns(["ability"]).select(sorted(set(table.column_names) - {"ability"})), other)
    config.data.train_files = [str(train), str(other)]
    check_data(config)


def test_a_file_that_verl_alone_cannot_read_is_refused(config, train: Path, monkeypatch) -> None:
    import datasets

    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full_disk)
    with pytest.raises(DataError, match=r"look at the free space .* \(HF_DATASETS_CACHE\)") as error:
        check_data(config)
    assert one_line(error).startswith(
        f"data.train_files: {train}: verl's reader refuses it (OSError: [Errno 28] No space"
    )


# ---------------------------------------------------------------- the reward on real rows


def own_reward(config, folder: Path, body: str, start: str = "def") -> None:
    """Give the run a reward function that notes its calls in ``calls``."""
    text = (
        "import asyncio, decimal, fractions, numpy, torch\ncalls = []\n"
        f"{start} compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        f"    calls.append((data_source, solution_str, ground_truth, extra_info))\n    {body}\n"
    )
    (folder / "mine.py").write_text(text)
    config.reward.custom_reward_function.path = str(folder / "mine.py")


@pytest.mark.parametrize("start", ["def", "async def"])
@pytest.mark.parametrize(
    "returned",
    [
        *("1.0", "-1", "True", "decimal.Decimal('0.5')", "fractions.Fraction(1, 2)", "{'score': 1.0, 'acc': 1.0}"),
        *("numpy.float32(1)", "numpy.array([1.0])", "torch.tensor(-1.0)", "{'score': torch.tensor([1])}"),
    ],
)
def test_a_reward_of_ones_own_may_return_any_one_number(config, tmp_path: Path, returned: str, start: str) -> None:
    own_reward(config, tmp_path, f"return {returned}", start)
    check_data(config)


def test_a_reward_of_ones_own_is_called_once_per_data_source_and_file_list(config, tmp_path: Path, train: Path) -> None:
    sources = ["a", "b", "a", "b", "a", "a", "a", "a"]
    truths = with_column("reward_model", lambda n: [{"ground_truth": [k]} for k in range(n)])
    pq.write_table(truths(with_column("data_source", lambda n: sources)(pq.read_table(train))), train)
    own_reward(config, tmp_path, "return 1.0")
    check_data(config)
    calls = check_reward(config)._function.__globals__["calls"]
    # As verl gives it, the file's own types included.
    given = {"num_turns": 2, "rollout_reward_scores": {}}
    first = [{"split": "train", "index": k, "question": f"{k} + 1?", **given} for k in range(2)]
    last = {"split": "val", "index": 0, "question": "20 + 1?", **given}
    assert calls == [("a", "", [0], first[0]), ("b", "", [1], first[1]), ("skpo/arithmetic", "", "5", last)]


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("grpo", "return -3.0"),
        ("dapo", "return {'score': torch.tensor(-3.0)}"),
        ("skpo", "return 2.0 if extra_info['split'] == 'val' else 1.0"),
    ],
)
def test_only_what_a_tracker_sees_is_bounded(compose_config, config, tmp_path: Path, method: str, body: str) -> None:
    files = config.data
    config = compose_config("platform=cpu", "data=files", f"method={method}")
    config.data = files
    own_reward(config, tmp_path, body)
    check_data(config)


def test_what_a_reward_returns_without_a_mean_is_said_once(config, tmp_path: Path, capsys) -> None:
    own_reward(config, tmp_path, "return {'score': 1.0, 'steps': [1], 'reward': 1.0, 'word': 'x'}")
    check_data(config)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" returns ")[1].split(",")[0] for line in lines] == [
        "'steps' (a list)",
        "'reward' (the name of the reward itself)",
    ]


def test_a_reward_manager_of_ones_own_may_call_as_it_likes(config, tmp_path: Path) -> None:
    text = "from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase\n"
    text += "class Mine(RewardManagerBase):\n    async def run_single(self, data): ...\ndef score(text): return None\n"
    (tmp_path / "manager.py").write_text(text)
    manager, reward = config.reward.reward_manager, config.reward.custom_reward_function
    manager.source, manager.name, manager.module.path = "importlib", "Mine", str(tmp_path / "manager.py")
    reward.path, reward.name = str(tmp_path / "manager.py"), "score"
    check_data(config)


def test_every_truth_of_20000_rows_is_tried_in_seconds(config, tmp_path: Path) -> None:
    """Words and fractions, 20,000 of them different."""
    rows = [
        Row("math", [{"role": "user", "content": f"{n}?"}], rf"\\frac{{{n}}}{{7}}+x", "math", "train", n, f"{n}?")
        for n in range(20_000)
    ]
    write_parquet(rows, tmp_path / "train.parquet")
    started = time.process_time()
    check_data(config)
    assert time.process_time() - started < 10


# ---------------------------------------------------------------- prompt lengths


def tokens_of(question: str, model_folder: Path) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    messages = [{"role": "user", "content": question}]
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("role", ["train", "val"])
@pytest.mark.parametrize("folder", ["model_folder", "bos_model_folder"])
def test_a_prompt_longer_than_the_limit(config, tmp_path: Path, request, role: str, folder: str) -> None:
    model_path = request.getfixturevalue(folder)
    question = "What is 2 plus 3, and why?"
    file = write_rows(tmp_path / "long.parquet", ["1 + 1?", "2 + 2?", question])
    config.actor_rollout_ref.model.path = str(model_path)
    config.data[f"{role}_files"] = str(file)

    config.data.max_prompt_length = length = tokens_of(question, model_path)  # as the rollout will count them
    check_prompt_lengths(config)
    config.data.max_prompt_length = length - 1
    with pytest.raises(DataError) as error:
        check_prompt_lengths(config)
    message = one_line(error)
    assert message.startswith(f"{file}: row 2: the prompt has {length} tokens, data.max_prompt_length is {length - 1}")
    assert "data.filter_overlong_prompts=true" in message

    config.data.filter_overlong_prompts, config.data.train_batch_size = True, 2
    check_prompt_lengths(config)
    config.data.train_batch_size = 3
    if role == "train":
        with pytest.raises(
            DataError, match=r"data.train_files: 2 prompts of at most .* fewer than data.train_batch_size=3"
        ):
            check_prompt_lengths(config)


def test_a_second_start_counts_nothing_again(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "once.parquet", ["once?", *(f"{n} + 10?" for n in range(8))])
    config.data.train_files = str(file)
    longest = tokens_of("0 + 10?", Path(config.actor_rollout_ref.model.path))
    config.data.max_prompt_length = longest
    check_prompt_lengths(config)
    monkeypatch.setattr(model, "count_tokens", None)
    check_prompt_lengths(config)
    config.data.max_prompt_length = longest - 1
    with pytest.raises(DataError, match=rf"once.parquet: row 1: the prompt has {longest} tokens"):
        check_prompt_lengths(config)
    write_rows(file, ["twice?"] * 1)
    with pytest.raises(RuntimeError, match="not callable"):
        check_prompt_lengths(config)


def test_prompts_are_counted_together_and_named_one_by_one(config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(model, "_TOGETHER", 3)
    monkeypatch.setattr(model, "_CHARACTERS", 300)
    questions = [f"{n} + 100?" for n in range(7)] + ["a" * 400, "b" * 80]
    config.data.train_files = str(write_rows(tmp_path / "together.parquet", questions))
    length = config.data.max_prompt_length = tokens_of("a" * 400, Path(config.actor_rollout_ref.model.path))
    check_prompt_lengths(config)
    config.data.max_prompt_length = length - 1
    with pytest.raises(DataError, match=rf"row 7: the prompt has {length} tokens"):
        check_prompt_lengths(config)
    monkeypatch.setattr(prompt_lengths, "folder", lambda: tmp_path / "kept")
    monkeypatch.setattr(model, "PROMPT_SECONDS", 0.5)
    monkeypatch.setattr(
        model, "count_tokens", lambda texts, _: time.sleep("b" * 80 in "".join(texts)) or [1] * len(texts)
    )
    with pytest.raises(
        DataError, match=r"together\.parquet: row 8: the model's chat template or tokenizer takes too long"
    ):
        check_prompt_lengths(config)


def test_the_tokenizer_of_the_run_counts(config, tmp_path: Path, bos_model_folder: Path) -> None:
    config.data.max_prompt_length = tokens_of("20 + 1?", Path(config.actor_rollout_ref.model.path))
    check_prompt_lengths(config)
    config.actor_rollout_ref.model.tokenizer_path = str(bos_model_folder)  # one token more: its BOS
    with pytest.raises(DataError):
        check_prompt_lengths(config)


def test_a_template_that_opens_a_thought_is_told(config, capsys: pytest.CaptureFixture[str]) -> None:
    options = config.actor_rollout_ref.model
    check_prompt_lengths(config)
    assert "thought" not in capsys.readouterr().out
    options.custom_chat_template = "{{ messages[0]['content'] }}<think>\n"
    check_prompt_lengths(config)
    assert capsys.readouterr().out.startswith("note: prompts end inside a thought (the chat template opens it), so a ")
    config.reward.custom_reward_function.reward_kwargs = {"thought_marks": "none"}
    check_prompt_lengths(config)
    assert "thought" not in capsys.readouterr().out
