"""The real stack with what the default run does not use: packed rows, and LoRA up to the export, minutes each."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from recipe.skpo.output.best import kept_best
from recipe.skpo.output.metrics import json_lines, read_lines
from recipe.skpo.output.run_folder import marked_step, stored_checkpoints
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


def called(module: str, *arguments: object) -> None:
    """Run a command to its end."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def greedy(model: Any, tokenizer: Any, problems: Path) -> list[list[int]]:
    """The greedy answers of transformers, up to 16 tokens each, in float32."""
    answers = []
    for row in pq.read_table(problems).to_pylist():
        inputs = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.float().generate(**inputs, do_sample=False, max_new_tokens=16)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.mark.timeout(1800)
def test_lora_trains_syncs_resumes_and_is_evaluated_and_exported(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
        "trainer.keep_best=-val-core/tiny/acc/mean@1",
        "trainer.test_freq=1",
        "trainer.max_actor_ckpt_to_keep=1",
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
    _, best = kept_best(tmp_path / "out") or pytest.fail("no best checkpoint")
    assert set(stored_checkpoints(tmp_path / "out/checkpoints")) == {best, 3}

    exported, adapter = tmp_path / "exported", tmp_path / "adapter"
    called("recipe.skpo.export", tmp_path / "out", "--step", "best", "--to", exported)
    called("recipe.skpo.export", tmp_path / "out", "--step", "best", "--to", adapter, "--adapter")
    options = [
        f"benchmarks=[{tmp_path / 'val.parquet'}]",
        *("temperature=0", "k.default=1", "max_prompt_length=48", "max_response_length=16"),
        *("engine.platform=cpu", "engine.dtype=float32", f"reward.path={ROOT / 'tests/e2e/tiny.py'}"),
    ]
    drawn = []
    checkpoints = {"run": [f"checkpoint={tmp_path / 'out'}", "step=best"], "export": [f"checkpoint={exported}"]}
    for name, chosen in checkpoints.items():
        out = tmp_path / "evaluation" / name
        called("recipe.skpo.evaluation", *chosen, *options, f"output_dir={out}")
        draws = json_lines(next(out.glob("*/draws.jsonl")))
        drawn.append([draw["completions"][0]["token_ids"] for draw in draws])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 16, "the run's checkpoint and the export are one model to vLLM"

    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert greedy(model, tokenizer, tmp_path / "val.parquet") == drawn[1]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, str(adapter))
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        merged, apart = model(tokens).logits, adapted.float()(tokens).logits
        with adapted.disable_adapter():
            untrained = adapted(tokens).logits
    # The merged weights are rounded to bfloat16, the base model of the adapter is not.
    assert (merged - apart).abs().max() < 0.05 * (merged - untrained).abs().max()
