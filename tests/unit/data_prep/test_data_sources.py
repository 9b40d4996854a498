"""From a source to parquet: what is read, refused, dropped and written; the same input gives the same bytes."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import benchmarks, command, dapo_math, gsm8k, math
from data_prep.code_tasks import tasks
from data_prep.leakage import held_out, normalised
from data_prep.pipeline import Collected, Problem, RowError, collect, prepare, sample, write_problems
from data_prep.prompts import FOLDER, load_prompt_template
from data_prep.reading import RawRow, read_rows, split_files
from data_prep.schema import DataError, check_parquet, prompt_id
from data_prep.training import TrainingData, prepare_training
from reward_fns import compute_score, route
from tests.support.code_rows import SCHEMAS

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside the repository")


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def word_problem(number: int) -> dict[str, str]:
    return {"question": f"What is {number} + 1?", "answer": f"It is {number + 1}.\n#### {number + 1}"}


def records(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def answers(path: Path) -> list[str]:
    return [row["reward_model"]["ground_truth"] for row in records(path)]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small GSM8K."""
    jsonl(tmp_path / "in" / "train.jsonl", [word_problem(number) for number in range(20)])
    jsonl(tmp_path / "in" / "test.jsonl", [word_problem(number) for number in range(100, 106)])
    return tmp_path / "in"


# ---------------------------------------------------------------- real data


@needs_data
def test_gsm8k_is_whole_and_its_golds_are_right_and_one_more_is_wrong(tmp_path: Path) -> None:
    paths = prepare(gsm8k.SOURCE, tmp_path, place=str(DATA / "gsm8k"))
    for split, count in (("train", 7473), ("test", 1319)):
        check_parquet(paths[split], role="train")
        rows = records(paths[split])
        assert len(rows) == count
        answers = [json.loads(line)["answer"] for line in (DATA / "gsm8k" / f"{split}.jsonl").open()]
        for row, answer in zip(rows, answers, strict=True):
            gold = row["reward_model"]["ground_truth"]
            assert compute_score("openai/gsm8k", answer, gold)["acc"] == 1.0
            more = re.sub(r"#### .*", f"#### {int(gold) + 1}", answer)
            assert compute_score("openai/gsm8k", more, gold)["acc"] == 0.0


@needs_data
def test_the_benchmarks_at_hand_are_whole(tmp_path: Path) -> None:
    paths = benchmarks.prepare(tmp_path, source=str(DATA / "bench"))
    assert {name: len(records(path)) for name, path in paths.items()} == {
        "aime24": 30,
        "amc23": 40,
        "minerva_math": 272,
    }
    math500 = benchmarks.prepare(tmp_path, names=["math500"], source=str(DATA / "math500" / "test.jsonl"))
    rows = records(math500["math500"])
    assert len(rows) == 500 and rows[0]["data_source"] == "HuggingFaceH4/MATH-500"
    assert {row["reward_model"]["ground_truth"] for row in records(paths["amc23"])} > {"27", "36"}


@needs_data
def test_math_takes_the_same_answers_from_the_solutions_as_math500_gives(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DATA / "math500" / "test.jsonl").open()]
    for row in rows:
        given = math.SOURCE.problem(row)
        taken = math.SOURCE.problem({key: value for key, value in row.items() if key != "answer"})
        assert given.answer == taken.answer, row["solution"][-100:]


# ---------------------------------------------------------------- the pipeline


def test_rows_have_verls_columns_the_template_and_a_content_hash(folder: Path, tmp_path: Path) -> None:
    paths = prepare(gsm8k.SOURCE, tmp_path / "out", place=str(folder))
    question = "What is 3 + 1?"
    asked = f'{question} Let\'s think step by step and output the final answer after "####".'
    assert records(paths["train"])[3] == {
        "id": prompt_id("openai/gsm8k", question),
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": asked}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 3, "question": question},
    }


@pytest.mark.parametrize("limit", [None, 7])
def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path, limit: int | None) -> None:
    def made(seed: int) -> list[bytes]:
        paths = prepare(gsm8k.SOURCE, tmp_path, place=str(folder), limit=limit, seed=seed)
        return [path.read_bytes() for path in paths.values()]

    first = made(1)
    assert (made(2) == first) == (limit is None)
    assert made(1) == first


