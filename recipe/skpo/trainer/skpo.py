"""The SKPO trainer: advantages, trackers and the objective of one step.

On top of ``base``, per step: after the old log-probs are known, baselines are read, both advantages and every
row's share of the objective are written, the trackers are updated (docs/method.md, sections 6 to 9).  The update
reports how far the policy moved.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.config import omega_conf_to_dataclass

from recipe.skpo.errors import ConfigError
from recipe.skpo.method.loss_weights import loss_weights
from recipe.skpo.method.rows import PHASE_FIELD, Rows, Transcript
from recipe.skpo.output.collapse import skip_gap
from recipe.skpo.output.metrics import read_steps, signal_metrics, update_metrics
from recipe.skpo.output.trees import rollout_tree, sample_rows
from recipe.skpo.trainer.base import EFFORT, BaseTrainer
from recipe.skpo.trainer.objective import skpo_loss


@register_trainer("skpo")
class SkpoTrainer(BaseTrainer):
    """SKPO's advantages, objective and trackers."""

    keeps_prompts_together = True

    def on_init_end(self) -> None:
        """Give the actor SKPO's loss."""
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(skpo_loss, config=actor))
        super().on_init_end()

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        rows = self._read(batch, PHASE_FIELD)
        baselines = self._baselines(rows, rows.segments)
        shares = self._signal_shares(rows, baselines, metrics)
        advantages = self._advantages(rows, baselines) * shares
        weights = loss_weights(rows, self._updates(rows), *self._objective)
        importance = self._importance_weights(rows, metrics)
        drifts = self._observe(batch, rows, rows.segments)
        self._log_rollout(rows, advantages, metrics)
        self._log_trackers(rows, rows.segments, baselines, drifts, metrics)
        self._require_boundaries(metrics)
        self._write_trees(batch, rows, advantages, baselines)
        columns = rows.write_back(advantages, weights)
        columns |= self._polarised(rows, columns["advantages"], metrics)
        return self._write_back(batch, columns | importance)

    def _signal_shares(self, rows: Rows, baselines: torch.Tensor, metrics: dict) -> torch.Tensor | float:
        """Measure signal and noise of the segments' rewards; return the factor of each row's advantage.

        Returns:
            float32 (rows,), 1 on responses; 1.0 without ``upstream.shrinkage``.
        """
        segments = rows.segments
        if self.settings.upstream_reward != "mc" or not segments:
            return 1.0
        squares = np.array([self.state.prompts.squares(rows.prompt_ids[row]) for row in segments])
        rewards, before = (column[segments].double().numpy() for column in (rows.rewards, baselines))
        self.state.signal.observe(rewards, before, squares, rows.reward_noise()[segments].numpy())
        metrics.update(signal_metrics(self.state.signal))
        if not self.settings.upstream.shrinkage:
            return 1.0
        shares = torch.ones_like(rows.rewards)
        shares[segments] = torch.from_numpy(self.state.signal.shares(squares)).to(shares.dtype)
        metrics["skpo/upstream/shrinkage/mean"] = float(shares[segments].mean())
        return shares

    def _validate(self) -> dict[str, float]:
        metrics: dict[str, float] = super()._validate()
        steps = {line["step"]: line for line in read_steps(self.metrics_path)}
        if self.step_metrics:  # of a step that is validated before it is logged
            steps[self.global_steps] = steps.get(self.global_steps, {}) | self.step_metrics
        gap = skip_gap(list(steps.values()), metrics)
        return metrics if gap is None else metrics | {"skpo/validation/skip_gap": gap}

    @property
    def _objective(self) -> tuple[float, float, str]:
        """Weights of both objectives, aggregation of the downstream tokens."""
        return self.settings.weight_up, self.settings.weight_down, self.settings.downstream_aggregation

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        prefix = "actor/"  # which verl puts before every metric of the actor
        names = [name for name in metrics if name.startswith(f"{prefix}skpo/")]
        shares, policy_kl = update_metrics({name.removeprefix(prefix): metrics.pop(name) for name in names})
        metrics.update(shares)
        self.state.clock.advance(policy_kl)
        return batch

    def _require_boundaries(self, metrics: Mapping[str, Any]) -> None:
        """Stop a launch whose first step has no boundary: it would go on as the adaptive split.

        Raises:
            ConfigError: naming the boundaries.
        """
        first = self.global_steps == self.resumed_at + 1
        if first and self.settings.split == "boundary_token" and metrics.get("skpo/upstream/boundary_share") == 0:
            raise ConfigError(
                f"skpo.boundaries: none of {self.settings.boundaries} is in any candidate of step {self.global_steps}, "
                f"so that skpo.split=boundary_token cuts as skpo.split=adaptive does; name what the model writes"
            )

    def _write_trees(self, batch: KVBatchMeta, rows: Rows, advantages: torch.Tensor, baselines: torch.Tensor) -> None:
        """Store the rollout trees of a sample of this step's prompts."""
        trees = []
        for segment in sample_rows(rows.segments, self.settings.trees_per_step, self.settings.seed, self.global_steps):
            columns = tq.kv_batch_get(
                keys=[batch.keys[row] for row in rows.siblings(segment)],
                partition_id=batch.partition_id,
                select_fields=list(Transcript.FIELDS),
            )
            story = Transcript.read(columns)
            trees.append(rollout_tree(self.global_steps, rows, segment, advantages, baselines, story, self._decode))
        with EFFORT.attempt("trees", OSError):
            self.trees.write(self.global_steps, trees)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
