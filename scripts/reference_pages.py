"""Write the reference pages of docs/ from the code: ``python scripts/reference_pages.py``.

docs/configuration.md comes from the settings and the comments of the config files, docs/metrics.md from the glossary,
docs/sandbox.md from the limits of programs and the hostile programs of the tests.
``tests/unit/docs/test_site.py`` fails where a page is not what the code says.
"""

import inspect
import re
import runpy
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from recipe.skpo.output import glossary
from recipe.skpo.output.console import markdown_table
from recipe.skpo.settings import BOUNDS, CHOICES, DRIFTS, RECORDS, PolaritySettings, SkpoSettings
from reward_fns import code_judge, code_worker
from reward_fns.code_judge import RunOptions

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
    """Tabulate the nodes ``skpo`` and ``polarity``."""
    rows = []
    for prefix, record in {
        "skpo": SkpoSettings,
        **{f"skpo.{name}": record for name, record in RECORDS.items()},
        "polarity": PolaritySettings,
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


def sandbox() -> str:
    """Write docs/sandbox.md."""
    hostile = runpy.run_path(str(ROOT / "tests/support/hostile_programs.py"))["PROGRAMS"]
    attacks = [[group, item.tries, " or ".join(item.ends)] for group, items in hostile.items() for item in items]
    mib = 2**20
    limits = [
        ["processor time of a test", f"{RunOptions.seconds:g} s", "of all its processes together", "`code_seconds`"],
        [
            "time of a test",
            f"{code_judge.WALL} x `code_seconds`",
            "wall clock; of calls, from one result to the next",
            "",
        ],
        ["all tests of a program", f"{code_judge.ALL_TESTS} x `code_seconds`", "processor time", ""],
        [
            "memory",
            f"{RunOptions.memory_mb} MiB",
            "of each process and of all, beyond Python's own",
            "`code_memory_mb`",
        ],
        ["processes and threads", str(code_judge.MOST_PROCESSES), "", ""],
        ["output", f"{code_judge.LARGEST_OUTPUT // mib} MiB", "standard error is thrown away", ""],
        ["files", f"{code_judge.LARGEST_FILES // mib} MiB", "in the private `/tmp`", ""],
        ["open files", str(code_worker.OPEN_FILES), "of a process", ""],
    ]
    return f"""# Running programs of a model

Answers to programming problems are Python, which runs on this machine to be checked
([rewards.md](rewards.md#programs) says how). This page says what such a program can reach.

This page is written by `python scripts/reference_pages.py`.

## The sandbox

`code_sandbox=namespaces`, the default, is made of the kernel's namespaces: it needs no package and no rights of root.
A program has

- a user of its own without capabilities. If the run is root's, the program runs as an unused user outside;
- a root folder with the system's programs and libraries and Python's modules, all read-only, and an empty `/tmp` of its
  own. Home folders, `/etc`, `/var`, `/sys`, the project and the data are not there;
- process numbers of its own: it sees no process but its children. When its first process ends, the kernel ends all;
- no network: `socket` is refused, and there is no interface. Shared memory and message queues are its own;
- none of your environment variables but PATH, the locale and LD_LIBRARY_PATH, and none of the judge's open files;
- {len(code_worker.refused_calls())} system calls refused: those that trace, mount, enter namespaces, keep memory
  outside a process, or load code into the kernel.

Each input of a program is run in a sandbox of its own, all calls of a function in one. Where the kernel or a container
does not allow namespaces, the run stops before it begins and says what to change.

**The verdict** is never the program's. Expected outputs and results stay in the process that judges. Tests that are
Python (HumanEval, MBPP) run in another sandbox and call the program's functions through a socket. Arguments and results
cross as plain values: numbers, texts, lists, dictionaries, sets. Other objects can be called and have attributes, but
equal nothing. A program that changes a built-in function, defines `__eq__`, reads its own memory or ends its process
changes nothing but its own answer.

## Limits

{table(["limit", "default", "of what", "option"], limits)}

Options are set by `+reward.custom_reward_function.reward_kwargs.code_seconds=10`, in an evaluation by
`+reward.reward_kwargs.code_seconds=10`. A program that is slower than a limit has the verdict "time-out"; more memory,
output or files than allowed are an "error".

## Cost

As many programs run at once as this process has cores; further answers wait. `python -m benchmarks programs` judges
right answers of every kind. On two cores, beside other work that kept ten more processes ready to run, 512 answers of
each kind took:

| tests of an answer | answers per second | processor time of an answer |
|---|---|---|
| one input and output | 26 | 10 ms |
| 8 calls | 31 | 10 ms |
| 8 assertions | 16 | 23 ms |

## Without namespaces

`code_sandbox=rlimits` runs programs **with your rights**, under the limits of time, memory, output and processes and
without the refused system calls, sockets among them. Such a program can read your files and keys, delete or change what
you can, see and kill your processes, and leave processes that outlive it for a moment. Memory is bounded per process
alone, and for root the number of processes is not bounded at all. Use it in a container or virtual machine that you
throw away.

## Hostile programs

`tests/unit/reward_fns/test_hostile_programs.py` runs these {len(attacks)} programs with half a second and 256 MiB.
Each ends within the limit, leaves no process, file or shared memory, and neither reads nor changes anything outside.
None passes.

{table(["kind", "attack", "verdict"], attacks)}
"""


PAGES = {"docs/configuration.md": configuration, "docs/metrics.md": metrics, "docs/sandbox.md": sandbox}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
