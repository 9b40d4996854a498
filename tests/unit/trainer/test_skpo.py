"""The trainers' own logic without Ray: order of rows, baselines and trackers, log-ratios, token budget, metrics.

Real here: our trainer classes and what they inherit from verl, its advantage estimators and its row functions.  In
place of a process border: TransferQueue is a dictionary, the workers are objects that note what they are asked.
"""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from recipe.skpo.errors import ConfigError
from recipe.skpo.method.rows import (
    LENGTH_FIELD,
    PHASE_FIELD,
    RECORD,
    SEED_FIELD,
    SLOPE_FIELD,
    SPLIT_FIELD,
    STEP_FIELD,
    UPSTREAM,
    WANT_SLOPES,
    WEIGHT_FIELD,
    RowKey,
)
from recipe.skpo.output.glossary import METRICS
from recipe.skpo.output.trees import FOLDER, TreeStore, tree_index
from recipe.skpo.settings import PolaritySettings
from tests.conftest import write_checkpoint
from tests.support.queue import Queue
from tests.support.reference import reference_group_relative, reference_reweighted, reference_single_stream
from tests.support.rows import stored_row

G = 2
EOS = 2

# ---------------------------------------------------------------- the borders


class ActorWorkers:
    """Stands for the actor's worker group.

    Attributes:
        asked: the batch of every ``compute_log_prob``.
        score: token ids and position of a row's tokens to the log-prob of each, prompt included.
    """

    def __init__(self, queue: Queue, ranks: int = 1) -> None:
        self._dispatch_info = {"actor": list(range(ranks))}
        self.queue = queue
        self.asked: list[Any] = []
        self.score: Callable[[torch.Tensor], torch.Tensor] = lambda ids: -ids.float() / 100
        self.loss_function: Any = None
        self.fails = False

    def set_loss_fn(self, function: Any) -> None:
        self.loss_function = function

    def compute_log_prob(self, batch):
        self.asked.append(batch)
        if self.fails:
            raise RuntimeError("a worker died")
        for key in batch.keys:
            row = self.queue.rows[key]
            # As the engine: position t holds the log-prob of token t + 1.
            row["log_probs"] = torch.cat([self.score(row["input_ids"])[1:], torch.zeros(1)])
        return batch


class Manager:
    """Stands for the rollout manager: counts that were noted since they were last taken."""

    def __init__(self) -> None:
        self.counts = {"generated": 0, "prefilled": 0, "cached": 0}
        self.failures: dict[str, int] = {}

    def take_failures(self) -> dict[str, int]:
        taken, self.failures = self.failures, {}
        return taken

    def take_tokens(self) -> dict[str, int]:
        taken, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return taken


@pytest.fixture
def make_trainer(compose_config, model_folder, tmp_path: Path, queue: Queue, monkeypatch) -> Callable[..., Any]:
    """Make a trainer by its real constructor, at step 1, with 4 prompts per step in mini-batches of 2."""

    def make(method: str = "skpo", ranks: int = 1, options: dict[str, Any] | None = None, **skpo: Any) -> Any:
        from verl.trainer.ppo.v1 import get_trainer_cls

        import recipe.skpo.trainer.baselines  # noqa: F401
        import recipe.skpo.trainer.skpo  # noqa: F401
        from recipe.skpo.main import scale_batch_for_spo

        config = compose_config("platform=cpu", f"method={method}", f"skpo.group_size={G}")
        for key, value in skpo.items():
            config.skpo[key] = value
        config.trainer.update(options or {})
        config.output_dir = str(tmp_path)
        config.trainer.default_local_dir = str(tmp_path / "checkpoints")
        config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size = 4, 2
        scale_batch_for_spo(config)
        trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
        trainer.global_steps, trainer.total_training_steps, trainer.timing_raw = 1, 10, {}
        trainer.curr_step_profile = False
        trainer.actor_rollout_wg = ActorWorkers(queue, ranks)
        trainer.agent_loop_manager = Manager()
        trainer.checkpoint_manager = SimpleNamespace(update_weights=lambda step: None, sleep_replicas=lambda: None)
        trainer.trees = TreeStore(tmp_path / FOLDER, 1.0, 0)
        trainer.tokenizer = SimpleNamespace(
            eos_token_id=EOS, decode=lambda ids, **options: " ".join(str(int(token)) for token in ids)
        )
        return trainer

    return make


Stored = tuple[str, dict[str, Any], dict[str, Any]]
"""Key, fields and tag of a row."""


