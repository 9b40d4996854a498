"""Every time-out around verl: the replay buffer, the rollout servers, the weight sync.

verl's ``ReplayBuffer`` polls until every prompt in the batch has finished; if a worker dies, it polls forever.  Its
calls to a rollout server, and its sender of weights, have no time-out either.  The classes here stop the run instead,
and say what did not answer.  Time limits of single prompts are in ``rollout.worker``.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import zmq
from transfer_queue import KVBatchMeta
from verl.checkpoint_engine import CheckpointEngineManager
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.ray_utils import auto_await

from recipe.skpo.errors import RunError
from recipe.skpo.method.rows import RowKey
from recipe.skpo.rollout.failures import RolloutError, stop_reason

_GRACE_S = 60.0
"""What storing rows and telling verl of a prompt's end may take beyond the prompt's own time limit."""

_SHOWN = 3
_NO_ROWS = "no materializable trajectories"

_LOOK_MS = 200
"""Milliseconds between two looks at the receiver, while a socket waits for it."""


@asynccontextmanager
async def answer_within(seconds: float, error: Exception) -> AsyncIterator[None]:
    """Wait no longer than ``seconds`` for what is awaited inside.

    Raises:
        Exception: ``error``, when the time is over.  A TimeoutError of what is awaited passes as it is.
    """
    try:
        async with asyncio.timeout(seconds) as bound:
            yield
    except TimeoutError as timeout:
        if not bound.expired():
            raise
        raise error from timeout


# ---------------------------------------------------------------- batches


class BatchError(RunError):
    """A batch that does not arrive, or of which too little does; the message says how much is missing and why."""


class ReplayBufferWithTimeout(ReplayBuffer):
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
        """Return the most frequent causes, for a message."""
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


# ---------------------------------------------------------------- rollout servers


class CheckpointManagerWithTimeout(CheckpointEngineManager):
    """A manager of verl's that gives up on a server that does not fall asleep.

    Args:
        manager: verl's own, taken over as verl built it.
        timeout_s: seconds within which every server must have answered.
    """

    def __init__(self, manager: CheckpointEngineManager, timeout_s: float) -> None:
        self.__dict__.update(vars(manager))
        self.timeout_s = timeout_s

    @auto_await
    async def sleep_replicas(self) -> Any:
        """As verl's.

        Raises:
            RolloutError: a server did not answer in time.
        """
        error = RolloutError(
            f"a rollout server is alive and has not answered within skpo.weight_sync_timeout_s={self.timeout_s:g} s"
        )
        async with answer_within(self.timeout_s, error):
            await super().sleep_replicas()


# ---------------------------------------------------------------- weights


class WeightSyncError(RunError):
    """Weights did not reach the inference server; the message says why, where that is known."""


class HandleWithTimeout:
    """A server's Ray handle that waits for no answer longer than ``seconds``, counted from when it is awaited."""

    def __init__(self, handle: Any, seconds: float) -> None:
        self._handle, self._seconds = handle, seconds

    def __getattr__(self, method: str) -> "_Method":
        return _Method(method, getattr(self._handle, method), self._seconds)


@dataclass(frozen=True)
class _Method:
    name: str
    method: Any
    seconds: float

    def remote(self, *args: Any, **kwargs: Any) -> "_Answer":
        return _Answer(self.name, self.method.remote(*args, **kwargs), self.seconds)


@dataclass(frozen=True)
class _Answer:
    name: str
    answer: Any
    seconds: float

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        error = WeightSyncError(f"vLLM did not answer {self.name} within skpo.weight_sync_timeout_s={self.seconds:g} s")
        async with answer_within(self.seconds, error):
            return await self.answer


def watched_socket(seconds: float, failure: Callable[[float], str | None]) -> type[zmq.Socket]:
    """Return a class of sockets whose waits end as soon as ``failure`` gives a reason.

    Args:
        seconds: after which ``failure`` gives one in any case.
        failure: takes the seconds that have been waited.
    """

    class WatchedSocket(zmq.Socket):
        """Raises WeightSyncError where another would wait on."""

        def recv(self, *args: Any, **kwargs: Any) -> Any:
            self._wait_for(zmq.POLLIN)
            return super().recv(*args, **kwargs)

        def send(self, *args: Any, **kwargs: Any) -> Any:
            self._wait_for(zmq.POLLOUT)
            return super().send(*args, **kwargs)

        def _wait_for(self, event: int) -> None:
            started = time.monotonic()
            while not self.poll(_LOOK_MS, event):
                reason = failure(time.monotonic() - started)
                if reason is not None:
                    raise WeightSyncError(reason)

    return WatchedSocket
