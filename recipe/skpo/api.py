"""Train, look at, evaluate and export runs from Python: a notebook, a script, a study.

    from recipe.skpo.api import Run, train

    run = train(["method=grpo", "output_dir=outputs/grpo-1", "skpo.seed=1"])
    run.metrics["actor/entropy"].plot()
    run.show_tree(step=12)

A training or an evaluation is the command in a process of its own, which leaves no GPU memory here.  What the command
would exit with is raised.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from data_prep.untrusted import read_json, visible
from recipe.skpo.errors import ConfigError, RunError
from recipe.skpo.export.command import export
from recipe.skpo.output.best import kept_best
from recipe.skpo.output.page_data import run_steps
from recipe.skpo.output.run_folder import FOLDER_NOTE, checkpoints_of, marked_step
from recipe.skpo.output.summary import render_tree
from recipe.skpo.output.tree_html import tree_html
from recipe.skpo.output.trees import read_trees, tree_index

_LAST_WORDS = ("error: ", "stopped by ")
"""How the last line of a command begins that did not reach its end."""


def train(overrides: Sequence[str] = (), *, show: bool = True) -> "Run":
    """Train as ``bash run_skpo.sh`` with these overrides, and return the run; a run that is there already resumes.

    Relative names are looked up in the current folder, where ``outputs/`` is made too.  An interrupt ends the training
    as Ctrl-C does in a terminal.

    Args:
        overrides: such as ``["method=grpo", "skpo.seed=2"]``.
        show: print the command's lines.

    Raises:
        ConfigError: an override, file or folder that cannot work, named with the fix.
        RunError: the training ended early; the message says why, and how to continue.
    """
    options = [word for word in overrides if word.startswith("-")]
    if options:
        raise ConfigError(f"{options[0]}: is an option of the command; give overrides such as method=grpo")
    with TemporaryDirectory() as place:
        note = Path(place) / "folder"
        try:
            _run("recipe.skpo.main", overrides, show, {FOLDER_NOTE: str(note)})
        except RunError as error:
            # The folder is noted once nothing is left to be refused.
            raise (error if note.is_file() else ConfigError(str(error))) from None
        return Run(Path(note.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Tree:
    """A stored rollout tree: HTML in a notebook, text when it is printed.

    Attributes:
        fields: a row of ``recipe.skpo.output.trees.TREE_SCHEMA``.
    """

    fields: dict[str, Any]

    def __str__(self) -> str:
        return visible(render_tree(self.fields))

    def _repr_html_(self) -> str:
        return tree_html(self.fields)


@dataclass(frozen=True)
class Run:
    """A run by its folder; each access reads its files, also while it trains.

    Raises:
        ConfigError: the folder does not exist.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).resolve())
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: is not a folder; name the folder of a run (output_dir)")

    @property
    def metrics(self) -> pd.DataFrame:
        """What the run logged: one row per step, one column per metric (docs/metrics.md), NaN where it was not logged.

        Raises:
            ReportError: the folder holds no run.
        """
        return pd.DataFrame(run_steps(self.folder)).set_index("step").sort_index()

    @property
    def trees(self) -> pd.DataFrame:
        """The stored rollout trees, one row each, with the columns of ``TREE_SCHEMA``."""
        return pd.DataFrame(read_trees(tree_index(self.folder)))

    def show_tree(self, step: int, prompt: str | int = 0) -> Tree:
        """Return a stored tree to look at.

        Args:
            step: training step.
            prompt: its ``prompt_id``, or its number among the trees of the step.

        Raises:
            LookupError: no such tree is stored.
        """
        files = {path: int(path.stem.rpartition("_")[2]) for path, _ in tree_index(self.folder)}
        if step not in files.values():
            raise LookupError(f"step {step}: no tree is stored; steps with trees are {sorted(files.values())}")
        found = list(read_trees([place for place in tree_index(self.folder) if files[place[0]] == step]))
        for number, tree in enumerate(found):
            if prompt in (number, tree["prompt_id"]):
                return Tree(tree)
        raise LookupError(f"prompt {prompt!r}: step {step} has the trees of {[tree['prompt_id'] for tree in found]}")

    def evaluate(
        self,
        benchmarks: Sequence[str],
        overrides: Sequence[str] = (),
        *,
        step: int | str | None = None,
        show: bool = True,
    ) -> pd.DataFrame:
        """Evaluate a checkpoint as ``python -m recipe.skpo.evaluation`` does, into the run's folder ``evaluation/``.

        Args:
            benchmarks: names, or parquet files.
            overrides: further keys of the command, such as ``["temperature=0", "k.default=1"]``.
            step: of the checkpoint, or ``best``; the latest if None.
            show: print the command's lines.

        Returns:
            The table, one row per benchmark.

        Raises:
            RunError: the evaluation was refused or ended early; the message says why.
        """
        number: int | str | None = step
        if step is None:
            number = marked_step(checkpoints_of(self.folder))
        elif step == "best" and (kept := kept_best(self.folder)) is not None:
            number = kept[1]
        out = self.folder / f"evaluation/step_{number}"
        given = [f"{name}={_quoted(str(path))}" for name, path in (("checkpoint", self.folder), ("output_dir", out))]
        given += [
            f"benchmarks=[{','.join(map(_quoted, map(str, benchmarks)))}]",
            f"step={'null' if step is None else step}",
        ]
        _run("recipe.skpo.evaluation", [*given, *overrides], show)
        return pd.DataFrame(read_json(out / "table.json")["benchmarks"])

    def export(self, to: str | Path, *, step: int | str | None = None, adapter: bool = False) -> Path:
        """Export a checkpoint as ``python -m recipe.skpo.export`` does: a Hugging Face folder with a model card.

        Args:
            to: a folder that is empty or not there yet.
            step: of the checkpoint, or ``best``; the latest if None.
            adapter: write the LoRA adapter alone.

        Returns:
            The folder.

        Raises:
            ConfigError: no such checkpoint, no adapter, or a folder that holds something.
        """
        return export(self.folder, to, None if step is None else str(step), adapter)


def _quoted(text: str) -> str:
    """Quote a text for Hydra, where a backslash counts before a quote alone."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), text) + '"'


def _run(module: str, arguments: Sequence[str], show: bool, variables: dict[str, str] | None = None) -> None:
    """Run a command of this recipe to its end, printing its lines here: a notebook shows what Python prints."""
    last = ""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | (variables or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # an interrupt reaches it once, from here
    )
    assert process.stdout is not None
    interrupted = False
    try:
        while True:
            try:
                for line in process.stdout:
                    # Warnings and libraries may print lines of the same form before it, and others behind it.
                    if line.startswith(_LAST_WORDS) or (line.strip() and not last.startswith(_LAST_WORDS)):
                        last = line.strip()
                    if show:
                        print(line, end="", flush=True)
                break
            except KeyboardInterrupt:
                interrupted = True
                process.terminate()  # a shell may have it ignore Ctrl-C
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if interrupted:
        raise KeyboardInterrupt
    if code:
        raise RunError(last.removeprefix("error: ") or f"{module} ended with exit code {code}")
