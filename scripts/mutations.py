"""Break the program on purpose, one place at a time, and see that a test turns red each time.

    python scripts/mutations.py                     # all, in a quarter of an hour
    python scripts/mutations.py golden loss state   # the method, of these modules alone
    python scripts/mutations.py faults              # the handling of faults

The tables are in ``tests/mutations``.  Each mutation is a textual change of one module in a temporary copy of the
repository; the work tree is not touched.  The tests that are to notice run in a forked process, which has the heavy
third-party packages loaded already.  Prints a table and exits with 1 if a mutation survives, breaks the import, or no
longer applies.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.mutations import Mutation, faults, golden  # noqa: E402

TABLES = {"golden": golden.MUTATIONS, "faults": faults.MUTATIONS}

FAST = "not gloo"
"""Pytest's -k: what the other golden tests of a file pin too, but slower."""

LIMIT_S = 60
"""For one test; what waits for ever under a mutation is stopped by it."""

BROKEN = ("AttributeError", "ImportError", "NameError", "SyntaxError", "TypeError", "UnboundLocalError")
"""Errors of a mutation that is no program; a test that stops with one has compared nothing."""


def _run_tests(copy: Path, modules: Iterable[str], tests: Iterable[str], log: Path) -> None:
    """In a forked process: pytest on the copy.  Exit code 0 green, 1 red, anything else is no verdict."""
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.dont_write_bytecode = True
        os.environ["COLUMNS"] = "300"  # or pytest's summary is cut before the error
        sys.path.insert(0, str(copy))
        os.chdir(copy)  # where interpreters that a test starts look first
        # verl has imported our plugin while it was loaded; from now on the copy is what is imported.
        for name in [name for name in sys.modules if name.split(".")[0] in ("recipe", "tests")]:
            del sys.modules[name]
        for module in modules:
            found = find_spec(f"recipe.skpo.{module}")
            if found is None or not str(found.origin).startswith(str(copy)):
                raise RuntimeError(f"{module} would not be imported from the copy")
        import pytest
        from hypothesis import Phase, settings

        importlib.import_module("tests.reference")  # which loads the profile of the golden tests
        settings.register_profile("no shrinking", settings.default, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("no shrinking")
        options = ["-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--rootdir", str(copy), "-k", FAST]
        options += ["--timeout", str(LIMIT_S)]
        code = pytest.main([*options, *(str(copy / "tests" / test) for test in sorted(tests))])
    sys.exit(int(code))


def run(copy: Path, mutations: Iterable[Mutation], log: Path) -> tuple[int, str]:
    """Exit code and output of the tests that are to notice these mutations."""
    modules = {mutation.module for mutation in mutations}
    tests = {test for mutation in mutations for test in mutation.tests}
    process = multiprocessing.get_context("fork").Process(target=_run_tests, args=(copy, modules, tests, log))
    process.start()
    process.join()
    return int(process.exitcode or 0), log.read_text(encoding="utf-8")


def preload() -> None:
    """Import what every forked process needs and no mutation changes."""
    import hypothesis  # noqa: F401
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for name in ("tensordict", "transfer_queue", "verl.trainer.ppo.v1.trainer_sync", "verl.workers.utils.padding"):
        importlib.import_module(name)
    for name in ("verl.trainer.ppo.v1.agent_loop_tq", "verl.utils.tensordict_utils", "pytest"):
        importlib.import_module(name)


def chosen(words: list[str]) -> list[Mutation]:
    """The mutations that the command line names: of these tables and modules, all where none is named.

    Raises:
        ValueError: a word is neither a table nor a module of the tables that are named.
    """
    tables = [word for word in words if word in TABLES] or list(TABLES)
    listed = [mutation for table in tables for mutation in TABLES[table]]
    modules = [word for word in words if word not in TABLES]
    if unknown := set(modules) - {mutation.module for mutation in listed}:
        raise ValueError(f"{', '.join(sorted(unknown))}: neither one of {', '.join(TABLES)} nor a module of theirs")
    return [mutation for mutation in listed if not modules or mutation.module in modules]


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "words", nargs="*", metavar="TABLE or MODULE", help="golden, faults, or modules; all by default"
    )
    try:
        mutations = chosen(parser.parse_args().words)
    except ValueError as error:
        parser.error(str(error))
    for mutation in mutations:
        mutation.apply(mutation.path().read_text(encoding="utf-8"))
    started = time.monotonic()
    preload()
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        copy, log = Path(temporary) / "copy", Path(temporary) / "log"
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("recipe", "tests", "data_prep", "model_prep", "reward_fns"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        code, output = run(copy, mutations, log)
        if code:
            print(f"the tests fail without any mutation:\n{output[-4000:]}", file=sys.stderr)
            return 1
        print("| module | mutation | caught by |\n|---|---|---|", flush=True)
        for mutation in mutations:
            path = mutation.path(copy)
            original = path.read_text(encoding="utf-8")
            path.write_text(mutation.apply(original), encoding="utf-8")
            code, output = run(copy, [mutation], log)
            path.write_text(original, encoding="utf-8")
            caught = re.search(r"^FAILED \S*::(test_\w+)\S*(?: - (\w+))?", output, re.MULTILINE)
            if code == 1 and caught and caught[2] not in BROKEN:
                print(f"| `{mutation.module}` | {mutation.name} | `{caught[1]}` |", flush=True)
            else:
                survivors.append(mutation)
                print(f"| `{mutation.module}` | {mutation.name} | **not caught** |", flush=True)
                print(output[-1500:], file=sys.stderr)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{len(mutations) - len(survivors)} of {len(mutations)} mutations caught in {minutes:.1f} minutes")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
