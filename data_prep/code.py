"""Programming problems with their tests: LiveCodeBench, HumanEval(+), MBPP(+), APPS, TACO, or generated tasks.

The schema is seen by the fields of a row. Tests become the ground truth of `reward_fns.code_tests`; those of more than
100 KB are written beside the parquet files, in `tests/`, and named by their absolute path. Without `--source` tasks are
generated (`data_prep.code_tasks`). A file, or a hub name with the split `train` alone, is split by `--split`.

    python -m data_prep.code --out DIR [--source FILE] [--split 0.95] [--from-date 2024-08-01] [--until-date 2025-02-01]
"""

import ast
import base64
import binascii
import pickletools
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from data_prep import command
from data_prep.files import validation_split
from data_prep.pipeline import Convert, Problem, RowError, Source, text_field
from data_prep.schema import DataError
from data_prep.training import TrainingData, prepare_training
from data_prep.untrusted import UntrustedError, parse_json
from reward_fns import CODE_SOURCES
from reward_fns.code_tests import CodeTests, inflated, read_tests

TEMPLATE = "code"
TOLERANCE = 1e-6
"""Of numbers with a fraction in APPS and TACO, whose checkers accept it. LiveCodeBench compares exactly."""

_READS = "The program reads from standard input and prints to standard output."
_TEXT_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
_UNICODE_OPCODES = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}


def convert(fields: Mapping[str, Any], data_source: str) -> Problem | None:
    """Convert a row of any of the schemas; a row of APPS or TACO without tests is of another kind.

    Raises:
        RowError: it has none of the schemas, or its tests cannot be read.
    """
    if "question_content" in fields:
        return livecodebench_problem(fields, data_source)
    if "entry_point" in fields:
        return humaneval_problem(fields, data_source)
    if "test_list" in fields:
        return mbpp_problem(fields, data_source)
    if "input_output" in fields:
        return apps_problem(fields, data_source)
    raise RowError(
        "has the fields of none of LiveCodeBench (question_content), HumanEval (entry_point), MBPP (test_list), APPS "
        "and TACO (input_output)"
    )


def _problem(data_source: str, question: str, tests: CodeTests) -> Problem:
    text = tests.text()
    try:
        read_tests(text)
    except ValueError as error:
        raise RowError(f"its tests are not complete: {error}") from error
    return Problem(data_source, question, text, "code")


def _fenced(text: str) -> str:
    return f"```python\n{text.strip(chr(10))}\n```"


def _json(fields: Mapping[str, Any], name: str) -> Any:
    try:
        return parse_json(text_field(fields, name))
    except UntrustedError as error:
        raise RowError(f"field {name!r} {error}") from error


# ---------------------------------------------------------------- LiveCodeBench


