"""Whole training steps of the trainer, without Ray and models, against the reference of a run.

verl's own padding, balancing and row format are the real ones; TransferQueue is a dictionary, the rollout a generator
of random rows, the actor a number.  What a wrong order of reading and updating, a wrong reward field or a row in the
wrong update changes is invisible to the functions that ``_compute_advantage`` calls, and shows here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict

from recipe.skpo.method.rows import DOWNSTREAM, SEED_FIELD, SPLIT_FIELD, UPSTREAM, WEIGHT_FIELD, RowKey
from recipe.skpo.output.glossary import METRICS
from recipe.skpo.settings import SkpoSettings, TrackerSettings
from recipe.skpo.trainer.state import SkpoState
from tests.support.queue import Queue
from tests.support.reference import ReferenceRun, reference_group_relative, reference_single_stream
from tests.support.rows import stored_row

GROUP, BATCH, PER_UPDATE, STEPS, BUDGET = 3, 6, 2, 6, 60
TOLERANCE = 1e-4  # rows are float32
PROMISED = {name for metric in METRICS for name in metric.names() if name.startswith("skpo/") and not metric.only}


@dataclass
class Visit:
    """One prompt's rollout as the reference sees it; row keys, lengths and rewards of the siblings that came back."""

    prompt_id: str
    uid: str
    problem: list[int]
    segment: list[int]
    segment_old: list[float]
    reward: float
    siblings: dict[str, tuple[int, int, float]] = field(default_factory=dict)  # written, trained tokens, reward


def actor_log_prob(step: int, before: int, token: int) -> float:
    """What the actor of a step says of a token after another; any function that changes from step to step."""
    return -0.1 - ((7 * before + 13 * token + 5 * step) % 17) / 16


def roll_out(rng: np.random.Generator, queue: Queue, prompt_id: str, uid: str, step: int) -> Visit:
    """One prompt's random rollout, stored."""

    def some(low: int, high: int) -> list[int]:
        return rng.integers(5, 99, int(rng.integers(low, high))).tolist()

    segment, problem = some(1, 8), some(2, 6)
    old = [float(np.float32(-value)) for value in rng.exponential(1.0, len(segment))]
    visit = Visit(prompt_id, uid, problem, segment, old, float(rng.integers(-8, 9)) / 8)
    # Log-probs of the rollout are values that nothing may mistake for the reward.
    rows = [stored_row(uid, 0, visit.reward, segment, UPSTREAM, problem, old_log_probs=old, id=prompt_id)]
    lost = rng.random(GROUP) < 0.25
    if rng.random() < 0.9:
        lost[rng.integers(GROUP)] = False
    continual = rng.random() < 0.3
    for index in range(GROUP):
        response = some(1, 20)
        if lost[index]:
            down = stored_row(uid, index + 1, 0.0, [1], DOWNSTREAM, segment + problem, opening=1, id=prompt_id)
        else:
            reward, opening = float(rng.choice([-1.0, 1.0])), segment if continual else []
            prompt = problem if continual else segment + problem
            written = opening + response
            down = stored_row(uid, index + 1, reward, written, DOWNSTREAM, prompt, len(opening), id=prompt_id)
            visit.siblings[down[0]] = (len(written), len(response), reward)
        rows.append(down)
    queue.store(rows)
    return visit


