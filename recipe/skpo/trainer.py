"""The SKPO trainer: the one place where state crosses training steps.

verl's synchronous V1 trainer does everything else.  Per step: split positions and seeds go out with the prompts
(SPEC section 2); after the old log-probs are known, baselines are read, both advantages and every row's share of the
objective are written, the trackers are updated (SPEC sections 4 to 6); the update reports how far the policy moved;
the state is in the checkpoint before verl marks it complete.  docs/verl_seams.md lists every override.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from tensordict import NonTensorData, NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

from recipe.skpo.advantage import skpo_advantage
from recipe.skpo.loss import DOWNSTREAM, UPSTREAM, skpo_loss
from recipe.skpo.metrics import MetricsFile, rollout_metrics, update_metrics
from recipe.skpo.minibatch import counted_rows, minibatch_of_rows, minibatch_order, row_scales
from recipe.skpo.rollout import SEED_FIELD, SPLIT_FIELD
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.state import SkpoState
from recipe.skpo.trees import FOLDER, TreeStore, rollout_tree, sample_rows

logger = logging.getLogger(__name__)

register_adv_est("skpo")(skpo_advantage)


@register_trainer("skpo")
class SkpoTrainer(PPOTrainerSync):
    """verl's synchronous trainer with SKPO's rollout inputs, advantages, objective and state."""

    def __init__(self, config: Any) -> None:
        self.settings = SkpoSettings.from_config(config.skpo)
        self.state = SkpoState(self.settings, config.data.max_response_length)
        self.output_dir = Path(config.output_dir)
        super().__init__(config)

    # ---------------------------------------------------------------- start, checkpoint, logging

    def _build_replay_buffer(self) -> Any:
        # verl compares the mode's name with "sync" in many places; under any other name it would behave as an
        # asynchronous trainer.  The name "skpo" has done its work, choosing this class, by now.
        self.trainer_mode = "sync"
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.settings.poll_interval_s
        return buffer

    def on_init_end(self) -> None:
        loss = partial(skpo_loss, clip_low=self.settings.clip_low, clip_high=self.settings.clip_high)
        self.actor_rollout_wg.set_loss_fn(loss)
        super().on_init_end()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self.resumed_at = self.global_steps
        if self.resumed_at:
            trainer = self.config.trainer
            explicit = trainer.resume_mode == "resume_path"
            folder = trainer.resume_from_path if explicit else self._checkpoint_folder()
            self.state.load(Path(folder))

    def _save_checkpoint(self) -> None:
        # Before verl's part, which ends with the marker file that makes the checkpoint count.
        self.state.save(self._checkpoint_folder())
        super()._save_checkpoint()

    def _checkpoint_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"

    def on_validate_begin(self) -> None:
        self._open_metrics_file()
        super().on_validate_begin()

    def on_train_begin(self) -> None:
        self._open_metrics_file()
        super().on_train_begin()

    def _open_metrics_file(self) -> None:
        # verl builds its loggers inside fit(), so the first hook after that adds ours.
        loggers: dict[str, Any] = self.logger.logger
        if "metrics_file" not in loggers:
            self.trees = TreeStore(self.output_dir / FOLDER, self.settings.trees_max_mb, self.resumed_at)
            loggers["metrics_file"] = MetricsFile(self.output_dir / "metrics.jsonl", self.resumed_at)

    # ---------------------------------------------------------------- prompts out, rows in order

    def _fetch_one_gen_batch(self) -> TensorDict:
        batch = super()._fetch_one_gen_batch()
        visits = [self.state.next_visit(str(prompt_id)) for prompt_id in batch.get("id").tolist()]
        # Our own uid in place of verl's random one, so that rows can be put into the same order run after run.
        # It has no "_", at which verl splits row keys.
        uids = [NonTensorData(f"v{visit.ordinal:010d}") for visit in visits]
        batch["uid"] = NonTensorStack.from_list(uids)
        batch[SPLIT_FIELD] = torch.tensor([visit.split_position for visit in visits])
        batch[SEED_FIELD] = torch.tensor([visit.seed for visit in visits])
        return batch

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        batch = super()._balance_batch(batch, *args, **kwargs)
        # verl's order follows which prompt finished first; sort by visit and session, padding last.
        uids, sessions = zip(*(key.rsplit("_", 2)[:2] for key in batch.keys), strict=True)
        padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
        rank = {uid: index for index, (_, uid) in enumerate(sorted(set(zip(padding, uids, strict=True))))}
        batch.reorder(sorted(range(len(batch)), key=lambda row: (rank[uids[row]], int(sessions[row]))))
        batch.reorder(
            minibatch_order(
                [rank[key.rsplit("_", 2)[0]] for key in batch.keys],
                [int(tag["seq_len"]) for tag in batch.tags],
                self._rows_per_minibatch(),
                self._data_parallel_size(),
                lambda lengths, ranks: get_seqlen_balanced_partitions(lengths, k_partitions=ranks, equal_size=True),
            )
        )
        return batch

    def _rows_per_minibatch(self) -> int:
        return self.config.actor_rollout_ref.actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n

    def _data_parallel_size(self) -> int:
        return max(self.actor_rollout_wg._dispatch_info["actor"]) + 1

    # ---------------------------------------------------------------- advantages, trackers, update

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        log_probs = ["rollout_log_probs", "old_log_probs"]
        fields = ["id", "uid", "skpo_phase", "response_mask", "rm_scores", "extra_fields", *log_probs]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        masks = list(data["response_mask"].unbind())
        lengths = torch.stack([mask.sum() for mask in masks])
        rewards = torch.stack([scores.sum() for scores in data["rm_scores"].unbind()])
        phase = data["skpo_phase"].reshape(-1)
        padding = torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags])
        uids, ids = data.get("uid").tolist(), [str(prompt_id) for prompt_id in data.get("id").tolist()]
        number = {uid: index for index, uid in enumerate(dict.fromkeys(uids))}
        prompts = torch.tensor([number[uid] for uid in uids])
        valid = counted_rows(phase, prompts, padding, lengths)
        segments = (valid & (phase == UPSTREAM)).nonzero().flatten().tolist()

        # Every baseline is read before any tracker moves, also where a prompt is in the batch twice.
        baselines = torch.zeros_like(rewards)
        for row in segments:
            baselines[row] = self.state.baseline(ids[row])
        advantages = get_adv_estimator_fn("skpo")(rewards, baselines, phase, prompts, valid)
        minibatch = minibatch_of_rows(len(batch), self._rows_per_minibatch(), self._data_parallel_size())
        weights = (self.settings.weight_up, self.settings.weight_down)
        scales = row_scales(phase, prompts, minibatch, lengths, valid, *weights)

        siblings = valid & (phase == DOWNSTREAM)
        drifts = []
        for row in segments:
            mean_length = float(lengths[siblings & (prompts == prompts[row])].double().mean())
            drifts.append(self.state.observe(ids[row], float(rewards[row]), mean_length))

        records = [extra.get("skpo") for extra in data.get("extra_fields").tolist()]
        metrics.update(rollout_metrics(phase, prompts, valid, rewards, advantages, lengths, records))
        metrics.update(self._tracker_metrics([ids[row] for row in segments], baselines[segments], drifts))
        gaps = [(data[log_probs[0]][row] - data[log_probs[1]][row]).abs() for row in valid.nonzero().flatten().tolist()]
        metrics["skpo/rollout_actor_logprob_gap/mean"] = float(torch.cat(gaps).mean()) if gaps else 0.0
        metrics["skpo/prompts_dropped"] = self.config.data.train_batch_size - len(segments)
        shown = sample_rows(segments, self.settings.trees_per_step, self.settings.seed, self.global_steps)
        numbers = {"reward": rewards, "advantage": advantages, "baseline": baselines, "length": lengths}
        self._write_trees(batch, [(row, siblings & (prompts == prompts[row])) for row in shown], numbers)

        per_token = [value * mask.to(advantages.dtype) for value, mask in zip(advantages, masks, strict=True)]
        output = {
            # What verl's own metrics read; the loss takes the two per-row fields below.
            "advantages": torch.nested.as_nested_tensor(per_token, layout=torch.jagged),
            "returns": torch.nested.as_nested_tensor(per_token, layout=torch.jagged),
            "skpo_advantage": advantages,
            "skpo_row_scale": scales,
        }
        rows = TensorDict(output, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=rows)

    def _tracker_metrics(
        self, ids: Sequence[str], baselines: torch.Tensor, drifts: Sequence[float]
    ) -> dict[str, float]:
        """Trackers of the prompts of this step, after their update; baselines as they were read."""
        if not ids:
            return {}

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        return {
            "skpo/upstream/baseline/mean": float(baselines.mean()),
            "skpo/tracker/value/mean": mean([self.state.values.value(key) for key in ids]),
            "skpo/tracker/effective_count/mean": mean([self.state.values.count(key) for key in ids]),
            "skpo/tracker/length/mean": mean([self.state.lengths.value(key) for key in ids]),
            "skpo/tracker/drift/mean": mean(drifts),
            "skpo/tracker/prompts_seen": len(self.state.values),
        }

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        prefix = "actor/"  # which verl puts before every metric of the actor
        names = [name for name in metrics if name.startswith(f"{prefix}skpo/")]
        shares, policy_kl = update_metrics({name.removeprefix(prefix): metrics.pop(name) for name in names})
        metrics.update(shares)
        self.state.clock.advance(policy_kl)
        return batch

    # ---------------------------------------------------------------- rollout trees

    def _write_trees(
        self, batch: KVBatchMeta, shown: Sequence[tuple[int, torch.Tensor]], numbers: Mapping[str, torch.Tensor]
    ) -> None:
        """Store rollout trees; ``shown``: row of the segment, mask of its siblings; ``numbers``: name to (rows,)."""

        def decode(token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        fields = ["id", "prompts", "responses", "raw_prompt", "reward_model", "extra_fields"]
        trees = []
        for segment, own in shown:
            rows = [segment, *own.nonzero().flatten().tolist()]
            data = tq.kv_batch_get(
                keys=[batch.keys[row] for row in rows], partition_id=batch.partition_id, select_fields=fields
            )
            extras = data.get("extra_fields").tolist()
            answers = [(extra.get("reward_extra_info") or {}).get("pred") for extra in extras]
            responses = [
                {
                    "text": decode(response.tolist()),
                    "reward": float(numbers["reward"][row]),
                    "advantage": float(numbers["advantage"][row]),
                    "length": int(numbers["length"][row]),
                    "answer": None if answer is None else str(answer),
                }
                for row, response, answer in zip(rows, data["responses"].unbind(), answers, strict=True)
            ]
            trees.append(
                rollout_tree(
                    step=self.global_steps,
                    prompt_id=str(data.get("id").tolist()[0]),
                    problem=data.get("raw_prompt").tolist()[0][-1]["content"],
                    answer=str(data.get("reward_model").tolist()[0]["ground_truth"]),
                    record=extras[0]["skpo"],
                    segment={name: float(numbers[name][segment]) for name in ("reward", "baseline", "advantage")},
                    skip_prompt=decode(data["prompts"].unbind()[1].tolist(), skip_special_tokens=False),
                    responses=responses[1:],
                    decode=decode,
                )
            )
        self.trees.write(self.global_steps, trees)