def groups(count: int, seed: int = 0) -> list[Stored]:
    """Whole SKPO groups: siblings in sessions 1 to G, the segment in session 0."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        uid, rewards = f"v{number:010d}", rng.choice([-1.0, 1.0], G)
        rows.append(stored_row(uid, 0, float(rewards.mean()), rng.integers(9, 60, 3).tolist(), UPSTREAM))
        for session, reward in enumerate(rewards, 1):
            rows.append(stored_row(uid, session, reward, rng.integers(9, 60, int(rng.integers(1, 9))).tolist()))
    return rows


def train(trainer: Any, queue: Queue, rows: list[Stored]) -> tuple[Any, dict[str, Any]]:
    """Order and train a batch as a step does; returns it and the metrics."""
    metrics: dict[str, Any] = {}
    batch = trainer._balance_batch(queue.store(rows), metrics)
    return trainer._compute_advantage(batch, metrics), metrics


def responses_of(count: int, sessions: int = G) -> list[Stored]:
    """Plain groups of a baseline: right and wrong responses of different lengths, the first group all right."""
    rows = []
    for number in range(count):
        for session in range(sessions):
            reward = 1.0 if number == 0 or (number + session) % 2 else -1.0
            rows.append(
                stored_row(f"v{number:010d}", session, reward, list(range(10, 11 + number + 2 * session)), None)
            )
    return rows


def rows_of(method: str, prompts: int) -> list[Stored]:
    """Rows of so many prompts as the method's rollout stores them; SPO's batch has G times as many."""
    if method == "skpo":
        return groups(prompts)
    return responses_of(prompts * G, 1) if method == "spo" else responses_of(prompts)


# ---------------------------------------------------------------- order of rows


@pytest.mark.parametrize("method", ["skpo", "grpo"])
def test_rows_come_in_one_order_whichever_prompt_finished_first(make_trainer, queue: Queue, method: str) -> None:
    orders, trainer = [], make_trainer(method)
    for seed in range(3):
        rows = rows_of(method, 4)
        np.random.default_rng(seed).shuffle(rows)  # type: ignore[arg-type]
        orders.append(trainer._balance_batch(queue.store(rows), {}).keys)
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(key for key, _, _ in rows)


def test_sessions_are_sorted_as_numbers(make_trainer, queue: Queue, monkeypatch) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(PPOTrainerSync, "_balance_batch", lambda self, batch, *others: batch)
    rows = [stored_row(uid, session, 1.0, [9]) for uid in ("v1", "v0") for session in (10, 2, 1)]
    ordered = make_trainer("grpo")._balance_batch(queue.store(rows), {})
    assert ordered.keys == [f"{uid}_{session}_0" for uid in ("v0", "v1") for session in (1, 2, 10)]
    assert [tag["seq_len"] for tag in ordered.tags] == [3] * 6


@pytest.mark.parametrize("shares", [False, True])
def test_ranks_get_the_shares_that_they_had_when_verl_balanced_the_batch_before(
    make_trainer, queue: Queue, shares: bool
) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    ranks, differences = 2, []
    for seed in range(8):
        stored = groups(3 if seed % 4 == 3 else 4, seed)
        trainer = make_trainer(ranks=ranks)
        trainer.shares_prompts = shares
        metrics: dict[str, Any] = {}
        batch = trainer._balance_batch(queue.store(stored), metrics)
        former = queue.store(stored)
        former.reorder(sorted(range(len(former)), key=lambda row: RowKey.parse(former.keys[row])))
        verls: dict[str, Any] = {}
        former = PPOTrainerSync._balance_batch(trainer, former, verls)
        trainer._order_by_prompt(former, "former")

        def tokens_per_rank_and_update(ordered) -> np.ndarray:
            return np.array([tag["seq_len"] for tag in ordered.tags]).reshape(ranks, -1, G + 1).sum(2)

        ours, theirs = tokens_per_rank_and_update(batch), tokens_per_rank_and_update(former)
        differences.append(int(ours.max(0).sum() - theirs.max(0).sum()))
        assert np.array_equal(ours.sum(0), theirs.sum(0)), "the same prompts in every update"
        # Those of the rows as they came are verl's.
        verls |= {f"global_seqlen/balanced_{name}": getattr(ours.sum(1), name)() for name in ("min", "max")}
        assert metrics == metrics | verls
    assert not any(differences), "tokens of the rank that the others wait for"


def test_the_step_counts_its_tokens_and_adds_them_up_over_the_run(make_trainer, queue: Queue) -> None:
    trainer = make_trainer()
    trainer.agent_loop_manager.counts = {"generated": 999, "prefilled": 9, "cached": 9}  # of validation
    trainer.on_step_begin()
    totals = []
    for _ in range(2):
        trainer.agent_loop_manager.counts = {"generated": 30, "prefilled": 500, "cached": 400}
        metrics: dict[str, float] = {}
        trainer._balance_batch(queue.store(groups(4)), metrics)
        assert [metrics[f"skpo/tokens/{name}"] for name in ("generated", "prefilled", "cached")] == [30, 500, 400]
        totals.append(metrics["skpo/tokens/generated_so_far"])
    assert totals == [30, 60]
    assert trainer.state.tokens_generated == 60


# ---------------------------------------------------------------- prompts out


def prompts(*ids: str) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    objects = np.empty(len(ids), dtype=object)
    objects[:] = [[{"role": "user", "content": key}] for key in ids]
    return tu.get_tensordict(
        {"id": np.array(ids, dtype=object), "uid": np.array(ids, dtype=object), "raw_prompt": objects}
    )


@pytest.mark.parametrize("method", ["skpo", "grpo"])
def test_every_prompt_gets_its_own_uid_split_seed_and_the_step(make_trainer, monkeypatch, method: str) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from recipe.skpo.trainer.state import SkpoState

    monkeypatch.setattr(PPOTrainerSync, "_fetch_one_gen_batch", lambda self: prompts("a", "b", "a"))
    trainer = make_trainer(method)
    trainer.global_steps = 5
    twin = SkpoState(trainer.settings, trainer.config.data.max_response_length)
    for state in (trainer.state, twin):
        state.observe("a", 1.0, 12.4)
    for first in (0, 3):
        batch = trainer._fetch_one_gen_batch()
        assert batch[LENGTH_FIELD].tolist() == [12, round(twin.prompts.length("b")), 12]
        visits = [twin.next_visit(key, 5) for key in ("a", "b", "a")]
        assert list(batch["uid"]) == [f"v{first + index:010d}" for index in range(3)]
        assert batch[SPLIT_FIELD].tolist() == [visit.split_position for visit in visits]
        assert batch[SEED_FIELD].tolist() == [visit.seed for visit in visits]
        assert batch[STEP_FIELD].tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("method", "enable", "prioritised"),
    [
        ("skpo", True, True),
        ("skpo", False, False),
        ("grpo", True, False),
        ("grpo_curriculum", True, True),
        ("spo", True, True),
    ],
)
def test_the_curriculum_is_for_methods_that_use_it_and_can_be_switched_off(
    make_trainer, monkeypatch, caplog, method: str, enable: bool, prioritised: bool
) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from recipe.skpo.method.curriculum import PrioritisedBatches

    ids = [f"p{number}" for number in range(20)]

    def init_dataloader(self) -> None:
        self.train_dataset = type("Dataset", (), {"dataframe": {"id": ids}, "__len__": lambda self: 20})()
        self.train_dataloader = "verl's own"

    monkeypatch.setattr(PPOTrainerSync, "_init_dataloader", init_dataloader)
    trainer = make_trainer(method, curriculum={"enable": enable, "epsilon": 0.25})
    with caplog.at_level("INFO", "recipe.skpo.trainer"):
        trainer._init_dataloader()
    assert ("segments of 20 prompts" in caplog.text) is (method == "spo"), "whose drift is the log-ratio"
    assert trainer.curriculum is prioritised
    if not prioritised:
        assert trainer.train_dataloader == "verl's own"
        return
    batches = trainer.train_dataloader.batch_sampler
    assert isinstance(batches, PrioritisedBatches)
    assert (batches.ids, batches.epsilon) == (ids, 0.25)
    assert batches.batch_size == trainer.config.data.train_batch_size == (4 * G if method == "spo" else 4)
    assert batches.rng() is trainer.state.rng and batches.prompts is trainer.state.prompts
    assert trainer.train_dataloader.num_workers == 0, "a prefetched batch would be lost to a checkpoint"


def test_a_group_moves_the_curriculums_tracker_by_its_mean_reward(make_trainer, queue: Queue) -> None:
    trainer, rows = make_trainer("grpo_curriculum"), responses_of(2)
    _, metrics = train(trainer, queue, rows)
    # The first group is all right; in the second one every other response is.
    assert [trainer.state.prompts.value(f"id-v000000000{number}") for number in (0, 1)] == [1.0, 0.5]
    lengths = [len(fields["responses"]) for key, fields, _ in rows if key.startswith("v0000000001")]
    assert trainer.state.prompts.length("id-v0000000001") == sum(lengths) / G
    assert metrics["skpo/tracker/value/mean"] == 0.75
    assert metrics["skpo/upstream/baseline/mean"] == 0.0, "before the first visits"


# ---------------------------------------------------------------- SKPO's advantages


def test_a_step_of_skpo_says_what_it_did(make_trainer, queue: Queue) -> None:
    """The numbers that are trained are in tests/golden/test_golden_step.py."""
    trainer, rows = make_trainer(), groups(4)
    # The same prompt twice in one batch, and one that was seen before.
    for key, fields, _ in rows:
        if key.startswith(("v0000000000", "v0000000001")):
            fields["id"] = "twice"
    trainer.state.observe("id-v0000000002", 0.5, 10)
    _, metrics = train(trainer, queue, rows)
    assert metrics["skpo/upstream/baseline/mean"] == pytest.approx(0.5 / 4)
    assert metrics["skpo/tracker/prompts_seen"] == 3
    assert metrics["skpo/prompts_dropped"] == 0
    assert metrics["skpo/rollout_actor_logprob_gap/mean"] > 0
    assert len(tree_index(Path(trainer.output_dir))) == 1
    siblings = [fields for key, fields, _ in rows if key.startswith("v0000000003")][1:]
    length = sum(len(fields["responses"]) for fields in siblings) / G
    assert trainer.state.prompts.length("id-v0000000003") == pytest.approx(length)
    assert trainer.state.prompts.count("id-v0000000003") == 1.0, "an unknown id is a first visit"


def test_a_validation_logs_the_newest_trees_each_once(make_trainer, queue: Queue) -> None:
    texts: list[tuple[str, int]] = []
    writer = SimpleNamespace(add_text=lambda name, text, step: texts.append((text, step)), flush=lambda: None)
    trainer = make_trainer(trees_per_step=2)
    trainer.trees = TreeStore(trainer.output_dir / FOLDER, 1.0, 0, keep=3)
    trainer.logger = SimpleNamespace(logger={"tensorboard": SimpleNamespace(writer=writer)})
    trainer.on_validate_end()
    for step in (1, 2):
        trainer.global_steps = step
        trainer._compute_advantage(queue.store(groups(4)), {})
    trainer.on_validate_end()
    trainer.on_validate_end()
    ((text, step),) = texts
    assert step == 2 and [text.count(f"Problem, step {step}") for step in (1, 2)] == [1, 2]


@pytest.mark.parametrize("method", ["skpo", "grpo", "spo"])
def test_importance_weights_are_those_of_the_rollout(method: str, make_trainer, queue: Queue) -> None:
    trainer = make_trainer(method, trees_per_step=0)
    trainer.config.algorithm.rollout_correction.rollout_is = "token"
    trainer.config.algorithm.rollout_correction.rollout_is_threshold = 1.015
    # A prompt is missing, so that there is padding.
    batch = trainer._balance_batch(queue.store(rows_of(method, 3)), {})
    for key in batch.keys:
        if key.startswith("pad"):  # its log-probs are computed once it is there
            queue.rows[key]["old_log_probs"] = torch.zeros(1)
    metrics: dict[str, Any] = {}
    trainer._compute_advantage(batch, metrics)
    weights = []
    for key in batch.keys:
        item = queue.rows[key]
        ratio = (item["old_log_probs"] - item["rollout_log_probs"]).exp().clamp(max=1.015)
        expected = (ratio * item["response_mask"]).tolist()
        assert item["rollout_is_weights"].tolist() == pytest.approx(expected)
        weights += [weight for weight in expected if weight]
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(np.mean(weights))
    assert len(set(weights)) > 2 and max(weights) == pytest.approx(1.015), "some are truncated, some are not"


# ---------------------------------------------------------------- signal and noise of the segments


def test_the_signal_is_measured_on_rewards_and_baselines_from_before_the_visit(make_trainer, queue: Queue) -> None:
    trainer, rows = make_trainer(trees_per_step=0), groups(4, seed=3)
    _, first = train(trainer, queue, groups(4, seed=1))
    assert np.isnan(trainer.state.signal.visits[:, 1]).all(), "first visits have no baseline"
    before = np.array([trainer.state.baseline(f"id-v{number:010d}") for number in range(4)])
    rewards = np.array([float(row["rm_scores"].sum()) for _, row, _ in rows]).reshape(4, G + 1)[:, 1:]
    _, second = train(trainer, queue, rows)
    deviation = rewards.mean(axis=1) - before
    squared, noise = (deviation - deviation.mean()) ** 2 * 4 / 3, rewards.var(axis=1, ddof=1) / G
    assert len(set(squared)) == len(set(noise)) == 2, "a difference would show"
    expected = sorted(zip(squared, [2.0] * 4, noise, strict=True))
    for found, wanted in zip(sorted(trainer.state.signal.visits[4:].tolist()), expected, strict=True):
        assert found == pytest.approx(wanted)
    assert not any("signal" in name for name in first | second), "four known prompts are too few"
    for seed in range(8):
        _, metrics = train(trainer, queue, groups(4, seed))
    estimate = [metrics[f"skpo/upstream/signal_to_noise{end}"] for end in ("_low", "", "_high")]
    assert estimate == sorted(estimate)


def test_rewards_of_single_responses_have_no_known_noise(make_trainer, queue: Queue) -> None:
    trainer = make_trainer(upstream_reward="own", trees_per_step=0)
    train(trainer, queue, groups(4))
    assert not len(trainer.state.signal.visits)


def test_shrinkage_multiplies_upstream_advantages_alone(make_trainer, queue: Queue) -> None:
    columns: dict[bool, list[dict[str, Any]]] = {}
    rows = groups(4)
    for shrinkage in (False, True):
        trainer = make_trainer(upstream={"shrinkage": shrinkage}, trees_per_step=0)
        trainer.state.signal.visits = np.tile([1.0, 1.5, 0.25], (32, 1))
        for prompt_id in ("id-v0000000000", "id-v0000000002"):
            trainer.state.observe(prompt_id, 0.5, 4.0)
        batch, metrics = train(trainer, queue, rows)
        columns[shrinkage] = [dict(queue.rows[key]) for key in batch.keys]
        assert ("skpo/upstream/shrinkage/mean" in metrics) == shrinkage
    shares = trainer.state.signal.shares(np.array([1.0, 0.0]))
    assert shares[0] != shares[1] and ((shares > 0) & (shares < 1)).all()
    assert metrics["skpo/upstream/shrinkage/mean"] == pytest.approx(shares.mean())
    for plain, shrunk in zip(columns[False], columns[True], strict=True):
        known = plain["uid"] in ("v0000000000", "v0000000002")
        factor = shares[0 if known else 1] if int(plain[PHASE_FIELD]) == UPSTREAM else 1.0
        assert shrunk["advantages"].tolist() == pytest.approx((plain["advantages"] * factor).tolist())
        assert torch.equal(shrunk[WEIGHT_FIELD], plain[WEIGHT_FIELD])


def test_the_gap_is_between_the_steps_since_the_last_validation_and_this_one(make_trainer, monkeypatch) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from recipe.skpo.output.metrics import MetricsFile

    reward, plain = "skpo/downstream/reward/mean", "val-aux/sums/reward/mean@1"
    monkeypatch.setattr(PPOTrainerSync, "_validate", lambda self: {plain: 0.25, "val-core/sums/acc/mean@1": 0.625})
    trainer = make_trainer()
    trainer.global_steps = 0
    assert "skpo/validation/skip_gap" not in trainer._validate(), "nothing has been trained yet"
    file = MetricsFile(trainer.metrics_path, 0)
    for step, line in enumerate([{plain: -0.5}, {reward: -1.0, plain: 0.0}, {reward: 0.5}]):
        file.log(line, step)
    trainer.global_steps, trainer.step_metrics = 3, {reward: 0.75}
    assert trainer._validate()["skpo/validation/skip_gap"] == pytest.approx((0.5 + 0.75) / 2 - 0.25)
    file.log(trainer.step_metrics, 3)
    assert trainer._validate()["skpo/validation/skip_gap"] == pytest.approx(0.375), "a step counts once"


@pytest.mark.faults
def test_trees_that_cannot_be_written_do_not_end_the_training(make_trainer, queue: Queue, monkeypatch, caplog) -> None:
    from recipe.skpo.output.best_effort import BestEffort
    from recipe.skpo.trainer import skpo as module

    def full(step: int, trees: list[dict[str, Any]]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "EFFORT", BestEffort())
    trainer = make_trainer()
    monkeypatch.setattr(trainer.trees, "write", full)
    batch, metrics = queue.store(groups(4)), {}
    for _ in range(2):
        trainer._compute_advantage(batch, metrics)
    assert metrics["skpo/prompts_dropped"] == 0 and not tree_index(Path(trainer.output_dir))
    assert [text for text in caplog.messages if "trees" in text] == [
        "trees: not written (OSError: [Errno 28] No space left on device); the training continues, and later failures "
        "of it are not logged"
    ]


@pytest.mark.faults
@pytest.mark.parametrize("method", ["skpo", "grpo", "grpo_curriculum", "spo"])
def test_a_dropped_prompt_is_counted_and_its_padding_is_in_nothing(make_trainer, queue: Queue, method: str) -> None:
    trainer = make_trainer(method, trees_per_step=0)
    batch, metrics = train(trainer, queue, rows_of(method, 3))
    padding = [queue.rows[key] for key in batch.keys if key.startswith("pad")]
    real = [queue.rows[key] for key in batch.keys if not key.startswith("pad")]
    assert len(batch) == len(real) + len(padding) == 4 * (G + (method == "skpo"))
    assert metrics["skpo/prompts_dropped"] == (2 if method == "spo" else 1)
    seen = {"skpo": 3, "grpo": 0, "grpo_curriculum": 3, "spo": 6}[method]
    assert len(trainer.state.prompts) == seen, "padding moves no tracker"
    assert not any(item["advantages"].any() for item in padding)
    if method == "skpo":
        assert all(float(item[WEIGHT_FIELD]) == 0.0 for item in padding)
    else:
        mean = sum(len(item["responses"]) for item in real) / len(real)
        assert metrics["skpo/downstream/length/mean"] == pytest.approx(mean)


# ---------------------------------------------------------------- log-ratios


LOGRATIO = {"rho_min": 0.875, "rho_max": 0.96, "half_life": 0.06, "drift": "logratio"}


def test_the_log_ratio_is_the_mean_move_on_what_the_prompt_was_last_trained_on(make_trainer, queue: Queue) -> None:
    trainer = make_trainer(tracker=LOGRATIO)
    trainer.state.segments.put("id-v1", [30, 40, 50], [-0.2, -0.5, -0.4])
    trainer.state.segments.put("id-v2", [60], [-0.1])
    batch = queue.store([stored_row(uid, 0, 1.0, [9, 9], UPSTREAM) for uid in ("v0", "v1", "v2")])
    measured = trainer._log_ratios(batch, [0, 1, 2], ["id-v0", "id-v1", "id-v2"])
    # The actor gives token k the log-prob -k / 100.
    assert measured == {
        "id-v1": pytest.approx((0.1 + 0.1 + 0.1) / 3, abs=1e-6),
        "id-v2": pytest.approx(0.5, abs=1e-6),
    }
    (asked,) = trainer.actor_rollout_wg.asked
    assert asked.extra_info == {
        "calculate_entropy": False,
        "compute_loss": False,
        "temperature": trainer.config.actor_rollout_ref.rollout.temperature,
    }
    assert [tag["seq_len"] for tag in asked.tags] == [5, 3]
    assert asked.partition_id not in ("train", "val")
    assert queue.cleared == [asked.partition_id]
    assert queue.rows.keys() == {"v0_0_0", "v1_0_0", "v2_0_0"}


def test_the_stored_tokens_are_read_after_the_prompts_own_question(make_trainer, queue: Queue) -> None:
    trainer = make_trainer(tracker=LOGRATIO)
    trainer.state.segments.put("id-v1", [30, 40], [-0.3, -0.4])
    seen: list[dict[str, Any]] = []
    compute = trainer.actor_rollout_wg.compute_log_prob

    def spy(batch):
        seen.extend(copy.deepcopy(queue.rows[key]) for key in batch.keys)
        return compute(batch)

    trainer.actor_rollout_wg.compute_log_prob = spy
    rows = [stored_row("v1", 0, 1.0, [9, 9, 9], UPSTREAM, prompts=[71, 72, 73])]
    ratios = trainer._log_ratios(queue.store(rows), [0], ["id-v1"])
    assert ratios == {"id-v1": pytest.approx(0.0, abs=1e-6)}, "a policy that did not move"
    (row,) = seen
    assert row["prompts"].tolist() == [71, 72, 73]
    assert row["input_ids"].tolist() == [71, 72, 73, 30, 40]
    assert row["responses"].tolist() == [30, 40] and row["responses"].dtype == torch.int64
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1, 1]
    assert "rm_scores" not in row and "old_log_probs" not in row


def test_ranks_get_equal_parts(make_trainer, queue: Queue) -> None:
    trainer = make_trainer(ranks=4, tracker=LOGRATIO)
    for number in range(5):
        trainer.state.segments.put(f"id-v{number}", [30 + number], [0.0])
    batch = queue.store([stored_row(f"v{number}", 0, 1.0, [9], UPSTREAM) for number in range(5)])
    measured = trainer._log_ratios(batch, list(range(5)), [f"id-v{number}" for number in range(5)])
    assert len(trainer.actor_rollout_wg.asked[0]) == 8
    assert measured == {f"id-v{number}": pytest.approx((30 + number) / 100) for number in range(5)}


@pytest.mark.parametrize("drift", ["kl_steps", "nats"])
def test_other_drifts_ask_for_no_forward_and_store_nothing(make_trainer, queue: Queue, drift: str) -> None:
    trainer = make_trainer(tracker={**LOGRATIO, "drift": drift}, trees_per_step=0)
    batch = trainer._balance_batch(queue.store(groups(4)), {})
    for _ in range(2):
        trainer._compute_advantage(batch, {})
    assert not trainer.actor_rollout_wg.asked and len(trainer.state.segments) == 0


def test_rows_are_cleared_also_when_the_actor_fails(make_trainer, queue: Queue) -> None:
    trainer = make_trainer(tracker=LOGRATIO)
    trainer.state.segments.put("id-v1", [30], [0.0])
    trainer.actor_rollout_wg.fails = True
    with pytest.raises(RuntimeError, match="a worker died"):
        trainer._log_ratios(queue.store([stored_row("v1", 0, 1.0, [9], UPSTREAM)]), [0], ["id-v1"])
    assert len(queue.cleared) == 1


def test_the_next_visit_measures_what_was_trained_now(make_trainer, queue: Queue) -> None:
    trainer = make_trainer(tracker=LOGRATIO, trees_per_step=0)
    batch, first = train(trainer, queue, groups(4))
    assert first["skpo/tracker/drift/mean"] == 0.0 and not trainer.actor_rollout_wg.asked
    trainer.actor_rollout_wg.score = lambda ids: -ids.float() / 100 + 0.03
    second: dict[str, Any] = {}
    trainer._compute_advantage(batch, second)
    assert second["skpo/tracker/drift/mean"] == pytest.approx(0.03, abs=1e-6)


# ---------------------------------------------------------------- baselines


BASELINE_METRICS = {
    f"skpo/downstream/{name}"
    for name in (
        "reward/mean",
        "advantage/mean",
        "advantage/std",
        "length/mean",
        "tokens_generated",
        "tokens_prefilled",
        "prefix_cache/hit_rate",
        "all_equal_share",
    )
}
BASELINE_METRICS |= {"skpo/prompts_dropped", "skpo/requests_failed", "skpo/rollout_actor_logprob_gap/mean"}
BASELINE_METRICS |= {f"skpo/tokens/{name}" for name in ("generated", "prefilled", "cached", "generated_so_far")}


def test_a_baseline_keeps_verls_advantages_and_logs_them_like_skpo(make_trainer, queue: Queue) -> None:
    trainer = make_trainer("grpo")
    batch, metrics = train(trainer, queue, responses_of(4))
    rows = [queue.rows[key] for key in batch.keys]
    uids = sorted({item["uid"] for item in rows})
    rewards = [float(item["rm_scores"].sum()) for item in rows]
    expected = reference_group_relative(rewards, [uids.index(item["uid"]) for item in rows], [True] * len(rows))
    for item, value in zip(rows, expected, strict=True):
        # verl divides by the sample standard deviation, which is larger by the square root of two for two.
        assert item["advantages"].tolist() == pytest.approx([value / math.sqrt(2)] * len(item["responses"]), abs=1e-4)

    assert {name for name in metrics if name.startswith("skpo/")} == BASELINE_METRICS
    assert metrics["skpo/downstream/reward/mean"] == pytest.approx(sum(rewards) / 8)
    assert metrics["skpo/downstream/length/mean"] == pytest.approx(sum(len(item["responses"]) for item in rows) / 8)
    assert metrics["skpo/downstream/all_equal_share"] == 0.25
    assert metrics["skpo/downstream/advantage/std"] == pytest.approx(math.sqrt(6 / 8 / 2), abs=1e-4)
    assert metrics["skpo/downstream/tokens_generated"] == sum(len(item["responses"]) for item in rows)
    assert metrics["skpo/downstream/tokens_prefilled"] == 16
    assert metrics["skpo/downstream/prefix_cache/hit_rate"] == 0.5
    assert metrics["skpo/prompts_dropped"] == 0
    assert len(trainer.state.prompts) == 0, "no tracker"


def test_spo_compares_with_the_tracker_read_before_any_update(make_trainer, queue: Queue) -> None:
    trainer = make_trainer("spo")
    rows = responses_of(8, sessions=1)
    rows[1][1]["id"] = rows[0][1]["id"] = "twice"
    trainer.state.observe("id-v0000000002", 0.5, 10)
    before = trainer.state.prompts.count("id-v0000000002")
    batch, metrics = train(trainer, queue, rows)
    written = [queue.rows[key] for key in batch.keys]
    rewards = [float(item["rm_scores"].sum()) for item in written]
    baselines = [0.5 if item["id"] == "id-v0000000002" else 0.0 for item in written]
    expected = reference_single_stream(rewards, baselines, [True] * 8)
    for item, value in zip(written, expected, strict=True):
        assert item["advantages"].tolist() == pytest.approx([value] * len(item["responses"]), abs=1e-5)
        assert item["returns"].tolist() == item["advantages"].tolist()
    assert metrics["skpo/upstream/baseline/mean"] == pytest.approx(0.5 / 8)
    assert metrics["skpo/tracker/prompts_seen"] == 7
    assert metrics["skpo/prompts_dropped"] == 0
    assert {name for name in metrics if name.startswith("skpo/")} > BASELINE_METRICS
    assert trainer.state.prompts.count("id-v0000000002") > before
    assert trainer.state.prompts.length("id-v0000000003") == 4, "a response's length is what its prompt's is"
    assert trainer.state.prompts.value("twice") == pytest.approx(1.0), "both were right"
    assert "id-v0000000003" in trainer.state.segments, "SPO's own drift needs what was trained"


@pytest.mark.parametrize(
    ("reported", "steps", "total"), [({"actor/ppo_kl": 0.25}, 1, 0.25), ({"actor/ppo_kl": -0.5}, 1, 0.0), ({}, 1, 0.0)]
)
def test_spos_clock_moves_by_verls_kl(make_trainer, monkeypatch, reported: dict, steps: int, total: float) -> None:
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(PPOTrainerSync, "_update_actor", lambda self, batch, metrics: metrics.update(reported) or batch)
    trainer = make_trainer("spo")
    batch = KVBatchMeta(keys=["v0_1_0"], tags=[{}], partition_id="train", extra_info={})
    assert trainer._update_actor(batch, {}) is batch
    assert (trainer.state.clock.steps, trainer.state.clock.total_kl) == (steps, total)


def test_prompts_that_fail_in_every_visit_are_counted_and_named(make_trainer, queue: Queue, caplog) -> None:
    trainer = make_trainer()
    trainer.curriculum = True
    for _ in range(3):
        trainer._visited = {f"v{number:010d}": f"id {number}" for number in range(5)}
        trainer._balance_batch(queue.store(groups(3)), {})
    assert trainer.state.failures == {"id 3": 3, "id 4": 3}
    (line,) = [record.getMessage() for record in caplog.records if "failed in each" in record.getMessage()]
    assert line.endswith(
        "2 prompts have failed in each of their last 3 visits or more, and are drawn less often: id 3, id 4"
    )
    trainer._visited = {"v0000000000": "id 3"}
    trainer._balance_batch(queue.store(groups(3)), {})
    assert trainer.state.failures == {"id 4": 3}


def test_only_skpo_wraps_verls_loss(make_trainer) -> None:
    for method in ("skpo", "grpo", "spo"):
        trainer = make_trainer(method)
        trainer.on_init_end()
        loss = trainer.actor_rollout_wg.loss_function
        if method == "skpo":
            actor = loss.keywords["config"]
            assert (actor.policy_loss.loss_mode, actor.loss_agg_mode) == ("skpo", "token-mean")
            assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.28)
            assert loss.func is pickle.loads(pickle.dumps(loss)).func
        else:
            assert loss is None


# ---------------------------------------------------------------- the token budget


def spending(trainer, calls: list[str]) -> None:
    """Note what the last step does; saving and validating do nothing else."""
    trainer._save_checkpoint = lambda: calls.append(f"save {trainer.global_steps}")
    trainer._validate = lambda: calls.append(f"validate {trainer.global_steps}") or {"val": 1.0}
    trainer.on_validate_begin = lambda: calls.append("begin")
    trainer.on_validate_end = lambda: calls.append("end")
    trainer.logger = SimpleNamespace(log=lambda data, step: calls.append(f"log {sorted(data)} {step}"))


def run_loop(trainer, tokens_per_step: int) -> int:
    """The steps of verl's loop that matter here; returns the number of steps that were trained."""
    trained, config = 0, trainer.config.trainer
    while trainer.global_steps <= trainer.total_training_steps:
        last = trainer.global_steps >= trainer.total_training_steps
        trainer.state.tokens_generated += tokens_per_step
        trained += 1
        if config.save_freq > 0 and (last or trainer.global_steps % config.save_freq == 0):
            trainer._save_checkpoint()
        trainer.on_step_end()
        if config.test_freq > 0 and (last or trainer.global_steps % config.test_freq == 0):
            trainer._validate()
        trainer.global_steps += 1
        if last:
            return trained
    trainer.on_train_end()
    return trained