def livecodebench_problem(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `question_content`, `starter_code`, `public_test_cases`, `private_test_cases`, `metadata`."""
    question, starter = text_field(fields, "question_content"), fields.get("starter_code")
    cases = _json(fields, "public_test_cases")
    if not isinstance(cases, list):
        raise RowError("field 'public_test_cases' is not a list")
    if fields.get("private_test_cases"):
        cases = cases + _private_cases(text_field(fields, "private_test_cases"))
    try:
        kinds = {case.get("testtype", "stdin") for case in cases}
        pairs = [(case["input"], case["output"]) for case in cases]
    except (AttributeError, KeyError, TypeError) as error:
        raise RowError("a test case is not a record of input, output and testtype") from error
    if kinds <= {"stdin"}:
        return _problem(data_source, f"{question}\n\n{_READS}", CodeTests("stdin", [list(pair) for pair in pairs]))
    if kinds != {"functional"}:
        raise RowError(f"test cases are of the kinds {sorted(map(str, kinds))}, must be all stdin or all functional")
    metadata = _json(fields, "metadata")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise RowError("field 'metadata' has no func_name, which its tests call")
    try:
        tests = [[[parse_json(line) for line in given.split("\n")], parse_json(result)] for given, result in pairs]
    except (UntrustedError, AttributeError) as error:
        raise RowError(f"a test case {error}") from error
    if isinstance(starter, str) and starter.strip():
        question = f"{question}\n\nComplete this code:\n{_fenced(starter)}"
    return _problem(data_source, question, CodeTests("call", tests, names=[name]))


def _private_cases(text: str) -> list[Any]:
    """Decode private test cases: JSON, or base64 of zlib of a pickled text of JSON, without unpickling."""
    if not text.startswith("["):
        try:
            text = pickled_text(inflated(base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError) as error:
            raise RowError(f"field 'private_test_cases' is neither JSON nor a compressed text ({error})") from error
    try:
        cases = parse_json(text)
    except UntrustedError as error:
        raise RowError(f"field 'private_test_cases' {error}") from error
    if not isinstance(cases, list):
        raise RowError("field 'private_test_cases' is not a list")
    return cases


def pickled_text(content: bytes) -> str:
    """Return the text that a pickle holds, read by its opcodes and never executed.

    Raises:
        ValueError: it is not the pickle of one text.
    """
    texts = []
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _UNICODE_OPCODES:
            texts.append(argument)
        elif opcode.name not in _TEXT_OPCODES:
            raise ValueError(f"is a pickle with {opcode.name}, must be one of a text")
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ValueError(f"is a pickle of {len(texts)} texts, must be of one")
    return texts[0]


def within(first: str | None, last: str | None) -> Convert:
    """Return the conversion of LiveCodeBench's rows whose contest was in a window of days, both included.

    Raises:
        DataError: a day is not a date.
    """
    try:
        days = [date.fromisoformat(day) if day else None for day in (first, last)]
    except ValueError as error:
        raise DataError(f"--from-date {first} --until-date {last}: {error}; write a day as 2024-08-01") from error

    def in_window(fields: Mapping[str, Any], data_source: str) -> Problem | None:
        try:
            # Other schemas have no such field, so they take no dates.
            day = date.fromisoformat(text_field(fields, "contest_date")[:10])
        except ValueError as error:
            raise RowError(f"field 'contest_date' is not a date ({error})") from error
        begins, ends = days
        if (begins and day < begins) or (ends and day > ends):
            return None
        return livecodebench_problem(fields, data_source)

    return in_window if any(days) else livecodebench_problem


# ---------------------------------------------------------------- HumanEval, MBPP


def humaneval_problem(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `prompt`, `entry_point` and `test`, of HumanEval or HumanEval+."""
    prompt = text_field(fields, "prompt")
    question = f"Complete this function:\n{_fenced(prompt)}"
    tests = CodeTests("assert", text_field(fields, "test"), names=[text_field(fields, "entry_point")], setup=prompt)
    _parsed(tests.tests, "test")
    _parsed(prompt, "prompt")
    return _problem(data_source, question, tests)


def mbpp_problem(fields: Mapping[str, Any], data_source: str) -> Problem:
    """Convert the fields `text` (or `prompt`), `code`, `test_list` and, if there, `test_setup_code`, `test_imports`.

    Those of MBPP+ have a longer text `test`. The first of the list is part of the question, which without it does not
    say what the function is called.
    """
    listed = fields.get("test_list")
    if not isinstance(listed, list) or not listed or not all(isinstance(test, str) for test in listed):
        raise RowError(f"field 'test_list' is not a list of assertions (found {listed!r:.60})")
    before = [*(fields.get("test_imports") or []), fields.get("test_setup_code") or ""]
    test = fields.get("test")
    text = "\n".join([*map(str, before), *([test] if isinstance(test, str) and test.strip() else listed)]).strip()
    tested = _parsed(text, "test_list")
    defined = {
        node.name
        for node in _parsed(text_field(fields, "code"), "code").body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    used = [node.id for node in ast.walk(tested) if isinstance(node, ast.Name) and node.id in defined]
    if not used:
        raise RowError("field 'test_list' calls no function of the field 'code'")
    question = f"{text_field(fields, 'text', 'prompt')}\n\nIt must pass this test:\n{_fenced(listed[0])}"
    return _problem(data_source, question, CodeTests("assert", text, names=list(dict.fromkeys(used))))


def _parsed(text: str, name: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RowError(f"field {name!r} is not Python ({error})") from error


# ---------------------------------------------------------------- APPS, TACO


def apps_problem(fields: Mapping[str, Any], data_source: str) -> Problem | None:
    """Convert the fields `question`, `starter_code` and `input_output`; None without tests."""
    if not fields.get("input_output"):
        return None
    record, question = _json(fields, "input_output"), text_field(fields, "question")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), list) for key in ("inputs", "outputs")):
        raise RowError("field 'input_output' is not a record of the lists inputs and outputs")
    inputs, outputs, name = record["inputs"], record["outputs"], record.get("fn_name")
    if len(inputs) != len(outputs):
        raise RowError(f"field 'input_output' has {len(inputs)} inputs and {len(outputs)} outputs")
    if not inputs:
        return None
    starter = fields.get("starter_code")
    if isinstance(starter, str) and starter.strip():
        question = f"{question}\n\nComplete this code:\n{_fenced(starter)}"
    pairs = list(zip(inputs, outputs, strict=True))
    if name is None:
        tests = CodeTests("stdin", [[_lines(given), _lines(result)] for given, result in pairs], tolerance=TOLERANCE)
        return _problem(data_source, f"{question}\n\n{_READS}", tests)
    if not isinstance(name, str) or not name:
        raise RowError(f"field 'input_output' has the fn_name {name!r:.60}, must be the name of a function")
    # Most results are in a list of their own, some are lists themselves.
    called = [
        [given, result, *(result if isinstance(result, list) and len(result) == 1 else [])] for given, result in pairs
    ]
    return _problem(data_source, question, CodeTests("call", called, names=[name], tolerance=TOLERANCE))


