"""The default task and the parquet schema: same bytes, disjoint splits, faults named in one line."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import arithmetic, schema
from data_prep.schema import PARQUET_SCHEMA, DataError, Row, check_parquet, prompt_id, write_parquet

ONE_SHOT = "Ann has 3 pens. Ann gets 4. How many now?"


def row(question: str = "1 + 1?", index: int = 0) -> Row:
    return Row("skpo/arithmetic", [{"role": "user", "content": question}], "2", "math", "train", index, question)


def records_of(paths: dict[str, Path]) -> list[dict[str, Any]]:
    """The rows of all splits."""
    return [record for path in paths.values() for record in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def default_task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of the default run, by split."""
    paths = arithmetic.prepare(tmp_path_factory.mktemp("default"))
    return {split: pq.read_table(path).to_pylist() for split, path in paths.items()}


def read(record: dict[str, Any]) -> tuple[tuple[str, str], tuple[int, ...], tuple[str, ...]]:
    """(name, thing), operands and verbs of a question, read from its text alone."""
    question = record["extra_info"]["question"]
    story = re.fullmatch(
        r"(?P<name>Ann|Ben|Tom|Mia) has (\d+) (pens|eggs|cups)\.((?: (?P=name) (?:gets|loses) \d+\.)*)"
        r" How many now\?",
        question,
    )
    assert story, question
    name, first, thing, steps = story.groups()
    verbs, amounts = re.findall(r"gets|loses", steps), re.findall(r"\d+", steps)
    return (name, thing), (int(first), *map(int, amounts)), tuple(verbs)


# ---- the default task


def test_default_task_has_the_promised_rows_in_verls_schema(default_task) -> None:
    assert len(default_task["train"]) == 1024
    assert len(default_task["val"]) == 128
    first = default_task["val"][0]
    assert list(first) == PARQUET_SCHEMA.names
    assert first["data_source"] == "skpo/arithmetic"
    assert first["reward_model"]["style"] == "rule"
    assert first["extra_info"] == {"split": "val", "index": 0, "question": first["prompt"][-1]["content"]}


def test_wording_and_one_shot_are_the_measured_ones(default_task) -> None:
    question = arithmetic.load_template().question(arithmetic.Expression((4, 1, 3), ("-", "+")), ("Mia", "eggs"))
    assert question == "Mia has 4 eggs. Mia loses 1. Mia gets 3. How many now?"
    for record in default_task["train"] + default_task["val"]:
        assert record["prompt"] == [
            {"role": "system", "content": "Calculate."},
            {"role": "user", "content": ONE_SHOT},
            {"role": "assistant", "content": "3 + 4 = 7\n#### 7"},
            {"role": "user", "content": record["extra_info"]["question"]},
        ]


def test_answers_follow_from_the_questions_and_no_total_is_negative(tmp_path: Path) -> None:
    paths = arithmetic.prepare(tmp_path, train=1000, val=500, min_terms=1, max_terms=4)
    terms = set()
    for record in records_of(paths):
        _, operands, signs = read(record)
        assert all(1 <= operand <= 9 for operand in operands)
        totals = [operands[0]]
        for sign, operand in zip(signs, operands[1:], strict=True):
            totals.append(totals[-1] + operand if sign == "gets" else totals[-1] - operand)
        assert min(totals) >= 0
        assert record["reward_model"]["ground_truth"] == str(totals[-1])
        terms.add(len(operands))
    assert terms >= {2, 3, 4}


def test_splits_share_no_expression_and_leave_out_the_solved_example(default_task) -> None:
    train, val = ({read(record)[1:] for record in default_task[split]} for split in ("train", "val"))
    assert len(train) == 93 and len(val) == 32
    assert not train & val
    # 126 exist; with 32 + 93 = 125 of them in the splits, the example is the only one left out
    assert ((3, 4), ("gets",)) not in train | val
    assert len({record["id"] for split in default_task.values() for record in split}) == 1024 + 128


