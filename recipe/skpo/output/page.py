"""One self-contained HTML page about a run, or about several that are compared.

    python -m recipe.skpo.output.page <run folder>
    python -m recipe.skpo.output.page <run folder> <run folder> ... [--out <file>]

The first writes ``report.html`` into the run folder: headline numbers, curves, rollout trees, config.  The second
writes ``comparison.html``: final numbers, curves over each other, the settings that differ.  A page needs no network
and stays below ``LARGEST_PAGE``.  Text of a model, a data file or a config stands in one JSON block of pure ASCII
without ``<``, ``>`` and ``&``, and the script renders it as text only.  The Content-Security-Policy allows only the
page's own script and style.
"""

import argparse
import base64
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.untrusted import error_line
from recipe.skpo.output.collapse import collapse
from recipe.skpo.output.comparison import comparison
from recipe.skpo.output.console import replace_unprintable
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.page_data import (
    LARGEST_PAGE,
    ReportError,
    curves,
    embed,
    headline,
    read_config,
    run_steps,
    trees_for_page,
)
from recipe.skpo.output.summary import LABELS, decoding, problems

PAGE = Path(__file__).with_name("page_files")


def page(output_dir: Path) -> str:
    """Build the page of one run.

    Raises:
        ReportError: there is no run in the folder, or its config cannot be read.
    """
    steps = run_steps(output_dir)
    warned, how = collapse(steps), decoding(output_dir)
    notes = list[str]()
    data = {
        "run": output_dir.resolve().name[:200],
        "labels": LABELS,
        "decoding": how,
        "headline": headline(steps, problems(output_dir)),
        "warning": warned and f"Warning: {warned}.",
        "curves": curves(steps, notes, how),
        "config": read_config(output_dir, notes),
    }
    # Notes are added below, hence some room for them.
    room = LARGEST_PAGE - len(_frame("").encode()) - len(embed(data)) - 2_000
    trees = trees_for_page(output_dir, room, notes)
    return _frame(f'{embed(data | {"notes": notes})[:-1]},"trees":[{",".join(trees)}]}}')


def _frame(data: str) -> str:
    """Put embedded data into the page's frame, with script, style and the policy that allows these two alone."""
    style, script, frame = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return _fill(frame, {"policy": policy, "style": style, "script": script, "data": data})


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _fill(frame: str, parts: Mapping[str, str]) -> str:
    """Replace ``<!--name-->`` in the frame, in one pass: nothing inside a part is replaced again."""
    return re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], frame)


def write_report(output_dir: Path, target: Path | None = None) -> Path:
    """Write the page of one run atomically; without ``target`` to ``report.html`` in the run's folder.

    Raises:
        ReportError: there is no run in the folder, or its config cannot be read.
        OSError: the file cannot be written.
    """
    text = page(output_dir)
    target = target or output_dir / "report.html"
    write_atomic(target, text)
    return target


def write_comparison(output_dirs: Sequence[Path], target: Path) -> Path:
    """Write the page that compares several runs, atomically.

    Raises:
        ReportError: a folder holds no run or is named twice, a config cannot be read, or there are too many runs.
        OSError: the file cannot be written.
    """
    write_atomic(target, _frame(embed(comparison(output_dirs))))
    return target


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m recipe.skpo.output.page",
        description="Write a run's report.html, or for several runs a page that compares them.",
    )
    parser.add_argument("run_folder", type=Path, nargs="+", help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="the file; default: report.html in the run folder, ./comparison.html")
    replace_unprintable()
    arguments = parser.parse_args()
    folders = arguments.run_folder
    try:
        if len(folders) == 1:
            target = write_report(folders[0], arguments.out)
        else:
            target = write_comparison(folders, arguments.out or Path("comparison.html"))
    except (ReportError, OSError) as error:
        sys.exit(error_line(error))
    print(f"{target} ({target.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
