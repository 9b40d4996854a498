"""The SKPO trainer: advantages, trackers and the objective of one step.

On top of ``base_trainer``, per step: after the old log-probs are known, baselines are read, both advantages and every
row's share of the objective are written, the trackers are updated (docs/method.md, sections 6 to 9).  The update
reports how far the policy moved.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est
from verl.trainer.ppo.v1.trainer_base import register_trainer

from recipe.skpo.errors import ConfigError
from recipe.skpo.method.advantage import skpo_advantage
from recipe.skpo.method.loss import DOWNSTREAM, UPSTREAM, skpo_loss
from recipe.skpo.method.minibatch import counted_rows, minibatch_of_rows, row_scales
from recipe.skpo.output.metrics import rollout_metrics, update_metrics
from recipe.skpo.output.trees import rollout_tree, sample_rows
from recipe.skpo.trainer.base import EFFORT, BaseTrainer
from recipe.skpo.trainer.logprob_gap import flat

register_adv_est("skpo")(skpo_advantage)


def _row_sums(values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Sum of each row of a flat column, (rows,), in its dtype; no row is empty."""
    starts = (sizes.cumsum(0) - sizes).numpy()
    return torch.from_numpy(np.add.reduceat(values.numpy(), starts))


@register_trainer("skpo")
class SkpoTrainer(BaseTrainer):
    """SKPO's advantages, objective and trackers."""

    def on_init_end(self) -> None:
        loss = partial(skpo_loss, clip_low=self.settings.clip_low, clip_high=self.settings.clip_high)
        self.actor_rollout_wg.set_loss_fn(loss)
        super().on_init_end()

    # ---------------------------------------------------------------- rows in order

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        return self._order_by_prompt(super()._balance_batch(batch, *args, **kwargs))

    # ---------------------------------------------------------------- advantages, trackers, update

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        log_probs = ["rollout_log_probs", "old_log_probs"]
        fields = ["id", "skpo_phase", "responses", "response_mask", "rm_scores", "extra_fields", *log_probs]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        mask, sizes = flat(data["response_mask"])
        lengths = _row_sums(mask, sizes)
        rewards = _row_sums(*flat(data["rm_scores"]))
        phase = data["skpo_phase"].reshape(-1)
        padding = torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags])
        uids = [key.rsplit("_", 2)[0] for key in batch.keys]
        number = {uid: index for index, uid in enumerate(dict.fromkeys(uids))}
        prompts = torch.tensor([number[uid] for uid in uids])
        valid = counted_rows(phase, prompts, padding, lengths)
        segments = (valid & (phase == UPSTREAM)).nonzero().flatten().tolist()
        ids = {row: str(data.get("id")[row].tolist()) for row in segments}

        # Every baseline is read before any tracker moves, also where a prompt is in the batch twice.
        baselines = torch.zeros_like(rewards)
        for row in segments:
            baselines[row] = self.state.baseline(ids[row])
        advantages = get_adv_estimator_fn("skpo")(rewards, baselines, phase, prompts, valid)
        minibatch = minibatch_of_rows(len(batch), self._rows_per_minibatch(), self._data_parallel_size())
        weights = (self.settings.weight_up, self.settings.weight_down)
        aggregation = self.settings.downstream_aggregation
        scales = row_scales(phase, prompts, minibatch, lengths, valid, *weights, aggregation)

        siblings = valid & (phase == DOWNSTREAM)
        # Of the whole response, in which a segment that was not trained may come first (skip=continual).
        written = torch.bincount(prompts, sizes * siblings) / torch.bincount(prompts, siblings.to(torch.float64))
        measured = self._log_ratios(batch, segments, [ids[row] for row in segments])
        drifts = []
        for row in segments:
            mean_length = float(written[prompts[row]])
            drifts.append(self.state.observe(ids[row], float(rewards[row]), mean_length, measured.get(ids[row])))
        if self.settings.tracker.drift == "logratio":
            tokens, then = (data[name].unbind() for name in ("responses", log_probs[1]))
            stored = ([column[row] for row in segments] for column in (tokens, then))
            self._store_segments([ids[row] for row in segments], *stored)

        records = [extra.get("skpo") for extra in data.get("extra_fields").tolist()]
        metrics.update(rollout_metrics(phase, prompts, valid, rewards, advantages, lengths, records))
        self._require_boundaries(metrics)
        metrics.update(self._tracker_metrics([ids[row] for row in segments], baselines[segments], drifts))
        self._check_logprob_gap(data, valid, metrics)
        metrics["skpo/prompts_dropped"] = self.config.data.train_batch_size - len(segments)
        shown = sample_rows(segments, self.settings.trees_per_step, self.settings.seed, self.global_steps)
        if shown:
            numbers = {"reward": rewards, "advantage": advantages, "baseline": baselines, "length": lengths}
            self._write_trees(batch, [(row, siblings & (prompts == prompts[row])) for row in shown], numbers)

        spread = torch.from_numpy(np.repeat(advantages.numpy(), sizes.numpy())).masked_fill_(mask == 0, 0.0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        per_token = torch.nested.nested_tensor_from_jagged(spread, offsets)
        output = {
            # What verl's own metrics read; the loss takes the two per-row fields below.
            "advantages": per_token,
            "returns": per_token,
            "skpo_advantage": advantages,
            "skpo_row_scale": scales,
        }
        written_back = TensorDict(output, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=written_back)

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
        with EFFORT.attempt("trees", OSError):
            self.trees.write(self.global_steps, trees)
