"""The two files of a training run, made once from the run's own configuration (``data=gsm8k`` and its like).

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
    """What `data.prepare` holds.

    `source` is a file, folder or hub name, None for the data set's own hub name. `val_benchmark` is the name of a
    benchmark (`data_prep.benchmarks`) with its `val_source`, None for the test split of `source`. `train_rows` and
    `val_rows` are bounds, None for all.
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


def prepare_training(folder: Path, wanted: TrainingData) -> dict[str, Path]:
    """Write `folder`/train.parquet and `folder`/val.parquet; returns their paths. Raises DataError in one line."""
    if wanted.name not in SOURCES:
        raise DataError(f"data.prepare.name: {wanted.name} is unknown; known are {', '.join(SOURCES)}")
    source: Source = import_module(SOURCES[wanted.name]).SOURCE
    if wanted.val_benchmark is not None:
        from data_prep.benchmarks import benchmark, places

        val_of = benchmark(wanted.val_benchmark)
        val_place = places(wanted.val_source, [wanted.val_benchmark])[wanted.val_benchmark]
    else:
        val_of, val_place = source, wanted.val_source or wanted.source
    if val_place == wanted.source and wanted.source is not None and Path(wanted.source).is_file():
        raise DataError(
            f"data.source: {wanted.source} is one file; give the folder that holds its train and test files, or the "
            f"test file by data.val_source"
        )
    val = read_split(val_of, val_place, "test", skip_bad=wanted.skip_bad)
    train = read_split(source, wanted.source, "train", skip_bad=wanted.skip_bad)
    drop_held_out(train, held_out(problem.question for problem in val.problems))
    train.problems = sample(train.problems, wanted.train_rows, wanted.seed)
    val.problems = sample(val.problems, wanted.val_rows, wanted.seed)
    paths = {"train": folder / "train.parquet", "val": folder / "val.parquet"}
    write_problems({paths["train"]: ("train", train), paths["val"]: ("val", val)}, wanted.template or source.template)
    return paths
