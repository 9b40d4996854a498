"""``scripts/mutations.py`` stays usable: every mutation applies to the code as it is, and is valid Python."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts/mutations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_mutation_applies_once_and_changes_the_program(script: ModuleType) -> None:
    for mutation in script.MUTATIONS:
        before = script.path_of(mutation).read_text()
        after = script.mutated(mutation, before)
        assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before)), mutation


def test_every_module_of_the_method_is_mutated_and_no_mutation_is_listed_twice(script: ModuleType) -> None:
    assert {mutation.module for mutation in script.MUTATIONS} == set(script.TESTS)
    for field in ("name", "changes"):
        keys = [(mutation.module, getattr(mutation, field)) for mutation in script.MUTATIONS]
        assert len(keys) == len(set(keys))
    for name in script.TESTS.values():
        assert (ROOT / f"tests/golden/test_golden_{name}.py").is_file()


def test_a_mutation_that_does_not_apply_is_refused(script: ModuleType) -> None:
    mutation = script.one("loss", "gone", "nothing of the kind", "x")
    with pytest.raises(ValueError, match="loss: gone: occurs 0 times, not once: 'nothing of the kind'"):
        script.mutated(mutation, script.path_of(mutation).read_text())