def last_step(step: int) -> list[str]:
    return [f"save {step}", "begin", f"validate {step}", f"log ['val'] {step}", "end"]


@pytest.mark.parametrize(
    ("tokens", "save_freq", "test_freq", "steps", "done"),
    [
        *((tokens, 50, 50, steps, last_step(steps)) for tokens, steps in ((1, 1), (100, 1), (101, 2), (250, 3))),
        (300, 3, 1, 3, ["validate 1", "validate 2", "save 3", "validate 3"]),  # what was done anyway is not done again
        (100, -1, -1, 1, []),  # a run that never saves or tests does not do so at its end
        *((tokens, 50, 50, 10, ["save 10", "validate 10"]) for tokens in (None, 1_000_000)),  # verl ends the run
    ],
)
def test_training_ends_with_the_step_that_spends_the_budget(
    make_trainer, tokens: int | None, save_freq: int, test_freq: int, steps: int, done: list[str]
) -> None:
    trainer, calls = make_trainer("grpo"), []
    trainer.config.budget.tokens = tokens
    trainer.config.trainer.save_freq, trainer.config.trainer.test_freq = save_freq, test_freq
    spending(trainer, calls)
    assert run_loop(trainer, 100) == steps
    assert calls == done
    if steps == 10:
        assert not trainer._budget_spent()
        trainer.on_train_end()
        assert calls == done
    elif done == last_step(steps):
        assert trainer.global_steps == steps


