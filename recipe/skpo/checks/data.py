"""Start-up checks of the data files: their rows, and whether verl will read them as they are meant."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf, open_dict

from data_prep.reading import SUFFIXES
from data_prep.schema import PARQUET_SCHEMA, DataError, check_parquet
from recipe.skpo.checks.reward import Sample, check_reward, is_ours, try_every_truth, try_reward
from recipe.skpo.errors import ConfigError, brief
from recipe.skpo.task.columns import GENERATED, OURS, SENT, STEERING, sends_all

Role = Literal["train", "val"]
ROLES: tuple[Role, ...] = ("train", "val")

_PATTERN = ("*", "?", "[", "]", "::")
"""Texts that verl's reader takes for a pattern or a chain of file systems."""

_AGENT = "single_turn_agent"
"""verl's agent that training with SKPO stands for."""

_OF_TOOLS = {"tools_kwargs", "interaction_kwargs"}
"""Fields of ``extra_info`` that verl hands to the tools of other agents."""

_INDEX_OF_PANDAS = "__index_level_0__"


@dataclass(frozen=True)
class DataFile:
    """A data file that was read.

    Attributes:
        role: which list names it.
        path: as it was given.
        table: its columns id, data_source and reward_model.
        names: all of its columns.
    """

    role: Role
    path: str
    table: pa.Table
    names: list[str]

    @property
    def where(self) -> str:
        """Begin a message about it."""
        return f"data.{self.role}_files: {self.path}"

    @property
    def ids(self) -> pa.ChunkedArray:
        """Return the ids of all rows, as text."""
        return self.table["id"].cast(pa.string())


def check_data(config: DictConfig) -> None:
    """Check the data files, as the trainer will read them, and the reward on their rows."""
    _check_class(config)
    files: list[DataFile] = []
    for role in ROLES:
        paths = prompt_files(config, role)
        _check_names(paths, role)
        for path in paths:
            table = check_parquet(Path(path), role=role, prompt_key=config.data.prompt_key)
            file = DataFile(role, path, table, pq.read_schema(path).names)
            _check_columns(config, file)
            files.append(file)
    train = [file for file in files if file.role == "train"]
    val = [file for file in files if file.role == "val"]
    _check_counts(config, train)
    _check_ids_unique_across_files(train)
    if not OmegaConf.select(config, "data.custom_cls.path"):
        for part in (train, val):
            _check_readable(config, part)
    _note_columns(config, files)
    _note_overlap(train, val)
    call = check_reward(config)
    if is_ours(config):
        try_every_truth(call, _truths(files))
    else:
        try_reward(config, call, _samples(files))


def prompt_files(config: DictConfig, role: Role) -> list[str]:
    """Return ``data.train_files`` or ``data.val_files`` as a list; none is refused."""
    value = config.data[f"{role}_files"]
    if not value:
        raise ConfigError(f"data.{role}_files: is not set; name a parquet file, or choose a data set with data=<name>")
    return [str(file) for file in ([value] if isinstance(value, str) else value)]


def _check_class(config: DictConfig) -> None:
    """Refuse a data set class that cannot be used: the curriculum reads the ids from verl's own ``dataframe``."""
    custom = config.data.get("custom_cls") or {}
    if not custom.get("path"):
        return
    from verl.utils.dataset.rl_dataset import RLHFDataset, get_dataset_class

    label = f"{custom.get('name')} of {custom.get('path')}"
    try:
        with redirect_stdout(io.StringIO()):
            chosen = get_dataset_class(config.data)
    except Exception as error:  # a process border: the file is somebody's own
        raise ConfigError(
            f"data.custom_cls: {label} cannot be loaded ({brief(error.__cause__ or error)}); give a python file and "
            f"the name of a torch Dataset in it"
        ) from error
    curriculum = config.skpo.curriculum.enable and "curriculum" in config.method.uses
    if curriculum and not issubclass(chosen, RLHFDataset):
        raise ConfigError(
            f"data.custom_cls: {label} has no `dataframe`, from which the curriculum reads the ids; derive it from "
            f"verl's RLHFDataset, or set skpo.curriculum.enable=false"
        )


