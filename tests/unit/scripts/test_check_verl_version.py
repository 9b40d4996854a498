"""scripts/check_verl_version.py: what it makes of the contract tests' results; no other release is installed."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "scripts/check_verl_version.py"

REPORT = """<testsuites><testsuite>
<testcase name="test_signature[a]"/>
<testcase name="test_signature[b]"><failure message="AssertionError: b has ... [+5 more lines]">
tests/x.py:3: in test_signature
E   AssertionError: b has another signature
E       0.9.1: (self, x)
E       now:   (self).
E     Where we rely on it: c.
E   assert '(self)' == '(self, x)'
E     - (self, x)</failure></testcase>
<testcase name="test_import"><error message="ImportError: no module"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def script() -> ModuleType:
    spec = spec_from_file_location("check_verl_version", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_broken_contracts_are_told_with_both_signatures(script, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    tried, broken = script.read_report(tmp_path / "report.xml")
    assert (tried, [item.test for item in broken]) == (3, ["test_signature[b]", "test_import"])
    text = script.summary("0.8.0", tried, broken)
    assert text.startswith("verl 0.8.0: 1 of 3 contracts hold")
    assert "0.9.1: (self, x)" in text and "now:   (self)" in text and "Where we rely on it: c." in text
    assert "ImportError: no module" in text
    assert "assert" not in text


def test_a_release_that_does_not_exist_ends_in_one_line(script, tmp_path: Path, monkeypatch, capsys) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found for verl==9\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(SystemExit) as exit_info:
        script.install("9", tmp_path)
    assert exit_info.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: verl 9 cannot be installed: ERROR: No matching distribution found for verl==9\n"
    )


def test_the_pinned_test_is_left_out_by_its_name(script) -> None:
    file, name = script.PIN.split("::")
    assert f"def {name}(" in (REPOSITORY / file).read_text()
