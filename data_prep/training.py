"""The two files of a training run, made once from the run's own configuration (``data=gsm8k`` and the like).

Validation is a seeded sample of the test split, or of a benchmark, so that it stays affordable; problems of the whole
test split, not of the sample alone, are kept out of the training file.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from data_prep.leakage import held_out
from data_prep.pipeline import Source, drop_held_out, read_split, sample, write_problems
from data_prep.schema import DataError

SOURCES = {"gsm8k": "data_prep.gsm8k", "math": "data_prep.math", "dapo_math": "data_prep.dapo_math"}


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


def prepare_training(folder: Path, data: TrainingData) -> dict[str, Path]:
    """Write `folder`/train.parquet and `folder`/val.parquet and return their paths."""
    if data.name not in SOURCES:
        raise DataError(f"data.prepare.name: {data.name} is unknown; known are {', '.join(SOURCES)}")
    source: Source = import_module(SOURCES[data.name]).SOURCE
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
    train = read_split(source, data.source, "train", skip_bad=data.skip_bad)
    drop_held_out(train, held_out(problem.question for problem in val.problems))
    train.problems = sample(train.problems, data.train_rows, data.seed)
    val.problems = sample(val.problems, data.val_rows, data.seed)
    paths = {"train": folder / "train.parquet", "val": folder / "val.parquet"}
    write_problems({paths["train"]: ("train", train), paths["val"]: ("val", val)}, data.template or source.template)
    return paths
