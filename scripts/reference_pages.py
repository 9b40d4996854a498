"""Write the reference pages of docs/ from the code: ``python scripts/reference_pages.py``.

docs/configuration.md comes from the settings and the comments of the config files, docs/metrics.md from the glossary.
``tests/unit/docs/test_site.py`` fails where a page is not what the code says.
"""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from recipe.skpo.output import glossary
from recipe.skpo.output.console import markdown_table
from recipe.skpo.settings import BOUNDS, CHOICES, DRIFTS, RECORDS, SkpoSettings

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "recipe/skpo/config"
GROUPS = ("model", "data", "method", "preset", "budget", "platform")


def meanings(record: type) -> dict[str, str]:
    """Read the section ``Attributes`` of a record's docstring: names, also of two attributes, to their text."""
    section = inspect.getdoc(record).partition("Attributes:\n")[2]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def default(item: Any) -> str:
    """Show the default of a field as a config writes it."""
    value = item.default if item.default is not MISSING else item.default_factory()
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value).replace("'", '"') if value == "" or re.search(r"\s|^\[", str(value)) else str(value)


def values(name: str) -> str:
    """Show what a setting may be, where a table of the settings says it."""
    choices = CHOICES | {"drift": DRIFTS}
    return ", ".join(f"`{choice}`" for choice in choices[name]) if name in choices else BOUNDS.get(name, ("", ""))[1]


def settings_table() -> str:
    """Tabulate the node ``skpo``."""
    rows = []
    for prefix, record in {
        "skpo": SkpoSettings,
        **{f"skpo.{name}": record for name, record in RECORDS.items()},
    }.items():
        said = meanings(record)
        rows += [
            [f"`{prefix}.{item.name}`", f"`{default(item)}`", values(item.name), said[item.name]]
            for item in fields(record)
            if item.name not in RECORDS
        ]
    return table(["key", "default", "values", "meaning"], rows)


def comment_above(lines: list[str], place: int) -> str:
    """Join the comment lines that end above a line."""
    start = place
    while start and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return " ".join(line.strip().lstrip("# ") for line in lines[start:place] if "@package" not in line)


def top_keys() -> str:
    """Tabulate the keys at the top of the config that are this recipe's own."""
    lines = (CONFIG / "skpo_trainer.yaml").read_text(encoding="utf-8").splitlines()
    rows = []
    for place, line in enumerate(lines):
        key, sign, value = line.partition(": ")
        if sign and re.fullmatch(r"\w+", key):
            rows.append([f"`{key}`", f"`{value}`", comment_above(lines, place)])
    return table(["key", "default", "meaning"], rows)


def choices_of(group: str) -> str:
    """Tabulate the choices of a config group by the comments that their files begin with."""
    rows = []
    for file in sorted((CONFIG / group).glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        end = next((place for place, line in enumerate(lines) if not line.startswith("#")), len(lines))
        rows.append([f"`{group}={file.stem}`", comment_above(lines, end)])
    return table(["choice", "what it is"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a table; cells may hold docstrings and names in angle brackets."""
    cells = [[" ".join(cell.split()).replace("|", "\\|").replace("``", "`") for cell in row] for row in rows]
    return markdown_table(head, [[re.sub(r"(<\w[^>]*>)(?![^`]*`)", r"`\1`", cell) for cell in row] for row in cells])


def configuration() -> str:
    """Write docs/configuration.md."""
    groups = "\n\n".join(choices_of(group) for group in GROUPS)
    return f"""# Configuration

The config is verl's with this recipe's keys and groups. Every key is a Hydra override (`key=value`);
[verl's documentation](https://verl.readthedocs.io) describes verl's own. `python -m recipe.skpo.main --help` lists
those that people change, `--cfg job --package skpo` the first table with the values of a command line, and
`python -m recipe.skpo.evaluation --help` the keys of the evaluation.

This page is written by `python scripts/reference_pages.py`.

## What SKPO adds

{settings_table()}

## The run

{top_keys()}

## Groups

{groups}
"""


def metrics() -> str:
    """Write docs/metrics.md."""
    rows = [
        [f"`{metric.name}`", metric.unit, metric.meaning + (f" ({metric.only})" if metric.only else "")]
        for metric in glossary.METRICS
    ]
    return f"""# Glossary of metrics

Every name in `metrics.jsonl` and in the [loggers](loggers.md). Those below `skpo/` are this recipe's; where they
differ by phase, upstream means segments and downstream responses. All others are verl's, which mixes both phases' rows.
`{{a,b}}` stands for either name, `<n>` for any text. In parentheses: when a metric is logged, if not in every SKPO run.

This page is written by `python scripts/reference_pages.py`.

{table(["metric", "unit", "meaning"], rows)}
"""


PAGES = {"docs/configuration.md": configuration, "docs/metrics.md": metrics}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
