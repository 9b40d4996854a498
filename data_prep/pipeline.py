"""From a source to parquet: read, convert, drop duplicates and held-out problems, sample, apply the template, write.

Exact duplicates (same question, same answer) are dropped and counted. A question with two answers and a malformed row
stop the run with file, line and reason, or are left out, counted and listed with ``--skip-bad``. Training rows whose
normalised text is in the test split, or in the files given by ``--against``, are dropped and counted. ``--limit`` takes
a seeded sample in the source's order. Nothing is written before everything has been read and checked.
"""

import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.leakage import held_out, normalised
from data_prep.prompts import load_prompt_template
from data_prep.reading import RawRow, read_rows
from data_prep.schema import DataError, Row, prompt_id, refuse_duplicates, write_parquet
from data_prep.untrusted import LONGEST_LINE, one_line
from reward_fns.code_tests import stored

Chat = list[dict[str, str]]

LISTED = 50
"""Faulty rows listed one by one with --skip-bad; the rest is counted."""


class RowError(ValueError):
    """Why a raw row is not a problem with a checkable answer; `collect` adds the place."""


@dataclass(frozen=True)
class Problem:
    """A bare question with its checkable answer. `data_source` chooses the answer check.

    `prompt` is the whole chat if the source has one; empty, a template is put around the question.
    """

    data_source: str
    question: str
    answer: str
    ability: str = "math"
    prompt: tuple[Mapping[str, str], ...] = ()

    @property
    def id(self) -> str:
        """Stable id, see ``prompt_id``."""
        return prompt_id(self.data_source, self.question)


Convert = Callable[[Mapping[str, Any], str], Problem | None]
"""Raw fields and data source to problem, or None for a row of another kind (an image, another language)."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and how its rows are read.

    `hub` and `hub_config` are the hub's names; `data_source` chooses the answer check; `splits` maps our name of a
    split to the source's; `template` is the default one.
    """

    name: str
    hub: str
    data_source: str
    convert: Convert
    template: str = "boxed"
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    hub_config: str | None = None

    def problem(self, fields: Mapping[str, Any]) -> Problem | None:
        """Convert the fields of a raw row; None for a row of another kind.

        Raises:
            RowError: it has no checkable problem.
        """
        return self.convert(fields, self.data_source)


@dataclass
class Collected:
    """The problems of one split and what was left out on the way."""

    problems: list[Problem] = field(default_factory=list)
    read: int = 0
    duplicates: int = 0
    other_kind: int = 0
    leaks: int = 0
    bad: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say how many rows were read, kept and left out, as "7473 of 7473 rows, ..."."""
        counts = [f"{len(self.problems)} of {self.read} rows", f"{self.duplicates} exact duplicates dropped"]
        alike = len(self.problems) - len({normalised(problem.question) for problem in self.problems})
        optional = {
            "of another kind": self.other_kind,
            "dropped because they are held out": self.leaks,
            "kept that differ from another in typesetting only": alike,
            "bad rows left out": len(self.bad),
        }
        return ", ".join([*counts, *(f"{count} {what}" for what, count in optional.items() if count)])


def text_field(fields: Mapping[str, Any], *names: str) -> str:
    """Return the first of `names` that is there, stripped.

    Raises:
        RowError: it is missing, empty or not a string.
    """
    for name in names:
        value = fields.get(name)
        if value is not None:
            if not isinstance(value, str) or not value.strip():
                raise RowError(f"field {name!r} is not a non-empty string (found {value!r:.60})")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise RowError(f"field {name!r} has half a character (a lone surrogate)") from error
            return value.strip()
    raise RowError(
        f"field {' or '.join(map(repr, names))} is missing (it has {one_line(', '.join(map(str, fields)) or 'none')})"
    )


def collect(
    rows: Iterable[RawRow], convert: Callable[[Mapping[str, Any]], Problem | None], *, skip_bad: bool = False
) -> Collected:
    """Convert all rows and drop exact duplicates.

    Raises:
        DataError: with place and reason of the first malformed row, unless `skip_bad`.
    """
    collected = Collected()
    first: dict[str, tuple[Problem, str]] = {}
    ambiguous: set[str] = set()
    for raw in rows:
        collected.read += 1
        try:
            if raw.fault:
                raise RowError(raw.fault)
            problem = convert(raw.fields)
            if problem is None:
                collected.other_kind += 1
                continue
            if problem.id in ambiguous:
                collected.duplicates += 1
                continue
            known, where = first.setdefault(problem.id, (problem, raw.where))
            if where == raw.where:
                continue
            if known != problem:
                ambiguous.add(problem.id)
                key = "answer" if known.answer != problem.answer else "prompt"
                here, there = getattr(problem, key), getattr(known, key)
                raise RowError(
                    f"same id {problem.id} as {where}, but the {key} is {here!r:.200} here and {there!r:.200} there"
                )
            collected.duplicates += 1
        except RowError as error:
            fault = f"{raw.where}: {error}"
            if not skip_bad:
                raise DataError(
                    f"{fault}; mend the row, or leave out such rows with --skip-bad (data.skip_bad=true)"
                ) from error
            collected.bad.append(fault)
    collected.problems = [problem for identifier, (problem, _) in first.items() if identifier not in ambiguous]
    # A question with two answers: nobody knows which one is right, so both rows go.
    collected.bad += [f"{where}: a later row has another answer" for id, (_, where) in first.items() if id in ambiguous]
    return collected


def drop_held_out(collected: Collected, texts: frozenset[str]) -> None:
    """Drop and count the problems whose normalised text is among `texts`."""
    kept = [problem for problem in collected.problems if normalised(problem.question) not in texts]
    collected.leaks += len(collected.problems) - len(kept)
    collected.problems = kept


def sample(problems: Sequence[Problem], limit: int | None, seed: int) -> list[Problem]:
    """Draw `limit` of the problems with the seed, in their order; None keeps all."""
    if limit is None or limit >= len(problems):
        return list(problems)
    if limit < 1:
        raise DataError(f"--limit {limit}: need at least 1 row")
    chosen = sorted(random.Random(seed).sample(range(len(problems)), limit))
    return [problems[index] for index in chosen]


def read_split(source: Source, place: str | None, split: str, *, skip_bad: bool = False) -> Collected:
    """Read one split of a source; `place` is a file, folder or hub name, None for the source's own place on the hub."""
    rows = read_rows(place or source.hub, source.splits[split], None if place else source.hub_config)
    collected = collect(rows, source.problem, skip_bad=skip_bad)
    for fault in collected.bad[:LISTED]:
        print(f"left out: {one_line(fault, LONGEST_LINE)}", file=sys.stderr)
    if len(collected.bad) > LISTED:
        print(f"left out: {len(collected.bad) - LISTED} more", file=sys.stderr)
    if not collected.problems:
        raise DataError(f"{place or source.hub}: no usable row of {collected.read} for split {split}")
    return collected