BEST = "val-core/x/acc/mean@1"


@pytest.mark.parametrize(
    ("values", "limit", "save_freq", "saved", "steps"),
    [
        ((0.0, 0.1, 0.2, 0.3, 0.4), None, -1, [2, 4, 6, 8, 10], 10),  # each validation has its checkpoint
        ((0.0, 0.1, 0.2, 0.3, 0.4), None, 4, [2, 4, 6, 8, 10], 10),  # and no other step a second one
        ((0.0, 0.1, 0.2, 0.3, 0.4), 1, 5, [2, 4, 5, 6, 8, 10], 10),
        ((0.0, 0.3, 0.2, 0.3, 0.4), 2, -1, [2, 4, 6, 8], 8),
        ((0.3, 0.3, 0.2, 0.1), 3, -1, [2, 4, 6, 8], 8),
    ],
)
def test_each_validation_has_a_checkpoint_and_training_ends_without_gain(
    make_trainer, monkeypatch, capsys, values, limit, save_freq: int, saved: list[int], steps: int
) -> None:
    trainer, calls, left = make_trainer("grpo", options={"keep_best": BEST}), [], iter(values)
    trainer.config.trainer.update({"stop_after_no_gain": limit, "save_freq": save_freq, "test_freq": 2})

    def save(self: Any) -> None:
        calls.append(self.global_steps)
        write_checkpoint(self._checkpoint_folder())

    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", save)
    monkeypatch.setattr(PPOTrainer, "_validate", lambda self: {BEST: next(left)})
    assert run_loop(trainer, 100) == steps
    assert calls == saved
    assert ("stopped by trainer.stop_after_no_gain" in capsys.readouterr().out) == (steps < 10)


