"""Programming problems: every schema to tests that canonical programs pass and changed ones fail; what is refused."""

import base64
import json
import os
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep import benchmarks, code
from data_prep.code_tasks import FAMILIES, generated, tasks
from data_prep.pipeline import RowError
from data_prep.schema import DataError, check_parquet
from data_prep.training import TrainingData, prepare_training
from reward_fns import code_judge, compute_score
from reward_fns.code_tests import read_tests
from tests.support.code_rows import SCHEMAS, wrong
from tests.unit.data_prep.test_data_sources import jsonl, one_line, records

TASKS = [replace(task, tests=task.tests[:3]) for task in tasks(1)[0][:100]]


@pytest.fixture(scope="module", autouse=True)
def servers():
    yield
    code_judge.close()


def verdicts(rows: list[dict[str, Any]], programs: list[str]) -> list[object]:
    """What the reward says of programs, one for each row of a parquet file."""

    def judged(row: dict[str, Any], program: str) -> object:
        truth = row["reward_model"]["ground_truth"]
        return compute_score(row["data_source"], f"```python\n{program}```\n", truth)["pred"]

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(judged, rows, programs))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_100_canonical_programs_pass_and_100_changed_ones_fail(schema: str, tmp_path: Path) -> None:
    made = [SCHEMAS[schema](task, task.program) for task in TASKS]
    changed = [SCHEMAS[schema](task, wrong(task))[1] for task in TASKS]
    file = jsonl(tmp_path / f"{schema}.jsonl", [row for row, _ in made])
    if schema in benchmarks.BENCHMARKS:
        assert benchmarks.main(["--out", str(tmp_path / "out"), "--names", schema, "--source", str(file)]) == 0
        rows = records(tmp_path / f"out/{schema}.parquet")
    else:
        assert code.main(["--out", str(tmp_path / "out"), "--source", str(file), "--split", "0.5"]) == 0
        halves = [check_parquet(tmp_path / f"out/{name}.parquet", role=name).num_rows for name in ("train", "val")]
        assert halves == [50, 50]
        rows = [row for name in ("train", "val") for row in records(tmp_path / f"out/{name}.parquet")]
        by_question = {row["question"]: number for number, (row, _) in enumerate(made)}
        order = [by_question[row["extra_info"]["question"].partition("\n")[0]] for row in rows]
        made, changed = [made[place] for place in order], [changed[place] for place in order]
    assert len(rows) == 100
    assert verdicts(rows, [program for _, program in made]) == ["passed"] * 100
    assert set(verdicts(rows, changed)) == {"wrong answer"}


def test_the_generated_tasks_have_right_programs_and_differ_between_the_splits() -> None:
    train, val = tasks(1)
    assert len(train) == 270 and len(val) == 90
    assert not {(task.a, task.b) for task in train} & {(task.a, task.b) for task in val}
    assert generated(1) == generated(1) != generated(2)
    rows = [
        {"data_source": problem.data_source, "reward_model": {"ground_truth": problem.answer}}
        for problem in generated(1)[1][:30]
    ]
    assert verdicts(rows, [task.program for task in val[:30]]) == ["passed"] * 30
    assert {task.family for task in train} == {task.family for task in val} == set(FAMILIES)


def test_tests_that_are_long_are_compressed_and_the_longest_are_a_file_that_must_be_the_one_written(
    tmp_path: Path,
) -> None:
    noise = [os.urandom(n).hex() for n in (50, 20_000, 100_000)]
    rows = [
        {"question": f"Print {n}.", "input_output": json.dumps({"inputs": [""], "outputs": [text]})}
        for n, text in enumerate(noise)
    ]
    jsonl(tmp_path / "in/train.jsonl", rows)
    jsonl(tmp_path / "in/test.jsonl", [{**rows[0], "question": "Print it."}])
    paths = prepare_training(tmp_path / "out", TrainingData("code", source=str(tmp_path / "in")))
    truths = [row["reward_model"]["ground_truth"] for row in records(paths["train"])]
    assert [next(iter(json.loads(truth))) for truth in truths] == ["kind", "zlib", "file"]
    for truth, text in zip(truths, noise, strict=True):
        assert read_tests(truth).tests == [["", text]]
    file = Path(json.loads(truths[2])["file"])
    assert file.parent == tmp_path / "out/tests" and len(list(file.parent.iterdir())) == 1
    file.write_bytes(zlib.compress(b"{}"))
    read_tests.__globals__["_from_file"].cache_clear()
    with pytest.raises(ValueError, match="are not those that were prepared"):
        read_tests(truths[2])


