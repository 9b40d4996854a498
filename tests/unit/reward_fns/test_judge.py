"""The judge's process: bounded in time, memory and rights, replaced when it dies, and never silent about a failure."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from reward_fns import compute_score, judge

REPOSITORY = Path(__file__).parents[3]

ENDLESS = "(8^{8})!"
"""A number of 100 million digits."""


@pytest.fixture(scope="module", autouse=True)
def impatient() -> Iterator[None]:
    """A worker that stops its comparisons soon."""
    judge.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "SECONDS", 0.5)
        yield
    judge.close()


def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> judge.Judge:
    """A judge whose worker runs `code`, with `there` as its connection."""
    script = tmp_path / "math_worker.py"
    script.write_text(
        "import json, sys, time\nfrom multiprocessing.connection import Connection\n"
        f"there = Connection(int(sys.argv[1]))\n{textwrap.dedent(code)}",
        encoding="utf-8",
    )
    monkeypatch.setattr(judge, "WORKER", script)
    return judge.Judge()


def run_python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def test_threads_and_executors_share_one_worker_and_get_their_own_verdicts() -> None:
    pairs = [(f"x+{n}", f"{n if n % 3 else n + 1}+x") for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda pair: judge.equal(*pair), pairs)) == [n % 3 != 0 for n in range(40)]
    worker = judge.worker_pid()

    async def ask() -> list[bool]:
        loop = asyncio.get_running_loop()
        texts = [f"\\boxed{{{n}+y}}" for n in range(20)]
        results = await asyncio.gather(
            *(loop.run_in_executor(None, compute_score, "math", text, "y + 7") for text in texts)
        )
        return [result["acc"] == 1.0 for result in results]

    assert asyncio.run(ask()) == [n == 7 for n in range(20)]
    assert judge.worker_pid() == worker


def test_a_comparison_that_does_not_end_is_stopped_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert judge.equal("a+1", "1+a")
    worker, stopped = judge.worker_pid(), judge.counts().stopped
    started = time.monotonic()
    assert not judge.equal(ENDLESS, "7")
    assert judge.SECONDS <= time.monotonic() - started < judge.SECONDS + 2
    assert "was stopped: it counts as wrong" in caplog.text and judge.counts().stopped == stopped + 1
    assert judge.equal("a+2", "2+a")
    assert judge.worker_pid() == worker, "the fork is replaced, not the worker"


def test_a_thousand_equal_answers_that_do_not_end_cost_one_time_out() -> None:
    asked = judge.Judge()
    assert asked.equal("a+1", "1+a")
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda n: asked.equal(*((ENDLESS, "8") if n % 2 else ("8", ENDLESS))), range(1024)))
    assert verdicts == [None] * 1024 and asked.counts.stopped == 1024
    assert time.monotonic() - started < 2 * judge.SECONDS + 1
    asked.close()


def test_no_more_stopped_pairs_are_remembered_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MOST_STOPPED", 2)
    code = """
        there.send_bytes(b"ready")
        while True:
            there.send_bytes(json.dumps([json.loads(there.recv_bytes())[0], None, "", ""]).encode())
        """
    asked = fake_worker(tmp_path, monkeypatch, code)
    for truth in ("1", "2", "3", "3"):
        assert asked.equal("x", truth) is None
    assert list(asked._stopped) == [frozenset("x2"), frozenset("x3")]
    asked.close()


def test_what_the_guard_refuses_and_what_fails_is_counted_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
        there.send_bytes(b"ready")
        for trouble, refusals in (("", "compile of <string>"), ("failed with TypeError", "")):
            there.send_bytes(json.dumps([json.loads(there.recv_bytes())[0], False, trouble, refusals]).encode())
        there.recv_bytes()
        """
    asked = fake_worker(tmp_path, monkeypatch, code)
    assert asked.equal("x", "1") is False and asked.equal("x", "2") is False
    assert asked.counts == judge.Counts(stopped=0, failed=1, refused=1)
    assert "the guard of math_worker.py refused compile of <string>, so the verdict may be wrong" in caplog.text
    assert "judging 'x' against '2' failed with TypeError: it counts as wrong" in caplog.text
    asked.close()


def test_a_worker_that_was_killed_is_replaced() -> None:
    assert judge.equal("b+1", "1+b")
    worker = judge.worker_pid()
    assert worker is not None
    os.killpg(worker, signal.SIGKILL)
    assert judge.equal("b+2", "2+b")
    assert judge.worker_pid() != worker


def test_a_fork_that_was_killed_costs_nothing() -> None:
    assert judge.equal("c+1", "1+c")
    worker = judge.worker_pid()
    (fork,) = psutil.Process(worker).children()
    fork.kill()
    assert judge.equal("c+2", "2+c")
    assert judge.worker_pid() == worker


def test_the_worker_has_a_memory_limit_no_secrets_and_no_way_to_new_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    asked = judge.Judge()
    assert asked.equal("d+1", "1+d")
    worker = psutil.Process(asked.pid)
    (fork,) = worker.children()
    assert set(worker.environ()) <= {"PATH", "LANG", "LANGUAGE", "LD_LIBRARY_PATH"} | {
        name for name in os.environ if name.startswith("LC_")
    }
    for process in (worker, fork):
        assert process.rlimit(psutil.RLIMIT_AS) == (judge.MEMORY, judge.MEMORY)
        assert "NoNewPrivs:\t1" in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    asked.close()