def test_a_budget_ends_with_one_checkpoint_that_may_be_the_best(make_trainer) -> None:
    trainer, calls = make_trainer("grpo", options={"keep_best": BEST}), []
    trainer.config.budget.tokens = 300
    trainer.config.trainer.update({"save_freq": 50, "test_freq": 50})
    spending(trainer, calls)
    trainer._save_checkpoint = lambda: calls.append("save") or setattr(trainer, "_saved_step", trainer.global_steps)
    assert run_loop(trainer, 100) == 3
    assert calls == ["save", *last_step(3)[1:]]


def test_the_budget_counts_over_a_resume(make_trainer, tmp_path: Path) -> None:
    first = make_trainer("grpo")
    first.state.tokens_generated = 900
    first.state.save(tmp_path / "checkpoint")
    resumed = make_trainer("grpo")
    resumed.state.load(tmp_path / "checkpoint")
    resumed.config.budget.tokens = 1000
    assert not resumed._budget_spent()
    resumed.state.tokens_generated += 100
    assert resumed._budget_spent()


# ---------------------------------------------------------------- faults


@pytest.mark.faults
@pytest.mark.parametrize("method", ["skpo", "grpo"])
def test_failed_requests_of_the_step_are_a_metric(make_trainer, queue: Queue, method: str) -> None:
    trainer = make_trainer(method)
    trainer.agent_loop_manager.failures = {"session: of validation": 9}
    trainer.on_step_begin()
    metrics: dict[str, float] = {}
    trainer.agent_loop_manager.failures = {"candidate: A": 2, "sibling: B": 3, "prompt: all failed": 1}
    trainer._balance_batch(queue.store(groups(4)), metrics)
    assert metrics["skpo/requests_failed"] == 5, "a prompt is no request, and is in skpo/prompts_dropped"
    trainer._balance_batch(queue.store(groups(4)), metrics)
    assert metrics["skpo/requests_failed"] == 0


