"""Sums solved in writing, the task of ``model=tiny``: each running total on a line, then the answer.

A problem is a bare expression, "7+8-3-2+9". Its solution has a line per operation and the strict form "#### 19":

    7+8=15
    15-3=12
    12-2=10
    10+9=19
    #### 19

Expressions are divided by a digest of their text: a sixteenth is held out for val, another one is for training, and the
rest is for the pretraining of the model (`data_prep.tiny`). So no seed and no size lets two of them overlap.

    python -m data_prep.steps --out DIR [--train N] [--val N] [--seed S]
"""

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from data_prep.arithmetic import Expression
from data_prep.command import generated, run
from data_prep.pipeline import Problem, write_split
from data_prep.schema import DataError

DATA_SOURCE = "skpo/steps"
TRAIN_ROWS = 2048
VAL_ROWS = 256
MOST_ROWS = 25_000  # of 30,343 that exist for train and 30,841 for val, the last of which take minutes to draw
TERMS = 5
LARGEST_OPERAND = 9
LARGEST_TOTAL = 99

Share = Literal["val", "train", "pretraining"]


def question(expression: Expression) -> str:
    """Return the problem as it is asked."""
    return str(expression).replace(" ", "")


def solution(totals: Sequence[int], expression: Expression) -> str:
    """Write out the operations of `expression` with the running totals given, which need not be right."""
    operations = zip(totals, expression.signs, expression.operands[1:], totals[1:], strict=False)
    lines = [f"{before}{sign}{operand}={after}\n" for before, sign, operand, after in operations]
    return "".join(lines) + f"#### {totals[-1]}"


def share(expression: Expression) -> Share:
    """Return which share an expression belongs to."""
    number = hashlib.sha256(question(expression).encode()).digest()[0] % 16
    return "val" if number == 0 else "train" if number == 1 else "pretraining"


def draw(wanted: Share, rng: random.Random) -> Iterator[Expression]:
    """Yield expressions of one share forever, with repetitions; no running total is negative."""
    while True:
        operands = tuple(rng.randint(1, LARGEST_OPERAND) for _ in range(TERMS))
        expression = Expression(operands, tuple(rng.choices("+-", k=TERMS - 1)))
        if min(expression.totals()) >= 0 and share(expression) == wanted:
            yield expression


def prepare(out: Path, *, train: int = TRAIN_ROWS, val: int = VAL_ROWS, seed: int = 1) -> dict[str, Path]:
    """Write `out`/train.parquet and `out`/val.parquet, print a line for each, and return the paths by split.

    Raises:
        DataError: for fewer rows than 1 or more than MOST_ROWS.
    """
    shares: dict[Share, int] = {"val": val, "train": train}
    for split, rows in shares.items():
        if not 1 <= rows <= MOST_ROWS:
            raise DataError(f"--{split} {rows}: must be 1 to {MOST_ROWS}, since about 30,000 problems exist")
    paths: dict[str, Path] = {}
    for split, rows in shares.items():
        drawn: dict[Expression, None] = {}  # a set that keeps the order
        expressions = draw(split, random.Random(f"{seed} {split}"))
        while len(drawn) < rows:
            drawn[next(expressions)] = None
        problems = [Problem(DATA_SOURCE, question(expression), str(expression.totals()[-1])) for expression in drawn]
        paths[split] = out / f"{split}.parquet"
        write_split(paths[split], split, problems, lambda text: [{"role": "user", "content": text}])
        print(f"{paths[split]}: {rows} rows")
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 with one line on stderr if the request cannot be met."""
    options = generated("steps", "Sums solved in writing.", TRAIN_ROWS, VAL_ROWS)
    return run(lambda: prepare(**vars(options.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
