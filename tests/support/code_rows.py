"""Rows in the schemas of the programming data sets, made of the project's generated tasks."""

import base64
import json
import pickle
import zlib
from collections.abc import Callable
from typing import Any

from data_prep.code_tasks import Task

Made = tuple[dict[str, Any], str]
"""A row and the program that solves it."""


def wrong(task: Task) -> str:
    """The program with one mistake."""
    addition = {"x": "1", "items": "[0]", "text": "'!'"}[task.family.argument.partition(":")[0]]
    if task.family.name == "above":
        addition = "1"
    heading, body = task.program.splitlines()
    return f"{heading}\n{body.replace('return ', 'return (')}) + {addition}\n"


def _reading(program: str, task: Task) -> str:
    """The program of a task as one that reads a line of JSON and prints."""
    return f"import json\n{program}\nprint(json.dumps({task.family.name}(json.loads(input()))))\n"


def _pairs(task: Task) -> list[dict[str, str]]:
    return [{"input": json.dumps(given) + "\n", "output": json.dumps(result)} for given, result in task.tests]


def _compressed(cases: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def _livecodebench(task: Task, program: str) -> Made:
    name, argument = task.family.name, task.family.argument
    row = {
        "question_title": name,
        "question_content": f"Return {task.says}. ({name} {task.a} {task.b})",
        "platform": "leetcode",
        "contest_date": f"2024-{task.a:02d}-{task.b:02d}T00:00:00",
        "difficulty": "easy",
    }
    if task.a % 2:
        cases = [case | {"testtype": "stdin"} for case in _pairs(task)]
        row |= {"starter_code": "", "metadata": "{}"}
        program = _reading(program, task)
    else:
        cases = [
            {"input": json.dumps(given), "output": json.dumps(result), "testtype": "functional"}
            for given, result in task.tests
        ]
        method = f"class Solution:\n    def {name}(self, {argument}):\n"
        row |= {"starter_code": f"{method}        ", "metadata": json.dumps({"func_name": name})}
        program = f"{method}        {program.splitlines()[1].strip()}\n"
    row |= {"public_test_cases": json.dumps(cases[:1]), "private_test_cases": _compressed(cases[1:])}
    return row, program


def _prompt(task: Task) -> str:
    return f'{task.heading}\n    """Return {task.says}."""\n'


def _humaneval(task: Task, program: str) -> Made:
    checks = "".join(f"    assert candidate({given!r}) == {result!r}\n" for given, result in task.tests)
    return {
        "task_id": f"Own/{task.family.name}",
        "prompt": _prompt(task),
        "entry_point": task.family.name,
        "canonical_solution": task.program.partition("\n")[2],
        "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n{checks}\n",
    }, program


_PLUS = """
import numpy as np

def is_floats(x):
    return isinstance(x, float) or isinstance(x, np.ndarray) and x.dtype == np.float64

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"
"""


def _plus(task: Task, function: str, indent: str) -> str:
    lines = (
        f"inputs = {[[given] for given, _ in task.tests]!r}",
        f"results = {[result for _, result in task.tests]!r}",
        "for i, (inp, exp) in enumerate(zip(inputs, results)):",
        f"    assertion({function}(*inp), exp, 0)",
    )
    return "".join(f"{indent}{line}\n" for line in lines)


def _humaneval_plus(task: Task, program: str) -> Made:
    row, _ = _humaneval(task, program)
    test = f"{_PLUS}\n\ndef check(candidate):\n{_plus(task, 'candidate', '    ')}"
    return row | {"test": test}, program


def _mbpp(task: Task, program: str) -> Made:
    return {
        "task_id": task.a,
        "text": f"Write a function that returns {task.says}.",
        "code": task.program.replace("\n", "\r\n"),
        "test_list": [f"assert {task.family.name}({given!r}) == {result!r}" for given, result in task.tests],
        "test_setup_code": "",
        "challenge_test_list": [],
    }, program


def _mbpp_plus(task: Task, program: str) -> Made:
    row, _ = _mbpp(task, program)
    row["prompt"] = row.pop("text")
    return row | {"test_imports": ["import math"], "test": _PLUS + _plus(task, task.family.name, "")}, program


def _apps(task: Task, program: str) -> Made:
    row = {"question": f"Return {task.says}. ({task.family.name} {task.a} {task.b})", "difficulty": "introductory"}
    pairs = _pairs(task)
    record: dict[str, Any] = {
        "inputs": [pair["input"] for pair in pairs],
        "outputs": [pair["output"] for pair in pairs],
    }
    if task.a % 2:
        row["starter_code"], program = "", _reading(program, task)
    else:
        record = {
            "fn_name": task.family.name,
            "inputs": [[given] for given, _ in task.tests],
            "outputs": [[result] for _, result in task.tests],
        }
        row["starter_code"] = f"{task.heading}\n    "
    return row | {"input_output": json.dumps(record), "solutions": json.dumps([program])}, program


SCHEMAS: dict[str, Callable[[Task, str], Made]] = {
    "livecodebench": _livecodebench,
    "humaneval": _humaneval,
    "humaneval_plus": _humaneval_plus,
    "mbpp": _mbpp,
    "mbpp_plus": _mbpp_plus,
    "apps": _apps,
}