@pytest.mark.parametrize(
    ("step", "resumed_at", "share", "stopped"),
    [(1, 0, 0.0, True), (1, 0, 0.25, False), (2, 0, 0.0, False), (6, 5, 0.0, True)],
)
def test_boundaries_that_nobody_writes_stop_the_first_step(
    make_trainer, queue: Queue, step: int, resumed_at: int, share: float, stopped: bool
) -> None:
    trainer = make_trainer(split="boundary_token", boundaries=["\\n"])
    trainer.global_steps, trainer.resumed_at = step, resumed_at
    rows = groups(4)
    for _, fields, _ in rows:
        if int(fields[PHASE_FIELD]) == UPSTREAM:
            record = fields["extra_fields"][RECORD]
            record["candidates"] = [record["candidates"][0] | {"at_boundary": n < 4 * share} for n in range(4)]
    if not stopped:
        train(trainer, queue, rows)
        return
    with pytest.raises(ConfigError) as error:
        train(trainer, queue, rows)
    message = f"skpo.boundaries: none of ['\\n'] is in any candidate of step {step}, so that skpo.split=boundary_token "
    assert str(error.value) == f"{message}cuts as skpo.split=adaptive does; name what the model writes"


@pytest.mark.faults
def test_a_reason_to_stop_ends_the_run_before_the_step_is_trained(make_trainer, queue: Queue) -> None:
    from recipe.skpo.rollout.failures import RolloutError

    trainer = make_trainer()
    trainer.agent_loop_manager.failures = {"sibling: B": 3, "stop: the reward is 2; scale it": 1}
    with pytest.raises(RolloutError, match=r"^the reward is 2; scale it$"):
        trainer._balance_batch(queue.store(groups(4)), {})


