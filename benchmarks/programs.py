"""Answers to programming problems judged per second on this machine, by kind of tests.

Every answer is a right program in the sandbox, so all its tests run; the generated tasks have eight each.  As many
threads ask as a training's reward worker has, and as many programs run at once as there are cores.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

from benchmarks.report import parser_of, table, write_json
from data_prep.code_tasks import TESTS, Task, tasks
from reward_fns import code_judge, compute_score
from reward_fns.code_tests import CodeTests

Asked = tuple[CodeTests, str]
"""Tests and the program that passes them."""


def one_output(task: Task) -> Asked:
    """Print one result."""
    (given, result), *_ = task.tests
    return CodeTests("stdin", [["", str(result)]]), f"{task.program}print({task.family.name}({given!r}))\n"


def results(task: Task) -> Asked:
    """Return every result."""
    tests = [[[given], result] for given, result in task.tests]
    return CodeTests("call", tests, names=[task.family.name]), task.program


def assertions(task: Task) -> Asked:
    """Pass assertions in another sandbox."""
    lines = [f"assert {task.family.name}({given!r}) == {result!r}" for given, result in task.tests]
    return CodeTests("assert", "\n".join(lines), names=[task.family.name]), task.program


KINDS = {"one input and output": one_output, f"{TESTS} calls": results, f"{TESTS} assertions": assertions}


def seconds(asked: Sequence[Asked]) -> float:
    """Measure the seconds to judge all answers.

    Raises:
        RuntimeError: one of them did not pass.
    """

    def judged(tests: CodeTests, program: str) -> object:
        return compute_score("own/code", f"```python\n{program}```\n", tests.text())["pred"]

    with ThreadPoolExecutor(min(32, len(os.sched_getaffinity(0)) + 4)) as threads:
        start = time.perf_counter()
        found = set(threads.map(judged, *zip(*asked, strict=True)))
        taken = time.perf_counter() - start
    if found != {"passed"}:
        raise RuntimeError(f"a right program was not right ({found}); is the machine too busy for the time limit?")
    return taken


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = parser_of("programs", __doc__ or "")
    parser.add_argument("--answers", type=int, default=1024, help="of each kind (default %(default)s)")
    options = parser.parse_args(argv)
    code_judge.ready(code_judge.RunOptions())
    train, _ = tasks(1)
    taken = {
        name: seconds([make(task) for task in islice(cycle(train), options.answers)]) for name, make in KINDS.items()
    }
    rows = [[name, f"{options.answers / value:.1f}", f"{value:.1f}"] for name, value in taken.items()]
    print(table(["tests of an answer", "answers per second", f"seconds for {options.answers}"], rows))
    write_json(options.out, {"answers": options.answers, "seconds": taken})
    return 0
