"""A run from Python: trained, looked at in the notebook, evaluated.  Minutes, hence nightly."""

from pathlib import Path

import pytest

from recipe.skpo.api import train
from recipe.skpo.errors import ConfigError, RunError
from tests.e2e.tiny import overrides
from tests.support.notebook import execute
from tests.unit.examples.test_notebook import NOTEBOOK

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]


def test_a_run_from_python(tmp_path: Path, monkeypatch, capsys) -> None:
    given = [*overrides(tmp_path), "trainer.total_training_steps=2"]
    with pytest.raises(ConfigError, match=r"^skpo\.group_size: "):
        train([*given, "skpo.group_size=0"])
    run = train([*given, "trainer.test_freq=1"])
    assert run.folder == tmp_path / "out" and "step 2/2" in capsys.readouterr().out
    assert run.metrics["actor/grad_norm"].notna().sum() == 2
    assert train([*given, "trainer.test_freq=1"]) == run, "a finished run is not trained again"

    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("SKPO_RUN", str(run.folder))
    shown = execute(NOTEBOOK)
    assert "Step 2, prompt" in shown[6] and "held-out tiny: accuracy" in shown[7]

    judged = [
        *("temperature=0", "k.default=1", "max_prompt_length=48", "max_response_length=16"),
        *("engine.dtype=float32", "engine.platform=cpu", f"reward.path={Path(__file__).with_name('tiny.py')}"),
    ]
    table = run.evaluate([str(tmp_path / "val.parquet")], judged)
    # The evaluation's model is rounded to bfloat16, hence not the validation's accuracy to the last digit.
    assert table["problems"].tolist() == [16] and 0 <= table["avg"][0] <= 1
    with pytest.raises(RunError, match=r"^step: .* has no checkpoint 7; give one of 2"):
        run.evaluate([str(tmp_path / "val.parquet")], judged, step=7)
    exported = run.export(tmp_path / "exported", step=2)
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in exported.iterdir()
    }
    with pytest.raises(ConfigError, match=r"^--to: .* holds "):
        run.export(exported)
    with pytest.raises(RunError, match=r"^k\.default: is 2, but with temperature=0"):
        run.evaluate([str(tmp_path / "val.parquet")], [*judged, "k.default=2"])