def test_a_limit_is_a_seeded_sample_in_the_sources_order(folder: Path, tmp_path: Path) -> None:
    rows = records(prepare(gsm8k.SOURCE, tmp_path, place=str(folder), limit=7, splits=["train"])["train"])
    numbers = [int(row["reward_model"]["ground_truth"]) for row in rows]
    assert len(numbers) == 7 and numbers == sorted(numbers) and numbers != list(range(1, 8))
    assert [row["extra_info"]["index"] for row in rows] == list(range(7))
    with pytest.raises(DataError, match="--limit 0"):
        prepare(gsm8k.SOURCE, tmp_path, place=str(folder), limit=0)


@given(st.lists(st.integers(), max_size=30), st.integers(1, 40), st.integers(0, 5))
def test_a_sample_is_a_subsequence_of_its_size(values: list[int], limit: int, seed: int) -> None:
    problems = [Problem("s", f"{index} {value}", "1") for index, value in enumerate(values)]
    chosen = sample(problems, limit, seed)
    assert len(chosen) == min(limit, len(problems))
    remaining = iter(problems)
    assert all(problem in remaining for problem in chosen)


def test_duplicates_are_dropped_and_a_question_with_two_answers_stops_the_run_or_loses_both(
    folder: Path, tmp_path: Path, capsys
) -> None:
    rows = [word_problem(number) for number in (1, 2, 1, 1, 3)]
    file = jsonl(folder / "train.jsonl", rows)
    assert answers(prepare(gsm8k.SOURCE, tmp_path / "out", place=str(folder))["train"]) == ["2", "3", "4"]
    assert "train.parquet: 3 of 5 rows, 2 exact duplicates dropped;" in capsys.readouterr().out
    contradicted = word_problem(1) | {"answer": "#### 99"}
    jsonl(file, [*rows[:2], contradicted, contradicted])
    with pytest.raises(DataError) as caught:
        prepare(gsm8k.SOURCE, tmp_path / "bad", place=str(folder))
    message = one_line(caught)
    for said in (f"{file}: line 3: same id", f"{file}: line 1", "'99' here and '2' there"):
        assert said in message
    assert not (tmp_path / "bad").exists()
    paths = prepare(gsm8k.SOURCE, tmp_path / "bad", place=str(folder), skip_bad=True)
    assert answers(paths["train"]) == ["3"]
    assert "2 bad rows left out" in capsys.readouterr().out


def test_training_problems_of_the_whole_test_split_are_dropped_and_counted(
    folder: Path, tmp_path: Path, capsys
) -> None:
    leaks = [word_problem(number) for number in range(100, 105)]
    spelt_otherwise = {"question": "what is  105+1 ?", "answer": "#### 106"}
    jsonl(folder / "train.jsonl", [word_problem(1), *leaks, spelt_otherwise])
    paths = prepare(gsm8k.SOURCE, tmp_path, place=str(folder), limit=1)
    assert answers(paths["train"]) == ["2"] and len(records(paths["test"])) == 1, "only a sample of it is written"
    assert "6 dropped because they are held out" in capsys.readouterr().out


def test_problems_of_other_files_are_kept_out_with_against(folder: Path, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "aime.jsonl", [{"problem": "What is $3$ + 1", "answer": 4}])
    benchmarks.prepare(tmp_path / "bench", names=["aime24"], source=str(other))
    given = ["--out", str(tmp_path / "out"), "--source", str(folder), "--split", "train", "--against"]
    for against in (tmp_path / "bench", tmp_path / "bench" / "aime24.parquet"):
        assert command.main(gsm8k.SOURCE, [*given, str(against)]) == 0
        questions = [row["extra_info"]["question"] for row in records(tmp_path / "out" / "train.parquet")]
        assert len(questions) == 19 and "What is 3 + 1?" not in questions


