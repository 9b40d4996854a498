"""Files of an analysis: picture, numbers, config; each is replaced as a whole or not at all."""

import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from data_prep.untrusted import UntrustedError, error_line, read_json
from recipe.skpo.output.console import replace_unprintable
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.redaction import reject_secrets

CONFIG_NAME = "config.json"


class AnalysisError(ValueError):
    """An analysis cannot be made of what was given; one line that names the place and the fix."""


def require(holds: bool, message: str) -> None:
    """Raise AnalysisError unless ``holds``."""
    if not holds:
        raise AnalysisError(message)


def plain(value: Any) -> Any:
    """``value`` in the types of JSON: dataclasses become objects, paths strings, NaN and infinities null."""
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


def _json(value: Any) -> bytes:
    return (json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one with dotted names."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {name: value for key, item in config.items() for name, value in _flat(item, f"{prefix}.{key}").items()}


def claim(out: Path, config: Any, free: Sequence[str] = ()) -> None:
    """Make ``out`` the folder of a run with this config, which may be half done.

    Args:
        out: folder; made if absent.
        config: a dataclass.
        free: dotted names of values that may differ from what the folder was begun with, because no draw depends on
            them.

    Raises:
        AnalysisError: the folder holds draws of another config, naming the first value that differs.
        ConfigError: a secret in the config, which is written down.
    """
    path, mine = out / CONFIG_NAME, plain(config)
    reject_secrets(mine)
    if path.is_file():
        try:
            theirs = read_json(path)
        except UntrustedError as error:
            raise AnalysisError(f"{path}: {error}; give another --out") from None
        before, now = _flat(theirs), _flat(mine)
        for name in sorted(set(before) | set(now)):
            require(
                name.removeprefix(".") in free or before.get(name) == now.get(name),
                f"{path}: was made with {name.removeprefix('.')}={before.get(name)!r}, now it is {now.get(name)!r}; "
                f"give another --out",
            )
    write_atomic(path, _json(mine))


def write_results(
    out: Path, name: str, config: Any, summary: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], figure: Figure
) -> list[Path]:
    """Write ``config.json``, ``<name>.json`` (summary and tables), ``<table>.csv`` for each table, ``<name>.png``
    and ``<name>.svg``; equal input gives equal bytes.

    Returns:
        The files, the picture first.
    """
    files: dict[Path, bytes] = {}
    # Element ids and dates would differ from run to run.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=80, metadata=metadata)
            files[out / f"{name}.{suffix}"] = buffer.getvalue()
    files[out / f"{name}.json"] = _json({"summary": summary, **{key: table for key, table in tables.items()}})
    for key, table in tables.items():
        files[out / f"{key}.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
    files[out / CONFIG_NAME] = _json(config)
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


def guarded(run: Callable[[], Sequence[Path]]) -> int:
    """Exit code of a command: prints the files it wrote, or one line on stderr for what a user can put right."""
    replace_unprintable()
    try:
        for path in run():
            print(path)
    except (ValueError, RuntimeError, OSError) as error:
        print(error_line(error), file=sys.stderr)
        return 1
    return 0
