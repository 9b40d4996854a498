"""The one shape of a prompt row: verl's RL parquet schema plus a stable `id`.

`id` is what the value and length trackers are keyed on, so it depends on the question alone and neither on
the row's position nor on the wording of the system message. A source module builds `Row`s and hands them to
`write_parquet`; whoever is about to train calls `check_parquet` first, before any model is loaded.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

REWRITE = "write it with `python -m data_prep.<source> --out DIR`"

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
    """The first 16 hex digits of sha256 over source, NUL and text: same question, same id."""
    return hashlib.sha256(f"{data_source}\0{text}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """One prompt with its checkable answer.

    `prompt` is the chat as a list of ``{"role", "content"}``; `question` is the bare text of the problem
    (without the system message and examples); `index` is the row's number within its split, counted from 0.
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
        return prompt_id(self.data_source, self.question)

    def record(self) -> dict[str, Any]:
        """The row as verl reads it; columns as in `PARQUET_SCHEMA`."""
        return {
            "id": self.id,
            "data_source": self.data_source,
            "prompt": self.prompt,
            "ability": self.ability,
            "reward_model": {"style": "rule", "ground_truth": self.ground_truth},
            "extra_info": {"split": self.split, "index": self.index, "question": self.question},
        }


def write_parquet(rows: Iterable[Row], path: Path) -> None:
    """Write the rows to `path`: same rows, same bytes; a killed process leaves no half file there.

    Raises DataError if there are no rows or if two of them have the same id (the trackers would mix them up).
    """
    records = [row.record() for row in rows]
    if not records:
        raise DataError(f"{path}: no rows to write")
    refuse_duplicates([record["id"] for record in records], str(path), "drop one of the two rows before writing")
    table = pa.Table.from_pylist(records, schema=PARQUET_SCHEMA)

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
    """Read the columns training needs (id, data_source, prompt, reward_model) and check every row; no units.

    `role` says which Hydra key the file came from (`data.train_files` or `data.val_files`), for the message.
    Rows in messages are counted from 0. About 0.2 s for 17,000 rows.

    Raises DataError: file missing, unreadable, not parquet or empty; column missing; a prompt that is not a
    non-empty list of {role, content}; a reward_model without ground_truth; an id missing or there twice.
    """
    where = f"data.{role}_files: {path}"
    path = Path(path)
    if not path.exists():
        raise DataError(f"{where}: file not found; {REWRITE}")
    if not path.is_file():
        raise DataError(f"{where}: is a folder, not a file; name the .parquet file in it")

    needed = ["id", "data_source", prompt_key, "reward_model"]
    try:
        present = pq.read_schema(path).names
        missing = [column for column in needed if column not in present]
        if missing:
            raise DataError(f"{where}: missing column(s) {', '.join(missing)} (it has {', '.join(present)}); {REWRITE}")
        table = pq.read_table(path, columns=needed)
    except PermissionError as error:
        raise DataError(f"{where}: no permission to read it; `chmod +r` it") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{where}: cannot be read as parquet ({reason}); {REWRITE}") from error
    if table.num_rows == 0:
        raise DataError(f"{where}: has no rows; {REWRITE}")

    for column in ("id", "data_source"):
        for number, value in enumerate(table.column(column).to_pylist()):
            if not isinstance(value, str) or not value:
                raise DataError(
                    f"{where}: row {number}: column {column!r} is not a non-empty string "
                    f"(found {_short(value)}); {REWRITE}"
                )
    for number, prompt in enumerate(table.column(prompt_key).to_pylist()):
        if not _is_chat(prompt):
            raise DataError(
                f"{where}: row {number}: column {prompt_key!r} is not a non-empty list of {{role, content}} "
                f"messages (found {_short(prompt)}); {REWRITE}"
            )
    for number, reward_model in enumerate(table.column("reward_model").to_pylist()):
        if not isinstance(reward_model, dict) or reward_model.get("ground_truth") in (None, ""):
            raise DataError(
                f"{where}: row {number}: column 'reward_model' has no ground_truth "
                f"(found {_short(reward_model)}); {REWRITE}"
            )
    refuse_duplicates(table.column("id").to_pylist(), where, "drop one of the two rows")
    return table


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


def refuse_duplicates(ids: list[str], where: str, fix: str) -> None:
    """Raise DataError naming the first two rows of one id: the trackers would mix them up."""
    first_row: dict[str, int] = {}
    for number, identifier in enumerate(ids):
        if identifier in first_row:
            raise DataError(f"{where}: rows {first_row[identifier]} and {number}: same id {identifier!r}; {fix}")
        first_row[identifier] = number


def _short(value: object) -> str:
    """The value for a one-line message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