def _lines(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else str(value)


# ---------------------------------------------------------------- the command


def source(data: TrainingData) -> Source:
    """Return how the rows of `data` are read."""
    for name in ("val_source", "val_benchmark", "split", "from_date", "until_date"):
        if data.source is None and getattr(data, name) is not None:
            raise DataError(
                f"--{name.replace('_', '-')} (data.{name}): is for rows of --source (data.source), and generated tasks "
                f"have none; give a source"
            )
    window = within(data.from_date, data.until_date)

    def of_any_schema(fields: Mapping[str, Any], data_source: str) -> Problem | None:
        if "question_content" in fields or data.from_date or data.until_date:
            return window(fields, data_source)
        return convert(fields, data_source)

    given = str(data.source)
    validation = validation_split(data)
    splits = {"train": "train"} | ({"test": validation} if validation else {})
    return Source("code", given, given if given in CODE_SOURCES else "own/code", of_any_schema, TEMPLATE, splits)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = command.parser("code", "Programming problems as parquet files for training.")
    options.add_argument("--val-source", help="file, folder or hub name with the rows to validate with")
    options.add_argument(
        "--split", type=float, help="share of the rows to train on (default 0.95, unless others are given)"
    )
    add_dates(options)
    given = vars(options.parse_args(argv))
    out, limit = given.pop("out"), given.pop("limit")
    data = TrainingData("code", train_rows=limit, val_rows=limit, **given)
    return command.run(lambda: prepare_training(out, data))


def add_dates(options: Any) -> None:
    """Add the options of LiveCodeBench's window."""
    options.add_argument("--from-date", metavar="DAY", help="LiveCodeBench: first day of contests, as 2024-08-01")
    options.add_argument("--until-date", metavar="DAY", help="LiveCodeBench: last day of contests")


if __name__ == "__main__":
    sys.exit(main())
