"""The config of an evaluation or analysis as a file, and the frame of their commands."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from data_prep.untrusted import UntrustedError, error_line, read_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.output.console import replace_unprintable
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.redaction import reject_secrets

CONFIG_NAME = "config.json"


def plain(value: Any) -> Any:
    """Convert to the types of JSON: dataclasses become objects, paths strings, NaN and infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, pd.DataFrame):
        return [plain(record) for record in value.to_dict(orient="records")]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def json_bytes(value: Any) -> bytes:
    """Encode a value as the text of a JSON file."""
    return (json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested objects into one with dotted names."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {name: value for key, item in config.items() for name, value in _flat(item, f"{prefix}.{key}").items()}


def check_same_config(out: Path, config: Any, free: Sequence[str] = ()) -> None:
    """Make ``out`` the folder of a command with this config, which may be half done.

    ``free`` are dotted names of values that may differ from those in the folder, because no draw depends on them.

    Raises:
        ConfigError: the folder holds draws of another config, naming the first value that differs; or a secret in the
            config, which is written to a file.
    """
    path, given = out / CONFIG_NAME, plain(config)
    reject_secrets(given)
    if path.is_file():
        try:
            before, now = _flat(read_json(path)), _flat(given)
        except UntrustedError as error:
            raise ConfigError(f"{path}: {error}; give another output folder") from None
        for name in sorted(set(before) | set(now)):
            if name.removeprefix(".") not in free and before.get(name) != now.get(name):
                raise ConfigError(
                    f"{path}: was made with {name.removeprefix('.')}={before.get(name)!r}, now it is "
                    f"{now.get(name)!r}; give another output folder"
                )
    write_atomic(path, json_bytes(given))


def run_cli(run: Callable[[], Sequence[Path]]) -> int:
    """Run a command: prints the files it wrote, or one line on stderr for what a user can put right.

    Returns:
        The exit code.
    """
    replace_unprintable()
    try:
        for path in run():
            print(path)
    except (ValueError, RuntimeError, OSError) as error:
        print(error_line(error), file=sys.stderr)
        return 1
    return 0


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line and prints its description as it is written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"formatter_class": argparse.RawDescriptionHelpFormatter} | options))

    def error(self, message: str) -> NoReturn:
        """Print the line and exit, without the usage, which may be longer than a screen."""
        self.exit(2, f"error: {message.removeprefix('argument ')}; --help lists the flags\n")
