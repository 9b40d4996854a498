"""Where the numbers of a measurement go."""

import json
import os
import time
from pathlib import Path
from typing import Any


def stamp() -> str:
    """Date of a measurement, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: the file is whole or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
