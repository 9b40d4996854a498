"""Where the numbers of a measurement go: a Markdown table on the terminal, all of them into a JSON file."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser_of(part: str, description: str) -> argparse.ArgumentParser:
    """The parser of a part's command, with the option that all of them have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {part}", description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(f"outputs/benchmarks/{part}.json"))
    return parser


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the content, the time and the machine's load; atomically: the file is whole or the old one."""
    facts = {
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**facts, **content}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(f"\nwritten: {path}")
