"""Every method and every ablation, two steps each through the real stack on the tiny model.

About a minute per launch, so it has a marker of its own: bash run_tests.sh -m nightly
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.skpo.output.glossary import METRICS, TERMS_OF_THE_LOSS, described
from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.trees import read_trees, tree_index
from tests.e2e.tiny import CLOSES, OPENS, REWARD, overrides, score_of_answer

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]

METHODS = ["grpo", "grpo_curriculum", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "spo", "rloo", "papo"]

# Choices that do not touch each other share a launch.
ABLATIONS = {
    "chat, extreme, fixed, three candidates": [
        "skpo.skip=chat",
        "skpo.selection=extreme",
        "skpo.split=fixed",
        "skpo.candidates=3",
    ],
    "continual, own reward, boundary token": [
        "skpo.skip=continual",
        "skpo.upstream_reward=own",
        "skpo.split=boundary_token",
        'skpo.boundaries=["a",40,50,60,70,80,90]',
    ],
    "unconditional, random, nats, token mean": [
        "skpo.skip=unconditional",
        "skpo.selection=random",
        "skpo.tracker.drift=nats",
        "skpo.downstream_aggregation=token_mean",
    ],
    # Four prompts, so that the second step sees them again and has a log-ratio to measure.
    "first, log-ratio, shuffled epochs": [
        "skpo.selection=first",
        "skpo.tracker.drift=logratio",
        "skpo.curriculum.enable=false",
        "data.train_max_samples=4",
        # With a warm-up the first step moves nothing.
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    ],
}


TERMS = [
    "actor_rollout_ref.actor.entropy_coeff=0.001",
    "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "algorithm.rollout_correction.rollout_is=token",
]
"""Terms of verl's own loss."""