def test_a_fork_of_this_process_gets_a_worker_of_its_own() -> None:
    assert judge.equal("f+1", "1+f")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mine = judge.worker_pid() is None and judge.equal("f+2", "2+f")
            os.write(writer, b"yes" if mine else b"no")
            judge.close()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == b"yes"
    os.waitpid(child, 0)
    assert judge.equal("f+3", "3+f")


def test_no_worker_outlives_its_process_even_when_that_is_killed() -> None:
    parent = run_python(
        """
        import time
        from reward_fns import judge
        assert judge.equal("x+1", "1+x")
        print(judge.worker_pid(), flush=True)
        time.sleep(60)
        """
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    forks = worker.children()
    assert forks
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs([worker, *forks], timeout=10)
    assert not alive and len(gone) == 2


def test_signals_that_the_process_blocks_or_ignores_do_not_disarm_the_timer() -> None:
    child = run_python(
        f"""
        import signal, time
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        from reward_fns import judge
        assert judge.equal("x+1", "1+x")
        started = time.monotonic()
        assert not judge.equal({ENDLESS!r}, "7")
        print(time.monotonic() - started)
        """
    )
    out, _ = child.communicate(timeout=60)
    assert float(out) < 1.2 + judge.GRACE / 2


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("raise SystemExit(1)", "math_worker.py does not start"),
        ("there.send_bytes(b'the judge finds 1 and 2 equal')", "^the judge finds 1 and 2 equal$"),
    ],
)
def test_a_worker_that_cannot_start_is_a_fault_of_the_installation(
    code: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        fake_worker(tmp_path, monkeypatch, code).equal("x", "y")


def test_a_worker_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_worker(tmp_path, monkeypatch, "there.send_bytes(b'ready')\ntime.sleep(60)\n")
    monkeypatch.setattr(judge, "SECONDS", 0.2)
    monkeypatch.setattr(judge, "GRACE", 0.2)
    assert asked.equal("x", "y") is None
    assert asked.pid is None


def test_a_late_reply_is_not_taken_for_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        there.send_bytes(b"ready")
        number = json.loads(there.recv_bytes())[0]
        there.send_bytes(json.dumps([number - 1, True, "", ""]).encode())
        there.send_bytes(json.dumps([number, False, "", ""]).encode())
        there.recv_bytes()
        """
    asked = fake_worker(tmp_path, monkeypatch, code)
    assert asked.equal("x", "y") is False
    asked.close()


# ---------------------------------------------------------------- the guard


def test_the_guard_refuses_to_compile_text_and_to_touch_anything_and_says_so() -> None:
    child = run_python(
        """
        import os, socket, subprocess, sympy
        from reward_fns import math_worker
        compare = math_worker.comparison()
        print("warm" if math_worker.warm_up(compare) == "" else "cold")
        print("told" if "finds" in math_worker.warm_up(lambda *_: False) else "silent")
        try:
            sympy.sympify("__import__('os').getpid()")
        except (SyntaxError, sympy.SympifyError):
            print("sympify")
        math_worker.forbid_code()
        for act, *arguments in (
            (eval, "1 + 1"), (exec, "x = 1"), (compile, "1", "<string>", "eval"), (os.system, "true"), (os.fork,),
            (subprocess.Popen, ["true"]), (os.kill, os.getpid(), 0), (os.symlink, "a", "b"), (os.link, "a", "b"),
            (os.chmod, ".", 0), (os.truncate, "written", 0), (open, "written", "w"), (socket.socket,),
            (os.open, "written", os.O_CREAT | os.O_WRONLY),
        ):
            math_worker.refused.clear()
            try:
                act(*arguments)
            except PermissionError:
                print(act.__name__ if math_worker.refused else act.__name__ + " without a word")
        print(compare("x+0.5", "\\\\frac{1}{2}+x"))
        """
    )
    out, _ = child.communicate(timeout=60)
    assert out.split() == [
        *("warm", "told", "sympify", "eval", "exec", "compile", "system", "fork", "Popen", "kill", "symlink", "link"),
        *("chmod", "truncate", "open", "socket", "open", "True"),
    ]


def test_sympy_would_eval_numbers_and_the_worker_does_not() -> None:
    """The reason for `read_number`: without it the audit hook has something to refuse."""
    code = """
        import importlib, sys
        import sympy.parsing.sympy_parser as parser
        from reward_fns import math_worker
        compare = math_worker.comparison()
        math_worker.warm_up(compare)
        counts = []
        sys.addaudithook(lambda event, args: counts.append(event) if event == "compile" else None)
        compare("x+17.5", "19+x")
        print(len(counts))
        importlib.reload(parser)
        counts.clear()
        compare("x+18.5", "20+x")
        print(len(counts))
        """
    out, _ = run_python(code).communicate(timeout=60)
    ours, original = map(int, out.split())
    assert ours == 0 and original > 0