def _check_names(paths: Sequence[str], role: Role) -> None:
    """Refuse names that verl's reader takes for something else, and a file that is named twice."""
    seen: dict[Path, str] = {}
    for path in paths:
        where = f"data.{role}_files: {path}"
        pattern = next((part for part in _PATTERN if part in path), None)
        if pattern is not None:
            raise DataError(
                f"{where}: has {pattern!r} in its path, which verl's reader takes for a pattern; rename it, or name "
                f"the files one by one"
            )
        kind = Path(path).suffix
        if kind in SUFFIXES and kind != ".parquet" and Path(path).is_file():
            raise DataError(
                f"{where}: is {kind[1:]}, not parquet; convert it with `python -m data_prep.files --source {path} "
                f"--prompt COLUMN --answer COLUMN --check number --out DIR`, or train on it by data=mine "
                f"data.source={path} data.prompt=COLUMN data.answer=COLUMN data.check=number"
            )
        # A missing file or a folder gets its own message.
        if not path.endswith(".parquet") and Path(path).is_file():
            raise DataError(
                f"{where}: does not end in .parquet, by which verl tells how to read it; rename it, or write it as "
                f"parquet (data_prep.schema: write_parquet)"
            )
        resolved = Path(path).resolve()
        if resolved in seen:
            raise DataError(f"{where}: is named twice (as {seen[resolved]}); leave one of the two out")
        seen[resolved] = path


def _check_counts(config: DictConfig, train: Sequence[DataFile]) -> None:
    batch, most = config.data.train_batch_size, config.data.get("train_max_samples", -1)
    rows = sum(file.table.num_rows for file in train)
    if rows < batch:
        raise DataError(f"data.train_files: {rows} rows are fewer than data.train_batch_size={batch}")
    if 0 < most < batch:
        raise ConfigError(
            f"data.train_max_samples: is {most}, fewer prompts than data.train_batch_size={batch}; raise the first or "
            f"lower the second"
        )


def _check_ids_unique_across_files(files: Sequence[DataFile]) -> None:
    ids = _all_ids(files)
    if len(files) < 2 or pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: dict[str, DataFile] = {}
    for file in files:
        for prompt_id in file.ids.to_pylist():
            if seen.setdefault(prompt_id, file) is not file:
                raise DataError(
                    f"{file.path}: id {prompt_id} is in {seen[prompt_id].path} too; ids must be unique over all "
                    f"of data.train_files"
                )


def _all_ids(files: Iterable[DataFile]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for file in files for chunk in file.ids.chunks], pa.string())


# ---------------------------------------------------------------- columns


def _check_columns(config: DictConfig, file: DataFile) -> None:
    """Refuse columns that would change the rollout of a row, or that a text model cannot see."""
    for name in file.names:
        if name in STEERING:
            raise DataError(f"{file.where}: has a column {name!r}: {STEERING[name]}; rename or remove it")
        if name.startswith(OURS):
            raise DataError(
                f"{file.where}: has a column {name!r}, and names that begin with {OURS} are ours; rename it"
            )
        if name in GENERATED and sends_all(config):
            raise DataError(
                f"{file.where}: has a column {name!r}, a name that verl gives to a generated row; rename it"
            )
    for key, what in (("image_key", "images"), ("video_key", "videos"), ("audio_key", "audios")):
        name = config.data.get(key) or what
        if name in file.names and not _is_empty(_column(file.path, name)):
            raise DataError(f"{file.where}: column {name!r} holds {what}, and models are trained on text; remove it")
    if "extra_info" in file.names:
        kind = pq.read_schema(file.path).field("extra_info").type
        if not pa.types.is_struct(kind) and not pa.types.is_null(kind):
            raise DataError(
                f"{file.where}: column 'extra_info' is {kind}, and verl reads fields of it; make it a struct"
            )
        if "rollout" in config.method.uses and file.role == "train" and pa.types.is_struct(kind):
            for name in _OF_TOOLS & {field.name for field in kind}:
                print(
                    f"note: {file.where}: field {name!r} of column 'extra_info' has no effect: training with "
                    f"method={config.method.name} samples one turn and calls no tool"
                )
    if "agent_name" in file.names and "rollout" in config.method.uses:
        others = [agent for agent in _column(file.path, "agent_name").unique().to_pylist() if agent != _AGENT]
        if others:
            raise DataError(
                f"{file.where}: column 'agent_name' has {others[0]!r}, and method={config.method.name} samples one "
                f"turn in training (validation would use that agent); remove the column, or choose method=grpo"
            )


def _column(path: str, name: str) -> pa.ChunkedArray:
    return pq.read_table(path, columns=[name])[name]


def _is_empty(column: pa.ChunkedArray) -> bool:
    """Return whether every value is null or an empty list."""
    if column.null_count == len(column):
        return True
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return lists and not pc.sum(pc.list_value_length(column)).as_py()


def _note_columns(config: DictConfig, files: Iterable[DataFile]) -> None:
    """Say which columns nobody reads, where they are left out of the rows."""
    if sends_all(config):
        return
    known = {*SENT, *PARQUET_SCHEMA.names, config.data.prompt_key, _INDEX_OF_PANDAS}
    known |= {config.data.get(key) for key in ("image_key", "video_key", "audio_key")}
    unread = sorted({name for file in files for name in file.names} - known)
    if unread:
        shown = ", ".join(map(repr, unread[:10])) + (f" and {len(unread) - 10} more" if len(unread) > 10 else "")
        print(f"note: nobody reads the column(s) {shown} of the data files; a reward reads extra_info")