@pytest.mark.faults
@pytest.mark.parametrize("method", ["skpo", "grpo", "spo"])
def test_other_weights_in_the_servers_stop_the_run(make_trainer, queue: Queue, method: str) -> None:
    from recipe.skpo.rollout.failures import RolloutError

    for gap, stops in ((0.4, False), (0.6, True), (math.nan, True)):
        trainer, rows = make_trainer(method), rows_of(method, 4)
        for _, fields, _ in rows:
            fields["rollout_log_probs"] = fields["old_log_probs"] + gap
        batch = trainer._balance_batch(queue.store(rows), {})
        metrics: dict[str, Any] = {}
        if stops:
            with pytest.raises(RolloutError, match=rf"in step 1 .* by {gap:g} .* skpo\.max_logprob_gap=0\.5 allows"):
                trainer._compute_advantage(batch, metrics)
        else:
            trainer._compute_advantage(batch, metrics)
            assert metrics["skpo/rollout_actor_logprob_gap/mean"] == pytest.approx(gap)


@pytest.mark.parametrize(
    ("rollout", "bound"),
    [
        ({}, 0.5),
        ({"top_p": 0.9}, 0.5 - math.log(0.9)),
        ({"temperature": 0.6}, 0.5),
        ({"top_k": 20}, None),
        ({"logprobs_mode": "raw_logprobs"}, None),
        ({"calculate_log_probs": False}, None),
    ],
)
def test_the_bound_on_the_gap_knows_what_the_log_probs_are_of(compose_config, rollout, bound, caplog) -> None:
    from recipe.skpo.trainer.logprob_gap import allowed_gap

    config = compose_config("platform=cpu").actor_rollout_ref.rollout
    config.update(rollout)
    assert allowed_gap(None, config) is None and not caplog.records
    assert allowed_gap(0.5, config) == bound
    assert [record.getMessage().split(":")[0] for record in caplog.records] == (
        [] if bound else ["skpo.max_logprob_gap is not checked"]
    )


@pytest.mark.parametrize("error", [None, TimeoutError("its own")], ids=["hangs", "fails"])
def test_a_replica_that_does_not_fall_asleep_is_not_waited_for_without_end(make_trainer, error) -> None:
    import asyncio

    from verl.checkpoint_engine import CheckpointEngineManager

    from recipe.skpo.rollout.failures import RolloutError

    async def sleep() -> None:
        await (asyncio.Event().wait() if error is None else asyncio.sleep(0))
        raise error

    trainer = make_trainer(weight_sync_timeout_s=1)
    synchronised = []
    engine = SimpleNamespace(backend="naive", custom_backend_module=None)
    trainer.checkpoint_manager = CheckpointEngineManager(engine, None, [SimpleNamespace(sleep=sleep)])
    trainer.checkpoint_manager.update_weights = synchronised.append
    trainer.on_init_end()
    assert synchronised == [1], "as verl's"
    with pytest.raises(RolloutError if error is None else TimeoutError) as raised:
        trainer.on_sample_end()
    if error is None:
        assert str(raised.value) == (
            "a rollout server is alive and has not answered within skpo.weight_sync_timeout_s=1 s"
        )
    else:
        assert raised.value is error


@pytest.mark.faults
def test_every_trainer_waits_with_a_bound(make_trainer) -> None:
    from recipe.skpo.trainer.timeouts import ReplayBufferWithTimeout

    for method in ("skpo", "grpo", "spo", "dapo"):
        trainer = make_trainer(method, prompt_timeout_s=7.0, max_dropped_share=0.25)
        buffer = trainer.replay_buffer
        assert isinstance(buffer, ReplayBufferWithTimeout)
        assert (buffer.patience_s, buffer.max_dropped_share) == (67.0, 0.25)
        assert buffer.poll_interval == trainer.settings.poll_interval_s
        assert (buffer.filter_groups_metric is not None) == (method == "dapo")
        trainer.agent_loop_manager.failures = {"prompt: A": 1}
        assert buffer.causes() == {"prompt: A": 1}


