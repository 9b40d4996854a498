"""Programs as answers: where the program is found, how outputs are compared, and how its process is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from reward_fns import check_options, code_judge, compute_score, judge
from reward_fns.code_answer import program
from reward_fns.code_judge import RunOptions, SandboxError
from reward_fns.code_tests import CodeTests, read_tests, same_output, same_value
from tests.unit.reward_fns.test_judge import run_python


@pytest.fixture(scope="module", autouse=True)
def own_server() -> Iterator[None]:
    yield
    code_judge.close()


def fenced(text: str, label: str = "python") -> str:
    return f"```{label}\n{text}\n```\n"


def judged(text: str, tests: CodeTests, **options: object) -> str:
    result = compute_score("own/code", fenced(text), tests.text(), **options)
    assert (result["score"] == 1.0) == (result["acc"] == 1.0) == (result["pred"] == "passed")
    return str(result["pred"])


# ---------------------------------------------------------------- the program in a response


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (fenced("a = 1"), "a = 1"),
        *((fenced("a = 1", label), "a = 1") for label in ("py", "Python", "python3", "python 3", "py3.11", "pypy3")),
        *((fenced("a = 1", label), "a = 1") for label in ("", "{.python}", "python title=x", "python:answer.py")),
        *((fenced("a = 1", label), "") for label in ("cpp", "java", "text", "pyret", "pythonic", "bash")),
        (fenced("a = 1") + fenced("a = 2"), "a = 2"),
        (fenced("a = 1") + "It prints\n" + fenced("1", ""), "a = 1"),
        (fenced("a = 1", "") + fenced("int a;", "c"), "a = 1"),
        (fenced("a = 1") + "```python\na = 2", ""),
        (fenced("a = 1") + "```python\na = 2\n``` done", ""),
        ("~~~python\na = '''\n```\n'''\n~~~", "a = '''\n```\n'''"),
        ("````python\n```\n````", "```"),
        ("  ```python\n  a = 1\n  ```", "  a = 1"),
        ("`a = 1`", ""),
        ("```a = 1```", ""),
        (fenced("   "), ""),
        ("a = 1", ""),
        ("", ""),
    ],
)
def test_the_last_closed_block_of_python_is_the_program(response: str, found: str) -> None:
    assert program(response).rstrip("\n") == found


def test_a_program_counts_after_the_thought_alone() -> None:
    truth = CodeTests("stdin", [["", "1"]]).text()
    right = fenced("print(1)")
    for response, verdict in {
        f"<think>{right}</think>": "no code",
        f"<think>{fenced('print(2)')}</think>{right}": "passed",
        f"<think>{right}": "no code",
    }.items():
        result = compute_score("own/code", response, truth)
        assert (result["pred"], result["well_formed"]) == (verdict, float(verdict != "no code"))


# ---------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("1 2\n3\n\n", "1 2\n3", 0, True),
        ("  1 2  \n 3", "1 2\n3\n", 0, True),
        ("1  2", "1 2", 0, True),
        ("a  b", "a b", 0, False),
        ("1\n2", "1 2", 0, False),
        ("1\n\n2", "1\n2", 0, False),
        ("1.0", "1", 0, True),
        ("1e2", "100", 0, True),
        ("0.1", "0.10000001", 0, False),
        ("0.1", "0.10000001", 1e-6, True),
        ("1000000.5", "1000000", 1e-6, False),
        ("1000000.5", "1000000.0", 1e-6, True),
        ("nan", "1", 0, False),
        ("NaN", "nan", 1e-6, False),
        ("inf", "1.5", 1e-6, False),
        ("Yes", "YES", 0, False),
        ("", "", 0, True),
        ("", "0", 0, False),
        ("1e999999999", "1.5", 1e-6, False),
    ],
)
def test_outputs_are_compared_by_lines_then_by_numbers(
    output: str, expected: str, tolerance: float, same: bool
) -> None:
    assert same_output(output, expected, tolerance) is same


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance", "same"),
    [
        ([1, [2, "a"]], [1, [2, "a"]], 0, True),
        ([1, 2], [2, 1], 0, False),
        ({"a": 1.0}, {"a": 1}, 0, True),
        ({"a": 1}, {"a": 1, "b": 1}, 0, False),
        ([0.1 + 0.2], [0.3], 0, False),
        ([0.1 + 0.2], [0.3], 1e-6, True),
        (1.0000001, 1, 1e-6, False),
        ("1", 1, 1e-6, False),
        (None, 0, 0, False),
    ],
)
def test_results_are_compared_by_value(answer: object, expected: object, tolerance: float, same: bool) -> None:
    assert same_value(answer, expected, tolerance) is same


# ---------------------------------------------------------------- programs

SUM = CodeTests("stdin", [["1 2\n", "3\n"], ["4\n5", "9"]])
MOST = CodeTests("call", [[[[3, 1]], 3], [[[2.5]], 2.5, [2.5]]], names=["most"])
PAIRS = CodeTests(
    "assert",
    "p = Pair(1, 2)\np.left = 5\nassert (p.left, p.right) == (5, 2)\nassert total([p, Pair(3, 4)]) == 14\n"
    "assert list(parts({'a': (1, {2})})) == [('a', (1, {2}))]\n"
    "try:\n    parts(None)\n    assert False\nexcept ValueError:\n    pass\n",
    names=["Pair", "total", "parts"],
)
PAIR = """
class Pair:
    def __init__(self, left, right):
        self.left, self.right = left, right
