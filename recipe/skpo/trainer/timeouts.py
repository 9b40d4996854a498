"""verl's replay buffer with an end to its waiting, and to training on what few prompts are left.

verl's polls until every prompt of a batch has ended, for ever if a worker died with some of them, and hands on whatever
was stored.  This one stops the run, and says why, when no prompt ends for too long, and when more prompts were dropped
than ``skpo.max_dropped_share`` allows.  Both hold for training and validation, for every method.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from recipe.skpo.errors import RunError
from recipe.skpo.method.rows import RowKey
from recipe.skpo.rollout.worker import stop_reason

_GRACE_S = 60.0
"""What storing rows and telling verl of a prompt's end may take beyond the prompt's own time limit."""

_SHOWN = 3
_NO_ROWS = "no materializable trajectories"


class BatchError(RunError):
    """A batch that does not arrive, or of which too little does; the message says how much is missing and why."""


class BoundedReplayBuffer(ReplayBuffer):
    """A replay buffer of verl's that gives up.

    Args:
        buffer: verl's own, taken over as verl built it.
        prompt_timeout_s: seconds after which a prompt that was not stored has been dropped.
        max_dropped_share: largest share of a batch's prompts that may be missing, inside [0, 1).
        causes: what failed since the step began, to its count.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        prompt_timeout_s: float,
        max_dropped_share: float,
        causes: Callable[[], Mapping[str, int]],
    ) -> None:
        # verl gives its constructor arguments that depend on a handful of options; the result is the same.
        self.__dict__.update(vars(buffer))
        self.patience_s = prompt_timeout_s + _GRACE_S
        self.max_dropped_share = max_dropped_share
        self.causes = causes
        self._ended, self._since = -1, 0.0

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """As verl's.

        Raises:
            BatchError: no prompt ended for the time limit of a prompt and a minute, or too many were dropped.
        """
        self._ended, self._since = -1, time.monotonic()
        where = f"{'validation' if partition_id == 'val' else 'training'} at step {global_steps}"
        try:
            batch, metrics = super().sample(global_steps, partition_id, batch_size)
        except RuntimeError as error:
            if _NO_ROWS not in str(error):
                raise
            raise BatchError(f"{where}: all {batch_size} prompts were dropped; {self._why()}") from error
        kept = len({RowKey.parse(key).uid for key in batch.keys})
        dropped = batch_size - kept
        if not kept or dropped > self.max_dropped_share * batch_size:
            raise BatchError(
                f"{where}: {dropped} of {batch_size} prompts were dropped, more than "
                f"skpo.max_dropped_share={self.max_dropped_share:g} allows; {self._why()}"
            )
        return batch, metrics

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        ended = len(self.finished_keys[partition_id]) + len(self.failure_keys[partition_id])
        if ended != self._ended:
            self._ended, self._since = ended, time.monotonic()
        elif time.monotonic() - self._since > self.patience_s:
            waiting = len(self.pending_keys[partition_id]) + len(self.running_keys[partition_id])
            raise BatchError(
                f"no prompt has ended for {self.patience_s:.0f} s (skpo.prompt_timeout_s and a minute) and "
                f"{waiting} still run: the server, the reward function or a rollout worker hangs or has died; "
                f"{self._why()}"
            )
        return super()._wait_for_next_poll(partition_id, last_debug_time)

    def _why(self) -> str:
        """The most frequent causes, for a message."""
        try:
            causes = sorted(self.causes().items(), key=lambda item: -item[1])
        except Exception as error:  # process border: a worker that cannot be asked must not hide what is being reported
            return f"a rollout worker does not answer ({type(error).__name__}: {str(error).splitlines()[:1]})"
        stop = stop_reason(cause for cause, _ in causes)
        if stop is not None:
            return stop
        if not causes:
            return "the rollout workers report no failure; see their log"
        return "causes: " + "; ".join(f"{count} x {cause}" for cause, count in causes[:_SHOWN])