def test_what_cannot_be_held_against_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for against in (tmp_path / "empty", tmp_path / "absent.parquet", folder / "test.jsonl"):
        with pytest.raises(DataError, match=re.escape(f"--against {against}")) as caught:
            prepare(gsm8k.SOURCE, tmp_path / "out", place=str(folder), against=[against])
        one_line(caught)


BAD_ROWS: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ("[1]", "is not an object"),
    ('{"question": "a"}', "'answer' is missing"),
    ('{"question": "", "answer": "#### 1"}', "'question' is not a non-empty string"),
    ('{"question": 5, "answer": "#### 1"}', "'question' is not a non-empty string (found 5)"),
    ('{"question": "a", "answer": "it is 1"}', "'answer' does not end in '#### number'"),
    ('{"question": "\\ud800", "answer": "#### 1"}', "lone surrogate"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"question": "a", "answer": "#### 1", "answer": "#### 2"}', "has the key 'answer' twice"),
    ('{"question": "a", "answer": "#### 1", "meta": [{"level": 1, "level": 1}]}', "has the key 'level' twice"),
    ('{"question": "a", "answer": "#### 1", "n": ' + "9" * 5000 + "}", "has a number of 5000 digits"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_malformed_row_stops_with_its_line_or_is_listed(
    row: str, reason: str, folder: Path, tmp_path: Path, capsys
) -> None:
    file = jsonl(folder / "train.jsonl", [word_problem(1), row, word_problem(2)])
    arguments = ["--out", str(tmp_path / "out"), "--source", str(folder)]
    assert command.main(gsm8k.SOURCE, arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: line 2: ") and reason in error and "--skip-bad" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert command.main(gsm8k.SOURCE, [*arguments, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert f"left out: {file}: line 2: " in captured.err and "1 bad rows left out" in captured.out
    assert len(records(tmp_path / "out" / "train.parquet")) == 2


def test_a_line_that_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(word_problem(1)).encode() + b'\n\n{"question": "\xff"}\n')
    rows = list(read_rows(str(file), "train"))
    assert [row.where for row in rows] == [f"{file}: line 1", f"{file}: line 3"]
    assert rows[0].fields == word_problem(1) and "is not JSON" in rows[1].fault


def test_a_split_without_a_usable_row_is_refused(folder: Path, tmp_path: Path) -> None:
    jsonl(folder / "test.jsonl", ["{"])
    with pytest.raises(DataError, match="no usable row of 1 for split test"):
        prepare(gsm8k.SOURCE, tmp_path / "out", place=str(folder), skip_bad=True)


def test_a_killed_command_leaves_no_half_file(folder: Path, tmp_path: Path) -> None:
    """The writer is stopped in the middle of writing the second file; what is there is whole."""
    code = """
import os, sys
import pyarrow.parquet as pq
from data_prep import command, gsm8k
write, calls = pq.write_table, []
def killed(table, where):
    write(table, where)
    calls.append(where)
    if len(calls) == 2:
        open(where, "r+b").truncate(100)
        os.kill(os.getpid(), 9)
pq.write_table = killed
command.main(gsm8k.SOURCE, ["--out", sys.argv[1], "--source", sys.argv[2]])
"""
    out, repository = tmp_path / "out", str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": repository}
    done = subprocess.run([sys.executable, "-c", code, str(out), str(folder)], env=environment, timeout=60)
    assert done.returncode == -9
    assert len(records(out / "train.parquet")) == 20 and not (out / "test.parquet").exists()


# ---------------------------------------------------------------- reading


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [word_problem(number) for number in range(3)]
    table = pa.Table.from_pylist(rows)

    def place(name: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        return tmp_path / name

    jsonl(place("jsonl/train.jsonl"), rows)
    place("json/train.json").write_text(json.dumps(rows))
    pq.write_table(table, place("parquet/train.parquet"))
    pa_csv.write_csv(table, place("csv/train.csv"))
    for number, row in enumerate(rows):
        pq.write_table(table.slice(number, 1), place(f"shards/main/train-0000{number}-of-00003.parquet"))
        place(f"one by one/train/algebra/{number}.json").write_text(json.dumps(row))
    for folder in tmp_path.iterdir():
        assert [dict(row.fields) for row in read_rows(str(folder), "train")] == rows, folder.name


def test_places_name_the_row(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([word_problem(1), word_problem(2)]), tmp_path / "x.parquet")
    assert [row.where for row in read_rows(str(tmp_path / "x.parquet"), "train")][1] == f"{tmp_path}/x.parquet: row 1"
    (tmp_path / "x.csv").write_text('question,answer\n"a\nb",1\nc\n')
    first, second = read_rows(str(tmp_path / "x.csv"), "train")
    assert first.where.endswith("line 3") and not first.fault
    assert second.where.endswith("line 4") and "2 fields" in second.fault


def test_a_field_of_a_csv_file_may_be_longer_than_the_modules_bound(tmp_path: Path) -> None:
    bound, long = csv.field_size_limit(), "so " * 100_000
    (tmp_path / "x.csv").write_text(f"question,answer\nq,{long}#### 7\n")
    (row,) = read_rows(str(tmp_path / "x.csv"), "train")
    assert row.fields["answer"] == f"{long}#### 7"
    assert csv.field_size_limit() == bound < len(long)


def test_a_key_that_is_there_twice_is_a_bad_row_of_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"question": "a"}, {"question": "a", "question": "b"}]')
    first, second = read_rows(str(tmp_path / "x.json"), "train")
    assert first.fields == {"question": "a"}
    assert (second.where, second.fault) == (f"{tmp_path}/x.json: row 1", "has the key 'question' twice")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("twice.csv", "has the column 'answer' twice; rename or drop one of them"),
        ("twice.parquet", "has the column 'answer' twice; rename or drop one of them"),
        ("absent.jsonl", "no such file or folder"),
        ("./absent", "no such file or folder"),
        ("a b/c", "no such file or folder"),
        ("empty", "has no train.jsonl"),
        ("twice", "several formats"),
        ("broken.parquet", "cannot be read as parquet"),
        ("text.txt", "unknown format '.txt'"),
        ("latin.csv", "cannot be read as csv"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    jsonl(tmp_path / "empty" / "validation.jsonl", [])
    jsonl(tmp_path / "twice" / "train.jsonl", [])
    (tmp_path / "twice" / "train.csv").touch()
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "twice.csv").write_text("question,answer,answer\nq,1,2\n")
    pq.write_table(pa.table([pa.array(["a"])] * 3, names=["question", "answer", "answer"]), tmp_path / "twice.parquet")
    (tmp_path / "text.txt").write_text("no")
    (tmp_path / "latin.csv").write_bytes(b"a,b\n\xff,1\n")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(read_rows(source, "train"))
    assert source.removeprefix("./") in one_line(caught)


