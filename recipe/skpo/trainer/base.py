"""What every method's run shares: state and checkpoints, repeatable batches, prompt choice, token budget, metrics file.

verl's synchronous V1 trainer does everything else.  The methods are ``trainer.SkpoTrainer`` and the baselines of
``baselines``; they differ in rollout, advantages and objective, and in nothing that is here, so their runs can be
compared.  docs/verl_seams.md lists every override of verl.
"""

import json
import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from ray.exceptions import RayActorError
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torchdata.stateful_dataloader import StatefulDataLoader
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.debug import marked_timer
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions, log_seqlen_unbalance
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.utils.tracking import ValidationGenerationsLogger
from verl.workers.utils.padding import response_from_nested, response_to_nested

from data_prep.untrusted import one_line
from recipe.skpo.engine.optimizer import use_own_settings_in_worker
from recipe.skpo.errors import describe
from recipe.skpo.method.curriculum import PrioritisedBatches
from recipe.skpo.method.polarity import reweighted
from recipe.skpo.method.rows import SLOPE_FIELD, WANT_SLOPES, Ragged, RowKey, Rows, visit_columns
from recipe.skpo.output.best import Validations
from recipe.skpo.output.best_effort import BestEffort, BestEffortLogger
from recipe.skpo.output.collapse import CollapseWarning
from recipe.skpo.output.console import say
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.metrics import (
    MetricsFile,
    mean,
    plain_numbers,
    polarity_metrics,
    read_numbers,
    rollout_metrics,
)
from recipe.skpo.output.progress import ProgressLines
from recipe.skpo.output.tree_table import as_block, log_trees, without_markdown
from recipe.skpo.output.trees import FOLDER, TreeStore
from recipe.skpo.rollout.failures import RolloutError, stop_reason
from recipe.skpo.rollout.manager import RolloutManager
from recipe.skpo.settings import PolaritySettings, SkpoSettings
from recipe.skpo.trainer.checkpoints import (
    METRICS_FILE,
    SaveError,
    expected_bytes,
    free_bytes,
    is_whole,
    mark,
    remove_checkpoint,
    remove_older,
)
from recipe.skpo.trainer.dataset import counted_dataset
from recipe.skpo.trainer.fingerprint import Fingerprint, differences, restarts_epoch
from recipe.skpo.trainer.logprob_gap import METRIC as GAP_METRIC
from recipe.skpo.trainer.logprob_gap import allowed_gap, mean_gap
from recipe.skpo.trainer.order import minibatch_of_rows, minibatch_order, prompts_fit_ranks, slots
from recipe.skpo.trainer.state import SkpoState
from recipe.skpo.trainer.timeouts import CheckpointManagerWithTimeout, ReplayBufferWithTimeout

logger = logging.getLogger(__name__)

_MANY = 100_000
"""Prompts above which the memory of their stored segments is warned of."""
_OFTEN = 3
"""Failed visits in a row from which a prompt is named in the log."""
EFFORT = BestEffort()
"""Remembers what of this process's writes has failed."""

_DRIFT_PARTITION = "skpo_drift"
"""TransferQueue partition of the rows whose log-probs only measure drift; empty between two steps."""


class InertGenerations(ValidationGenerationsLogger):
    """verl's ``trainer.log_val_generations``, without markup of a model's in the loggers that render Markdown."""

    def log_generations_to_tensorboard(self, samples: Sequence[tuple[str, str, float]], step: int) -> None:
        """Log prompts and responses as blocks."""
        blocks = [(f"\n\n{as_block(prompt)}", f"\n\n{as_block(text)}", score) for prompt, text, score in samples]
        super().log_generations_to_tensorboard(blocks, step)

    def log_generations_to_trackio(self, samples: Sequence[tuple[str, str, float]], step: int) -> None:
        """Log prompts and responses with escaped markup."""
        escaped = [(without_markdown(prompt), without_markdown(text), score) for prompt, text, score in samples]
        super().log_generations_to_trackio(escaped, step)