class Trainer:
    """SkpoTrainer's own methods around stand-ins for everything that needs a process or a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, queue: Queue, ranks: int, **skpo: Any) -> None:
        from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

        from recipe.skpo.trainer.skpo import SkpoTrainer

        self.settings = SkpoSettings(group_size=GROUP, initial_length=40, trees_per_step=0, **skpo)
        self.queue, self.ids, self.kl_sums = queue, [""], (0.0, 0.0, 0, 0)
        self.real = cast(Any, object.__new__(SkpoTrainer))
        self.real.settings, self.real.state = self.settings, SkpoState(self.settings, BUDGET)
        self.real.use_critic, self.real.global_steps = False, 0
        self.real.tokenizer = SimpleNamespace(eos_token_id=1)
        counts = {"generated": 1, "prefilled": 1, "cached": 0}
        self.real.agent_loop_manager = SimpleNamespace(take_tokens=lambda: counts, take_failures=dict)
        self.real.actor_rollout_wg = SimpleNamespace(
            _dispatch_info={"actor": list(range(ranks))}, compute_log_prob=self.compute_log_prob
        )
        self.real.config = OmegaConf.create(
            {
                "data": {"train_batch_size": BATCH},
                "trainer": {"critic_warmup": 0},
                "algorithm": {"adv_estimator": "skpo", "rollout_correction": {"rollout_is": None}},
                "actor_rollout_ref": {
                    "actor": {"ppo_mini_batch_size": PER_UPDATE},
                    "rollout": {"n": GROUP + 1, "temperature": 1.0, "calculate_log_probs": True},
                },
            }
        )
        self.real.trees = SimpleNamespace(write=lambda *rest: None)
        monkeypatch.setattr(PPOTrainerSync, "_fetch_one_gen_batch", lambda trainer: self.prompts())
        monkeypatch.setattr(PPOTrainerSync, "_update_actor", lambda trainer, *rest: self.update_actor(*rest))

    def prompts(self) -> TensorDict:
        """verl's batch of the next prompts."""
        return TensorDict({"id": NonTensorStack.from_list([NonTensorData(key) for key in self.ids])}, len(self.ids))

    def compute_log_prob(self, rows: Any) -> None:
        """verl's forward over stored rows: position j scores token j + 1."""
        for key in rows.keys:
            ids = self.queue.rows[key]["input_ids"].tolist()
            scores = [actor_log_prob(self.real.global_steps, *pair) for pair in pairwise(ids)]
            self.queue.rows[key]["log_probs"] = torch.tensor([*scores, 9.0])

    def update_actor(self, batch: Any, metrics: dict) -> Any:
        """verl's update reports the sums of the loss."""
        up_kl, down_kl, up_tokens, down_tokens = self.kl_sums
        metrics["actor/skpo/loss"] = 0.0
        for name, kl, tokens in (("upstream", up_kl, up_tokens), ("downstream", down_kl, down_tokens)):
            metrics |= {f"actor/skpo/{name}/{part}_sum": 0.0 for part in ("loss", "clipped_low", "clipped_high")}
            metrics |= {f"actor/skpo/{name}/kl_sum": kl, f"actor/skpo/{name}/tokens_sum": tokens}
        return batch