def questions_of(files: Iterable[Path]) -> list[str]:
    """Read the questions in parquet files written by this package; a folder stands for all of them in it."""
    questions: list[str] = []
    for file in files:
        paths = sorted(file.glob("*.parquet")) if file.is_dir() else [file]
        if not paths:
            raise DataError(f"--against {file}: has no parquet file; write them with `python -m data_prep.benchmarks`")
        for path in paths:
            try:
                infos = pq.read_table(path, columns=["extra_info"])["extra_info"].to_pylist()
                questions += [info["question"] for info in infos]
            except (OSError, pa.ArrowException, KeyError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(f"--against {path}: is not a file of data_prep ({reason})") from error
    return questions


def write_split(path: Path, split: str, problems: Sequence[Problem], chat: Callable[[str], Chat]) -> None:
    """Write the problems of one split, each as its own chat or as the one that asks its question."""
    write_parquet(
        [
            Row(
                data_source=problem.data_source,
                prompt=[dict(message) for message in problem.prompt] or chat(problem.question),
                ground_truth=stored(problem.answer, path.parent / "tests"),
                ability=problem.ability,
                split=split,
                index=index,
                question=problem.question,
            )
            for index, problem in enumerate(problems)
        ],
        path,
    )


def write_problems(splits: Mapping[Path, tuple[str, Collected]], template: str) -> None:
    """Write every split (path to its name and problems) and print a line for each.

    Raises:
        DataError: before anything is written, if two rows of different files have one id.
    """
    chat = load_prompt_template(template)
    everything = [problem for _, collected in splits.values() for problem in collected.problems]
    refuse_duplicates(
        pa.chunked_array([[problem.id for problem in everything]], pa.string()),
        " + ".join(str(path) for path in splits),
        "drop one of the two rows from its source",
    )
    for path, (split, collected) in splits.items():
        write_split(path, split, collected.problems, chat.prompt)
        lengths = sorted(len(problem.question) for problem in collected.problems)
        print(
            f"{path}: {collected.summary()}; questions of {lengths[0]} to {lengths[-1]} characters "
            f"(median {lengths[len(lengths) // 2]}), template {template}"
        )


def prepare(
    source: Source,
    out: Path,
    *,
    place: str | None = None,
    splits: Sequence[str] | None = None,
    limit: int | None = None,
    template: str | None = None,
    seed: int = 1,
    skip_bad: bool = False,
    against: Sequence[Path] = (),
) -> dict[str, Path]:
    """Write ``out/<split>.parquet`` for each split (None takes all) and return the paths by split.

    ``place`` is a file (for a single split), a folder or a hub name, None the source's; ``template`` is a name or path,
    None the source's. At most ``limit`` rows of each split are sampled with the seed. Problems in the files of
    ``against`` are kept out of the training split.
    """
    splits = tuple(splits or source.splits)
    if place is not None and Path(place).is_file() and len(splits) > 1:
        raise DataError(f"--source {place}: is one file; say with --split which of {', '.join(splits)} it is")
    load_prompt_template(template or source.template)
    collected = {split: read_split(source, place, split, skip_bad=skip_bad) for split in splits}
    if "train" in collected:
        test = [problem.question for name, split in collected.items() if name != "train" for problem in split.problems]
        drop_held_out(collected["train"], held_out([*test, *questions_of(against)]))
    for split in collected.values():
        split.problems = sample(split.problems, limit, seed)
    paths = {split: out / f"{split}.parquet" for split in splits}
    write_problems({paths[split]: (split, collected[split]) for split in splits}, template or source.template)
    return paths