def train(folder: Path, *arguments: str, thinks: bool = False, own_data: bool = True) -> list[dict[str, float]]:
    """Train the tiny model, on its own data or other, and return the metrics of its steps."""
    given = overrides(folder, thinks)
    if not own_data:
        given = [each for each in given if not re.match(r"data(=|\.train_files|\.val_files)", each)]
    command = [sys.executable, "-m", "recipe.skpo.main", *given, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = read_lines(folder / "out/metrics.jsonl")
    assert not [name for line in lines for name in line if name != "step" and described(name) is None]
    return [line for line in lines if "actor/grad_norm" in line]


@pytest.mark.parametrize("method", METHODS)
def test_method(method: str, tmp_path: Path) -> None:
    steps = train(tmp_path, f"method={method}", "trainer.total_training_steps=2")
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["actor/grad_norm"] > 0
        assert line["skpo/tokens/generated"] > 0
        # DAPO's punishment of long responses is a reward like any other, and no response may be lost to it.
        assert line["skpo/requests_failed"] == line["skpo/prompts_dropped"] == 0
        # Only DAPO generates what it does not train on.
        assert (line["skpo/tokens/generated"] > line["skpo/downstream/tokens_generated"]) <= (method == "dapo")
        assert "skpo/downstream/reward/mean" in line
        # SPO has one response per prompt, and G times the prompts.
        assert ("skpo/tracker/value/mean" in line) == (method == "spo")
        assert ("skpo/polarity/entropy" in line) == (method == "papo")


def test_programs_are_run_in_the_sandbox_during_a_training(tmp_path: Path) -> None:
    arguments = ["data=code", "data.template=plain", "data.max_prompt_length=200", "data.val_rows=8"]
    arguments += [f"{REWARD}.name=score_of_program", f"data.prepared={tmp_path}/code"]
    steps = train(tmp_path, *arguments, "trainer.total_training_steps=2", own_data=False)
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["actor/grad_norm"] > 0
        assert line["skpo/prompts_dropped"] == 0
        # Half of the programs are right ones.
        assert -1 < line["skpo/downstream/reward/mean"] < 1
    assert any("val-core/skpo/code/acc/mean@1" in line for line in read_lines(tmp_path / "out/metrics.jsonl"))


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation(name: str, tmp_path: Path) -> None:
    steps = train(tmp_path, *ABLATIONS[name], "trainer.total_training_steps=2")
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["actor/grad_norm"] > 0
        assert line["skpo/prompts_dropped"] == 0
        # The record of every prompt accounts for every token that the server generated.
        own = line["skpo/upstream/tokens_generated"] + line["skpo/downstream/tokens_generated"]
        assert own == line["skpo/tokens/generated"]
    if "logratio" in " ".join(ABLATIONS[name]):
        assert steps[0]["skpo/tracker/drift/mean"] == 0
        assert steps[1]["skpo/tracker/drift/mean"] > 1e-5, "more than rounding"


@pytest.mark.parametrize("method", ["skpo", "spo", "grpo"])
def test_terms_of_verls_loss(method: str, tmp_path: Path) -> None:
    steps = train(tmp_path, f"method={method}", *TERMS, "trainer.total_training_steps=2")
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["actor/grad_norm"] > 0
        assert {name for metric in METRICS if metric.only == TERMS_OF_THE_LOSS for name in metric.names()} <= set(line)
        assert line["actor/entropy_loss"] > 0
        assert 0.5 < line["rollout_corr/rollout_is_mean"] < 2
    # Before the first update the actor is the reference.
    assert steps[1]["actor/kl_loss"] > steps[0]["actor/kl_loss"] >= 0


def test_a_thinking_model_is_cut_inside_its_thought_and_paid_for_what_follows_it(tmp_path: Path) -> None:
    steps = train(
        tmp_path,
        *("trainer.total_training_steps=2", "skpo.trees_per_step=4"),
        # A token's id: the bytes and the special tokens are before it.
        *("skpo.split=boundary_token", "skpo.boundaries=[261]", f"trainer.validation_data_dir={tmp_path}/val"),
        thinks=True,
    )
    assert [line["step"] for line in steps] == [1, 2] and all(line["actor/grad_norm"] > 0 for line in steps)
    assert 0 < steps[0]["skpo/upstream/boundary_share"] < 1
    trees = list(read_trees(tree_index(tmp_path / "out")))
    assert len(trees) == 8
    whole = []
    for tree in trees:
        # A random model writes special tokens, too, which only the skip prompt shows.
        assert re.sub("<(/?s|pad|unk)>", "", tree["skip_prompt"]).startswith(tree["segment"]["text"])
        assert tree["skip_prompt"].endswith(f"user: {tree['problem']}\nanswer: {OPENS}\n")
        for response in tree["responses"]:
            _, closed, answer = response["text"].rpartition(CLOSES)
            paid = score_of_answer("", "", "", {"response_after_thought": answer})
            assert response["reward"] == (paid if closed and OPENS not in answer else -1)
            whole.append(score_of_answer("", response["text"], "", {}))
    assert whole != [response["reward"] for tree in trees for response in tree["responses"]]
    assert {response["reward"] for tree in trees for response in tree["responses"]} == {-1, 1}
    segments = [candidate["text"] for tree in trees for candidate in tree["candidates"]]
    assert any(CLOSES not in segment for segment in segments), "inside the thought"
    assert any(CLOSES in segment for segment in segments), "a whole thought"
    assert all(segment.endswith(CLOSES) for segment in segments if CLOSES in segment)
    validated = read_lines(tmp_path / "val/2.jsonl")
    assert len(validated) == 16 and all(line["input"].endswith(f"answer: {OPENS}\n") for line in validated)


def test_a_token_budget_ends_the_run_with_a_checkpoint_and_a_validation(tmp_path: Path) -> None:
    # A step of four prompts generates at most 4 x 4 x 16 tokens.
    steps = train(tmp_path, "method=grpo", "budget=tokens", "budget.tokens=300")
    assert steps[-1]["skpo/tokens/generated_so_far"] >= 300
    assert all(line["skpo/tokens/generated_so_far"] < 300 for line in steps[:-1])
    last = int(steps[-1]["step"])
    assert (tmp_path / f"out/checkpoints/global_step_{last}/skpo_state.npz").is_file()
    validated = [line for line in read_lines(tmp_path / "out/metrics.jsonl") if any("val-core" in key for key in line)]
    assert int(validated[-1]["step"]) == last


def test_two_runs_with_full_determinism_are_identical(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        steps = train(folder, "full_determinism=true", "trainer.total_training_steps=3")
        # What is left out measures the machine.
        measured = ("timing", "perf/", "seconds")
        runs.append([{k: v for k, v in line.items() if not any(part in k for part in measured)} for line in steps])
    assert len(runs[0]) == 3 and len(runs[0][0]) > 60
    assert runs[0] == runs[1]
