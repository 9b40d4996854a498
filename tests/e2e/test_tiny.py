"""``model=tiny`` as docs/tiny.md gives it: its pretraining, its own task, and the trial of a set-up of one's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.skpo.output.metrics import read_lines

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]


def train(folder: Path, *arguments: str) -> list[dict[str, float]]:
    """Train two steps and return the metrics; the first launch with an empty cache pretrains the model."""
    command = [
        sys.executable,
        "-m",
        "recipe.skpo.main",
        "model=tiny",
        "platform=cpu",
        f"output_dir={folder}",
        *arguments,
    ]
    done = subprocess.run(
        [*command, "trainer.total_training_steps=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return read_lines(folder / "metrics.jsonl")


@pytest.mark.parametrize("method", ["skpo", "grpo"])
def test_it_knows_its_own_task_in_part(method: str, tmp_path: Path) -> None:
    lines = train(tmp_path / "out", f"method={method}")
    before = next(line["val-core/skpo/steps/acc/mean@1"] for line in lines if line["step"] == 0)
    assert 0.2 < before < 0.8
    first = next(line for line in lines if "actor/grad_norm" in line)
    # Under [s, q] as under q.
    assert 0.2 < (1 + first["skpo/downstream/reward/mean"]) / 2 < 0.7
    assert 28 < first["skpo/downstream/length/mean"] < 60
    assert first["actor/grad_norm"] > 0


def test_own_rows_and_an_own_reward_are_tried(tmp_path: Path) -> None:
    rows = [{"question": f"{'Read this. ' * 100}Which number is {number}?", "answer": number} for number in range(12)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **options):\n"
        "    return len(solution_str) % 2\n"
    )
    lines = train(
        tmp_path / "out",
        *("data=mine", f"data.source={tmp_path / 'my.jsonl'}", "data.prompt=question", "data.answer=answer"),
        *("data.check=none", f"reward.custom_reward_function.path={tmp_path / 'reward.py'}"),
    )
    assert [line["step"] for line in lines if "actor/grad_norm" in line] == [1, 2]
    assert all(0 < line["skpo/downstream/reward/mean"] < 1 for line in lines if "actor/grad_norm" in line)
