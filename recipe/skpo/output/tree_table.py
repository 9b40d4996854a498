"""Rollout trees where people look: with every validation, a table in wandb, mlflow and trackio, a text in tensorboard.

A table has one row per response, with columns as in ``COLUMNS``.  Texts of data and models are cut at ``LONGEST_CELL``
and are inert: no control characters and, in a logger that renders Markdown, no markup, so no image of another host.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_prep.untrusted import one_line
from recipe.skpo.output.best_effort import BestEffort

NAME = "skpo/trees"
"""Key of the table."""

COLUMNS = (
    "step",
    "prompt_id",
    "problem",
    "ground_truth",
    "segment",
    "segment_reward",
    "response",
    "reward",
    "answer",
)

LONGEST_CELL = 3_000
"""Characters of a text; of a longer one the beginning and, as an answer stands there, the end are kept."""

_MARKDOWN = re.compile(r"([!-/:-@\[-`{-~])")


def shown(text: object) -> str:
    """Return a text of data or models with its line ends, cut, and without control or invisible characters."""
    given = str(text)
    if len(given) > LONGEST_CELL:
        end = LONGEST_CELL // 3
        given = f"{given[: LONGEST_CELL - end]} [...] {given[-end:]}"
    return "\n".join(one_line(line, LONGEST_CELL) for line in given.splitlines())


def without_markdown(text: object) -> str:
    """As ``shown``, with a backslash before every character that could be Markdown or HTML."""
    return _MARKDOWN.sub(r"\\\1", shown(text))


def as_block(text: object) -> str:
    """As ``shown``, as an indented block of Markdown, in which nothing is markup."""
    return "\n".join(f"    {line}" for line in shown(text).split("\n"))


def log_trees(loggers: Mapping[str, Any], trees: Sequence[Mapping[str, Any]], step: int, effort: BestEffort) -> None:
    """Give trees to those of verl's loggers that show tables or texts; one that fails costs a warning.

    Args:
        loggers: name to backend, as in verl's ``Tracking``.
        trees: rows of ``trees.TREE_SCHEMA``; none logs nothing.
        step: of the validation.
        effort: remembers which logger has failed.
    """
    for name, write in _WRITERS.items():
        if trees and name in loggers:
            with effort.attempt(f"trees in logger {name}", Exception):
                write(loggers[name], trees, step)


def _rows(trees: Sequence[Mapping[str, Any]], cell: Callable[[object], str] = shown) -> Iterator[list[Any]]:
    """Yield a row of ``COLUMNS`` per response."""
    for tree in trees:
        segment = tree["segment"]
        texts = [cell(text) for text in (tree["prompt_id"], tree["problem"], tree["answer"], segment["text"])]
        for response in tree["responses"]:
            answer = "" if response["answer"] is None else cell(response["answer"])
            yield [tree["step"], *texts, segment["reward"], cell(response["text"]), response["reward"], answer]


def _to_wandb(backend: Any, trees: Sequence[Mapping[str, Any]], step: int) -> None:
    table = backend.Table(columns=list(COLUMNS), data=list(_rows(trees)))
    backend.log(data={NAME: table}, step=step)


def _to_trackio(backend: Any, trees: Sequence[Mapping[str, Any]], step: int) -> None:
    import pandas as pd

    # It renders cells as Markdown.
    table = backend.trackio.Table(dataframe=pd.DataFrame(_rows(trees, without_markdown), columns=COLUMNS))
    backend.log(data={NAME: table}, step=step)


def _to_mlflow(backend: Any, trees: Sequence[Mapping[str, Any]], step: int) -> None:
    import mlflow

    columns = zip(*_rows(trees), strict=True)
    data = {name: list(column) for name, column in zip(COLUMNS, columns, strict=True)}
    # A file per step: mlflow would read and write a common one again each time.
    mlflow.log_table(data=data, artifact_file=f"trees/{step:06d}.json")


def _to_tensorboard(backend: Any, trees: Sequence[Mapping[str, Any]], step: int) -> None:
    parts = []
    for tree in trees:
        segment = tree["segment"]
        parts += [(f"Problem, step {tree['step']}", tree["problem"]), ("Ground truth", tree["answer"])]
        parts += [(f"Segment, mean reward {segment['reward']:+.2f}", segment["text"])]
        parts += [(f"Response, reward {response['reward']:+.2f}", response["text"]) for response in tree["responses"]]
    backend.writer.add_text(NAME, "\n\n".join(f"**{title}**\n\n{as_block(text)}" for title, text in parts), step)
    backend.writer.flush()


_WRITERS = {"wandb": _to_wandb, "mlflow": _to_mlflow, "trackio": _to_trackio, "tensorboard": _to_tensorboard}
