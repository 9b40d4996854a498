"""The one shape of a prompt row: verl's RL parquet schema plus a stable `id`.

`id` is the key of the value and length trackers, so it depends on the question alone and neither on the row's position
nor on the wording of the system message. A source module writes `Row`s by `write_parquet`; a training run calls
`check_parquet` before any model is loaded.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

MOST_ROWS = 10_000_000
MOST_VALUES = 500_000_000
"""Rows, and values of all columns with those inside lists."""
LONGEST_TEXT = 1_000_000
MOST_TEXT, MOST_TEXT_IN_ALL = 2 * 2**30, 32 * 2**30
"""Bytes of one text, and of all texts in the columns that Python reads and in all columns."""
_ROWS = 65_536
"""Rows that are checked at once."""

REWRITE = "write it with `python -m data_prep.files`, whose --help lists its options"

PARQUET_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64()), ("question", pa.string())])),
    ]
)


class DataError(ValueError):
    """A data file or a request for one is wrong; the message is one line that names the place and the fix."""


def prompt_id(data_source: str, text: str) -> str:
    """Return the first 16 hex digits of sha256 over source, NUL and text: same question, same id."""
    return hashlib.sha256(f"{data_source}\0{text}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """One prompt with its checkable answer: a row of the parquet files that a training reads.

    Attributes:
        data_source: selects the answer check (`reward_fns.route`) and names the validation metrics.
        prompt: the chat as a list of ``{"role", "content"}``, to which the model's template is applied.
        ground_truth: the right answer, as that check reads it.
        ability: kind of problem, for statistics of your own.
        split: name of the file, "train" or "val".
        index: number of the row within its split, counted from 0.
        question: bare text of the problem, without system message and instructions; the id depends on it.
    """

    data_source: str
    prompt: list[dict[str, str]]
    ground_truth: str
    ability: str
    split: str
    index: int
    question: str

    @property
    def id(self) -> str:
        """Stable id, see ``prompt_id``."""
        return prompt_id(self.data_source, self.question)

    def record(self) -> dict[str, Any]:
        """Return the row as verl reads it; columns as in `PARQUET_SCHEMA`."""
        return {
            "id": self.id,
            "data_source": self.data_source,
            "prompt": self.prompt,
            "ability": self.ability,
            "reward_model": {"style": "rule", "ground_truth": self.ground_truth},
            "extra_info": {"split": self.split, "index": self.index, "question": self.question},
        }


def write_parquet(rows: Iterable[Row], path: Path) -> None:
    """Write the rows to `path`, atomically: same rows, same bytes.

    Raises:
        DataError: there are no rows, or two of them have the same id (the trackers would mix them up).
    """
    records = [row.record() for row in rows]
    if not records:
        raise DataError(f"{path}: no rows to write")
    table = pa.Table.from_pylist(records, schema=PARQUET_SCHEMA)
    refuse_duplicates(table["id"], str(path), "drop one of the two rows before writing")

    path.parent.mkdir(parents=True, exist_ok=True)
    # A rename is atomic only within one file system, hence the temporary file beside the target.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_parquet(path: Path, *, role: Literal["train", "val"], prompt_key: str = "prompt") -> pa.Table:
    """Check every row of the columns training needs (id, data_source, prompt, reward_model).

    Arrow checks a batch of rows at once; Python looks only at rows that arrow cannot pass.

    Args:
        path: the file.
        role: which Hydra key it came from (`data.train_files` or `data.val_files`), for messages.
        prompt_key: name of the prompt's column.

    Returns:
        The columns without the prompts, which take the most memory.

    Raises:
        DataError: file missing, unreadable, not parquet, empty or too large for memory; column missing; a prompt that
            is not a non-empty list of {role, content}; a reward_model without ground_truth; an id or data source that
            is missing or cannot be printed; an id there twice. Rows are counted from 0.
    """
    where = f"data.{role}_files: {path}"
    path = Path(path)
    if not path.exists():
        raise DataError(f"{where}: file not found; {REWRITE}")
    if not path.is_file():
        raise DataError(f"{where}: is a folder, not a file; name the .parquet file in it")

    kept = ["id", "data_source", "reward_model"]
    needed = [*kept, prompt_key]
    try:
        present = pq.read_schema(path).names
        missing = [column for column in needed if column not in present]
        if missing:
            has = _short(", ".join(present), 300)[1:-1]
            raise DataError(f"{where}: missing column(s) {', '.join(missing)} (it has {has}); {REWRITE}")
        refuse_excess(path, {*needed, "extra_info"}, where)
        batches, rows = list[pa.RecordBatch](), 0
        with pq.ParquetFile(path) as file, progress(file.metadata.num_rows, "rows checked") as bar:
            for batch in file.iter_batches(batch_size=_ROWS, columns=needed):
                _check_rows(batch, prompt_key, where, rows)
                batches.append(batch.select(kept))
                rows += batch.num_rows
                bar.update(batch.num_rows)
    except PermissionError as error:
        raise DataError(f"{where}: no permission to read it; `chmod +r` it") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{where}: cannot be read as parquet ({reason}); {REWRITE}") from error
    if not rows:
        raise DataError(f"{where}: has no rows; {REWRITE}")
    table = pa.Table.from_batches(batches)
    refuse_duplicates(table["id"].cast(pa.string()), where, "drop one of the two rows")
    return table


def _check_rows(batch: pa.RecordBatch, prompt_key: str, where: str, first: int) -> None:
    """Refuse the first bad row of a batch, whose rows are counted from ``first``."""
    for column in ("id", "data_source"):
        for row, value in _doubtful(batch[column], _is_plain_text, _is_name):
            what = "a non-empty string" if not isinstance(value, str) or not value else "text that can be printed"
            raise DataError(
                f"{where}: row {first + row}: column {column!r} is not {what} (found {_short(value)}); {REWRITE}"
            )
    for row, prompt in _doubtful(batch[prompt_key], _are_chats, _is_chat):
        raise DataError(
            f"{where}: row {first + row}: column {prompt_key!r} is not a non-empty list of {{role, content}} "
            f"messages (found {_short(prompt)}); {REWRITE}"
        )
    for row, reward_model in _doubtful(batch["reward_model"], _have_truths, _has_truth):
        raise DataError(
            f"{where}: row {first + row}: column 'reward_model' has no ground_truth "
            f"(found {_short(reward_model)}); {REWRITE}"
        )


def _doubtful(
    column: pa.Array, good: Callable[[pa.Array], bool], is_good: Callable[[Any], bool]
) -> Iterator[tuple[int, Any]]:
    """Yield row and value of what is bad: ``is_good`` decides wherever ``good`` does not see all rows to be."""
    if not good(column):
        yield from ((row, value) for row, value in enumerate(column.to_pylist()) if not is_good(value))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_plain_text(column: pa.Array) -> bool:
    """Return whether all values are non-empty printable ASCII; what else can be printed is for Python to say."""
    if not _is_text(column.type) or column.null_count or not _all(pc.not_equal(column, "")):
        return False
    return _all(pc.string_is_ascii(column)) and _all(pc.ascii_is_printable(column))


def _are_chats(column: pa.Array) -> bool:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    if not all(_is_text(fields.get(name, pa.null())) for name in ("role", "content")):
        return False
    messages = column.flatten()
    roles, contents = (pc.struct_field(messages, name) for name in ("role", "content"))
    return bool(
        not column.null_count
        and _all(pc.greater(pc.list_value_length(column), 0))
        and not roles.null_count + contents.null_count
        and _all(pc.not_equal(roles, ""))
    )


def _have_truths(column: pa.Array) -> bool:
    if not pa.types.is_struct(column.type) or column.type.get_field_index("ground_truth") < 0:
        return False
    truths = pc.struct_field(column, "ground_truth")
    return not truths.null_count and not (_is_text(truths.type) and not _all(pc.not_equal(truths, "")))


def _all(values: pa.Array) -> bool:
    return bool(pc.all(values).as_py())


def _is_name(value: object) -> bool:
    # A terminal obeys what cannot be printed, and ids and data sources are printed all over.
    return isinstance(value, str) and bool(value) and value.isprintable()


def _has_truth(reward_model: object) -> bool:
    return isinstance(reward_model, dict) and reward_model.get("ground_truth") not in (None, "")


def refuse_excess(path: Path, needed: set[str], where: str) -> None:
    """Refuse a file whose content would not fit into memory: compressed, 80 GB of text may take 100 KB.

    Texts stay indices into a dictionary, as in the file, and only their lengths are read.

    Raises:
        DataError: naming the column, and the row of a text that is too long.
    """
    metadata = pq.read_metadata(path)
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    values, stored = sum(chunk.num_values for chunk in chunks), sum(chunk.total_uncompressed_size for chunk in chunks)
    for count, limit, what in (
        (metadata.num_rows, MOST_ROWS, "rows"),
        (values, MOST_VALUES, "values"),
        (stored, MOST_TEXT_IN_ALL, "bytes before compression"),
    ):
        if count > limit:
            raise DataError(f"{where}: has {count} {what}, at most {limit} are read; split it, or drop columns")
    for leaf in leaves:
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > LONGEST_TEXT:
            raise DataError(f"{where}: column {_short(leaf.path)} has values of {leaf.length} bytes; drop the column")
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    if not texts:
        return
    total = needed_total = first = 0
    with pq.ParquetFile(path, read_dictionary=texts) as file, progress(metadata.num_rows, "texts measured") as bar:
        # One row group after another: arrow cannot join nested dictionaries of two.
        batches = (file.iter_batches(_ROWS, row_groups=[group], columns=texts) for group in range(len(groups)))
        for batch in chain.from_iterable(batches):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                longest, size = _text_sizes(column)
                total += size
                if name in needed:
                    needed_total += size
                    if longest > LONGEST_TEXT:
                        row = next(row for row in range(len(column)) if _text_sizes(column.slice(row, 1))[0] == longest)
                        raise DataError(
                            f"{where}: row {first + row}: column {name!r} has a text of {longest} bytes, at most "
                            f"{LONGEST_TEXT} are read; shorten it, or leave the row out"
                        )
                if needed_total > MOST_TEXT or total > MOST_TEXT_IN_ALL:
                    limit = MOST_TEXT if needed_total > MOST_TEXT else MOST_TEXT_IN_ALL
                    raise DataError(
                        f"{where}: its texts have more than {limit} bytes by row {first + batch.num_rows}, column "
                        f"{_short(name)}; split it, or drop columns"
                    )
            first += batch.num_rows
            bar.update(batch.num_rows)


def progress(rows: int, what: str) -> "tqdm[NoReturn]":
    """Make a progress bar, which is shown on a terminal alone, and only of what takes more than three seconds."""
    return tqdm(total=rows, desc=what, file=sys.stdout, delay=3, disable=None, leave=False)


def _text_sizes(array: pa.Array) -> tuple[int, int]:
    """Measure the longest text of an array and all together, in bytes, with those inside lists and structs."""
    longest = total = 0
    for leaf in _text_leaves(array):
        lengths = pc.binary_length(leaf.dictionary)
        own = lengths.take(leaf.indices)
        longest, total = max(longest, pc.max(own).as_py() or 0), total + (pc.sum(own).as_py() or 0)
    return longest, total


def _text_leaves(array: pa.Array) -> Iterator[pa.DictionaryArray]:
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield array
    elif pa.types.is_nested(kind):
        # Of lists the elements in use, of structs the fields; a map is a list of structs.
        parts = [array.keys, array.items] if pa.types.is_map(kind) else array.flatten()
        for part in parts if isinstance(parts, list) else [parts]:
            yield from _text_leaves(part)


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("content"), str)
            and isinstance(message.get("role"), str)
            and bool(message["role"])
            for message in prompt
        )
    )


def refuse_duplicates(ids: pa.ChunkedArray, where: str, fix: str) -> None:
    """Refuse two rows of one id, which the trackers would mix up.

    Args:
        ids: text, of every row.
        where: file, for the message.
        fix: what to do.

    Raises:
        DataError: naming the first two.
    """
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    first_row: dict[str, int] = {}
    for number, identifier in enumerate(ids.to_pylist()):
        if identifier in first_row:
            raise DataError(f"{where}: rows {first_row[identifier]} and {number}: same id {identifier!r}; {fix}")
        first_row[identifier] = number


def _short(value: object, longest: int = 60) -> str:
    """Show a value in a message: at most `longest` characters, unprintable ones escaped."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 4]}...{text[-1]}"