def total(pairs):
    return sum(pair.left + pair.right for pair in pairs)
def parts(value):
    if value is None:
        raise ValueError
    yield_from = iter(value.items())
    return yield_from
"""


@pytest.mark.parametrize(
    ("text", "tests", "verdict"),
    [
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", SUM, "passed"),
        ("print(sum(map(int, open('/dev/stdin').read().split())))", SUM, "passed"),
        ("a, b = map(int, input().split())\nprint(a + b)", SUM, "error"),
        ("print(3)", SUM, "wrong answer"),
        ("if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))\n    exit(1)", SUM, "passed"),
        (
            "from threading import Thread\nimport sys\nsys.setrecursionlimit(10**6)\n"
            "def down(n):\n    return n and 1 + down(n - 1)\n"
            "Thread(target=lambda: print(sum(map(int, open(0).read().split())) + down(10**4) - 10**4)).start()",
            SUM,
            "passed",
        ),
        ("import numpy\nprint(numpy.array(open(0).read().split(), int).sum())", SUM, "passed"),
        ("print(", SUM, "error"),
        ("while True: pass", SUM, "time-out"),
        ("most = max", MOST, "passed"),
        ("class Solution:\n    def most(self, x: List[int]) -> int:\n        return max(x)", MOST, "passed"),
        ("def most(x):\n    return x[-1]", MOST, "wrong answer"),
        ("def least(x):\n    return min(x)", MOST, "error"),
        ("def most(x):\n    return {max(x)}", MOST, "error"),
        ("def most(x):\n    while len(x) < 2: pass\n    return max(x)", MOST, "time-out"),
        ("import os\ndef most(x):\n    if len(x) < 2: os._exit(0)\n    return max(x)", MOST, "error"),
        ("import os\nos.write(4, b'3\\n2.5\\n' * 2)\ndef most(x):\n    return max(x)", MOST, "error"),
        (PAIR, PAIRS, "passed"),
        (PAIR.replace("+ pair.right", "- pair.right"), PAIRS, "wrong answer"),
        (PAIR.replace("raise ValueError", "raise KeyError"), PAIRS, "error"),
        ("def total(pairs): ...", PAIRS, "error"),
        ("def f(): ...", CodeTests("assert", "assert True", names=["f"]), "error"),
        ("def f(): ...", CodeTests("assert", "def check(f):\n    while True: f()", names=["f"]), "time-out"),
        (
            "def f(): ...",
            CodeTests("assert", "import numpy\nassert numpy.sum([f() is None]) == 1", names=["f"]),
            "passed",
        ),
    ],
)
def test_a_program_gets_its_verdict(text: str, tests: CodeTests, verdict: str) -> None:
    assert judged(text, tests, code_seconds=1.5) == verdict


def test_a_program_sees_neither_the_environment_nor_the_files_of_this_process(monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "x")
    code_judge.close()
    seen = (
        "import os\ndef f():\n    return [sorted(os.listdir('/')), os.listdir('/tmp'), os.getuid(), os.getpid(),"
        "\n        sorted(map(int, os.listdir('/proc/self/fd')))[:-1], sorted(os.environ)]"
    )
    request = {"role": "call", "program": seen, "entry": "f", "calls": [[]]}
    with code_judge._judge.server("namespaces").open(b"run") as connection:
        code_judge._ask(connection, request, RunOptions())
        root, temporary, user, process, files, variables = json.loads(code_judge._answer(connection).output)
    assert not {"home", "var", "mnt", "sys", "run"} & set(root) and {"usr", "proc", "tmp", "dev"} <= set(root)
    python = {Path(sys.prefix).parts[2]} if Path(sys.prefix).is_relative_to("/tmp") else set()
    assert (set(temporary), user, process, files) == (python, 1000, 1, [0, 1, 2, 3, 4])
    ours = {"PYTHONHASHSEED", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "HOME", "TMPDIR", "LC_CTYPE"}
    assert {name for name in variables if not name.startswith("LC_")} - ours <= set(judge.KEPT_VARIABLES)


def test_the_tests_together_have_a_limit_too(monkeypatch) -> None:
    monkeypatch.setattr(code_judge, "ALL_TESTS", 0.01)
    spin = "sum(range(10**7))\nprint(sum(map(int, open(0).read().split())))"
    assert judged(spin, SUM, code_seconds=3) == "time-out"


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("5", "is not the tests of a program"),
        ("def f", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"kind": "shell", "tests": []}', "is not the tests"),
        ('{"kind": "stdin", "tests": []}', "at least one test"),
        ('{"kind": "stdin", "tests": [["1"]]}', "is not a pair"),
        ('{"kind": "stdin", "tests": [["1", 1]]}', "pair of texts"),
        ('{"kind": "call", "tests": [[[1], 1]]}', "which function"),
        ('{"kind": "call", "tests": [[1, 1]], "names": ["f"]}', "list of arguments"),
        ('{"kind": "assert", "tests": "", "names": ["f"]}', "text of Python"),
        ('{"kind": "assert", "tests": "f()", "names": "f"}', "list of names"),
        ('{"kind": "stdin", "tests": [["", ""]], "tolerance": 2}', "'tolerance'"),
        ('{"file": "/nowhere", "sha256": "00"}', "cannot be read"),
        ('{"file": "/etc/hostname", "sha256": "00"}', "are not those that were prepared"),
    ],
)
def test_a_ground_truth_that_is_no_test_is_refused_before_anything_runs(truth: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_score("own/code", "", truth)


def test_the_tests_of_a_record_are_read_as_they_were_written() -> None:
    for tests in (SUM, MOST, PAIRS):
        assert read_tests(tests.text()) == tests
        assert "tolerance" not in json.loads(tests.text())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"code_sandbox": "none"}, "namespaces, rlimits"),
        ({"code_seconds": 0}, "from 0.1 to 600"),
        ({"code_memory_mb": "1G"}, "from 64"),
        ({"code_second": 1}, "code_second: is unknown"),
    ],
)
def test_an_option_that_is_wrong_is_refused(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(**option)


# ---------------------------------------------------------------- processes


def test_many_answers_are_judged_at_once_by_as_many_processes_as_there_are_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    seen = []
    with ThreadPoolExecutor(12) as threads:
        answers = [
            threads.submit(
                judged, f"import time\ntime.sleep(0.05)\nprint({n})", CodeTests("stdin", [["", str(n % 20)]])
            )
            for n in range(40)
        ]
        while not all(answer.done() for answer in answers):
            server = code_judge._judge.server("namespaces").process
            # Behind the three of the server: a guard and a program for each.
            seen.append(len(psutil.Process(server.pid).children(recursive=True)) - 2)
            time.sleep(0.01)
    assert [answer.result() for answer in answers] == ["passed"] * 20 + ["wrong answer"] * 20
    # A guard that has answered may still be ending.
    assert 2 < max(seen) <= 3 * cores


def test_a_server_that_is_killed_is_replaced() -> None:
    assert judged("print(1)", CodeTests("stdin", [["", "1"]])) == "passed"
    first = code_judge._judge.server("namespaces").process
    os.killpg(first.pid, signal.SIGKILL)
    assert judged("print(1)", CodeTests("stdin", [["", "1"]])) == "passed"
    assert code_judge._judge.server("namespaces").process.pid != first.pid


def test_programs_end_with_the_process_that_judges_them() -> None:
    client = run_python(
        """
        from reward_fns import code_judge
        from reward_fns.code_tests import CodeTests
        options = code_judge.RunOptions(seconds=60)
        code_judge.ready(options)
        print(code_judge._judge.server("namespaces").process.pid, flush=True)
        code_judge.verdict("import time; time.sleep(60)", CodeTests("stdin", [["", ""]]), options)
        """
    )
    assert client.stdout is not None
    server = psutil.Process(int(client.stdout.readline()))
    until = time.monotonic() + 20
    while len(family := [server, *server.children(recursive=True)]) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(family) == 5
    client.kill()
    client.wait()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_where_namespaces_are_not_allowed_nothing_runs_and_the_message_says_what_to_do(tmp_path, monkeypatch) -> None:
    script = tmp_path / "code_worker.py"
    script.write_text(
        "import socket, sys\nsocket.socket(fileno=int(sys.argv[1])).send(b'unshare: Operation not permitted')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(code_judge, "WORKER", script)
    monkeypatch.setattr(code_judge, "_judge", code_judge.CodeJudge())
    with pytest.raises(SandboxError, match=r"\(unshare: Operation not permitted\).*code_sandbox=rlimits.*your rights"):
        compute_score("own/code", "", SUM.text())


def test_with_limits_alone_programs_run_where_they_can_see_files_and_still_end(tmp_path: Path) -> None:
    options = {"code_sandbox": "rlimits", "code_seconds": 0.5}
    assert judged("print(sum(map(int, open(0).read().split())))", SUM, **options) == "passed"
    (tmp_path / "file").write_text("7", encoding="utf-8")
    assert judged(f"print(open('{tmp_path}/file').read())", CodeTests("stdin", [["", "7"]]), **options) == "passed"
    assert judged("while True: pass", SUM, **options) == "time-out"
    assert judged("import socket; socket.socket()", SUM, **options) == "error"
    name = f"skpo-daemon-{os.getpid()}"
    daemon = (
        "import os, time\nopen('left', 'w').close()\nprint(os.getcwd(), flush=True)\n"
        f"if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    os.execv('/bin/sleep', ['{name}', '100'])"
    )
    assert judged(daemon, SUM, **options) == "wrong answer"
    assert name not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("skpo-code-*/left"))
    assert RunOptions().sandbox == "namespaces"