# ---------------------------------------------------------------- entropy polarity


def with_slopes(trainer: Any, queue: Queue, rows: list[Stored], seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Train a batch whose rows, padding among them, the actor has given entropies and slopes."""
    rng, metrics = np.random.default_rng(seed), {}
    batch = trainer._balance_batch(queue.store(rows), metrics)
    for key in sorted(batch.keys):
        row = queue.rows[key]
        if key.startswith("pad"):  # its log-probs are computed once it is there
            row["old_log_probs"] = torch.zeros(len(row["responses"]))
        row["entropy"] = torch.tensor(rng.exponential(1.0, len(row["responses"])), dtype=torch.float32)
        slopes = torch.tensor(rng.normal(0, 0.1, len(row["input_ids"])), dtype=torch.float32)
        row[SLOPE_FIELD] = slopes  # as the engine returns them, one place before the token
    return trainer._compute_advantage(batch, metrics), metrics


def trained_tokens(queue: Queue, keys: list[str]) -> list[tuple[str, int, float]]:
    """Key, place in the response and slope of every trained token of real rows."""
    found = []
    for key in keys:
        row = queue.rows[key]
        start = len(row["prompts"]) - 1
        for place, trained in enumerate(row["response_mask"].tolist()):
            if trained and not key.startswith("pad"):
                found.append((key, place, float(row[SLOPE_FIELD][start + place])))
    return found


@pytest.mark.parametrize("method", ["skpo", "papo", "spo", "rloo", "dr_grpo"])
def test_polarity_reweights_the_tokens_of_the_whole_step(make_trainer, queue: Queue, method: str) -> None:
    rows, columns = groups(3, seed=5) if method == "skpo" else rows_of(method, 3), {}
    for strength in (None, 0.0, 0.8):
        trainer = make_trainer(method, trees_per_step=0)
        trainer.polarity = PolaritySettings(enable=strength is not None, strength=strength or 0.0, target=2.0)
        trainer.state.entropy.target = trainer.polarity.entropy
        batch, metrics = with_slopes(trainer, queue, copy.deepcopy(rows))
        columns[strength] = {key: dict(queue.rows[key]) for key in batch.keys if not key.startswith("pad")}
        padding = [queue.rows[key] for key in batch.keys if key.startswith("pad")]
        assert padding and not any(row["advantages"].any() for row in padding)
        assert any(name.startswith("skpo/polarity/") for name in metrics) == (strength is not None)
    for key, plain in columns[None].items():
        assert torch.equal(columns[0.0][key]["advantages"], plain["advantages"]), "strength 0 is off, to the bit"
    tokens = trained_tokens(queue, batch.keys)
    entropies = [float(queue.rows[key]["entropy"][place]) for key, place, _ in tokens]
    phase = (2.0 - float(np.mean(entropies))) / 2.0
    assert metrics["skpo/polarity/phi"] == pytest.approx(phase)
    before = [(float(columns[None][key]["advantages"][place]), slope) for key, place, slope in tokens]
    expected = reference_reweighted(before, phase, 0.8)
    found = [float(columns[0.8][key]["advantages"][place]) for key, place, _ in tokens]
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(map(abs, found)) == pytest.approx(sum(abs(advantage) for advantage, _ in before), rel=1e-6)
    assert found != pytest.approx([advantage for advantage, _ in before], rel=1e-2)
    everything = sum(abs(advantage) for advantage, _ in before)
    for branch, sign in (("expanding", 1), ("contracting", -1)):
        inside = [number for number, (advantage, slope) in enumerate(before) if sign * advantage * slope > 0]
        shares = {
            "token_share": len(inside) / len(before),
            "advantage_share": sum(abs(before[number][0]) for number in inside) / everything,
            "advantage_share_after": sum(abs(expected[number]) for number in inside) / everything,
        }
        for name, share in shares.items():
            assert metrics[f"skpo/polarity/{branch}/{name}"] == pytest.approx(share, rel=1e-5)
    assert metrics["skpo/polarity/mean"] == pytest.approx(np.mean([a * t for a, t in before]), rel=1e-5)
    assert all(set(columns[0.8][key]) == set(plain) for key, plain in columns[None].items()), "no other column"


def test_slopes_are_requested_with_the_old_log_probs_alone(make_trainer, queue: Queue, monkeypatch) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    seen: list[bool] = []

    def old_log_probs(self: Any, batch: Any, metrics: dict) -> Any:
        seen.append(batch.extra_info[WANT_SLOPES])
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_compute_old_log_prob", old_log_probs)
    for method, wanted in (("papo", True), ("grpo", False)):
        trainer = make_trainer(method)
        batch = trainer._compute_old_log_prob(queue.store(rows_of(method, 4)), {})
        assert (seen.pop(), batch.extra_info[WANT_SLOPES]) == (wanted, False), "an update must not pay for them"


def test_the_trajectory_of_the_entropy_resumes_from_the_checkpoint(make_trainer, queue: Queue, tmp_path: Path) -> None:
    def steps(trainer: Any, numbers: range) -> list[dict[str, float]]:
        said = []
        for number in numbers:
            _, metrics = with_slopes(trainer, queue, rows_of("papo", 4), seed=number)
            said.append({name: value for name, value in metrics.items() if name.startswith("skpo/polarity/")})
        return said

    whole, part, resumed = make_trainer("papo"), make_trainer("papo"), make_trainer("papo")
    everything = steps(whole, range(6))
    steps(part, range(3))
    part.state.save(tmp_path / "checkpoint")
    resumed.state.load(tmp_path / "checkpoint")
    assert steps(resumed, range(3, 6)) == everything[3:]
    assert everything[0]["skpo/polarity/phi"] == 0 != everything[1]["skpo/polarity/phi"]
    promised = {name for metric in METRICS for name in metric.names() if name.startswith("skpo/polarity/")}
    assert set(everything[-1]) == promised


def test_a_step_without_a_trained_token_moves_no_trajectory(make_trainer, queue: Queue) -> None:
    trainer, rows = make_trainer("spo"), rows_of("spo", 4)
    trainer.polarity = PolaritySettings(enable=True)
    for _, fields, _ in rows:
        fields["response_mask"] = torch.zeros_like(fields["response_mask"])
    _, metrics = with_slopes(trainer, queue, rows)
    assert trainer.state.entropy.last is None and not any("polarity" in name for name in metrics)