def test_names_that_begin_alike_are_other_splits(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train_extra.jsonl", "training.jsonl", "train-00000-of-00001.jsonl"):
        jsonl(tmp_path / name, [])
    assert [path.name for path in split_files(tmp_path, "train")] == ["train-00000-of-00001.jsonl", "train.jsonl"]


def test_without_the_hub_one_line_says_which_file_to_give(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for source in (gsm8k.SOURCE, math.SOURCE, dapo_math.SOURCE):
        assert command.main(source, ["--out", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {source.hub}: cannot be loaded from the hub (Couldn't reach the Hub)")
        assert "by --source" in error and error.count("\n") == 1
    assert benchmarks.main(["--out", str(tmp_path), "--names", "aime25"]) == 1
    assert "yentinglin/aime_2025: cannot be loaded" in capsys.readouterr().err


def test_the_hub_is_asked_for_subset_and_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [word_problem(len(asked))]

    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare(gsm8k.SOURCE, tmp_path)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


# ---------------------------------------------------------------- templates


def templates() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in ("arithmetic", "chains"))


@pytest.mark.parametrize("name", templates())
def test_every_template_holds_the_question_once_and_nothing_unfinished(name: str) -> None:
    text = "Q {question} \\boxed{x}?"
    messages = load_prompt_template(name).prompt(text)
    everything = "".join(message["content"] for message in messages)
    assert everything.count(text) == 1 and everything.count("{question}") == 1
    assert messages[-1]["role"] == "user"
    if name.startswith(("boxed", "choice")):
        assert "\\boxed{}" in everything


def test_a_template_of_ones_own_is_given_by_path(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        'messages:\n  - {role: system, content: "Be ${brief}."}\n  - {role: user, content: "{question}!"}\n'
    )
    paths = prepare(gsm8k.SOURCE, tmp_path / "out", place=str(folder), template=str(mine))
    assert records(paths["test"])[0]["prompt"] == [
        {"role": "system", "content": "Be ${brief}."},
        {"role": "user", "content": "What is 100 + 1?!"},
    ]
    other = prepare(gsm8k.SOURCE, tmp_path / "other", place=str(folder), template="boxed")
    ids = [[row["id"] for row in records(path)] for path in (paths["train"], other["train"])]
    assert ids[0] == ids[1], "the id does not depend on the wording"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("messages: [", "cannot be read as a template"),
        ("messages: []", "needs {question} exactly once"),
        ("messages: 5", "not a list of"),
        ("messages: [{role: user}]", "not a list of"),
        ("messages: [{role: user, content: 5}]", "not a list of"),
        ("messages: [{role: user, content: hello}]", "needs {question} exactly once"),
        ("messages: [{role: user, content: '{question}{question}'}]", "needs {question} exactly once"),
        ("text: hello", "needs the one key 'messages'"),
        ("- a", "is not a mapping"),
    ],
)
def test_a_broken_template_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_prompt_template(str(path))
    assert one_line(caught).startswith(str(path))


def test_an_unknown_template_lists_the_known_ones() -> None:
    for name in ("nope", "no/such.yaml"):
        with pytest.raises(DataError, match=r"known are answer_line, boxed, boxed_base, .*gsm8k"):
            load_prompt_template(name)


# ---------------------------------------------------------------- single sources


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"problem": "p", "solution": "\\boxed{1} or \\boxed{\\frac{1}{2}}"}, "\\frac{1}{2}"),
        ({"problem": "p", "solution": "\\boxed{1}", "answer": "2"}, "2"),
        ({"problem": "p", "answer": 27.0}, "27"),
        ({"question": "p", "answer": 0.5}, "0.5"),
    ],
)
def test_math_reads_the_box_or_the_answer(fields: dict[str, Any], answer: str) -> None:
    assert math.SOURCE.problem(fields) == Problem("DigitalLearningGmbH/MATH-lighteval", "p", answer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem": "p", "solution": "\\boxed{1"}, "no complete"),
        ({"problem": "p", "answer": "x" * 500}, "500 characters"),
        ({"problem": "p", "answer": True}, "not a number"),
        ({"problem": "p", "answer": float("nan")}, "not a number"),
        ({"solution": "\\boxed{1}"}, "'problem' or 'question' is missing"),
    ],
)
def test_math_refuses_rows_without_a_checkable_answer(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        math.SOURCE.problem(fields)


BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo_row(problem: str, answer: str, index: int = 0) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"{BEFORE}{problem}{AFTER}"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{index:08d}-uuid"},
    }


