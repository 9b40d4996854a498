"""The tables of ``tests/mutations`` stay usable: every mutation applies, is Python, and names tests that are there."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutations import ROOT, Mutation, faults, golden

TABLES = pytest.mark.parametrize("table", [golden.MUTATIONS, faults.MUTATIONS], ids=["golden", "faults"])
MATRIX = (ROOT / "docs/operations.md").read_text().partition("\n## Faults\n")[2].partition("\n## ")[0]


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if hasattr(node, "name")}


@TABLES
def test_every_mutation_applies_once_and_changes_the_program(table: tuple[Mutation, ...]) -> None:
    for mutation in table:
        before = mutation.path().read_text()
        after = mutation.apply(before)
        assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before)), mutation


@TABLES
def test_no_mutation_is_listed_twice_and_each_names_tests_that_are_there(table: tuple[Mutation, ...]) -> None:
    for field in ("name", "changes"):
        keys = [(mutation.module, getattr(mutation, field), mutation.tests) for mutation in table]
        assert len(keys) == len(set(keys))
    for test in {test for mutation in table for test in mutation.tests}:
        file, _, name = test.partition("::")
        assert (ROOT / "tests" / file).is_file()
        assert not name or name.partition("[")[0] in functions(ROOT / "tests" / file), test


def test_every_module_of_the_method_is_mutated() -> None:
    assert {mutation.module for mutation in golden.MUTATIONS} == set(golden.TESTS)


def test_a_mutation_that_does_not_apply_is_refused() -> None:
    mutation = golden.one("loss", "gone", "nothing of the kind", "x")
    with pytest.raises(ValueError, match="loss: gone: occurs 0 times, not once: 'nothing of the kind'"):
        mutation.apply(mutation.path().read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations_script", ROOT / "scripts/mutations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_names_tables_and_modules(script: ModuleType) -> None:
    everything = [*golden.MUTATIONS, *faults.MUTATIONS]
    assert script.chosen([]) == everything
    assert script.chosen(["faults"]) == list(faults.MUTATIONS)
    assert script.chosen(["state"]) == [mutation for mutation in everything if mutation.module == "state"]
    assert {mutation.module for mutation in script.chosen(["golden", "loss", "state"])} == {"loss", "state"}
    with pytest.raises(ValueError, match="replay: neither one of golden, faults nor a module of theirs"):
        script.chosen(["golden", "replay"])


def named_in_the_matrix() -> set[tuple[str, str]]:
    """(file, test) of the matrix in docs/operations.md; a test without a file is of ``test_faults.py``."""
    rows = [line.split("|") for line in MATRIX.splitlines() if line.startswith("| ")]
    named = set()
    for _, _, _, tests, *_ in rows:
        for file, test in re.findall(r"`(?:([\w/]+\.py): )?(test_\w+)`", tests):
            named.add((file or "test_faults.py", test))
    return named


def test_every_test_of_the_fault_matrix_is_there_and_has_a_mutation_that_it_alone_must_notice() -> None:
    named = named_in_the_matrix()
    assert len(named) >= 30
    alone = [mutation.tests[0] for mutation in faults.MUTATIONS if len(mutation.tests) == 1]
    caught = {tuple(test.partition("[")[0].split("::")) for test in alone}
    for file, test in sorted(named):
        assert test in functions(ROOT / "tests" / file), f"{file}: {test}"
        assert file.startswith("e2e/") or (file, test) in caught, f"no mutation is for {file}: {test} alone"
