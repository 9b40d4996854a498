"""The command line that the source modules share."""

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.model_folder import ModelError
from data_prep.pipeline import Source, prepare
from data_prep.schema import DataError
from data_prep.untrusted import error_line


def run(work: Callable[[], object]) -> int:
    """Run a command; returns the exit code, 1 with one line on stderr if a request, a file or a model is wrong."""
    try:
        work()
    except (DataError, ModelError) as error:
        print(error_line(error), file=sys.stderr)
        return 1
    return 0


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every source takes."""
    options = argparse.ArgumentParser(prog=f"python -m data_prep.{module}", description=description)
    options.add_argument("--out", type=Path, required=True, help="folder for the parquet files")
    options.add_argument("--source", help="file or folder (jsonl, json, parquet, csv), or a hub name")
    options.add_argument("--limit", type=int, help="at most this many rows per file, drawn with --seed")
    options.add_argument("--template", help="name of a template, or the path of your own yaml file")
    options.add_argument("--seed", type=int, default=1, help="of what is drawn (default %(default)s)")
    options.add_argument("--skip-bad", action="store_true", help="leave out and list malformed rows, do not stop")
    return options


def generated(module: str, description: str, train: int, val: int) -> argparse.ArgumentParser:
    """Return a parser with the options that every generated task takes, with its default numbers of rows."""
    options = argparse.ArgumentParser(prog=f"python -m data_prep.{module}", description=description)
    options.add_argument("--out", type=Path, required=True, help="folder for train.parquet and val.parquet")
    options.add_argument("--train", type=int, default=train, help="training rows (default %(default)s)")
    options.add_argument("--val", type=int, default=val, help="held-out rows (default %(default)s)")
    options.add_argument("--seed", type=int, default=1, help="default %(default)s")
    return options


def main(source: Source, argv: Sequence[str] | None = None) -> int:
    """Run the command of a source with splits; returns the exit code."""
    options = parser(source.name, f"{source.name} as parquet files for training (hub: {source.hub}).")
    options.add_argument("--split", choices=[*source.splits], help="only this split (default: all)")
    options.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        help="prepared parquet files or folders whose problems must not be in the training split",
    )
    given = options.parse_args(argv)
    return run(
        lambda: prepare(
            source,
            given.out,
            place=given.source,
            splits=[given.split] if given.split else None,
            limit=given.limit,
            template=given.template,
            seed=given.seed,
            skip_bad=given.skip_bad,
            against=given.against,
        )
    )


def commands(folder: Path, package: str) -> dict[str, str]:
    """Find the modules of a package that are commands, without importing them: their docstrings say it.

    Returns:
        Name to the first sentence of the docstring and its command lines.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines = [line for line in said.splitlines() if line.strip().startswith(f"python -m {package}.{path.stem} ")]
        if lines:
            found[path.stem] = "\n".join([said.split("\n")[0], *lines])
    return found


def listed(folder: Path, package: str) -> str:
    """List the commands of a package as text."""
    texts = commands(folder, package).values()
    return "\n\n".join([*texts, "--help behind a command lists its options."])
