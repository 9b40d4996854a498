"""The real stack, end to end: Ray, vLLM, FSDP2, TransferQueue; train, save, die, resume, train on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipe.skpo.cpu.shared_memory import leftover_segments, remove_segments, segments
from recipe.skpo.output.glossary import METRICS, described
from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.trees import read_trees, tree_index
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.state import SkpoState
from tests.e2e.tiny import overrides

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LAUNCH = [sys.executable, "-m", "recipe.skpo.main"]
ROOT = Path(__file__).parents[2]


def wait_for_marker(folder: Path, process: subprocess.Popen, step: int, seconds: float = 420) -> None:
    """Wait until verl has marked the checkpoint of ``step`` as complete."""
    marker = folder / "out/checkpoints/latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if marker.is_file() and marker.read_text().strip() == str(step):
            return
        assert process.poll() is None, f"the run ended early:\n{(folder / 'first.log').read_text()[-4000:]}"
        time.sleep(0.2)
    raise AssertionError(f"no checkpoint of step {step} after {seconds} s")


def saved_state(checkpoint: Path) -> SkpoState:
    state = SkpoState(SkpoSettings(group_size=4), response_budget=16)
    state.load(checkpoint)
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Two steps, SIGKILL right after their checkpoint, the same command again for one step more."""
    folder, before = tmp_path_factory.mktemp("tiny"), segments()
    arguments = overrides(folder)
    with (folder / "first.log").open("w") as log:
        process = subprocess.Popen(
            [*LAUNCH, *arguments, "trainer.total_training_steps=1000"],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_for_marker(folder, process, step=2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    saved = saved_state(folder / "out/checkpoints/global_step_2")
    # Ray's processes follow their driver; give them the time to.
    time.sleep(5)
    again = subprocess.run(
        [
            *LAUNCH,
            *arguments,
            "trainer.total_training_steps=3",
            "actor_rollout_ref.actor.optim.lr=2e-3",
            # For the evaluation: every response of the validations, and the last weights as they are.
            f"trainer.validation_data_dir={folder / 'validations'}",
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ,
    )
    # What the killed launch left; the next one cannot know whose it is.
    remove_segments(leftover_segments(before))
    return {"folder": folder, "saved": saved, "again": again, "out": folder / "out"}


def test_resumes_after_a_kill_and_ends_well(run: dict) -> None:
    again = run["again"]
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "global_step_2" in again.stdout + again.stderr
    assert "out: 3 steps" in again.stdout


def test_a_changed_learning_rate_is_said_and_honoured(run: dict) -> None:
    said = [line for line in run["again"].stdout.splitlines() if line.startswith("note: actor_rollout_ref.")]
    assert said == [
        "note: actor_rollout_ref.actor.optim.lr: 0.001 in global_step_2, 0.002 in this command; it applies from the "
        "next step"
    ]
    lines = {line["step"]: line for line in read_lines(run["out"] / "metrics.jsonl") if "skpo/loss" in line}
    assert [lines[step]["actor/lr"] for step in (2, 3)] == [0.001, 0.002]


def test_metrics_are_kept_over_the_kill(run: dict) -> None:
    steps = [int(line["step"]) for line in read_lines(run["out"] / "metrics.jsonl") if "skpo/loss" in line]
    assert steps == [1, 2, 3]


def test_trackers_go_on_where_they_were(run: dict) -> None:
    before, after = run["saved"], saved_state(run["out"] / "checkpoints/global_step_3")
    saved, later = before.prompts.state_dict(), after.prompts.state_dict()
    seen = len(before.prompts)
    assert 4 <= seen <= 8, "two steps of four prompts"
    assert later["text"].tobytes().startswith(saved["text"].tobytes())
    # What the third step did not visit stays as it was saved; what it did has one observation more.
    kept = (later["counts"][:seen] == saved["counts"]).nonzero()[0]
    assert len(after.prompts) - len(kept) == 4
    for column in ("values", "lengths"):
        assert (later[column][kept] == saved[column][kept]).all()
    assert after.visits == 12
    assert after.clock.steps == 3


def test_rollout_and_actor_agree(run: dict) -> None:
    """fp32 on both sides: mean absolute difference of log-probs, over every step and also after weight syncs."""
    gaps = [
        line["skpo/rollout_actor_logprob_gap/mean"]
        for line in read_lines(run["out"] / "metrics.jsonl")
        if "skpo/loss" in line
    ]
    assert len(gaps) == 3
    assert 0 < max(gaps) < 1e-3, "exactly 0 would mean that they were not compared"


def test_the_glossary_has_every_metric_and_no_other(run: dict) -> None:
    logged = {name for line in read_lines(run["out"] / "metrics.jsonl") for name in line} - {"step"}
    assert not [name for name in logged if described(name) is None]
    promised = [name for metric in METRICS if not metric.only for name in metric.names()]
    patterns = [name for name in promised if "<" in name]
    assert not set(promised) - logged - set(patterns)
    found = {described(name) for name in logged}
    assert {metric for metric in METRICS if not metric.only} <= found


def test_the_update_changed_the_policy(run: dict) -> None:
    lines = [line for line in read_lines(run["out"] / "metrics.jsonl") if "skpo/loss" in line]
    assert all(line["actor/grad_norm"] > 0 for line in lines)
    assert any(line["skpo/policy_kl"] > 0 for line in lines), "the second update of a step sees the first one"


def test_trees_and_tensorboard_are_written(run: dict) -> None:
    text = (run["out"] / "sample_trees.txt").read_text()
    assert text.count("upstream candidates") == 3
    assert text.count("->") == 3
    events = EventAccumulator(str(run["out"] / "tensorboard"))
    events.Reload()
    (shown,) = events.Tensors("skpo/trees/text_summary")
    assert shown.step == 3 and shown.tensor_proto.string_val[0].decode().count("**Response, reward ") == 4
    trees = list(read_trees(tree_index(run["out"])))
    assert [tree["step"] for tree in trees] == [1, 2, 3], "those after the checkpoint were made once more"
    for tree in trees:
        assert tree["problem"] in tree["skip_prompt"]
        assert len(tree["candidates"]) == len(tree["responses"]) == 4
        assert sum(candidate["chosen"] for candidate in tree["candidates"]) == 1
        assert all(response["length"] > 0 for response in tree["responses"])


def test_a_report_is_written(run: dict) -> None:
    assert "report.html" in run["again"].stdout
    text = (run["out"] / "report.html").read_text()
    assert "Content-Security-Policy" in text and '"step":3' in text


def test_evaluation_agrees_with_the_last_validation(run: dict) -> None:
    """Greedy, in the run's own float32: the same responses, the same numbers to the last digit."""
    folder = run["folder"]
    arguments = [
        f"checkpoint={run['out']}",
        f"benchmarks=[{folder / 'val.parquet'}]",
        f"output_dir={folder / 'evaluation'}",
        "temperature=0",
        "k.default=1",
        "max_prompt_length=48",
        "max_response_length=16",
        "engine.dtype=float32",
        "engine.platform=cpu",
        f"reward.path={ROOT / 'tests/e2e/tiny.py'}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "recipe.skpo.evaluation", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = json.loads((folder / "evaluation/table.json").read_text())["benchmarks"]
    last = [line for line in read_lines(run["out"] / "metrics.jsonl") if "val-core/tiny/acc/mean@1" in line][-1]
    assert last["step"] == 3
    assert line["problems"] == 16
    assert line["avg"] == last["val-core/tiny/acc/mean@1"]
    assert line["well_formed"] == last["val-aux/tiny/well_formed/mean@1"]
    results = pd.read_parquet(folder / "evaluation" / line["benchmark"] / "problems.parquet")
    validated = read_lines(folder / "validations/3.jsonl")
    assert {row["gts"]: row["output"] for row in validated} == {
        row.ground_truth: row.responses[0] for row in results.itertuples()
    }
