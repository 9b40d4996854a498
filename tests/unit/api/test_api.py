"""Runs from Python: trainings and evaluations in a process of their own, and what a run's folder holds."""

import html.parser
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from recipe.skpo import api
from recipe.skpo.api import Run, train
from recipe.skpo.errors import ConfigError, RunError
from recipe.skpo.output.run_folder import FOLDER_NOTE
from tests.conftest import REPOSITORY, move_checkpoints
from tests.support.report_run import HARM, make_hostile_run, make_run

PYTHON = """#!/bin/sh
module="$2"; shift 2
printf '%s\\n' "$@" > {folder}/given
{body}
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let a shell script stand for the interpreter of the child process; returns the arguments of the command."""

    def install(body: str) -> Path:
        program = tmp_path / "python"
        program.write_text(PYTHON.format(folder=tmp_path, body=body))
        program.chmod(0o755)
        monkeypatch.setattr(api.sys, "executable", str(program))
        return tmp_path / "given"

    return install


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(make_run(tmp_path_factory.mktemp("run"), steps=12, per_step=2))


# ---------------------------------------------------------------- processes


def test_a_training_returns_its_run_and_shows_its_lines(python: Any, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    given = python(f'printf %s {tmp_path}/out > "${FOLDER_NOTE}"; echo step 1/2; echo Käthe >&2')
    assert train(["method=grpo", "skpo.seed=2"]) == Run(tmp_path / "out")
    assert given.read_text().split() == ["method=grpo", "skpo.seed=2"]
    assert capsys.readouterr().out == "step 1/2\nKäthe\n"
    assert train(show=False).folder == tmp_path / "out" and capsys.readouterr().out == ""


def test_what_ends_a_training_is_raised_in_its_own_words(python: Any) -> None:
    early = 'echo "error: a warning of the run"; echo "error: reward: is missing; give it" >&2; echo bye; exit 1'
    python(early)
    with pytest.raises(ConfigError, match=r"^reward: is missing; give it$"):
        train()
    python(f'echo /x > "${FOLDER_NOTE}"; {early}')
    with pytest.raises(RunError, match=r"^reward: is missing; give it$"):
        train()
    python(f'echo /x > "${FOLDER_NOTE}"; echo "stopped by SIGTERM; the same command resumes"; exit 143')
    with pytest.raises(RunError, match=r"^stopped by SIGTERM; the same"):
        train()
    python("kill -9 $$")
    with pytest.raises(ConfigError, match=r"^recipe\.skpo\.main ended with exit code -9$"):
        train()
    with pytest.raises(ConfigError, match=r"^-m: is an option of the command; give overrides such as method=grpo"):
        train(["-m", "skpo.seed=1,2"])


def test_a_refusal_of_the_real_command_is_raised(monkeypatch) -> None:
    monkeypatch.setenv("SKPO_NUM_THREADS", "none")
    with pytest.raises(ConfigError, match=r"^SKPO_NUM_THREADS: is 'none' in the environment"):
        train(show=False)


def test_an_interrupt_ends_the_training_and_then_the_caller(python: Any, tmp_path: Path, capsys) -> None:
    python(f'trap "echo saved; exit 143" TERM; touch {tmp_path}/begun; while :; do sleep 0.05; done')

    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # A job in the background ignores Ctrl-C.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        signal.signal(signal.SIGINT, former)
    assert capsys.readouterr().out == "saved\n"


def test_the_command_notes_its_folder_once_nothing_is_refused(command_line, tmp_path: Path, monkeypatch) -> None:
    note = tmp_path / "note"
    monkeypatch.setenv(FOLDER_NOTE, str(note))
    assert command_line("method=nope").message and not note.exists()
    launched = command_line("output_dir=mine")
    assert note.read_text() == launched.config.output_dir == str(tmp_path / "mine")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("step", "number", "asked"), [(None, 4, "None"), (2, 2, "2"), ("best", 2, "best")])
