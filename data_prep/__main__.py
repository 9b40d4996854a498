"""Data as parquet files: ``python -m data_prep`` lists the commands, ``python -m data_prep NAME ...`` runs one."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from data_prep import command


def main(argv: Sequence[str] | None = None) -> int:
    """List the commands, or run one; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    folder = Path(__file__).parent
    if not given or given[0] not in command.commands(folder, "data_prep"):
        print(command.listed(folder, "data_prep"))
        return 0 if not given or given[0] in ("-h", "--help") else 2
    module = import_module(f"data_prep.{given[0]}")
    if hasattr(module, "SOURCE"):
        return command.main(module.SOURCE, given[1:])
    return int(module.main(given[1:]))


if __name__ == "__main__":
    sys.exit(main())
