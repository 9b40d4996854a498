"""Raw rows of a source: a local file or folder (jsonl, json, parquet, csv), or a data set of the Hugging Face hub.

Every row carries its place ("train.jsonl: line 7") for messages. A line that cannot be read becomes a row with a
`fault`: whether to stop or to skip it is decided in `data_prep.pipeline`. A name like ``owner/name`` that is not on the
disk is loaded from the hub.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.hub import quiet_hub
from data_prep.schema import DataError, refuse_excess
from data_prep.untrusted import UntrustedError, parse_json

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class RawRow:
    """One row as it was found; `fault` is "" or says why there are no `fields`."""

    where: str
    fields: Mapping[str, Any]
    fault: str = ""


def read_rows(source: str, split: str, hub_config: str | None = None) -> Iterator[RawRow]:
    """Read the rows of one split, in the order of the source.

    The source is a file, a folder with one file (or several shards) per split, or a hub name; `split` is the source's
    name of it, and `hub_config` the hub's name of a subset.

    Raises:
        DataError: no such file, split or data set.
    """
    path = Path(source)
    if path.is_dir():
        files = split_files(path, split)
    elif path.is_file():
        files = [path]
    elif path.suffix in SUFFIXES or source.startswith(("/", ".", "~")) or not HUB_NAME.fullmatch(source):
        raise DataError(
            f"{source}: no such file or folder; give a file, a folder or a hub name (owner/name) by --source"
        )
    else:
        yield from _hub_rows(source, hub_config, split)
        return
    for file in files:
        yield from _file_rows(file)


def split_files(folder: Path, split: str) -> list[Path]:
    """Find the files of a split: ``<split>.jsonl``, shards ``<split>-*``, or everything below a folder ``<split>/``.

    They may lie in `folder` itself or in a folder inside it, as in a download from the hub. Sorted by name.
    """
    candidates = data_files(folder)
    files = _of_split(folder, candidates, split)
    if not files:
        present = ", ".join(str(path.relative_to(folder)) for path in candidates[:5]) or "no data file"
        raise DataError(
            f"{folder}: has no {split}.jsonl, .json, .parquet or .csv (it has {present}); name the file by --source"
        )
    copies = {path.stem for path in files if path.suffix != files[0].suffix}
    if copies:
        listed = ", ".join(str(path.relative_to(folder)) for path in files[:4])
        raise DataError(f"{folder}: {split} is there in several formats ({listed}); name one of them by --source")
    return files


def data_files(place: Path) -> list[Path]:
    """Find the files that can be read at a place, a file or a folder, sorted by name; none if it does not exist."""
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return [place] if place.is_file() else []


def has_split(source: str, split: str) -> bool:
    """Return whether a source is a folder with files of a split."""
    folder = Path(source)
    return folder.is_dir() and bool(_of_split(folder, data_files(folder), split))


def _of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    by_name = [path for path in files if re.fullmatch(rf"{re.escape(split)}(-.*)?", path.stem)]
    return by_name or [path for path in files if split in path.relative_to(folder).parent.parts]


def _file_rows(file: Path) -> Iterator[RawRow]:
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    if file.suffix not in readers:
        raise DataError(f"{file}: unknown format {file.suffix!r}; give one of {', '.join(SUFFIXES)}")
    try:
        yield from readers[file.suffix](file)
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file}: cannot be read as {file.suffix[1:]} ({reason})") from error


class _Ambiguous(dict[str, Any]):
    """A JSON object in which the key `twice` stands more than once, at any depth."""

    twice: str = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, an ambiguous one if a key is there twice in it or in an object inside."""
    made = dict(pairs)
    twice = _twice([key for key, _ in pairs]) if len(made) < len(pairs) else None
    inside = (part for value in made.values() for part in (value if isinstance(value, list) else [value]))
    twice = twice or next((part.twice for part in inside if isinstance(part, _Ambiguous)), None)
    if twice is None:
        return made
    ambiguous = _Ambiguous(made)
    ambiguous.twice = twice
    return ambiguous


def _twice(names: Sequence[str]) -> str | None:
    """Return the first name that is there more than once."""
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


def _check_columns(file: Path, names: Sequence[str]) -> None:
    """Refuse a column that is there twice: which one holds the question or the answer is not known."""
    twice = _twice(names)
    if twice is not None:
        raise DataError(f"{file}: has the column {twice!r} twice; rename or drop one of them")


def _row(where: str, value: object) -> RawRow:
    if isinstance(value, _Ambiguous):
        return RawRow(where, {}, f"has the key {value.twice!r} twice")
    if isinstance(value, dict):
        return RawRow(where, value)
    return RawRow(where, {}, f"is not an object with named fields (found {type(value).__name__})")


def _jsonl_rows(file: Path) -> Iterator[RawRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}: line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield _row(where, parse_json(text, _object))
            except UnicodeDecodeError as error:
                yield RawRow(where, {}, f"is not JSON ({error})")
            except UntrustedError as error:
                yield RawRow(where, {}, str(error))


def _json_rows(file: Path) -> Iterator[RawRow]:
    """Read a list of objects, or one object (the original MATH has a file per problem)."""
    try:
        content = parse_json(file.read_bytes(), _object)
    except UntrustedError as error:
        yield RawRow(str(file), {}, str(error))
        return
    if isinstance(content, list):
        for number, value in enumerate(content):
            yield _row(f"{file}: row {number}", value)
    else:
        yield _row(str(file), content)


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    number = 0
    with pq.ParquetFile(file) as table:
        _check_columns(file, table.schema_arrow.names)
        refuse_excess(file, set(table.schema_arrow.names), str(file))
        # A text may have a million characters: few of those are in memory at a time.
        for batch in table.iter_batches(batch_size=512):
            for value in batch.to_pylist():
                yield _row(f"{file}: row {number}", value)
                number += 1


def _csv_rows(file: Path) -> Iterator[RawRow]:
    # A field may be as long as the file: the module's own bound of 131,072 characters cuts long solutions off.
    bound = csv.field_size_limit(max(csv.field_size_limit(), file.stat().st_size))
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            _check_columns(file, reader.fieldnames or [])
            for value in reader:
                where = f"{file}: line {reader.line_num}"
                if None in value or None in value.values():
                    lacks = "".join(f": {name!r} is missing" for name, text in value.items() if text is None)
                    yield RawRow(
                        where, {}, f"has not the {len(value) - (None in value)} fields of the first line{lacks}"
                    )
                else:
                    yield RawRow(where, value)
    finally:
        csv.field_size_limit(bound)


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[RawRow]:
    import datasets

    try:
        # A data set's own loading script would be code from the hub: datasets does not run any (since version 4).
        with quiet_hub():
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # a process border: the hub answers with errors of five libraries
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise DataError(
            f"{name}: cannot be loaded from the hub ({reason}); without the hub, download its {split} split and give "
            f"the file (jsonl, json, parquet, csv), or the folder with {split}.*, by --source (data.source in training)"
        ) from error
    for number, value in enumerate(rows):
        yield _row(f"{name}[{split}]: row {number}", value)
