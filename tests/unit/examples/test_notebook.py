"""The notebook of examples/ on a recorded run; tests/e2e/test_api.py has it on one that was trained."""

import json
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.support.notebook import execute
from tests.support.report_run import make_run

NOTEBOOK = REPOSITORY / "examples/look_at_a_run.ipynb"


def test_the_notebook_shows_a_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("SKPO_RUN", str(make_run(tmp_path / "run", steps=20)))
    shown = execute(NOTEBOOK)
    assert "<h4>Step 1, prompt train-" in shown[5] and "<h4>Step 20, prompt train-" in shown[6]
    assert "held-out skpo/arithmetic: accuracy" in shown[7]


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]
