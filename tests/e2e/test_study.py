"""Two cells of a study, side by side, through the real stack."""

from pathlib import Path

import pytest

from data_prep.untrusted import read_json
from recipe.skpo.analysis import study
from tests.e2e.tiny import overrides

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]


def test_two_cells_train_to_their_budget_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    plan = ["--methods", "grpo_curriculum,skpo", "--seeds", "1", "--rates", "1e-3", "--tokens", "300"]
    given = [*plan, "--parallel", "2", "--out", str(tmp_path / "out"), *overrides(tmp_path), "trainer.test_freq=1"]
    assert study.main(given) == 0, capsys.readouterr().out
    for cell in read_json(tmp_path / "out/tiny.json")["cells"]:
        assert cell["state"] == "finished" and cell["problems"] == {"tiny": 16}
        tokens = [line["skpo/tokens/generated"] for line in cell["steps"] if line["step"]]
        assert sum(tokens[:-1]) < 300 <= sum(tokens), "it ends with the step that spends the budget"
    said = capsys.readouterr().out
    assert "| GRPO, SKPO's curriculum, lr 0.001 | 1 |" in said and "| SKPO, lr 0.001 | 1 |" in said
    assert study.main(given) == 0
    assert "started" not in capsys.readouterr().out
