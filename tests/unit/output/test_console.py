"""Texts under a console and a locale of another encoding: files are UTF-8, and nothing ends for a character."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.skpo.output.metrics import MetricsFile, read_lines
from recipe.skpo.output.trees import FOLDER, TreeStore
from tests.unit.output.test_summary import tree

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCE = "数学/题目"

COMMAND = """\
import locale, sys
from pathlib import Path
assert locale.getpreferredencoding().lower() not in ("utf-8", "utf8"), "the test's locale"
from recipe.skpo.output.page import write_report
from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.output.console import replace_unprintable
from recipe.skpo.output.summary import summary

folder = Path(sys.argv[1])
replace_unprintable()
MetricsFile(folder / "metrics.jsonl", resumed_at=3)
print(summary(folder))
print(write_report(folder).name)
"""


@pytest.mark.parametrize("console", ["gbk", "iso-8859-1", "ascii"])
def test_a_run_is_reported_under_any_encoding(tmp_path: Path, console: str) -> None:
    """The locale C stands for the others, which need not be installed: its ASCII has none of the characters."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.log({f"val-core/{SOURCE}/acc/mean@1": 0.5}, 3)
    TreeStore(tmp_path / FOLDER, 64.0, 0).write(3, [tree(problem="三加四 🙂?")])
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": console}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path)],
        env={**os.environ, **plain, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    lines = done.stdout.decode(console).splitlines()
    shown = SOURCE if console == "gbk" else SOURCE.replace("数学", "??").replace("题目", "??")
    assert any(f"held-out {shown}" in line for line in lines), lines
    assert lines[-1] == "report.html"
    assert "三加四 🙂?" in (tmp_path / "sample_trees.txt").read_text(encoding="utf-8")
    assert f"val-core/{SOURCE}/acc/mean@1" in read_lines(tmp_path / "metrics.jsonl")[0], "not damaged by the resume"


def _locale_dependent(tree: ast.Module) -> list[int]:
    """Lines that open a text, or read a process's, in the locale's encoding; ruff sees less where types are unknown."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {item.arg for item in node.keywords}
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        mode = node.args[0 if method else 1 :][:1]
        opens = name == "open" and (
            (not method and not mode) or any(getattr(item, "value", "") in ("r", "w", "a") for item in mode)
        )
        text = opens or name in ("read_text", "write_text") or keywords & {"text", "universal_newlines"}
        if text and "encoding" not in keywords:
            found.append(node.lineno)
    return found


def test_every_text_has_an_encoding() -> None:
    files = [
        path
        for folder in ("recipe", "data_prep", "reward_fns", "benchmarks", "scripts")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    found = {
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in files
        for line in _locale_dependent(ast.parse(path.read_text(encoding="utf-8")))
    }
    # A method of importlib's, which reads what was installed.
    assert {place for place in found if "distribution_alias" not in place} == set()


SCREEN = r"""
import logging, os, subprocess, sys
from pathlib import Path
from recipe.skpo.output.console import Screen, VARIABLE, configure_logging, say

with Screen(Path(sys.argv[1]) / "logs/run.log", 4):
    print("flood")
    sys.stderr.write("half a "), sys.stderr.write("line\n")
    os.write(2, b"from C++\n")
    subprocess.run(["echo", "from a child"])
    say("for people")
    child = "import logging; from recipe.skpo.output.console import *; configure_logging(); say('step 1/4 here');"
    child += "[logging.getLogger('recipe.skpo.x').warning('trouble %d', i) for i in range(5)];"
    child += "logging.getLogger('recipe.skpo.y').error('failed', exc_info=ValueError('why'))"
    forwarded = subprocess.run([sys.executable, "-c", child], env=os.environ | {VARIABLE: "short"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    for line in forwarded.splitlines():
        print(f"\x1b[36m(Worker(name) pid=7, ip=1.2.3.4)\x1b[0m {line}")
    print("(EngineCore pid=1) quoted [skpo] is not marked")
    print("(Worker pid=7) [skpo] a model's \x1b[2J")
    subprocess.run(["echo", "by descriptor"], stdout=sys.stdout)
    os.dup2(os.open("/dev/full", os.O_WRONLY), Screen.active.log.fileno())
    say("the disk is full")
    os.dup2(os.open(Screen.active.log_path, os.O_WRONLY | os.O_APPEND), Screen.active.log.fileno())
    sys.stdout.write("without an end")
print("after", file=sys.stderr)
raise SystemExit("error: last")
"""


def test_the_screen_shows_what_is_for_people_and_keeps_the_rest(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCREEN, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    warnings = [f"warning: trouble {count}" for count in range(3)]
    after = ["error: failed: ValueError: why", "a model's ?[2J", "the disk is full"]
    assert done.stdout.splitlines() == ["for people", "step 1/4 here", *warnings, *after]
    assert done.stderr.splitlines() == ["after", "error: last"]
    log = (tmp_path / "logs/run.log").read_text()
    for line in (
        "flood",
        "half a line",
        "from C++",
        "from a child",
        "[skpo] for people",
        "quoted [skpo] is not marked",
        "by descriptor",
        "without an end",
    ):
        assert line in log.splitlines() or f"(EngineCore pid=1) {line}" in log.splitlines()
