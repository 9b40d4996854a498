"""The methods SKPO is compared with, on the same prompts, budget, state and logging (docs/method.md, section 14).

``BaselineTrainer`` leaves advantages and objective to verl; which ones is the business of ``config/method/*.yaml``.
``SpoTrainer`` is Single-stream Policy Optimization (arXiv 2509.13232) on our tracker: one response per prompt and G
times as many prompts, advantage R - V_before normalised over the batch, no warm-up of the tracker; the objective is
verl's clipped surrogate.  Every response counts as ``downstream`` in the metrics.
"""

from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer

from recipe.skpo.method.advantage import single_stream_advantage
from recipe.skpo.method.loss import DOWNSTREAM
from recipe.skpo.output.metrics import rollout_metrics
from recipe.skpo.trainer.base import BaseTrainer


@register_trainer("skpo_baseline")
class BaselineTrainer(BaseTrainer):
    """verl's own estimators and losses, logged like SKPO."""

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        batch = super()._balance_batch(batch, *args, **kwargs)
        # The responses to one q share it as SKPO's do, or a comparison would flatter SKPO.
        return self._order_by_prompt(batch) if self.shares_prompts else batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        data = self._rows(batch, ["advantages"])
        # One value per row: every token of a response has the advantage of the response.
        advantages = torch.stack([row.sum() / max(1, int((row != 0).sum())) for row in data["advantages"].unbind()])
        self._log_rollout(batch, data, advantages, metrics)
        return batch

    def _rows(self, batch: KVBatchMeta, more: list[str]) -> TensorDict:
        fields = ["id", "uid", "response_mask", "rm_scores", "extra_fields", "old_log_probs", *more]
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            fields.append("rollout_log_probs")
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)

    def _log_rollout(self, batch: KVBatchMeta, data: TensorDict, advantages: torch.Tensor, metrics: dict) -> None:
        lengths = torch.stack([mask.sum() for mask in data["response_mask"].unbind()])
        uids = data.get("uid").tolist()
        number = {uid: index for index, uid in enumerate(dict.fromkeys(uids))}
        cached = [int(extra.get("num_cached_tokens") or 0) for extra in data.get("extra_fields").tolist()]
        records = [
            {"generated": int(tag["response_len"]), "prefilled": int(tag["prompt_len"]), "cached": hits}
            for tag, hits in zip(batch.tags, cached, strict=True)
        ]
        valid = self._valid(batch)
        rewards = torch.stack([scores.sum() for scores in data["rm_scores"].unbind()])
        metrics.update(
            rollout_metrics(
                torch.full((len(batch),), DOWNSTREAM),
                torch.tensor([number[uid] for uid in uids]),
                valid,
                rewards,
                advantages,
                lengths,
                records,
            )
        )
        if "rollout_log_probs" in data:
            self._check_logprob_gap(data, valid, metrics)
        prompts = {uid for uid, counts in zip(uids, valid.tolist(), strict=True) if counts}
        metrics["skpo/prompts_dropped"] = self.config.data.train_batch_size - len(prompts)

    def _valid(self, batch: KVBatchMeta) -> torch.Tensor:
        return torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])


@register_trainer("skpo_spo")
class SpoTrainer(BaselineTrainer):
    """SPO: a per-prompt tracker in place of a group."""

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        data = self._rows(batch, ["responses"])
        valid = self._valid(batch)
        ids = [str(prompt_id) for prompt_id in data.get("id").tolist()]
        rewards = torch.stack([scores.sum() for scores in data["rm_scores"].unbind()])
        rows = valid.nonzero().flatten().tolist()
        own_ids = [ids[row] for row in rows]

        # Every baseline is read before any tracker moves.
        baselines = torch.zeros_like(rewards)
        for row in rows:
            baselines[row] = self.state.baseline(ids[row])
        advantages = single_stream_advantage(rewards, baselines, valid)
        measured = self._log_ratios(batch, rows, own_ids)
        lengths = [len(response) for response in data["responses"].unbind()]
        drifts = [
            self.state.observe(ids[row], float(rewards[row]), lengths[row], measured.get(ids[row])) for row in rows
        ]
        self._store_segments(own_ids, *([data[name][row] for row in rows] for name in ("responses", "old_log_probs")))

        self._log_rollout(batch, data, advantages, metrics)
        metrics.update(self._tracker_metrics(own_ids, baselines[rows], drifts))
        masks = data["response_mask"].unbind()
        per_token = [value * mask.to(advantages.dtype) for value, mask in zip(advantages, masks, strict=True)]
        nested = torch.nested.as_nested_tensor(per_token, layout=torch.jagged)
        output = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        # verl's estimate of KL(pi_old || pi) may be below 0, which the clock counts as 0.
        self.state.clock.advance(float(metrics.get("actor/ppo_kl", 0.0)))
        return batch
