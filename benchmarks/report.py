"""Where the numbers of a measurement go: a Markdown table on the terminal, all of them into a JSON file."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from recipe.skpo.output.console import markdown_table as table
from recipe.skpo.output.files import write_atomic

__all__ = ["parser_of", "table", "write_json"]


def parser_of(part: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a part's command, with the option that all of them have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {part}", description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(f"outputs/benchmarks/{part}.json"))
    return parser


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the content, the time and the machine's load, atomically."""
    facts = {
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }
    write_atomic(path, json.dumps({**facts, **content}, indent=1) + "\n")
    print(f"\nwritten: {path}")
