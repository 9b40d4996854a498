"""Mathematical answers: what is equal, what is not, and that nothing a model writes is run, hangs or kills."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from reward_fns import compute_score, judge, math_answer
from reward_fns.forms import answer_text, last_boxed
from reward_fns.math_answer import equal, normalised, number, refusal
from reward_fns.perturbations import PERTURBATIONS, perturbed

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside the repository")


def math500() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "math500" / "test.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- where the answer is


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{1} and then \\boxed{2}.", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{[0, 1\\}}", "[0, 1\\}"),
        ("\\boxed{a \\\\}", "a \\\\"),
        ("\\fbox{7}", "7"),
        ("\\boxed {7}", "7"),
        ("$\\boxed 7$", "7"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5} and \\boxed{6", ""),
        ("\\boxedx{5}", ""),
        ("\\boxed{}", ""),
        ("nothing", ""),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\\boxed{1}\n#### 2", {"any": "2", "boxed": "1", "hash": "2", "line": ""}),
        ("#### 2\n\\boxed{1}", {"any": "1", "boxed": "1", "hash": "2", "line": ""}),
        ("Answer: 3\nso \\boxed{1}", {"any": "1", "boxed": "1", "hash": "", "line": "3"}),
        ("**Answer:** 3.", {"any": "3", "boxed": "", "hash": "", "line": "3"}),
        ("Answer: 3\nANSWER : 4", {"any": "4", "boxed": "", "hash": "", "line": "4"}),
        ("The final answer is $x^2$.", {"any": "$x^2$", "boxed": "", "hash": "", "line": "$x^2$"}),
        ("Answer: 3, no \\boxed{", {"any": "", "boxed": "", "hash": "", "line": "3, no \\boxed{"}),
        ("#### 2 \nthat is it", {"any": "2", "boxed": "", "hash": "2", "line": ""}),
        ("it is 5", {"any": "", "boxed": "", "hash": "", "line": ""}),
    ],
)
def test_every_form_counts_by_its_last_occurrence(text: str, wanted: dict[str, str]) -> None:
    assert {form: answer_text(text, form) for form in wanted} == wanted


# ---------------------------------------------------------------- what is equal

EQUAL = [
    ("\\dfrac{1}{2}", "\\frac12"),
    ("1/2", "\\frac{1}{2}"),
    ("0.5", "\\frac{1}{2}"),
    ("-\\frac{3}{4}", "\\frac{-3}{4}"),
    ("1,234,567", "1234567"),
    ("11,\\!111", "11111"),
    ("2{,}000", "2000"),
    ("50\\%", "50"),
    ("90^\\circ", "90"),
    ("\\$32", "32"),
    ("$5$", "5"),
    ("5.", "5"),
    ("1.6 \\times 10^{3}", "1600"),
    ("2.5e-3", "0.0025"),
    ("x = 5", "5"),
    ("5 \\text{ cm}", "5"),
    ("5\\text{ cm}^2", "5"),
    ("5 dollars", "5"),
    ("3\\sqrt{2} \\text{ m}", "3\\sqrt2"),
    ("1 + g", "g + 1"),
    ("2 \\text{ and } 3", "2,3"),
    ("\\text{Evelyn}", "evelyn"),
    ("(C)", "\\text{C}"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
    ("\\{2, 1\\}", "\\{1,2\\}"),
    ("2,1", "1, 2"),
    ("[1,2)", "[1, 2)"),
    ("(-\\infty, 3]", "(-∞,3]"),
    ("x \\ge 3", "3 \\le x"),
    ("2(x+1)", "2x+2"),
    ("\\frac{2}{\\sqrt{2}}", "\\sqrt{2}"),
    ("\\frac{\\sqrt{3}}{2}", "\\frac{3}{2\\sqrt3}"),
    ("3\\frac{1}{2}", "\\frac{7}{2}"),
    ("y = 2x + 1", "y=1+2x"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("52_{8}", "52_8"),
    ("2\\pi", "2π"),
    ("1\\pm\\sqrt{19}", "1 \\pm \\sqrt{19}"),
]
DIFFERENT = [
    ("6", "5"),
    ("-5", "5"),
    ("\\frac{2}{1}", "\\frac{1}{2}"),
    ("0.333333", "\\frac{1}{3}"),
    ("1, 234", "1234"),
    ("12", "1 2"),
    ("0.5\\%", "50"),
    ("1600", "1.6 \\times 10^{2}"),
    ("\\text{Evelyn}", "\\text{Carla}"),
    ("3", "3t"),
    ("3", "3 pi"),
    ("2 + m", "2 + g"),
    ("5 cm", "6 cm"),
    ("(3, \\frac{\\pi}{3})", "(3, \\frac{\\pi}{2})"),
    ("(2, 1)", "(1, 2)"),
    ("\\{1\\}", "\\{1,2\\}"),
    ("\\{1,2,3\\}", "\\{1,2\\}"),
    ("[1,2]", "[1,2)"),
    ("(-\\infty, 3)", "(-\\infty, 3]"),
    ("x \\ge 3", "x \\le 3"),
    ("2(x-1)", "2x+2"),
    ("\\sqrt{3}", "\\sqrt{2}"),
    ("52_7", "52_8"),
    ("2", "2\\pi"),
    ("5 or 6", "5"),
    ("", "5"),
    ("?", "5"),
    ("1/0", "5"),
    ("\\frac{1}{0}", "\\infty"),
    ("\\sum_{n=1}^{10} n", "55"),
    ("\\int_0^1 2x dx", "1"),
    ("nan", "5"),
]


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_the_same_answer_written_otherwise_is_right(answer: str, truth: str) -> None:
    assert equal(answer, truth)
    assert equal(truth, truth)


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_another_answer_is_wrong(answer: str, truth: str) -> None:
    assert not equal(answer, truth)


def test_plain_numbers_are_decided_without_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "equal", lambda *_: pytest.fail("asked the worker"))
    assert equal("1,234.50", "1234.5") and not equal("1235", "1234") and equal("\\frac{10}{4}", "2.5")
    assert equal("  x^2 ", "x^2") and equal("\\text{even}", "Even")
    assert not equal("9" * 500, "9") and not equal("(" * 100, "9")


def test_numbers_are_exact() -> None:
    assert number("0.1") == number("\\frac{1}{10}") == number("1/10") == number("1e-1")
    assert number("1" * 40) == int("1" * 40)
    for text in ("", "-", ".", "1/0", "1..2", "1,23", "x", "1e9999", "--1"):
        assert number(text) is None, text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("x\0", "control"),
        ("x\ud800", "control"),
        ("(" * 13 + "x" + ")" * 13, "nested"),
        ("{x", "braces"),
        ("x} + {y", "braces"),
        ("x" + "9" * 41, "digits"),
        ("10^{99999}", "power"),
        ("x^{201}", "power"),
        ("9^{9^{9}}", "power of a power"),
        ("9^9^9", "power of a power"),
        ("9999!", "factorial"),
        ("(9!)!", "factorial"),
        ("\\binom{10000}{5000}", "binomial"),
        ("\\lim_{x \\to 0} x", "not evaluated"),
    ],
)
def test_what_could_run_away_is_refused_by_its_text(answer: str, reason: str) -> None:
    assert reason in refusal(answer, "5")


@pytest.mark.parametrize(
    "answer", ["(" * 12 + "x" + ")" * 12, "2^{1000}x", "x^{200}", "x^2+y^2", "\\{\\}", "5!", "|x|"]
)
def test_usual_answers_are_not_refused(answer: str) -> None:
    assert refusal(answer, "5") == ""
    assert refusal("\\int x dx", "\\int y dy") == ""


def test_normalised_text_keeps_what_matters() -> None:
    assert normalised("\\left( 3 ,\\; \\dfrac12 \\right)") == "(3,\\frac{1}{2})"
    assert normalised("\\leftarrow x") == "\\leftarrow x"
    assert normalised("two words") == "two words" and normalised("x  y") == "x y"


# ---------------------------------------------------------------- the worker


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


def test_a_comparison_that_does_not_end_is_stopped_and_the_next_one_works() -> None:
    assert judge.equal("a + 1", "1 + a")
    worker = judge.worker_pid()
    started = time.monotonic()
    assert not judge.equal("(a+b+c+d+e+f)^{150}", "7")
    assert judge.SECONDS <= time.monotonic() - started < judge.SECONDS + 2
    assert judge.equal("a + 2", "2 + a")
    assert judge.worker_pid() == worker, "the fork is replaced, not the worker"


def test_a_stopped_comparison_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert not judge.equal("(a+b+c+d+e+f)^{151}", "7")
    assert "was stopped: it counts as wrong" in caplog.text


def test_a_worker_that_was_killed_is_replaced() -> None:
    assert judge.equal("b + 1", "1 + b")
    worker = judge.worker_pid()
    assert worker is not None
    os.killpg(worker, signal.SIGKILL)
    assert judge.equal("b + 2", "2 + b")
    assert judge.worker_pid() != worker


def test_a_fork_that_was_killed_costs_nothing() -> None:
    assert judge.equal("c + 1", "1 + c")
    worker = judge.worker_pid()
    (fork,) = psutil.Process(worker).children()
    fork.kill()
    assert judge.equal("c + 2", "2 + c")
    assert judge.worker_pid() == worker


def test_the_worker_has_a_memory_limit() -> None:
    assert judge.equal("d + 1", "1 + d")
    (fork,) = psutil.Process(judge.worker_pid()).children()
    for process in (psutil.Process(judge.worker_pid()), fork):
        assert process.rlimit(psutil.RLIMIT_AS) == (judge.MEMORY, judge.MEMORY)


def test_a_fork_of_this_process_gets_a_worker_of_its_own() -> None:
    assert judge.equal("f + 1", "1 + f")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mine = judge.worker_pid() is None and judge.equal("f + 2", "2 + f")
            os.write(writer, b"yes" if mine else b"no")
            judge.close()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == b"yes"
    os.waitpid(child, 0)
    assert judge.equal("f + 3", "3 + f")


def run_python(code: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        **options,
    )


def test_no_worker_outlives_its_process_even_when_that_is_killed() -> None:
    parent = run_python(
        """
        import time
        from reward_fns import judge
        assert judge.equal("x + 1", "1 + x")
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
        """
        import signal, time
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        from reward_fns import judge
        assert judge.equal("x + 1", "1 + x")
        started = time.monotonic()
        assert not judge.equal("(a+b+c+d+e+f)^{150}", "7")
        print(time.monotonic() - started)
        """
    )
    out, _ = child.communicate(timeout=60)
    assert float(out) < judge.SECONDS + judge.GRACE / 2