def test_dapo_is_reduced_to_its_unique_bare_problems(tmp_path: Path, capsys) -> None:
    rows = [dapo_row(f"Find $x$ if $x = {number}$.", str(-number), index) for index in range(9) for number in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dapo-math-17k.parquet")
    source = str(tmp_path / "dapo-math-17k.parquet")
    assert command.main(dapo_math.SOURCE, ["--out", str(tmp_path / "out"), "--source", source]) == 0
    made = records(tmp_path / "out" / "train.parquet")
    assert answers(tmp_path / "out" / "train.parquet") == ["0", "-1", "-2", "-3", "-4"]
    assert [row["extra_info"]["question"] for row in made][1] == "Find $x$ if $x = 1$."
    assert made[0]["prompt"][0]["content"].startswith("Find $x$") and "\\boxed{}" in made[0]["prompt"][0]["content"]
    assert "5 of 45 rows, 40 exact duplicates dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "not a chat of one message"),
        ({"prompt": []}, "not a chat of one message"),
        ({"prompt": [{"role": "user", "content": BEFORE + "p"}]}, "only one of the two sentences"),
        ({"prompt": [{"role": "user", "content": "p" + AFTER}]}, "only one of the two sentences"),
        ({"prompt": [{"role": "user", "content": BEFORE + AFTER}]}, "holds no problem"),
        ({"reward_model": None}, "'reward_model' is missing"),
        ({"reward_model": {"ground_truth": "\\frac{1}{2}"}}, "is not an integer"),
        ({"reward_model": {"ground_truth": None}}, "'ground_truth' is missing"),
    ],
)
def test_dapo_refuses_malformed_rows(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        dapo_math.SOURCE.problem(dapo_row("p", "1") | change)


def test_dapo_answers_are_integers_without_separators() -> None:
    assert dapo_math.SOURCE.problem(dapo_row("p", " 1,234 ")).answer == "1234"
    assert dapo_math.SOURCE.problem(dapo_row("p", "-07")).answer == "-7"
    plain = {"prompt": [{"role": "user", "content": " bare "}], "reward_model": {"ground_truth": "1"}}
    assert dapo_math.SOURCE.problem(plain).question == "bare"


def test_aime_answers_are_integers() -> None:
    convert = benchmarks.BENCHMARKS["aime24"].problem
    problem = convert({"problem": "p", "answer": "033"})
    assert problem is not None and (problem.answer, problem.data_source) == ("33", "aime24")
    with pytest.raises(RowError, match="not an integer"):
        convert({"problem": "p", "answer": "1/2"})


def test_olympiad_keeps_open_english_text_problems_and_joins_several_answers() -> None:
    convert = benchmarks.BENCHMARKS["olympiadbench"].problem
    row = {"question": "q", "context": "Let x.", "final_answer": ["$2$", "$-1$"], "modality": "Text-only"}
    problem = convert({**row, "subject": "Math", "language": "English", "question_type": "Open-ended"})
    assert problem == Problem("olympiadbench", "Let x.\n\nq", "2, -1")
    assert compute_score("olympiadbench", "\\boxed{-1, 2}", "2, -1")["acc"] == 1.0
    others = [{"subject": "Physics"}, {"language": "Chinese"}, {"image_1": b"png"}, {"question_type": "Theorem proof"}]
    found = collect((RawRow(str(other), row | other) for other in others), convert)
    assert (found.problems, found.other_kind, found.read) == ([], 4, 4), "counted apart"
    with pytest.raises(RowError, match="not a list of strings"):
        convert({**row, "final_answer": None})


@pytest.mark.parametrize(
    ("answer", "tolerance", "right", "wrong"),
    [
        ("14.5", "1e-1", ["14.5", "14.6", "14.4", "\\frac{29}{2}", "14.5\\text{ cm}"], ["14.61", "15", "x"]),
        ("$\\frac{1}{3}$", "0.01", ["0.33", "1/3", "0.3433"], ["0.32", "0.344"]),
        ("1.5, 2,000", "0.1,1", ["1.5, 2000", "1.6,2001"], ["1.7, 2000", "2001, 1.6", "1.5", "1.5, 2002"]),
        ("$2\\pi$", "0.1", ["2\\pi", "\\pi \\cdot 2"], ["3\\pi", "6.5"]),
    ],
)
def test_olympiad_numbers_may_be_off_by_their_tolerance(answer, tolerance, right, wrong) -> None:
    convert = benchmarks.BENCHMARKS["olympiadbench"].problem
    problem = convert({"question": "q", "final_answer": [answer], "error": tolerance})
    assert problem is not None
    for text, verdict in [*((text, 1.0) for text in right), *((text, 0.0) for text in wrong)]:
        assert compute_score("olympiadbench", f"\\boxed{{{text}}}", problem.answer)["acc"] == verdict, text
    exact = convert({"question": "q", "final_answer": [answer], "error": None})
    assert exact is not None and "tolerance" not in exact.answer
    for change, message in (({"error": "a lot"}, "the tolerance 'a lot' is not"), ({"error": "-1"}, "'-1' is not")):
        with pytest.raises(RowError, match=message):
            convert({"question": "q", "final_answer": [answer], **change})


def test_mmlu_pro_lists_its_options_and_its_letter_is_the_answer() -> None:
    convert = benchmarks.BENCHMARKS["mmlu_pro"].problem
    row = {"question": "Which?", "options": ["red", " blue"], "answer": "B", "answer_index": 1}
    problem = convert(row)
    assert problem is not None
    assert problem == Problem("TIGER-Lab/MMLU-Pro", "Which?\n(A) red\n(B) blue", "B", "multiple choice")
    assert compute_score(problem.data_source, "so \\boxed{B}", problem.answer)["acc"] == 1.0
    for change, message in (
        ({"answer": "C"}, "not a letter of 2 options"),
        ({"answer_index": 0}, "disagree"),
        ({"options": "ab"}, "not a list"),
        ({"answer": "BA"}, "not a letter"),
    ):
        with pytest.raises(RowError, match=message):
            convert({**row, **change})


GPQA = {"Question": "Why?", "Correct Answer": "Since."} | {f"Incorrect Answer {n}": f"No {n}" for n in (1, 2, 3)}
BBH = {"input": "Which?\nOptions:\n(A) this\n(B) that (A)\n(C) none", "target": "(B)"}


def test_gpqa_draws_the_order_of_its_answers_by_the_question() -> None:
    convert = benchmarks.BENCHMARKS["gpqa"].problem
    letters = set()
    for number in range(40):
        problem = convert({**GPQA, "Question": f"Why {number}?"})
        assert problem == convert({**GPQA, "Question": f"Why {number}?"})
        question, *options = problem.question.splitlines()
        assert question == f"Why {number}?" and len(options) == 4
        assert f"({problem.answer}) Since." in options
        letters.add(problem.answer)
        assert compute_score(problem.data_source, f"\\boxed{{{problem.answer}}}", problem.answer)["acc"] == 1.0
    assert letters == set("ABCD")
    for change, message in (
        ({"Incorrect Answer 2": None}, "'Incorrect Answer 2' is missing"),
        ({"Incorrect Answer 2": "Since."}, "among the wrong ones"),
    ):
        with pytest.raises(RowError, match=message):
            convert({**GPQA, **change})


def test_bbh_keeps_the_tasks_with_options() -> None:
    convert = benchmarks.BENCHMARKS["bbh"].problem
    problem = convert(BBH)
    assert problem is not None and (problem.answer, problem.question) == ("B", BBH["input"])
    many = "Options:\n" + "\n".join(f"({letter}) x" for letter in "ABCDEFGHIJK")
    for other in ({"target": "valid"}, {"target": "True"}, {"input": many, "target": "(A)"}):
        assert convert({**BBH, **other}) is None
    for change in ({"target": "(D)"}, {"input": "Which?"}):
        with pytest.raises(RowError, match="not one of the options"):
            convert({**BBH, **change})


def test_every_benchmark_has_a_reward_and_a_template() -> None:
    row = {"problem": "p", "question": "p", "answer": "1", "final_answer": ["1"]}
    special = {"mmlu_pro": {"answer": "A", "options": ["x"]}, "gsm8k": {"answer": "#### 1"}}
    (task, *_), _ = tasks(1)
    special |= {"gpqa": GPQA, "bbh": BBH}
    special |= {name: make(task, task.program)[0] for name, make in SCHEMAS.items()}
    for name, source in benchmarks.BENCHMARKS.items():
        problem = source.problem(row | special.get(name, {}))
        assert problem is not None
        route(problem.data_source)
        load_prompt_template(source.template)


def test_a_folder_gives_the_benchmarks_it_has(tmp_path: Path, capsys) -> None:
    jsonl(tmp_path / "aime24.jsonl", [{"problem": "p", "answer": 1}])
    jsonl(tmp_path / "aime25.jsonl", [{"problem": "P ", "answer": 1}])
    assert set(benchmarks.prepare(tmp_path / "out", source=str(tmp_path))) == {"aime24", "aime25"}
    assert "note: 1 problems are in aime24 and in aime25" in capsys.readouterr().out
    for arguments, message in (
        (["--names", "amc23"], "has no amc23.jsonl"),
        (["--names", "nope"], "known are aime24, aime25"),
        (["--source", str(tmp_path / "aime24.jsonl")], "say with --names"),
        (["--source", str(tmp_path / "out")], ""),
    ):
        code = benchmarks.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path), *arguments])
        error = capsys.readouterr().err
        assert code == 1 and message in error and error.count("\n") == 1


