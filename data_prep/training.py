"""The two files of a training run, made once from the run's own configuration (``data=gsm8k``, ``data=mine``).

Validation is a seeded sample of the test split, of a benchmark, or of the rows that ``split`` leaves, so that it stays
affordable; problems of the whole split, not of the sample alone, are kept out of the training file.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from data_prep.leakage import held_out
from data_prep.pipeline import Collected, Source, drop_held_out, read_split, sample, write_problems
from data_prep.schema import DataError

SOURCES = {
    "gsm8k": "data_prep.gsm8k",
    "math": "data_prep.math",
    "dapo_math": "data_prep.dapo_math",
    "mine": "data_prep.files",
    "code": "data_prep.code",
}
SPLIT = 0.95
"""Share of a file of one's own that is trained on, unless another is given."""


@dataclass(frozen=True)
class TrainingData:
    """The keys of `data.prepare`; None takes the data set's own source and template, and all rows.

    Attributes:
        name: of the data set, one of `SOURCES`.
        source: file, folder or hub name.
        template: name or path.
        train_rows, val_rows: at most.
        val_benchmark: name of a benchmark (`data_prep.benchmarks`); None for the test split of `source`.
        val_source: of the benchmark or test split.
        seed: of the samples.
        skip_bad: leave malformed rows out.
        prompt, answer, check, system: of `mine`, see `data_prep.files`.
        split: of `mine` and `code`, the share of the rows to train on; None takes the validation that `source` or
            `val_source` has, or `SPLIT`.
        from_date, until_date: of `code`, the days of LiveCodeBench's contests, both included.
    """

    name: str
    source: str | None = None
    template: str | None = None
    train_rows: int | None = None
    val_benchmark: str | None = None
    val_source: str | None = None
    val_rows: int | None = None
    seed: int = 1
    skip_bad: bool = False
    prompt: str | None = None
    answer: str | None = None
    check: str | None = None
    system: str | None = None
    split: float | None = None
    from_date: str | None = None
    until_date: str | None = None


def prepare_training(folder: Path, data: TrainingData) -> dict[str, Path]:
    """Write `folder`/train.parquet and `folder`/val.parquet and return their paths."""
    if data.name not in SOURCES:
        raise DataError(f"data.prepare.name: {data.name} is unknown; known are {', '.join(SOURCES)}")
    module = import_module(SOURCES[data.name])
    source: Source = module.source(data) if hasattr(module, "source") else module.SOURCE
    share = _share(source, data)
    if data.name == "code" and data.source is None:
        from data_prep.code_tasks import generated

        train, val = (Collected(problems, read=len(problems)) for problems in generated(data.seed))
    elif share is not None:
        train = read_split(source, data.source, "train", skip_bad=data.skip_bad)
        val = _divide(train, share, data.seed)
    else:
        val, train = _read_both(source, data)
    drop_held_out(train, held_out(problem.question for problem in val.problems))
    train.problems = sample(train.problems, data.train_rows, data.seed)
    val.problems = sample(val.problems, data.val_rows, data.seed)
    paths = {"train": folder / "train.parquet", "val": folder / "val.parquet"}
    write_problems({paths["train"]: ("train", train), paths["val"]: ("val", val)}, data.template or source.template)
    return paths


def _share(source: Source, data: TrainingData) -> float | None:
    """Return the share of the rows to train on, None if those to validate with are a split of their own."""
    apart = data.val_source or data.val_benchmark
    if data.split is None:
        return None if apart or "test" in source.splits else SPLIT
    where = f"--split {data.split} (data.split)"
    if apart:
        raise DataError(f"{where}: the rows to validate with are those of {apart}; leave one of the two out")
    if not isinstance(data.split, int | float) or not 0 < data.split < 1:
        raise DataError(f"{where}: is not a share; give a number above 0 and below 1, such as {SPLIT}")
    return data.split


def _divide(train: Collected, share: float, seed: int) -> Collected:
    """Take the rows to validate with out of `train`; at least one row stays on either side."""
    rows = len(train.problems)
    if rows < 2:
        raise DataError("--source (data.source): has one usable row, and training and validation need one each")
    chosen = sample(train.problems, min(max(round(share * rows), 1), rows - 1), seed)
    kept = {problem.id for problem in chosen}
    val = Collected([problem for problem in train.problems if problem.id not in kept], read=train.read)
    train.problems = chosen
    return val


def _read_both(source: Source, data: TrainingData) -> tuple[Collected, Collected]:
    """Read the rows to validate with and those to train on, each from its own place."""
    if data.val_benchmark is not None:
        from data_prep.benchmarks import benchmark, places

        val_of = benchmark(data.val_benchmark)
        val_place = places(data.val_source, [data.val_benchmark])[data.val_benchmark]
    else:
        val_of, val_place = source, data.val_source or data.source
    if val_place == data.source and data.source is not None and Path(data.source).is_file():
        raise DataError(
            f"data.source: {data.source} is one file; give the folder that holds its train and test files, or the "
            f"test file by data.val_source"
        )
    val = read_split(val_of, val_place, "test", skip_bad=data.skip_bad)
    return val, read_split(source, data.source, "train", skip_bad=data.skip_bad)