# ---------------------------------------------------------------- as verl reads


def _check_readable(config: DictConfig, files: Sequence[DataFile]) -> None:
    """Have verl's own data set read the files; what it has read is cached for the trainer.

    Raises:
        DataError: naming the file, or two files and the column in which they differ.
    """
    try:
        _read(config, files)
        return
    except Exception as error:  # a process border: pyarrow, fsspec and datasets answer with their own errors
        failure = error
    for file in files:
        try:
            _read(config, [file])
        except Exception as error:  # as above
            # The reader copies what it reads into its cache.
            cache = "look at the free space and the rights of its cache (HF_DATASETS_CACHE)"
            fix = cache if isinstance(_innermost(error), OSError) else "write it with data_prep.schema: write_parquet"
            raise DataError(f"{file.where}: verl's reader refuses it ({_first_cause(error)}); {fix}") from error
    for file in files[1:]:
        column = _differing_column(config, files[0], file)
        if column is not None:
            first, other = (_type(config, each, column) for each in (files[0], file))
            raise DataError(
                f"{file.where}: cannot be joined with {files[0].path}: column {column!r} is {other} here and {first} "
                f"there; write both with the same types, as data_prep.schema: write_parquet does"
            ) from failure
    raise DataError(f"{files[0].where}: verl's reader refuses it ({_first_cause(failure)})") from failure


def _read(config: DictConfig, files: Sequence[DataFile]) -> Any:
    import datasets
    from verl.utils.dataset.rl_dataset import RLHFDataset

    options: Any = OmegaConf.create(OmegaConf.to_container(config.data))
    with open_dict(options):
        # Both need the tokenizer; checks.model looks at the lengths.
        options.filter_overlong_prompts, options.tool_config_path = False, None
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()):
            tokenizer: Any = None
            return RLHFDataset([file.path for file in files], tokenizer, options).dataframe
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _differing_column(config: DictConfig, first: DataFile, other: DataFile) -> str | None:
    import datasets

    tables = [_read(config, [file]) for file in (first, other)]
    for name in tables[0].column_names:
        if name in tables[1].column_names:
            try:
                datasets.concatenate_datasets([table.select_columns([name]) for table in tables])
            except Exception:  # a process border: which error it is does not matter
                return str(name)
    return None


def _type(config: DictConfig, file: DataFile, column: str) -> str:
    text = str(_read(config, [file]).features.arrow_schema.field(column).type)
    return text if len(text) <= 150 else text[:147] + "..."


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_cause(error: BaseException) -> str:
    """Name the innermost error in one line."""
    error = _innermost(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# ---------------------------------------------------------------- train and validation, rewards


def _note_overlap(train: Iterable[DataFile], val: Iterable[DataFile]) -> None:
    """Say how much of the validation is trained on."""
    trained, held_out = _all_ids(train), _all_ids(val)
    # The table that is looked up in is the small one.
    common = trained.filter(pc.is_in(trained, value_set=held_out))
    both = pc.sum(pc.is_in(held_out, value_set=common)).as_py()
    if both:
        print(
            f"note: {both} of the {len(held_out)} prompts of data.val_files are in data.train_files too, so validation "
            f"measures what was trained on"
        )


def _truths(files: Iterable[DataFile]) -> Iterator[tuple[str, str, Any]]:
    for file in files:
        first = 0
        for batch in file.table.to_batches():
            truths = pc.struct_field(batch["reward_model"], "ground_truth")
            rows = zip(batch["data_source"].to_pylist(), truths.to_pylist(), strict=True)
            yield from ((f"{file.where}: row {row}", *pair) for row, pair in enumerate(rows, first))
            first += batch.num_rows


def _samples(files: Iterable[DataFile]) -> Iterator[Sample]:
    """Yield the first row of every data source, training rows first."""
    seen: set[tuple[str, str]] = set()
    for file in files:
        extra = _column(file.path, "extra_info") if "extra_info" in file.names else None
        sources = file.table["data_source"].cast(pa.string())
        for source in sources.unique().to_pylist():
            if (file.role, source) not in seen:
                seen.add((file.role, source))
                row = sources.index(source).as_py()
                yield Sample(
                    where=f"{file.path} (row {row})",
                    trains=file.role == "train",
                    data_source=source,
                    ground_truth=file.table["reward_model"][row].as_py()["ground_truth"],
                    extra_info=(extra[row].as_py() if extra is not None else None) or {},
                )