# ---------------------------------------------------------------- the same problem


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $x$.", "find x", True),
        ("A  b\nc", "a b c", True),
        ("$\\dfrac{1}{2}$", "\\frac12", True),
        ("\\left(1, 2\\right)", "(1,2)", True),
        ("Janet’s ducks", "Janet's ducks", True),
        ("1,000 eggs", "1000 eggs", True),
        ("ｘ＋１", "x+1", True),
        ("2 + 3", "2 - 3", False),
        ("2.5 pens", "25 pens", False),
        ("x < 1", "x > 1", False),
        ("3 eggs", "4 eggs", False),
        ("x^2", "x2", False),
    ],
)
def test_values_and_operators_make_another_problem_typesetting_does_not(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) == same


@given(st.text())
def test_normalised_text_is_stable_and_empty_text_holds_nothing_out(text: str) -> None:
    assert normalised(f"  {text}\n") == normalised(text)
    assert held_out([text, "$ $"]) == held_out([text])


# ---------------------------------------------------------------- the files of a training run


def test_training_files_are_the_train_split_and_a_sample_of_the_test_split(folder: Path, tmp_path: Path) -> None:
    paths = prepare_training(tmp_path, TrainingData("gsm8k", str(folder), template="boxed", val_rows=3))
    train, val = records(paths["train"]), records(paths["val"])
    assert len(train) == 20 and len(val) == 3
    assert {row["extra_info"]["split"] for row in val} == {"val"}
    assert "\\boxed{}" in train[0]["prompt"][0]["content"]


