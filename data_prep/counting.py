"""Counting in steps, each number on a line: long responses that a very small chat model writes partly right.

"Count from 7 in steps of 3. Write 12 numbers." is answered with twelve lines, "1: 7", "2: 10", ..., and "#### 40". Two
solved examples come before. Val has a sixth of the problems, by a digest of their text, and training the others.

    python -m data_prep.counting --out DIR [--train N] [--val N] [--seed S]
"""

import argparse
import hashlib
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.command import run
from data_prep.pipeline import Problem, write_split
from data_prep.schema import DataError

DATA_SOURCE = "skpo/arithmetic"
"""Whose check takes the strict form "#### 40"."""
STARTS, STEPS, COUNTS = range(1, 31), range(1, 11), range(10, 21)
EXAMPLES = ((31, 4, 11), (2, 12, 10))
"""Not among the problems."""
TRAIN_ROWS, VAL_ROWS = 2048, 256


def question(start: int, step: int, count: int) -> str:
    """Return the problem as it is asked."""
    return f"Count from {start} in steps of {step}. Write {count} numbers."


def solution(start: int, step: int, count: int) -> str:
    """Write it out."""
    numbers = [start + step * place for place in range(count)]
    return "\n".join([*(f"{place}: {number}" for place, number in enumerate(numbers, 1)), f"#### {numbers[-1]}"])


def chat(text: str) -> list[dict[str, str]]:
    """Return the prompt of a problem: two solved examples, then its text."""
    messages = [{"role": "system", "content": "Count."}]
    for example in EXAMPLES:
        messages += [{"role": "user", "content": question(*example)}]
        messages += [{"role": "assistant", "content": solution(*example)}]
    return [*messages, {"role": "user", "content": text}]


def prepare(out: Path, *, train: int = TRAIN_ROWS, val: int = VAL_ROWS, seed: int = 1) -> dict[str, Path]:
    """Write `out`/train.parquet and `out`/val.parquet, print a line for each, and return the paths by split.

    Raises:
        DataError: fewer rows than 1, or more than there are problems.
    """
    shares: dict[str, list[Problem]] = {"train": [], "val": []}
    for start, step, count in itertools.product(STARTS, STEPS, COUNTS):
        text = question(start, step, count)
        split = "train" if hashlib.sha256(text.encode()).digest()[0] % 6 else "val"
        shares[split].append(Problem(DATA_SOURCE, text, str(start + step * (count - 1))))
    paths = {}
    for split, rows in {"train": train, "val": val}.items():
        problems = shares[split]
        if not 1 <= rows <= len(problems):
            raise DataError(f"--{split} {rows}: must be 1 to {len(problems)}")
        paths[split] = out / f"{split}.parquet"
        write_split(paths[split], split, random.Random(f"{seed} {split}").sample(problems, rows), chat)
        print(f"{paths[split]}: {rows} rows")
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 with one line on stderr if the request cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.counting", description="Counting in steps.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and val.parquet")
    parser.add_argument("--train", type=int, default=TRAIN_ROWS, help="training rows (default %(default)s)")
    parser.add_argument("--val", type=int, default=VAL_ROWS, help="held-out rows (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    return run(lambda: prepare(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