def test_an_evaluation_is_of_a_stored_checkpoint_and_returns_its_table(
    step: Any, number: Any, asked: str, python: Any, tmp_path: Path, elsewhere: bool
) -> None:
    folder = tmp_path / "a run"
    for stored in (2, 4):
        (folder / f"checkpoints/global_step_{stored}").mkdir(parents=True)
    (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    (folder / "config.yaml").write_text('{"trainer": {"keep_best": "acc"}}')
    (folder / "metrics.jsonl").write_text('{"step": 2, "acc": 0.5}\n{"step": 4, "acc": 0.4}\n')
    if elsewhere:
        move_checkpoints(folder, tmp_path / "disk")
    out = folder / f"evaluation/step_{number}"
    table = '{"benchmarks": [{"benchmark": "mine", "avg": 0.5}]}'
    given = python(f"mkdir -p '{out}'; echo '{table}' > '{out}/table.json'")
    benchmarks = ["aime24", 'my "own"\\.parquet']
    assert Run(folder).evaluate(benchmarks, ["k.default=1"], step=step)["avg"].tolist() == [0.5]
    read = OverridesParser.create().parse_overrides(given.read_text().splitlines())
    assert {override.key_or_group: str(override.value()) for override in read} == {
        "checkpoint": str(folder),
        "output_dir": str(out),
        "benchmarks": str(benchmarks),
        "step": asked,
        "k.default": "1",
    }
    python("echo error: step: there is none; exit 1")
    with pytest.raises(RunError, match=r"^step: there is none$"):
        Run(folder).evaluate(["aime24"], step=3)


def test_the_documented_lines_run(python: Any, tmp_path: Path, monkeypatch) -> None:
    folder = make_run(tmp_path / "outputs/grpo-2", steps=2)
    (folder / "checkpoints/global_step_2").mkdir(parents=True)
    (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    (folder / "evaluation/step_2").mkdir(parents=True)
    monkeypatch.setattr(api, "export", lambda run, to, step, adapter: Path(to))
    (folder / "evaluation/step_2/table.json").write_text('{"benchmarks": []}')
    monkeypatch.setenv("MPLBACKEND", "Agg")
    python(f'if [ $module = recipe.skpo.main ]; then printf %s {folder} > "${FOLDER_NOTE}"; fi')
    document = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", document, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["run"] == Run(folder) and names["tree"].fields["step"] == 1


# ---------------------------------------------------------------- what a folder holds


def test_metrics_and_trees_are_data_frames(recorded: Run) -> None:
    metrics = recorded.metrics
    assert metrics.index.tolist() == list(range(13)) and metrics.index.name == "step"
    assert metrics["skpo/loss"].isna().tolist() == [True] + [False] * 12
    trees = recorded.trees
    assert trees["step"].tolist() == [step for step in range(1, 13) for _ in range(2)]
    assert len(trees["candidates"].iloc[0]) == 8


def test_a_tree_is_shown_by_its_step_and_prompt(recorded: Run) -> None:
    stored = recorded.trees[recorded.trees["step"] == 3].to_dict("records")
    shown = recorded.show_tree(3, stored[1]["prompt_id"])
    assert shown.fields == stored[1] == recorded.show_tree(step=3, prompt=1).fields
    assert recorded.show_tree(3).fields == stored[0]
    assert "upstream candidates, cut at t_q" in str(shown)
    with pytest.raises(LookupError, match=r"step 13: no tree is stored; steps with trees are \[1, 2, 3, 4, "):
        recorded.show_tree(13)
    with pytest.raises(LookupError, match=r"prompt 'x': step 3 has the trees of \['train-"):
        recorded.show_tree(3, "x")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope: is not a folder; name the folder of a run"):
        Run(tmp_path / "nope")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: missing or empty"):
        _ = Run(tmp_path).metrics


class Reader(html.parser.HTMLParser):
    """Notes tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {f"{name}={value}" for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_of_a_model_is_text_in_a_notebook(tmp_path: Path) -> None:
    harm = [text for text in HARM if len(text) < 10_000]
    run = Run(make_hostile_run(tmp_path, harm))
    for step, text in enumerate(harm, start=4):
        shown = run.show_tree(step)
        reader = Reader()
        reader.feed(shown._repr_html_())
        assert reader.tags == {"div", "h4", "h5", "table", "tr", "th", "td"} and len(reader.attributes) == 1
        printed = reader.text + str(shown)
        assert all(character.isprintable() or character in "\n\t\u200d" for character in printed)
        if text.isascii() and text.isprintable():
            assert text in reader.text
