"""Rows of one's own: every form gives the same parquet, and what does not fit is named."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import files
from data_prep.schema import DataError, check_parquet, prompt_id
from data_prep.training import TrainingData, prepare_training
from reward_fns import compute_score
from tests.conftest import REPOSITORY

Rows = list[dict[str, Any]]
SYSTEM = 'Reply with "#### number", nothing else.'
KEYS = ["--prompt", "question", "--answer", "result", "--check", "number"]


def to_jsonl(rows: Rows, path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def to_json(rows: Rows, path: Path) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def to_parquet(rows: Rows, path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def to_csv(rows: Rows, path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(number: int) -> dict[str, Any]:
    return {"question": f'Käthe says "{number}",\nthen adds 1. What is it?', "result": number + 1, "level": "easy"}


def chat(number: int, encode: Callable[[Any], Any] = lambda messages: messages) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row(number)["question"]}]
    return row(number) | {"question": encode(messages)}


def made(out: Path, source: Path, *more: str) -> dict[str, list[dict[str, Any]]]:
    assert files.main(["--source", str(source), "--out", str(out), *KEYS, *more]) == 0
    return {split: pq.read_table(out / f"{split}.parquet").to_pylist() for split in ("train", "val")}


def truths(rows: Rows) -> set[str]:
    return {each["reward_model"]["ground_truth"] for each in rows}


def refusal(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    assert files.main(["--out", str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not out.exists()
    return error.removeprefix("error: ").rstrip("\n")


# ---------------------------------------------------------------- what is made


def test_the_same_thousand_rows_in_every_form_are_the_same_parquet(tmp_path: Path) -> None:
    numbers = range(1000)
    text, chats = [row(number) for number in numbers], [chat(number) for number in numbers]
    floats = [each | {"result": float(each["result"])} for each in text]
    system = ("--system", SYSTEM)
    forms = {
        "text.jsonl": (to_jsonl, text, system),
        "text.json": (to_json, text, system),
        "text.csv": (to_csv, text, system),
        "text.parquet": (to_parquet, floats, system),
        "chat.jsonl": (to_jsonl, chats, ()),
        "chat.parquet": (to_parquet, chats, ()),
        "chat.csv": (to_csv, [chat(number, json.dumps) for number in numbers], ()),
    }
    contents = set()
    for name, (write, rows, more) in forms.items():
        out = tmp_path / f"out {name}"
        tables = made(out, write(rows, tmp_path / name), *more)
        contents.add(tuple((out / f"{split}.parquet").read_bytes() for split in tables))
    assert len(contents) == 1

    assert {split: len(rows) for split, rows in tables.items()} == {"train": 950, "val": 50}
    assert len({each["id"] for rows in tables.values() for each in rows}) == 1000
    first = tables["train"][0]
    number = int(first["reward_model"]["ground_truth"]) - 1
    question = row(number)["question"]
    assert first == {
        "id": prompt_id("own/number", question),
        "data_source": "own/number",
        "prompt": chat(number)["question"],
        "ability": "number",
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"split": "train", "index": 0, "question": question},
    }
    check_parquet(out / "train.parquet", role="train")


def test_the_share_and_the_seed_decide_which_rows_validate(tmp_path: Path) -> None:
    source = to_jsonl([row(number) for number in range(40)], tmp_path / "my.jsonl")
    first = made(tmp_path / "a", source, "--split", "0.7")
    assert len(first["train"]) == 28 and truths(first["train"]) | truths(first["val"]) == set(map(str, range(1, 41)))
    assert made(tmp_path / "a", source, "--split", "0.7") == first
    assert made(tmp_path / "a", source, "--split", "0.7", "--seed", "2") != first
    two = made(tmp_path / "b", to_jsonl([row(1), row(2)], tmp_path / "two.jsonl"))
    assert (len(two["train"]), len(two["val"])) == (1, 1)


@pytest.mark.parametrize("split", ["val", "validation", "test"])
def test_rows_to_validate_with_are_taken_where_they_are(split: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    to_csv([row(number) for number in range(9)], folder / "train.csv")
    held_out = to_jsonl([row(8), row(20)], folder / f"{split}.jsonl")
    for source, more in ((folder, ()), (folder / "train.csv", ("--val-source", str(held_out)))):
        tables = made(tmp_path / "out", source, *more)
        assert truths(tables["val"]) == {"9", "21"} and truths(tables["train"]) == set(map(str, range(1, 9)))
    assert len(made(tmp_path / "out", folder, "--split", "0.5")["val"]) == 5, "a share that is given counts"


def test_a_problem_that_differs_in_typesetting_is_not_on_both_sides(tmp_path: Path) -> None:
    rows = [row(number) for number in range(20)]
    alike = [each | {"question": each["question"].upper()} for each in rows]
    tables = made(tmp_path / "out", to_jsonl(rows + alike, tmp_path / "my.jsonl"), "--split", "0.5")
    assert not truths(tables["train"]) & truths(tables["val"])


def test_earlier_turns_belong_to_the_prompt_and_its_id(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("user", "+1?"))]
    rows = [{"question": turns, "result": 5}, {"question": turns[2:], "result": 1}]
    tables = made(tmp_path / "out", to_jsonl(rows, tmp_path / "my.jsonl"))
    prompts = {each["id"]: each["prompt"] for split in tables.values() for each in split}
    assert prompts == {prompt_id("own/number", "2+2?\n\n4\n\n+1?"): turns, prompt_id("own/number", "+1?"): turns[2:]}


def test_text_may_be_asked_by_a_template(tmp_path: Path) -> None:
    source = to_jsonl([row(1), row(2)], tmp_path / "my.jsonl")
    (asked,) = made(tmp_path / "out", source, "--template", "boxed", "--system", "Be brief.")["val"]
    assert [message["role"] for message in asked["prompt"]] == ["system", "user"]
    assert "\\boxed{}" in asked["prompt"][1]["content"] and "boxed" not in asked["extra_info"]["question"]


@pytest.mark.parametrize(
    ("check", "truth", "right", "wrong"),
    [
        ("number", 1234, "so $1,234$ it is. Answer: 1,234", "Answer: 1235"),
        ("math", "\\frac{1}{2}", "\\boxed{0.5}", "\\boxed{2}"),
        ("choice", "B", "The answer is (B).", "The answer is (C)."),
    ],
)
def test_a_check_selects_the_reward(check: str, truth: Any, right: str, wrong: str, tmp_path: Path) -> None:
    rows = [{"question": f"{number}?", "result": truth} for number in range(2)]
    (found,) = made(tmp_path / "out", to_jsonl(rows, tmp_path / "my.jsonl"), "--check", check)["val"]
    scores = [
        compute_score(found["data_source"], text, found["reward_model"]["ground_truth"])["acc"]
        for text in (right, wrong)
    ]
    assert scores == [1.0, 0.0]


def test_without_a_check_any_text_is_an_answer_and_the_reward_is_ones_own(tmp_path: Path) -> None:
    rows = [{"question": f"{number}?", "result": "x" * 500} for number in range(2)]
    (found,) = made(tmp_path / "out", to_jsonl(rows, tmp_path / "my.jsonl"), "--check", "none")["val"]
    with pytest.raises(ValueError, match=r"'own/none' has no reward here .* your own compute_score"):
        compute_score(found["data_source"], "", found["reward_model"]["ground_truth"])


# ---------------------------------------------------------------- what is refused

USER = {"role": "user", "content": "1+1?"}
MALFORMED: dict[str, tuple[Callable[[Rows, Path], Path], str, dict[str, Any], str, str]] = {
    "no prompt": (to_jsonl, "", {"question": None}, "line 3", "field 'question' is missing"),
    "an empty prompt": (to_csv, "", {"question": ""}, "line 6", "field 'question' is not a non-empty string"),
    "a number as prompt": (
        to_json,
        "",
        {"question": 5},
        "row 2",
        "field 'question' is not a non-empty string (found 5)",
    ),
    "no messages": (to_parquet, "chat", {"question": []}, "row 2", "field 'question': the last message is missing"),
    "text as message": (to_json, "chat", {"question": ["1+1?"]}, "row 2", "field 'question': message 1 is not {role"),
    "no content": (
        to_jsonl,
        "chat",
        {"question": [{"role": "user"}]},
        "line 3",
        "field 'question': message 1: field 'con",
    ),
    "a tool call": (
        *(to_jsonl, "chat", {"question": [USER | {"tool_calls": [1]}]}, "line 3"),
        "field 'question': message 1 has 'tool_calls'",
    ),
    "the answer in the prompt": (
        *(to_jsonl, "chat", {"question": [USER, {"role": "assistant", "content": "2"}]}, "line 3"),
        "field 'question': the last message is by 'assistant', must be by 'user'",
    ),
    "messages as Python": (
        *(to_csv, "", {"question": str([USER])}, "line 6"),
        "field 'question' begins as a list of messages, but is not JSON",
    ),
    "no answer": (to_parquet, "", {"result": None}, "row 2", "field 'result' is missing"),
    "words as answer": (
        to_jsonl,
        "",
        {"result": "five"},
        "line 3",
        "field 'result': ground_truth 'five' is not a number",
    ),
    "a truth value": (to_jsonl, "", {"result": True}, "line 3", "field 'result': the answer True is not a number"),
    "not a number": (to_parquet, "", {"result": float("nan")}, "row 2", "field 'result': the answer nan is not a n"),
    "a list of answers": (to_json, "", {"result": ["1"]}, "row 2", "field 'result' is not a non-empty string"),
    "another answer": (
        to_jsonl,
        "",
        row(0) | {"result": 7},
        "line 3",
        "line 1, but the answer is '7' here and '1' there",
    ),
    "another system message": (
        *(to_jsonl, "chat", chat(0) | {"question": [{"role": "system", "content": "x"}, chat(0)["question"][1]]}),
        *("line 3", "line 1, but the prompt is"),
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_row_that_does_not_fit_is_named_by_file_row_and_key(name: str, tmp_path: Path, capsys) -> None:
    write, form, change, place, said = MALFORMED[name]
    good = chat if form == "chat" else row
    source = write([good(0), good(1), good(2) | change, good(3)], tmp_path / f"my.{write.__name__[3:]}")
    message = refusal(capsys, tmp_path / "out", "--source", str(source), *KEYS)
    assert message.startswith(f"{source}: {place}: ") and said in message
    assert message.endswith("; mend the row, or leave out such rows with --skip-bad (data.skip_bad=true)")


def test_a_field_that_a_row_of_a_csv_file_lacks_is_named(tmp_path: Path, capsys) -> None:
    source = tmp_path / "my.csv"
    source.write_text("question,result\n1+1?,2\n1+2?\n")
    message = refusal(capsys, tmp_path / "out", "--source", str(source), *KEYS)
    assert message.startswith(f"{source}: line 3: has not the 2 fields of the first line: 'result' is missing; ")


OPTIONS: dict[str, tuple[list[str], str]] = {
    "sql": (["--check", "sql"], "--check sql (data.check): is unknown; known are number, math, choice, code, none"),
    "no tests": (["--check", "code"], "field 'result': ground_truth '"),
    "no share": (["--split", "1"], "--split 1.0 (data.split): is not a share; give a number above 0 and below 1"),
    "no share, NaN": (["--split", "nan"], "--split nan (data.split): is not a share"),
    "a share of what is split": (
        ["--split", "0.5", "--val-source", "v.csv"],
        "are those of v.csv; leave one of the two",
    ),
    "two system messages": (["--system", "a", "--template", "boxed_system"], "has a system message already; leave --s"),
    "no such template": (["--template", "nope"], "--template nope: no such template; known are "),
    "no such column": (["--prompt", "quest"], "line 1: field 'quest' is missing (it has question, result, level)"),
    "no source": (["--source", ""], "--source (data.source): is not set"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_fit_are_named(name: str, tmp_path: Path, capsys) -> None:
    source = to_jsonl([row(1), row(2)], tmp_path / "my.jsonl")
    given, said = OPTIONS[name]
    assert said in refusal(capsys, tmp_path / "out", "--source", str(source), *KEYS, *given)


def test_one_row_cannot_train_and_validate_and_a_template_is_for_text(tmp_path: Path, capsys) -> None:
    source = to_jsonl([row(1), row(1)], tmp_path / "my.jsonl")
    assert "has one usable row" in refusal(capsys, tmp_path / "out", "--source", str(source), *KEYS)
    to_jsonl([chat(1), chat(2)], source)
    message = refusal(capsys, tmp_path / "out", "--source", str(source), *KEYS, "--template", "boxed")
    assert f"{source}: line 1: field 'question' is a list of messages, and --template is for text" in message


@pytest.mark.parametrize("name", ["prompt", "answer", "check"])
def test_a_setting_that_training_lacks_is_named(name: str, tmp_path: Path) -> None:
    given = {"source": "my.jsonl", "prompt": "question", "answer": "result", "check": "number"}
    with pytest.raises(DataError, match=re.escape(f"--{name} (data.{name}): is not set")):
        prepare_training(tmp_path, TrainingData("mine", **{**given, name: None}))
    with pytest.raises(DataError, match=r"data.val_benchmark: aime24 is asked in another form"):
        prepare_training(tmp_path, TrainingData("mine", val_benchmark="aime24", **given))


# ---------------------------------------------------------------- the record


def test_the_example_of_the_record_writes_a_file_that_training_reads(tmp_path: Path, monkeypatch) -> None:
    text = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(from pathlib .*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/data.md", "exec"), {})
    table = check_parquet(Path("train.parquet"), role="train")
    (found,) = table.to_pylist()
    assert compute_score(found["data_source"], "#### 4", found["reward_model"]["ground_truth"])["acc"] == 1.0