def test_expressions_and_wordings_are_used_equally_often(default_task) -> None:
    """Val: 128 = 32 x 4 and 128 / 12 = 10.7; train: 1024 / 93 = 11.01 and 1024 / 12 = 85.3."""
    for split, expression_uses, wording_uses in (("val", {4}, {10, 11}), ("train", {11, 12}, {85, 86})):
        read_rows = [read(record) for record in default_task[split]]
        assert {*Counter((operands, signs) for _, operands, signs in read_rows).values()} == expression_uses
        assert {*Counter(wording for wording, _, _ in read_rows).values()} == wording_uses


@given(st.integers(1, 40), st.integers(1, 15), st.data())
def test_any_choice_is_even_and_without_repetition(expressions: int, wordings: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, expressions * wordings))
    pairs = arithmetic.choose(range(expressions), range(wordings), rows)
    assert len(set(pairs)) == len(pairs) == rows
    for column, size in zip(zip(*pairs, strict=True), (expressions, wordings), strict=True):
        uses = [column.count(item) for item in range(size)]
        assert max(uses) - min(uses) <= 1


def test_the_seed_decides_which_expressions_are_held_out_and_in_which_wordings(tmp_path: Path) -> None:
    def val(seed: int) -> tuple[set[Any], list[Any]]:
        path = arithmetic.prepare(tmp_path, train=1, seed=seed)["val"]
        rows = [read(record) for record in pq.read_table(path).to_pylist()]
        return {row[1:] for row in rows}, [row[0] for row in rows]

    (expressions, wordings), (other_expressions, other_wordings) = val(1), val(2)
    # chance makes them share 8 of 32; chain_sum alone, whose draws for neighbouring seeds overlap, nearly all
    assert len(expressions & other_expressions) < 20
    assert wordings != other_wordings


@pytest.mark.parametrize("max_terms", [2, 4])
def test_a_split_depends_on_its_size_and_the_seed_alone(max_terms: int, tmp_path: Path) -> None:
    def task(train: int, val: int, seed: int = 1) -> dict[str, bytes]:
        paths = arithmetic.prepare(tmp_path, train=train, val=val, seed=seed, max_terms=max_terms)
        return {split: path.read_bytes() for split, path in paths.items()}

    few, more_train, more_val, other_seed = task(10, 20), task(1100, 20), task(10, 300), task(10, 20, seed=2)
    assert few["val"] == more_train["val"] != more_val["val"]
    assert few["train"] == more_val["train"] != more_train["train"]
    assert few["val"] != other_seed["val"]


def test_every_existing_problem_can_be_had_and_the_impossible_is_refused(tmp_path: Path) -> None:
    arithmetic.prepare(tmp_path, train=1116, val=384)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, message in (
        ({"train": 1117, "val": 1}, r"--train 1117: only 1116 problems exist .*93 expressions x 12 wordings"),
        ({"train": 1, "val": 385}, r"--val 385: only 384 problems exist .*32 expressions x 12 wordings"),
        ({"train": 1, "val": 6073, "max_terms": 3}, r"--val 6073: only 6072 problems exist"),  # 2024 / 4 x 12
        ({"train": 0}, "need"),
        ({"val": 0}, "need"),
        ({"min_terms": 3, "max_terms": 2}, "need"),
        ({"min_terms": 0}, "need"),
        ({"max_terms": 21}, "need 1 <= min-terms <= max-terms <= 20"),
    ):
        with pytest.raises(DataError, match=message):
            arithmetic.prepare(tmp_path, **arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("terms", "count"), [((1, 1), 9), ((2, 2), 126), ((3, 3), 1899), ((2, 3), 2025)])
def test_expression_count_equals_brute_force(terms: tuple[int, int], count: int) -> None:
    assert arithmetic.count_expressions(*terms) == count


def test_many_terms_are_cut_at_the_first_expressions_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "MAX_EXPRESSIONS", 300)
    drawn = arithmetic.draw_expressions(1, 6, 6)
    assert len(set(drawn)) == len(drawn) == 300
    assert {len(expression.operands) for expression in drawn} == {6}
    assert set(arithmetic.draw_expressions(1_000_000, 6, 6)) != set(drawn)


