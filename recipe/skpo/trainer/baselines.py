"""The methods SKPO is compared with, on the same prompts, budget, state and logging (docs/method.md, section 14).

``BaselineTrainer`` leaves advantages and objective to verl; which ones is the business of ``config/method/*.yaml``.
``SpoTrainer`` is Single-stream Policy Optimization (arXiv 2509.13232) on our tracker: one response per prompt and G
times as many prompts, advantage R - V_before normalised over the batch, no warm-up of the tracker; the objective is
verl's clipped surrogate.  Every response counts as ``downstream`` in the metrics.
"""

from dataclasses import replace

import torch
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer

import recipe.skpo.trainer.objective  # noqa: F401  registers the estimator of SPO's rows, each with a baseline
from recipe.skpo.method.rows import OUTCOME_FIELDS, Ragged, Rows
from recipe.skpo.trainer.base import BaseTrainer


@register_trainer("skpo_baseline")
class BaselineTrainer(BaseTrainer):
    """verl's own estimators and losses, logged like SKPO."""

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        rows = self._read(batch, *OUTCOME_FIELDS, "advantages")
        # Every trained token has the advantage of its response.
        tokens = rows.tokens["advantages"]
        trained = Ragged((tokens.values != 0).to(torch.int64), tokens.sizes).sums().clamp(min=1)
        self._log_rollout(rows, tokens.sums() / trained, metrics)
        if self.curriculum:
            self._follow_groups(batch, rows, metrics)
        columns = self._polarised(rows, tokens.nested(), metrics)
        return self._write_back(batch, columns) if columns else batch

    def _follow_groups(self, batch: KVBatchMeta, rows: Rows, metrics: dict) -> None:
        """Update every prompt's tracker with the mean reward of its group, as SKPO does with a segment's reward."""
        groups = replace(rows, rewards=rows.mean_rewards().to(rows.rewards.dtype))
        # One row of each prompt; the last one, which is as good as another.
        visited = [*{int(rows.prompts[row]): row for row in rows.valid_mask.nonzero().flatten().tolist()}.values()]
        baselines = self._baselines(rows, visited)
        drifts = self._observe(batch, groups, visited)
        self._log_trackers(rows, visited, baselines, drifts, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        # verl's estimate of KL(pi_old || pi) may be below 0, which the clock counts as 0.
        self.state.clock.advance(float(metrics.get("actor/ppo_kl", 0.0)))
        return batch


@register_trainer("skpo_spo")
class SpoTrainer(BaselineTrainer):
    """Single-stream Policy Optimization: a per-prompt tracker replaces the group."""

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        rows = self._read(batch, *OUTCOME_FIELDS)
        visited = rows.valid_mask.nonzero().flatten().tolist()
        baselines = self._baselines(rows, visited)
        advantages = self._advantages(rows, baselines)
        importance = self._importance_weights(rows, metrics)
        drifts = self._observe(batch, rows, visited)
        self._log_rollout(rows, advantages, metrics)
        self._log_trackers(rows, visited, baselines, drifts, metrics)
        columns = rows.write_back(advantages)
        columns |= self._polarised(rows, columns["advantages"], metrics)
        return self._write_back(batch, columns | importance)