def test_dapo_is_validated_with_a_benchmark_whose_problems_are_left_out(tmp_path: Path) -> None:
    rows = [dapo_row("Find 3.", "3"), dapo_row("Find 4.", "4")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    bench = jsonl(tmp_path / "aime24.jsonl", [{"problem": "find 3", "answer": 3}])
    for val_source in (str(bench), str(tmp_path)):
        paths = prepare_training(
            tmp_path / "run",
            TrainingData("dapo_math", str(tmp_path / "dapo.parquet"), val_benchmark="aime24", val_source=val_source),
        )
        assert [row["extra_info"]["question"] for row in records(paths["train"])] == ["Find 4."]
        assert [row["data_source"] for row in records(paths["val"])] == ["aime24"]


def test_one_file_cannot_be_both_splits(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give the folder"):
        prepare_training(tmp_path, TrainingData("gsm8k", str(folder / "train.jsonl")))
    with pytest.raises(DataError, match="say with --split"):
        prepare(gsm8k.SOURCE, tmp_path, place=str(folder / "train.jsonl"))
    with pytest.raises(DataError, match="known are gsm8k, math, dapo_math"):
        prepare_training(tmp_path, TrainingData("nope"))
    paths = prepare_training(
        tmp_path / "run",
        TrainingData("gsm8k", str(folder / "train.jsonl"), val_source=str(folder / "test.jsonl"), train_rows=5),
    )
    assert len(records(paths["train"])) == 5 and len(records(paths["val"])) == 6


def test_one_id_in_two_files_of_a_command_stops_before_anything_is_written(tmp_path: Path) -> None:
    same = [Problem("s", "q", "1")]
    splits = {tmp_path / f"{name}.parquet": (name, Collected(problems=same)) for name in ("train", "test")}
    with pytest.raises(DataError, match="rows 0 and 1: same id") as caught:
        write_problems(splits, "boxed")
    assert "train.parquet + " in one_line(caught)
    assert not list(tmp_path.iterdir())