def changed_template(path: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the template with every (old, new) applied below its comment."""
    comment, marker, body = arithmetic.TEMPLATE.read_text().partition("names:")
    body = marker + body
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    path.write_text(comment + body, encoding="utf-8")
    return path


def test_another_template_changes_the_wording_and_the_example_with_it(tmp_path: Path) -> None:
    path = changed_template(
        tmp_path / "beans.yaml",
        ("{name} has {a} {thing}.", "A jar holds {a} {thing} of {name}."),
        ("3 + 4", "9 - 2"),
    )
    paths = arithmetic.prepare(tmp_path, train=1116, val=384, template=path)
    for record in records_of(paths):
        question = record["extra_info"]["question"]
        assert question.startswith("A jar holds ")
        assert record["prompt"][1]["content"] == "A jar holds 9 pens of Ann. Ann loses 2. How many now?"
        assert not ("holds 9 " in question and "loses 2." in question)


def test_a_template_without_names_and_things_has_one_wording_and_without_example_leaves_no_expression_out(
    tmp_path: Path,
) -> None:
    path = changed_template(
        tmp_path / "plain.yaml",
        ("names: [Ann, Ben, Tom, Mia]\n", ""),
        ("things: [pens, eggs, cups]\n", ""),
        ("{name}", "Zoe"),
        ("{thing}", "nuts"),
        ("example: 3 + 4\n", ""),
        ('  - {role: user, content: "{example}"}\n', ""),
    )
    paths = arithmetic.prepare(tmp_path, train=94, val=32, template=path)
    questions = [record["extra_info"]["question"] for record in records_of(paths)]
    assert all(question.startswith("Zoe has ") and " nuts. Zoe " in question for question in questions)
    with pytest.raises(DataError, match="only 94 problems exist"):
        arithmetic.prepare(tmp_path, train=95, val=32, template=path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{a}", "some", "'first' lacks {a}"),
        ("gets {b}", "gets it", "'plus' lacks {b}"),
        ("minus:", "less:", "'minus' is missing"),
        ("{question}", "?", "exactly once"),
        ("messages:", "messages: 3\nrest:", "not a list of"),
        ("loses {b}", "gets {b}", "both read"),
        ("[pens, eggs, cups]", "[pens, eggs, pens]", "'4 - 1' Ann pens and '4 - 1' Ann pens both read"),
        ("first:", "first: [", "cannot be read as a template"),
        ("names: [Ann, Ben, Tom, Mia]", "", "'names' and {name} need each other"),
        ("{thing}", "pens", "'things' and {thing} need each other"),
        ("[Ann,", "[1,", "'names' is not a list of strings"),
        ("[pens, eggs, cups]", "pens", "'things' is not a list of strings"),
        ("example: 3 + 4", "", "'example' and {example} need each other"),
        ('"{example}"', "hello", "'example' and {example} need each other"),
        ("3 + 4\n", "3 and 4\n", "'example' is not a chain sum"),
        ("3 + 4\n", "3 +\n", "'example' is not a chain sum"),
    ],
)
def test_a_broken_template_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = changed_template(tmp_path / "template.yaml", (old, new))
    with pytest.raises(DataError) as caught:
        arithmetic.prepare(tmp_path, train=5, val=5, template=path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_command_prints_a_summary_or_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arithmetic.main(["--out", str(tmp_path), "--val", "20"]) == 0
    output = capsys.readouterr().out
    assert "val.parquet: 20 rows, 20 expressions (20 with 2 terms)" in output
    assert "train.parquet: 1024 rows, 93 expressions (93 with 2 terms)" in output
    assert arithmetic.main(["--out", str(tmp_path), "--train", "1117"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# ---- ids and writing


def test_id_is_stable() -> None:
    # computed with sha256sum; a change here would orphan the trackers in every old checkpoint
    assert prompt_id("skpo/arithmetic", "Ann has 3 pens. She gets 4. She loses 2. How many now?") == "b8fa6fc587705c0f"


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_ids_differ_when_source_or_text_do(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (prompt_id(*one) == prompt_id(*other)) == (one == other)
    assert len(prompt_id(*one)) == 16 and set(prompt_id(*one)) <= set("0123456789abcdef")


def test_writing_two_rows_of_one_id_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows 0 and 2: same id"):
        write_parquet([row("a"), row("b"), row("a", index=2)], tmp_path / "train.parquet")
    assert not list(tmp_path.iterdir())


def test_a_failing_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.parquet"
    write_parquet([row()], path)
    before = path.read_bytes()

    def full_disk(table: pa.Table, where: str) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("data_prep.schema.pq.write_table", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_parquet([row("other")], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- the check before training


def test_a_written_file_passes_the_check(tmp_path: Path) -> None:
    write_parquet([row("a"), row("b", index=1)], tmp_path / "train.parquet")
    table = check_parquet(tmp_path / "train.parquet", role="train")
    assert table.num_rows == 2
    assert table.column("id").to_pylist() == [row("a").id, row("b").id]


GOOD_PROMPT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", None, "missing column(s) id"),
        ("reward_model", None, "missing column(s) reward_model"),
        ("prompt", None, "missing column(s) prompt"),
        ("prompt", [GOOD_PROMPT, []], "row 1: column 'prompt'"),
        ("prompt", [GOOD_PROMPT, None], "row 1: column 'prompt'"),
        ("prompt", ["a", "b"], "row 0: column 'prompt'"),
        ("prompt", [GOOD_PROMPT, [{"role": "user", "content": None}]], "row 1: column 'prompt'"),
        ("prompt", [[{"role": "user"}], [{"role": "user"}]], "row 0: column 'prompt'"),
        ("reward_model", [{"ground_truth": "1"}, {"ground_truth": None}], "row 1: column 'reward_model'"),
        ("reward_model", [{"style": "rule"}, {"style": "rule"}], "row 0: column 'reward_model'"),
        ("id", ["x", None], "row 1: column 'id'"),
        ("id", [1, 2], "row 0: column 'id'"),
        ("id", ["x", "x"], "rows 0 and 1: same id 'x'"),
        ("data_source", ["s", ""], "row 1: column 'data_source'"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    column: str, values: list[Any] | None, message: str, tmp_path: Path
) -> None:
    """The column has these values; None: it is missing."""
    records = [row("a").record(), row("b", index=1).record()]
    for number, record in enumerate(records):
        record[column] = values[number] if values else None
    records = records if values else [{name: record[name] for name in record if name != column} for record in records]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(records), path)
    with pytest.raises(DataError) as caught:
        check_parquet(path, role="val")
    text = str(caught.value)
    assert message in text
    assert text.startswith(f"data.val_files: {path}")
    assert "\n" not in text


def test_an_unreadable_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("id,prompt\n")
    (tmp_path / "nothing.parquet").touch()
    write_parquet([row()], tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    pq.write_table(PARQUET_SCHEMA.empty_table(), tmp_path / "empty.parquet")
    for name, message in {
        "absent.parquet": "file not found",
        "text.parquet": "cannot be read as parquet",
        "nothing.parquet": "cannot be read as parquet",
        "cut.parquet": "cannot be read as parquet",
        "empty.parquet": "has no rows",
        ".": "is a folder",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            check_parquet(tmp_path / name, role="train")
        assert str(caught.value).startswith("data.train_files: ")
        assert "\n" not in str(caught.value)


def test_rows_are_counted_over_batches_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_ROWS", 2)
    records = [row(f"q{index}", index).record() for index in range(9)]
    records[3]["id"] = "é"  # printable
    for number, (column, value) in enumerate(
        [("id", "a\x1b"), ("data_source", ""), ("prompt", []), ("reward_model", None), ("id", records[1]["id"])]
    ):
        damaged = [dict(record) for record in records]
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(damaged, schema=PARQUET_SCHEMA), path, row_group_size=5)
        assert check_parquet(path, role="train").num_rows == 9
        damaged[6][column] = value
        pq.write_table(pa.Table.from_pylist(damaged, schema=PARQUET_SCHEMA), path, row_group_size=5)
        with pytest.raises(DataError, match=r"row 6: column|rows 1 and 6: same id"):
            check_parquet(path, role="train")


def test_checking_17000_rows_takes_less_than_two_seconds(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    write_parquet([row(f"question {index}", index) for index in range(17_000)], path)
    start = time.process_time()
    assert check_parquet(path, role="train").num_rows == 17_000
    assert time.process_time() - start < 2
