"""What the analyses' commands share: the frame of a parser, and the files they write."""

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.options import add_flags, add_model_flags, model_settings, read_flags
from recipe.skpo.evaluation.results import CONFIG_NAME, Parser, json_bytes, plain, run_cli
from recipe.skpo.output.files import write_atomic
from recipe.skpo.task.digests import model_digest


def parser_of(name: str, description: str | None) -> Parser:
    """Return the parser of an analysis, whose module's docstring is its help."""
    return Parser(prog=f"python -m recipe.skpo.analysis.{name}", description=description)


def add_out(parser: argparse.ArgumentParser, help: str = "folder for picture, numbers and config") -> None:
    """Add the flag ``--out``."""
    parser.add_argument("--out", type=Path, required=True, help=help)


def sampling_command(
    name: str,
    description: str | None,
    kind: type[Any],
    run: Callable[[Any, Path], list[Path]],
    argv: Sequence[str] | None,
) -> int:
    """Run an analysis that samples from a model; returns the exit code.

    Args:
        name: of the command.
        description: its help.
        kind: dataclass of its options, with ``model``, ``engine`` and ``asked``.
        run: the analysis.
        argv: its arguments; None for those of the process.
    """
    parser = parser_of(name, description)
    add_out(parser, "folder for draws, picture, numbers and config")
    add_flags(parser, kind)
    add_model_flags(parser)
    add_flags(parser, EngineConfig, "vLLM")
    flags = parser.parse_args(argv)

    def command() -> list[Path]:
        asked = model_settings(flags, flags.model)
        return run(read_flags(kind, flags, engine=read_flags(EngineConfig, flags), asked=asked), flags.out)

    return run_cli(command)


def with_weights(config: Any, models: Mapping[str, str]) -> dict[str, Any]:
    """Return a config as it is stored, with the digest of each model: its path stays when its weights are replaced.

    Args:
        config: of a command that samples.
        models: name to folder or hub name, whose tokenizers have been loaded (``model_digest``).
    """
    return {**plain(config), "weights": {name: model_digest(model) for name, model in models.items()}}


def rendered(figure: Figure, suffix: str, name: str) -> bytes:
    """Render a figure as ``png`` or ``svg``; equal figures of one name give equal bytes."""
    buffer = io.BytesIO()
    # Element ids and dates would differ from run to run.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        unknown = {"Software" if suffix == "png" else "Date": None}
        figure.savefig(buffer, format=suffix, dpi=80, metadata=unknown)
    return buffer.getvalue()


def write_results(
    out: Path, name: str, config: Any, summary: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], figure: Figure
) -> list[Path]:
    """Write an analysis; equal input gives equal bytes.

    Returns:
        The files: ``<name>.png`` and ``<name>.svg``, ``<name>.json`` (summary and tables), ``<table>.csv`` for each
        table, ``config.json``.
    """
    files = {out / f"{name}.{suffix}": rendered(figure, suffix, name) for suffix in ("png", "svg")}
    files[out / f"{name}.json"] = json_bytes({"summary": summary, **tables})
    for key, table in tables.items():
        files[out / f"{key}.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
    files[out / CONFIG_NAME] = json_bytes(config)
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)