def test_a_worker_that_cannot_start_is_a_fault_of_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "math_worker.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(judge, "WORKER", broken)
    with pytest.raises(RuntimeError, match="does not start"):
        judge.Judge().equal("x", "y")


def test_a_worker_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = tmp_path / "math_worker.py"
    mute.write_text(
        "import sys, time\nfrom multiprocessing.connection import Connection\n"
        "Connection(int(sys.argv[1])).send_bytes(b'ready')\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(judge, "WORKER", mute)
    monkeypatch.setattr(judge, "SECONDS", 0.2)
    monkeypatch.setattr(judge, "GRACE", 0.2)
    asked = judge.Judge()
    assert asked.equal("x", "y") is None
    assert asked.pid is None


def test_a_late_reply_is_not_taken_for_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "math_worker.py"
    late.write_text(
        "import json, sys\nfrom multiprocessing.connection import Connection\n"
        "there = Connection(int(sys.argv[1]))\nthere.send_bytes(b'ready')\n"
        "number = json.loads(there.recv_bytes())[0]\n"
        "there.send_bytes(json.dumps([number - 1, True]).encode())\n"
        "there.send_bytes(json.dumps([number, False]).encode())\nthere.recv_bytes()\n"
    )
    monkeypatch.setattr(judge, "WORKER", late)
    asked = judge.Judge()
    assert asked.equal("x", "y") is False
    asked.close()


# ---------------------------------------------------------------- no code


def test_the_workers_process_refuses_to_compile_text_and_to_touch_anything() -> None:
    child = run_python(
        """
        import os, socket, subprocess, sympy
        from reward_fns import math_worker
        compare = math_worker.comparison()
        try:
            sympy.sympify("__import__('os').getpid()")
        except (SyntaxError, sympy.SympifyError):
            print("sympify")
        math_worker.forbid_code()
        for name, act in {
            "eval": lambda: eval("1 + 1"),
            "exec": lambda: exec("x = 1"),
            "compile": lambda: compile("1", "<string>", "eval"),
            "system": lambda: os.system("true"),
            "popen": lambda: subprocess.Popen(["true"]),
            "fork": lambda: os.fork(),
            "write": lambda: open("written", "w"),
            "create": lambda: os.open("written", os.O_CREAT | os.O_WRONLY),
            "socket": lambda: socket.socket().connect(("127.0.0.1", 9)),
        }.items():
            try:
                act()
            except PermissionError:
                print(name)
        print(compare("x + 0.5", "\\\\frac{1}{2} + x"))
        """
    )
    out, _ = child.communicate(timeout=60)
    names = ["sympify", "eval", "exec", "compile", "system", "popen", "fork", "write", "create", "socket", "True"]
    assert out.split() == names


def test_math_verify_would_eval_numbers_and_ours_does_not() -> None:
    """The reason for `read_number`: without it the audit hook has something to refuse."""
    code = """
        import sys
        from reward_fns import math_worker
        compare = math_worker.comparison()
        {restore}
        for answer, truth in math_worker.WARM_UP:
            compare(answer, truth)
        seen = []
        sys.addaudithook(lambda event, args: seen.append(args) if event == "compile" else None)
        compare("x + 17", "19 + x")
        print(len(seen))
        """
    restore = (
        "import importlib, sympy.parsing.sympy_parser as parser; original = parser.parse_expr; importlib.reload(parser)"
    )
    counts = []
    for text in (restore, "pass"):
        out, _ = run_python(textwrap.dedent(code).replace("{restore}", text)).communicate(timeout=60)
        counts.append(int(out))
    assert counts[0] > 0 and counts[1] == 0


CODE = [
    "__import__('os').system('touch {file}')",
    "\\text{{__import__('os').system('touch {file}')}}",
    "\\operatorname{{exec}}(open('{file}','w'))",
    "\\mathrm{{eval}}(\\text{{open('{file}','w')}})",
    "open('{file}','w')_{{1}}",
    "[].__class__.__base__.__subclasses__()",
    "x; import os; os.mkdir('{file}')",
    "\\f{{open('{file}','w')}}",
]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("form", ["\\boxed{{{}}}", "Answer: {}", "#### {}"])
def test_no_answer_is_run(code: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = form.format(code.format(file=tmp_path / "hacked"))
    for truth in ("x+1", "7"):
        assert compute_score("math", text, truth)["score"] == -1.0
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- real answers


@needs_data
def test_every_gold_solution_of_math500_is_right() -> None:
    rows = math500()
    assert len(rows) == 500
    wrong = [row["answer"] for row in rows if compute_score("math", row["solution"], row["answer"])["acc"] != 1.0]
    assert wrong == []


@needs_data
def test_every_gold_of_the_benchmarks_is_right_when_it_is_boxed() -> None:
    for name, count in {"aime24": 30, "amc23": 40, "minerva_math": 272}.items():
        rows = [json.loads(line) for line in (DATA / "bench" / f"{name}.jsonl").read_text().splitlines()]
        golds = [str(row["answer"]) if "answer" in row else last_boxed(row["solution"]) for row in rows]
        assert len(golds) == count
        for gold in golds:
            assert compute_score(name, f"so \\boxed{{{gold}}}.", gold)["acc"] == 1.0, gold


def accepted(count: int) -> list[tuple[str, str, str]]:
    """The perturbed answers of MATH-500 that the reward takes for right."""
    wrong = list(perturbed([row["answer"] for row in math500()], count, seed=1))
    assert len(wrong) == count and len({kind for _, _, kind in wrong}) == len(PERTURBATIONS)
    return [case for case in wrong if compute_score("math", f"\\boxed{{{case[1]}}}", case[0])["acc"] == 1.0]


@needs_data
def test_perturbed_answers_are_wrong() -> None:
    assert len(accepted(60)) <= 1


@needs_data
@pytest.mark.fuzz
def test_two_thousand_perturbed_answers_are_wrong() -> None:
    found = accepted(2000)
    print(f"\n{len(found)} of 2000 perturbed answers were taken for right: {found}")
    assert len(found) <= 20


def test_an_empty_or_endless_ground_truth_is_a_fault_of_the_data() -> None:
    for truth in ("", "  ", "x" * (math_answer.LONGEST + 1)):
        with pytest.raises(ValueError, match="ground_truth"):
            compute_score("math", "\\boxed{5}", truth)


def test_the_lock_is_not_held_while_nothing_is_asked() -> None:
    """A thread that dies in a comparison must not stop the others."""
    assert judge.equal("g + 1", "1 + g")
    thread = threading.Thread(target=judge.equal, args=("g + 2", "2 + g"))
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive() and judge.equal("g + 3", "3 + g")
