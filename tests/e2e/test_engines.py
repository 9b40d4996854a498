"""The real stack with what the default run does not use: packed rows and LoRA, minutes each."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.run_folder import marked_step
from tests.e2e.test_resume import MACHINE, launch
from tests.e2e.tiny import overrides

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PACKED = ["packed_attention=varlen", "share_prefixes=true", "actor_rollout_ref.model.use_remove_padding=true"]


def steps(folder: Path) -> list[dict[str, float]]:
    """Metrics of the training steps."""
    return [line for line in read_lines(folder / "out/metrics.jsonl") if "actor/grad_norm" in line]


def test_packed_rows_train_as_the_cpu_platforms_dense_masks_do(tmp_path: Path) -> None:
    found = []
    for name, options in (("dense", []), ("packed", PACKED)):
        folder = tmp_path / name
        folder.mkdir()
        more = [*options, "full_determinism=true", "trainer.total_training_steps=2", "trainer.val_before_train=false"]
        code, log = launch(folder, ["recipe.skpo.main"], [*overrides(folder), *more])
        assert code == 0, log[-4000:]
        found.append(steps(folder))
    for dense, packed in zip(*found, strict=True):
        assert packed["actor/packing/positions_sum"] < 0.7 * packed["actor/packing/tokens_sum"]
        assert set(dense) == {name for name in packed if "/packing/" not in name}
        for name, value in dense.items():
            if not any(part in name for part in MACHINE):
                assert packed[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_lora_trains_syncs_resumes_and_is_evaluated(tmp_path: Path) -> None:
    command = [
        *overrides(tmp_path),
        *PACKED,
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora_alpha=16",
        # So that every step moves the policy by what a server without the adapter would be seen to lack.
        "actor_rollout_ref.actor.optim.lr=2e-2",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=false",
    ]
    code, log = launch(tmp_path, ["tests.e2e.killed", "generation", "3"], command)
    assert code == -signal.SIGKILL, log[-4000:]
    assert marked_step(tmp_path / "out/checkpoints") == 2
    code, log = launch(tmp_path, ["recipe.skpo.main"], command)
    assert code == 0, log[-4000:]
    lines = steps(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["skpo/rollout_actor_logprob_gap/mean"] < 1e-3 for line in lines)
    assert all(line["skpo/policy_kl"] > 1e-4 for line in lines), "the adapter moves the policy"
    evaluation = [
        f"checkpoint={tmp_path / 'out'}",
        f"benchmarks=[{tmp_path / 'val.parquet'}]",
        f"output_dir={tmp_path / 'evaluation'}",
        *("temperature=0", "k.default=1", "max_prompt_length=48", "max_response_length=16"),
        *("engine.platform=cpu", f"reward.path={ROOT / 'tests/e2e/tiny.py'}"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "recipe.skpo.evaluation", *evaluation],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = json.loads((tmp_path / "evaluation/table.json").read_text())["benchmarks"]
    assert line["problems"] == 16
    assert len(list((tmp_path / "merged").glob("*/model.safetensors"))) == 1