class BaseTrainer(PPOTrainerSync):
    """verl's synchronous trainer with the state, order and logging that all methods share."""

    agent_loop_manager: RolloutManager
    resumed_at = 0
    """Step of the checkpoint that was resumed from, 0 for a fresh start."""
    curriculum = False
    allowed_gap: float | None = None
    polarity = PolaritySettings()
    keeps_prompts_together = False
    """Whether an update has to see whole prompts."""
    shares_prompts = False
    """Whether the actor computes a prompt that several rows begin with once, so that its rows must stay together."""
    _rows_together = 1
    """So many consecutive rows belong to one prompt and go into one micro-batch."""
    validations: Validations | None = None
    """The values of ``trainer.keep_best``, None without it."""
    _saved_step = 0
    """Step of the checkpoint that this launch saved last."""
    _visited: Mapping[str, str] = {}
    """uid to id of the prompts that were sent out and have not come back yet."""

    def __init__(self, config: Any) -> None:
        self.settings = SkpoSettings.from_config(config.skpo)
        self.polarity = PolaritySettings.from_config(config.polarity)
        self.state = SkpoState(self.settings, config.data.max_response_length, self.polarity)
        self.allowed_gap = allowed_gap(self.settings.max_logprob_gap, config.actor_rollout_ref.rollout)
        self.output_dir = Path(config.output_dir)
        self.metrics_path = self.output_dir / "metrics.jsonl"
        # Written by the command; it goes into every checkpoint.
        self.fingerprint = Fingerprint.read(self.output_dir)
        self.step_metrics: dict[str, Any] = {}
        self.shares_prompts = bool(config.share_prefixes) and config.packed_attention in ("varlen", "flex")
        self.saved_metrics: dict[str, float] = {}
        # Removed by us: verl's own removal leaves our file behind and forgets what earlier launches wrote.
        self.checkpoints_to_keep: int | None = config.trainer.max_actor_ckpt_to_keep
        with open_dict(config):
            config.trainer.max_actor_ckpt_to_keep = None
        if config.trainer.keep_best:
            self.validations = Validations(config.trainer.keep_best)
        self.curriculum = self.settings.curriculum.enable and "curriculum" in config.method.uses
        super().__init__(config)

    # ---------------------------------------------------------------- start, checkpoint, logging

    def _build_replay_buffer(self) -> Any:
        # verl compares the mode's name with "sync" in many places; under any other name it would behave as an
        # asynchronous trainer.  The name has done its work, choosing this class, by now.
        self.trainer_mode = "sync"
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.settings.poll_interval_s
        # A sampler of the user's own polls as it likes.
        if type(buffer) is not ReplayBuffer:
            return buffer
        limits = (self.settings.prompt_timeout_s, self.settings.max_dropped_share)
        return ReplayBufferWithTimeout(buffer, *limits, lambda: self.agent_loop_manager.take_failures())

    def on_init_end(self) -> None:
        """Bound the wait for replicas that are put to sleep."""
        self.checkpoint_manager = CheckpointManagerWithTimeout(
            self.checkpoint_manager, self.settings.weight_sync_timeout_s
        )
        super().on_init_end()

    def _init_dataloader(self) -> None:
        with counted_dataset(self.config):
            super()._init_dataloader()
        if self.settings.tracker.drift == "logratio":
            prompts = len(self.train_dataset)
            expected = self.state.segments.expected(prompts, self.config.data.max_response_length)
            logger.log(logging.WARNING if prompts > _MANY else logging.INFO, expected)
        if self.curriculum:
            batches = PrioritisedBatches(
                # The whole column at once; row by row takes sixty times as long.
                map(str, self.train_dataset.dataframe["id"][:]),
                self.config.data.train_batch_size,
                self.settings.curriculum.epsilon,
                self.state.prompts,
                lambda: self.state.rng,
                lambda: self.state.failures,
            )
            self.train_dataloader = StatefulDataLoader(
                self.train_dataset, batch_sampler=batches, num_workers=0, collate_fn=collate_fn
            )

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self.resumed_at = self.global_steps
        own = None
        if self.resumed_at:
            trainer = self.config.trainer
            explicit = trainer.resume_mode == "resume_path"
            folder = Path(trainer.resume_from_path) if explicit else self._checkpoint_folder()
            self.state.load(folder)
            self._follow_the_command(Fingerprint.read(folder))
            if (folder / METRICS_FILE).is_file():
                self.saved_metrics = read_numbers(folder / METRICS_FILE)
            own = self.resumed_at if folder.resolve() == self._checkpoint_folder().resolve() else None
        # Later steps are trained again: a marker that still named one of them would make a kill in the middle of
        # saving it again look like a whole checkpoint.
        mark(self._checkpoint_folder().parent, own)

    def _follow_the_command(self, saved: Fingerprint | None) -> None:
        """Restore the command's own settings, which verl's loading has replaced."""
        changed = differences(saved, self.fingerprint) if saved and self.fingerprint else []
        # verl would skip as many rows of other data, and end in an empty StopIteration where there are not so many.
        if restarts_epoch(changed):
            self.train_dataloader.next_iter_state = None
        if any(difference.of_optimizer for difference in changed):
            workers = self.actor_rollout_wg.workers
            rates = ray.get([worker.__ray_call__.remote(use_own_settings_in_worker) for worker in workers])
            logger.info("learning rate of the next update: %s", rates[0])

    def _save_checkpoint(self) -> None:
        folder, keep = self._checkpoint_folder(), self.checkpoints_to_keep
        # What is left of a killed save, or of steps that are trained again.
        remove_checkpoint(folder)
        # Makes room, but never removes the one that the marker names.
        remove_older(folder.parent, self.global_steps - 1, keep and max(1, keep - 1), self.validations)
        what, needed = f"the checkpoint of step {self.global_steps}", expected_bytes(self.config)
        if needed is not None and free_bytes(folder) < needed:
            raise SaveError(f"{what} has no room: {self._room(needed)}; make room")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / METRICS_FILE, json.dumps(plain_numbers(self.step_metrics)))
            if self.fingerprint:
                self.fingerprint.write(folder)
            # Before verl's part, which ends with the marker file that makes the checkpoint count.
            self.state.save(folder)
            super()._save_checkpoint()
        except RayActorError:
            raise
        except Exception as error:  # process border: the actor's ranks write too, and torch has errors of its own
            room = self._room(needed)
            if not is_whole(folder):
                # Half of one is of no use, and takes the room that the next launch needs.
                remove_checkpoint(folder)
            raise SaveError(f"{what} could not be written ({describe(error)}): {room}; make room") from error
        remove_older(folder.parent, self.global_steps, keep, self.validations)
        self._saved_step = self.global_steps

    def _room(self, needed: int | None) -> str:
        """Bytes free where checkpoints are written, and bytes needed, for a message."""
        folder = self._checkpoint_folder().parent
        wanted = f", a checkpoint takes about {needed:,}" if needed is not None else ""
        return f"{folder} has {free_bytes(folder):,} bytes free{wanted}"

    @staticmethod
    def _write_generations(*args: Any, **kwargs: Any) -> None:
        with EFFORT.attempt("trainer.rollout_data_dir or validation_data_dir", OSError):
            PPOTrainerSync._write_generations(*args, **kwargs)

    def _checkpoint_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"

    def on_validate_begin(self) -> None:
        """Open the metrics file before the first validation."""
        self._open_metrics_file()
        super().on_validate_begin()

    def on_validate_end(self) -> None:
        """Log the newest rollout trees, each once."""
        super().on_validate_end()
        log_trees(self.logger.logger, self.trees.latest, self.global_steps, EFFORT)
        self.trees.latest.clear()

    def _maybe_log_val_generations(self, *args: Any, **kwargs: Any) -> None:
        with EFFORT.attempt("trainer.log_val_generations", Exception):
            super()._maybe_log_val_generations(*args, **kwargs)

    def on_train_begin(self) -> None:
        """Open the metrics file before the first step."""
        self._open_metrics_file()
        super().on_train_begin()

    def _open_metrics_file(self) -> None:
        # verl builds its loggers inside fit(), so the first hook after that adds ours.
        loggers: dict[str, Any] = self.logger.logger
        if "metrics_file" not in loggers:
            settings = self.settings
            self.trees = TreeStore(
                self.output_dir / FOLDER, settings.trees_max_mb, self.resumed_at, settings.trees_per_validation
            )
            self.validation_generations_logger = InertGenerations(
                self.config.trainer.project_name, self.config.trainer.experiment_name
            )
            loggers["metrics_file"] = MetricsFile(self.metrics_path, self.resumed_at, self.saved_metrics)
            if self.validations:
                # Those of steps that are trained again are gone by now.
                self.validations.read(self.metrics_path)
            ends_with = self.total_training_steps, OmegaConf.select(self.config, "budget.tokens")
            loggers["progress"] = ProgressLines(*ends_with)
            loggers["collapse"] = CollapseWarning(self.metrics_path)
            for name, backend in loggers.items():
                loggers[name] = BestEffortLogger(name, backend, EFFORT)

    # ---------------------------------------------------------------- prompts out, rows in order

    def on_step_begin(self) -> None:
        """Drop the token and failure counts of validation, which belong to no step."""
        self.agent_loop_manager.take_tokens()
        self.agent_loop_manager.take_failures()
        super().on_step_begin()

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        """Keep the step's metrics for its checkpoint, which verl writes before it logs them."""
        self.step_metrics = metrics
        return super().step(metrics, timing_raw)

    def _fetch_one_gen_batch(self) -> TensorDict:
        batch = super()._fetch_one_gen_batch()
        visits = [self.state.next_visit(str(key), self.global_steps) for key in batch.get("id").tolist()]
        # The visit's uid replaces verl's random one, so that rows have the same order in every run.
        ids = zip(visits, batch.get("id").tolist(), strict=True)
        self._visited = {**self._visited, **{visit.uid: str(prompt_id) for visit, prompt_id in ids}}
        batch["uid"] = NonTensorStack.from_list([NonTensorData(visit.uid) for visit in visits])
        return batch.update(visit_columns(visits))

    def _balance_batch(
        self, batch: KVBatchMeta, metrics: dict, logging_prefix: str = "global_seqlen", keep_minibatch: bool = False
    ) -> KVBatchMeta:
        # Rows arrive in the order in which prompts finished, which no two runs share.
        batch.reorder(sorted(range(len(batch)), key=lambda row: RowKey.parse(batch.keys[row])))
        # Responses that share a prompt are computed together for every method, or a comparison would flatter SKPO.
        if self.keeps_prompts_together or self.shares_prompts:
            multiple = self._get_required_batch_multiple(self._data_parallel_size())
            batch = upsample_batch_to_divisible_size(batch, multiple, self.tokenizer.eos_token_id)
            metrics.update(self._order_by_prompt(batch, logging_prefix))
        else:
            batch = super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)
        self._note_failed_prompts({RowKey.parse(key).uid for key in batch.keys})
        # Every request of the step has been answered by now.
        counts = self.agent_loop_manager.take_tokens()
        self.state.tokens_generated += counts["generated"]
        metrics.update({f"skpo/tokens/{name}": count for name, count in counts.items()})
        metrics["skpo/tokens/generated_so_far"] = self.state.tokens_generated
        failures = self.agent_loop_manager.take_failures()
        stop = stop_reason(failures)
        if stop is not None:
            raise RolloutError(stop)
        requests = [count for cause, count in failures.items() if not cause.startswith("prompt:")]
        metrics["skpo/requests_failed"] = sum(requests)
        if failures:
            logger.warning("failures in step %d: %s", self.global_steps, json.dumps(failures))
        return batch

    def _order_by_prompt(self, batch: KVBatchMeta, prefix: str) -> dict[str, float]:
        """Order the rows such that an update sees whole prompts and, where rows are shared, a rank does too.

        Returns:
            verl's metrics of how many tokens the ranks get, before and after.
        """
        actor = self.config.actor_rollout_ref
        places = slots(
            [RowKey.parse(key).uid for key in batch.keys],
            [bool(tag.get("is_padding", False)) for tag in batch.tags],
            actor.rollout.n,
            actor.actor.ppo_mini_batch_size,
        )
        rows, ranks = self._rows_per_minibatch(), self._data_parallel_size()
        whole = self.shares_prompts and prompts_fit_ranks(places, rows, ranks)
        lengths = [int(tag["seq_len"]) for tag in batch.tags]
        order = minibatch_order(places, lengths, rows, ranks, _balanced, whole)
        batch.reorder(order)
        self._rows_together = actor.rollout.n if whole else 1
        share = len(order) // ranks
        return log_seqlen_unbalance(lengths, [order[at : at + share] for at in range(0, len(order), share)], prefix)

    def _updates(self, rows: Rows) -> torch.Tensor:
        """Return the number of the update that trains each row, int64 (rows,)."""
        return minibatch_of_rows(len(rows), self._rows_per_minibatch(), self._data_parallel_size())

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.extra_info["force_group_size"] = self._rows_together
        batch.extra_info[WANT_SLOPES] = self.polarity.enable
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info[WANT_SLOPES] = False
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.extra_info["force_group_size"] = self._rows_together
        return super()._update_actor(batch, metrics)

    def _rows_per_minibatch(self) -> int:
        return self.config.actor_rollout_ref.actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n

    # ---------------------------------------------------------------- rows of a step

    def _read(self, batch: KVBatchMeta, *fields: str) -> Rows:
        """Fetch and decode the rows of a batch; ``fields`` are those that only some methods need."""
        names = ["id", "extra_fields", "old_log_probs", *fields]
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            names.append("rollout_log_probs")
        if self.settings.tracker.drift == "logratio":
            names.append("responses")
        if self.polarity.enable:
            names += ["entropy", SLOPE_FIELD]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        if self.polarity.enable:
            # verl has cut the old log-probs so.
            data[SLOPE_FIELD] = response_from_nested(data[SLOPE_FIELD], data["old_log_probs"])
        return Rows.read(data, batch.keys, batch.tags)

    def _write_back(self, batch: KVBatchMeta, columns: dict[str, torch.Tensor]) -> KVBatchMeta:
        """Store columns with the rows of a batch."""
        fields = TensorDict(columns, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _baselines(self, rows: Rows, visited: Sequence[int]) -> torch.Tensor:
        """Read the prompts' baselines, float32 (rows,), NaN for all but the ``visited`` rows.

        All are read before any tracker moves, also if a prompt is in the batch twice.
        """
        baselines = torch.full_like(rows.rewards, torch.nan)
        for row in visited:
            baselines[row] = self.state.baseline(rows.prompt_ids[row])
        return baselines

    def _advantages(self, rows: Rows, baselines: torch.Tensor) -> torch.Tensor:
        """Compute the advantage of each row by the estimator that the config names, float32 (rows,).

        Args:
            rows: the batch.
            baselines: float32 (rows,), NaN on rows that are compared with their siblings.
        """
        # Every trained token of a row has its row's advantage, so that one column stands for all of them.
        advantages, _ = get_adv_estimator_fn(self.config.algorithm.adv_estimator)(
            token_level_rewards=rows.rewards.unsqueeze(-1),
            response_mask=rows.valid_mask.unsqueeze(-1),
            index=rows.prompts.numpy(),
            reward_baselines=baselines,
            config=self.config.algorithm,
        )
        return advantages.squeeze(-1)

    def _polarised(self, rows: Rows, advantages: torch.Tensor, metrics: dict) -> dict[str, torch.Tensor]:
        """Reweight the advantages of tokens that expand the entropy against those that contract it.

        Args:
            rows: the whole step.
            advantages: of every token, nested (rows, tokens).
            metrics: gets those below ``skpo/polarity/``.

        Returns:
            The column ``advantages``; nothing if ``polarity`` is off or no token is trained.
        """
        mask = rows.tokens["response_mask"]
        trained = (mask.values != 0) & rows.valid_mask.repeat_interleave(mask.sizes)
        if not self.polarity.enable or not trained.any():
            return {}
        values = Ragged.of(advantages).values.clone()
        before, slopes, entropies = (
            column[trained] for column in (values, rows.tokens[SLOPE_FIELD].values, rows.tokens["entropy"].values)
        )
        trajectory, entropy = self.state.entropy, float(entropies.double().mean())
        target, phase = trajectory.aim, trajectory.phase(entropy)
        values[trained] = reweighted(before, slopes, phase, self.polarity.strength)
        metrics.update(polarity_metrics(before, values[trained], slopes))
        change = trajectory.observe(entropy, metrics["skpo/polarity/predicted_change"])
        found = {
            "entropy": entropy,
            "target": target,
            "phi": phase,
            "entropy_change": change,
            "correlation": trajectory.correlation(),
        }
        metrics.update({f"skpo/polarity/{name}": value for name, value in found.items() if value is not None})
        return {"advantages": Ragged(values, mask.sizes).nested()}

    def _importance_weights(self, rows: Rows, metrics: dict) -> dict[str, torch.Tensor]:
        """Return the column of importance weights, pi_old / pi_rollout per token, if rollout correction is on."""
        options = self.config.algorithm.rollout_correction
        if options.rollout_is is None:
            return {}
        mask = rows.tokens["response_mask"].nested()
        old, rollout, trained = (
            rows.tokens[name].nested().to_padded_tensor(0)
            for name in ("old_log_probs", "rollout_log_probs", "response_mask")
        )
        weights, _, measured = compute_rollout_correction_and_rejection_mask(
            old_log_prob=old,
            rollout_log_prob=rollout,
            response_mask=trained * rows.valid_mask.unsqueeze(-1),
            rollout_is=options.rollout_is,
            rollout_is_threshold=options.rollout_is_threshold,
            rollout_is_batch_normalize=options.rollout_is_batch_normalize,
        )
        assert weights is not None  # as there is a level
        metrics.update(measured)
        return {"rollout_is_weights": response_to_nested(weights.batch["rollout_is_weights"], mask)}

    def _observe(self, batch: KVBatchMeta, rows: Rows, visited: Sequence[int]) -> list[float]:
        """Update the trackers with the ``visited`` rows, one per prompt; return the drift of each."""
        ids = [rows.prompt_ids[row] for row in visited]
        measured = self._log_ratios(batch, visited, ids)
        rewards, lengths = rows.rewards.tolist(), rows.mean_response_lengths().tolist()
        drifts = [
            self.state.observe(prompt_id, rewards[row], lengths[row], measured.get(prompt_id))
            for row, prompt_id in zip(visited, ids, strict=True)
        ]
        if self.settings.tracker.drift == "logratio":
            tokens, log_probs = (rows.tokens[name].split() for name in ("responses", "old_log_probs"))
            for row, prompt_id in zip(visited, ids, strict=True):
                self.state.segments.put(prompt_id, tokens[row], log_probs[row])
        return drifts

    def _log_rollout(self, rows: Rows, advantages: torch.Tensor, metrics: dict) -> None:
        """Add the metrics of the rollout, and check the servers' weights by them."""
        metrics.update(rollout_metrics(rows, advantages))
        kept = rows.prompts[rows.valid_mask].unique().numel()
        metrics["skpo/prompts_dropped"] = self.config.data.train_batch_size - kept
        if "rollout_log_probs" in rows.tokens:
            self._check_logprob_gap(rows, metrics)

    def _check_logprob_gap(self, rows: Rows, metrics: dict) -> None:
        """Log how far rollout and actor are apart on this step's responses.

        Raises:
            RolloutError: so far that the servers cannot have the actor's weights.
        """
        gap = mean_gap(rows.tokens["rollout_log_probs"], rows.tokens["old_log_probs"], rows.valid_mask)
        metrics[GAP_METRIC] = gap
        if self.allowed_gap is not None and not gap <= self.allowed_gap:
            raise RolloutError(
                f"in step {self.global_steps} the log-probs of rollout and actor differ by {gap:.3g} per token on "
                f"average, more than skpo.max_logprob_gap={self.settings.max_logprob_gap:g} allows: the servers "
                f"hardly have the actor's weights; null lifts the limit"
            )

    def _note_failed_prompts(self, trained: Set[str]) -> None:
        """Count the prompts of the step that left no row; prioritised sampling draws them less often."""
        visited, self._visited = self._visited, {}
        if not self.curriculum:
            return
        failing = [key for uid, key in visited.items() if self.state.note_outcome(key, uid in trained) >= _OFTEN]
        if failing:
            logger.warning(
                "step %d: %d prompts have failed in each of their last %d visits or more, and are drawn less often: %s",
                *(self.global_steps, len(failing), _OFTEN, one_line(", ".join(failing))),
            )

    # ---------------------------------------------------------------- drift of the policy

    def _log_ratios(self, batch: KVBatchMeta, rows: Sequence[int], ids: Sequence[str]) -> dict[str, float]:
        """D of ``tracker.drift=logratio`` for prompts seen before, by one forward over what they stored then.

        Args:
            batch: of this step, old log-probs computed.
            rows: one row per prompt whose ``prompts`` field is q.
            ids: prompt id of each of these rows.

        Returns:
            Prompt id to mean abs(log pi_then - log pi_now), in nats per token.
        """
        seen = {key: row for key, row in zip(ids, rows, strict=True) if key in self.state.segments}
        if self.settings.tracker.drift != "logratio" or not seen:
            return {}
        source = tq.kv_batch_get(
            keys=[batch.keys[row] for row in seen.values()], partition_id=batch.partition_id, select_fields=["prompts"]
        )
        # Unbound once: indexing a nested column row by row unbinds it every time.
        prompts = source["prompts"].unbind()
        stored = [
            _with_response(prompt, self.state.segments.get(key)[0]) for key, prompt in zip(seen, prompts, strict=True)
        ]
        # Ranks take equal parts; what is computed twice is not read.
        stored += [stored[-1]] * (-len(stored) % self._data_parallel_size())
        keys = [f"{index}_0_0" for index in range(len(stored))]  # a key per row, in a partition of their own
        lengths = [len(row["input_ids"]) for row in stored]
        tags = [{"seq_len": length, "status": "success"} for length in lengths]
        tq.kv_batch_put(keys=keys, partition_id=_DRIFT_PARTITION, fields=list_of_dict_to_tensordict(stored), tags=tags)
        try:
            options = {
                "calculate_entropy": False,
                "compute_loss": False,
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            }
            rows_meta = KVBatchMeta(partition_id=_DRIFT_PARTITION, keys=keys, tags=tags, extra_info=options)
            self.actor_rollout_wg.compute_log_prob(rows_meta)
            fields = ["log_probs", "response_mask"]
            data = tq.kv_batch_get(keys=keys, partition_id=_DRIFT_PARTITION, select_fields=fields)
            now = response_from_nested(data["log_probs"], data["response_mask"]).unbind()
        finally:
            tq.kv_clear(keys=keys, partition_id=_DRIFT_PARTITION)
        then = {key: torch.from_numpy(self.state.segments.get(key)[1]) for key in seen}
        return {key: float((then[key] - now[index]).abs().mean()) for index, key in enumerate(seen)}

    def _data_parallel_size(self) -> int:
        known = self.actor_rollout_wg._dispatch_info
        if "actor" not in known:
            known["actor"] = self.actor_rollout_wg._query_dispatch_info("actor")
        return max(known["actor"]) + 1

    def _log_trackers(
        self, rows: Rows, visited: Sequence[int], baselines: torch.Tensor, drifts: Sequence[float], metrics: dict
    ) -> None:
        """Add the metrics of the ``visited`` rows' trackers after their update; baselines are those before it."""
        if not visited:
            return
        ids = [rows.prompt_ids[row] for row in visited]
        metrics.update(
            {
                "skpo/upstream/baseline/mean": float(baselines[visited].mean()),
                "skpo/tracker/value/mean": mean(self.state.prompts.value(key) for key in ids),
                "skpo/tracker/effective_count/mean": mean(self.state.prompts.count(key) for key in ids),
                "skpo/tracker/length/mean": mean(self.state.prompts.length(key) for key in ids),
                "skpo/tracker/drift/mean": mean(drifts),
                "skpo/tracker/prompts_seen": len(self.state.prompts),
            }
        )

    # ---------------------------------------------------------------- end

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        if self.validations:
            self.validations.add(self.global_steps, metrics)
            if self._no_gain():
                # verl leaves its loop before the next step, through on_train_end.
                self.total_training_steps = self.global_steps
        return metrics

    def _no_gain(self) -> bool:
        """Whether as many validations as ``trainer.stop_after_no_gain`` says were no better than one before them."""
        limit = self.config.trainer.stop_after_no_gain
        return self.validations is not None and limit is not None and self.validations.without_gain() >= limit

    def _budget_spent(self) -> bool:
        budget = OmegaConf.select(self.config, "budget.tokens")
        return budget is not None and self.state.tokens_generated >= budget

    def on_step_end(self) -> None:
        """Save what validation may find to be the best; end the loop after this step if the token budget is spent."""
        if self._best_may_be_next():
            # Before the weights are synced, as verl saves: the servers sleep.
            with marked_timer("save_checkpoint", self.timing_raw):
                self._save_checkpoint()
        super().on_step_end()
        if self._budget_spent():
            # verl leaves its loop after this step, through on_train_end.
            self.total_training_steps = self.global_steps

    def _best_may_be_next(self) -> bool:
        """Whether a validation follows this step, whose model has no checkpoint yet although the best one is kept."""
        if self.validations is None or self._saved_step == self.global_steps:
            return False
        last = self.global_steps >= self.total_training_steps or self._budget_spent()
        return last or self.global_steps % self.config.trainer.test_freq == 0

    def on_train_end(self) -> None:
        """Save and validate at the last step of a token budget, which verl cannot know beforehand."""
        super().on_train_end()
        if self._no_gain():
            say(f"stopped by trainer.stop_after_no_gain={self.config.trainer.stop_after_no_gain}")
        if self._budget_spent():
            # verl saves and validates in a last step that it knows beforehand.  It has counted on by now.
            self.global_steps -= 1
            if self._due_at_the_end("save_freq") and self._saved_step != self.global_steps:
                self._save_checkpoint()
            if self._due_at_the_end("test_freq"):
                self.on_validate_begin()
                self.logger.log(data=self._validate(), step=self.global_steps)
                self.on_validate_end()

    def _due_at_the_end(self, name: str) -> bool:
        """Whether the last step has yet to do what it does every ``trainer.<name>`` steps; not above 0 means never."""
        frequency = self.config.trainer[name]
        return frequency > 0 and self.global_steps % frequency != 0


def _balanced(lengths: list[int], ranks: int) -> list[list[int]]:
    return get_seqlen_balanced_partitions(lengths, k_partitions=ranks, equal_size=True)


def _with_response(prompt: torch.Tensor, token_ids: np.ndarray) -> dict[str, Any]:
    """Build a row of a prompt's tokens and these response tokens, as the actor's forward pass needs it."""
    responses = torch.from_numpy(token_ids).to(prompt.dtype)
    input_ids = torch.cat([prompt, responses])
    mask = torch.ones_like(responses)
    return {
        "prompts": prompt,
        "responses": responses,
        "input_ids": input_ids,
        "position_ids": torch.arange(len(input_ids)),
        "response_mask": mask,
        "loss_mask": mask,
        "multi_modal_inputs": {},
    }