def expected_rows(run: ReferenceRun, visits: list[Visit], settings: SkpoSettings) -> Iterator[tuple[str, float, float]]:
    """Key, advantage and loss weight of every row that is trained in this step, before its trackers move."""
    counted = [visit for visit in visits if visit.siblings]
    baselines = [run.baseline(visit.prompt_id) for visit in counted]
    upstream = reference_single_stream([visit.reward for visit in counted], baselines, [True] * len(counted))
    for number, visit in enumerate(counted):
        # Prompts that were stored fill the updates in the order of their visits.
        place = visits.index(visit) // PER_UPDATE
        update = [other for other in counted if visits.index(other) // PER_UPDATE == place]
        yield f"{visit.uid}_0_0", upstream[number], settings.weight_up / len(update) / len(visit.segment)
        rewards = [reward for _, _, reward in visit.siblings.values()]
        advantages = reference_group_relative(rewards, [0] * len(rewards), [True] * len(rewards))
        tokens = sum(trained for _, trained, _ in visit.siblings.values())
        share = 1 / (len(update) * tokens)
        if settings.downstream_aggregation == "token_mean":
            share = 1 / sum(trained for other in update for _, trained, _ in other.siblings.values())
        for key, advantage in zip(visit.siblings, advantages, strict=True):
            yield key, advantage, settings.weight_down * share


@pytest.mark.parametrize(
    ("ranks", "drift", "aggregation"),
    [
        (1, "kl_steps", "group_token_mean"),
        (2, "nats", "group_token_mean"),
        (2, "kl_steps", "token_mean"),
        (2, "logratio", "group_token_mean"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_steps_follow_the_reference(
    ranks: int,
    drift: str,
    aggregation: str,
    seed: int,
    queue: Queue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(seed)
    half_life = 0.5 if drift == "logratio" else 3.0
    trainer = Trainer(
        monkeypatch,
        queue,
        ranks,
        weight_up=0.7,
        weight_down=0.3,
        downstream_aggregation=aggregation,
        tracker=TrackerSettings(drift=drift, half_life=half_life),
    )
    real, settings = trainer.real, trainer.settings
    run = ReferenceRun(40.0, 0.875, 0.96, half_life, "kl_steps" if drift == "logratio" else drift)
    stored: dict[str, tuple[list[int], list[float]]] = {}
    for step in range(1, STEPS + 1):
        real.global_steps = step
        # On one rank, where rows stay in the order of visits, a prompt may be twice in a batch.
        names = [f"prompt {number}" for number in rng.choice(9, BATCH, replace=ranks == 1)]
        trainer.ids = names
        prompts = real._fetch_one_gen_batch()
        uids = prompts.get("uid").tolist()
        assert prompts[SEED_FIELD].shape == (BATCH,)
        for name, split in zip(names, prompts[SPLIT_FIELD].tolist(), strict=True):
            assert run.length(name) / 6 - 1 < split <= max(1, run.length(name) / 2)

        # A prompt may be dropped altogether; verl fills the last update up with padding.
        kept = sorted(rng.permutation(BATCH)[: int(rng.integers(BATCH - 2, BATCH + 1))].tolist())
        queue.rows.clear()
        visits = [roll_out(rng, queue, names[index], uids[index], step) for index in kept]
        keys = [str(key) for key in rng.permutation(list(queue.rows))]  # in the order in which they were finished
        batch = queue.batch(keys)
        metrics: dict[str, Any] = {}
        batch = real._balance_batch(batch, metrics)
        assert len(batch) % (PER_UPDATE * (GROUP + 1)) == 0
        expected = {key: (advantage, scale) for key, advantage, scale in expected_rows(run, visits, settings)}
        batch = real._compute_advantage(batch, metrics)

        for key in batch.keys:
            row, (advantage, scale) = queue.rows[key], expected.get(key, (0.0, 0.0))
            assert float(row[WEIGHT_FIELD]) == pytest.approx(scale, rel=TOLERANCE), key
            spread = [advantage * trained for trained in row["response_mask"].tolist()]
            assert row["advantages"].tolist() == pytest.approx(spread, rel=TOLERANCE, abs=1e-5)
        assert set(expected) <= set(batch.keys)

        # What an update may see are the rows of its prompts, wherever the ranks have them.
        per_rank, part = len(batch) // ranks, PER_UPDATE * (GROUP + 1) // ranks
        order = [visit.uid for visit in visits]
        for position, key in enumerate(batch.keys):
            uid = RowKey.parse(key).uid
            if uid in order:
                assert position % per_rank // part == order.index(uid) // PER_UPDATE

        for visit in visits:
            if not visit.siblings:
                continue
            measured = None
            if drift == "logratio" and visit.prompt_id in stored:
                tokens, then = stored[visit.prompt_id]
                sequence = [visit.problem[-1], *tokens]
                now = [actor_log_prob(step, *pair) for pair in pairwise(sequence)]
                measured = sum(abs(a - b) for a, b in zip(then, now, strict=True)) / len(tokens)
            stored[visit.prompt_id] = (visit.segment, visit.segment_old)
            lengths = [written for written, _, _ in visit.siblings.values()]
            run.visit(visit.prompt_id, visit.reward, sum(lengths) / len(lengths), measured)
        assert metrics["skpo/prompts_dropped"] == BATCH - sum(bool(visit.siblings) for visit in visits)

        trainer.kl_sums = (float(rng.exponential(0.5)), float(rng.exponential(0.5)), 40, 160)
        real._update_actor(batch, metrics)
        assert {name for name in metrics if name.startswith("skpo/")} == PROMISED
        run.end_step(sum(trainer.kl_sums[:2]) / 200)
        for number in range(9):
            name = f"prompt {number}"
            assert real.state.baseline(name) == pytest.approx(run.baseline(name), rel=1e-6, abs=1e-6)
            assert real.state.prompts.length(name) == pytest.approx(run.length(name), rel=1e-6)
            assert real.state.prompts.count(name) == pytest.approx(run.count(name), rel=1e-6)