def test_a_window_of_days_chooses_problems_of_livecodebench(tmp_path: Path, capsys) -> None:
    file = jsonl(
        tmp_path / "x.jsonl", [SCHEMAS["livecodebench"](task, task.program)[0] for part in tasks(1) for task in part]
    )
    given = ["--names", "livecodebench", "--source", str(file), "--out", str(tmp_path)]
    assert benchmarks.main([*given, "--from-date", "2024-03-02", "--until-date", "2024-04-01"]) == 0
    # The tasks of a and b have the day b of month a: eight days of March, one of April.
    assert len(records(tmp_path / "livecodebench.parquet")) == 9 * len(FAMILIES)
    assert benchmarks.main([*given, "--from-date", "March"]) == 1
    assert "write a day as 2024-08-01" in capsys.readouterr().err
    given[1] = "humaneval"
    assert benchmarks.main([*given, "--from-date", "2024-03-02"]) == 1
    assert "are for livecodebench" in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made by the pickle",)


def test_a_pickle_is_read_for_its_text_and_never_executed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert code.pickled_text(pickle.dumps("[é]", protocol)) == "[é]"
    for bomb in (Bomb(), [Bomb()], ["a"], ("a", "b"), 5, b"a"):
        with pytest.raises(ValueError, match=r"^(is a pickle|pickle )"):
            code.pickled_text(pickle.dumps(bomb))
    row = SCHEMAS["livecodebench"](TASKS[0], TASKS[0].program)[0]
    row["private_test_cases"] = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    with pytest.raises(RowError, match="'private_test_cases' is neither JSON nor a compressed text"):
        code.convert(row, "own/code")
    assert not list(tmp_path.iterdir())


def changed(schema: str, **fields: Any) -> dict[str, Any]:
    odd = next(task for task in TASKS if task.a % 2 == (schema != "apps"))
    return {**SCHEMAS[schema](odd, odd.program)[0], **fields}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "fields of none of LiveCodeBench"),
        (changed("livecodebench", public_test_cases="5"), "'public_test_cases' is not a list"),
        (changed("livecodebench", public_test_cases="[5]", private_test_cases=""), "not a record of input"),
        (changed("livecodebench", private_test_cases="x"), "neither JSON nor"),
        (
            changed("livecodebench", private_test_cases='[{"input": "", "output": "", "testtype": "functional"}]'),
            "kinds",
        ),
        (changed("livecodebench", public_test_cases="[]", private_test_cases=""), "at least one test"),
        (changed("humaneval", test="def check("), "'test' is not Python"),
        (changed("humaneval", entry_point=None), "'entry_point' is missing"),
        (changed("mbpp", test_list=[]), "not a list of assertions"),
        (changed("mbpp", test_list=["assert other(1) == 1"]), "calls no function"),
        (changed("apps", input_output="{"), "is not JSON"),
        (changed("apps", input_output='{"inputs": [1], "outputs": []}'), "1 inputs and 0 outputs"),
        (changed("apps", input_output='{"inputs": [1], "outputs": [1], "fn_name": 5}'), "fn_name 5"),
        (changed("apps", input_output='{"inputs": [1], "outputs": [1], "fn_name": "f"}'), "list of arguments"),
    ],
)
def test_a_row_whose_tests_cannot_be_used_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        code.convert(row, "own/code")


def test_a_row_of_apps_without_tests_is_of_another_kind() -> None:
    for empty in ("", '{"inputs": [], "outputs": []}'):
        assert code.convert(changed("apps", input_output=empty), "own/code") is None


@pytest.mark.parametrize("option", [{"split": 0.5}, {"val_source": "x"}, {"from_date": "2024-01-01"}])
def test_options_of_a_source_are_refused_for_generated_tasks(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare_training(tmp_path, TrainingData("code", **option))
    assert "generated tasks" in one_line(error)
