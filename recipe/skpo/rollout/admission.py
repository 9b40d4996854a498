"""As many requests in flight as the inference servers run at once, and clocks that do not count the wait before.

All prompts of a batch are handed to the rollout workers together.  A time limit that began then would drop the prompts
that waited longest, and those are the short ones, since the longest go first.
"""

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import ray
from omegaconf import DictConfig

_SLACK = 1.25
"""Requests in flight per request that is run: prompts do not spread evenly over the servers."""


def slots_of_worker(config: DictConfig) -> int:
    """Return how many requests one rollout worker may have in flight."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    gpus = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    servers = max(1, trainer.nnodes * trainer.n_gpus_per_node // gpus)
    return math.ceil(_SLACK * servers * rollout.max_num_seqs / rollout.agent.num_workers)


class Admission:
    """So many slots; the lowest priority gets the next free one, in order of arrival among equals.

    Requests of an owner that has had a slot go before those of owners that have not, whatever their priority: its clock
    is running.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: list[tuple[bool, int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()
        self._started: WeakSet[Any] = WeakSet()
        self._of_owner: WeakKeyDictionary[Any, list[tuple[int, int, asyncio.Future[None]]]] = WeakKeyDictionary()

    @asynccontextmanager
    async def slot(self, priority: int = 0, owner: Any = None) -> AsyncIterator[None]:
        """Hold a slot for ``owner``, a prompt's clock for example."""
        if self._free:
            self._free -= 1
        else:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (priority, next(self._arrivals), mine)
            fresh = owner is not None and owner not in self._started
            heapq.heappush(self._waiting, (fresh, *entry))
            if fresh:
                self._of_owner.setdefault(owner, []).append(entry)
            try:
                await mine
            except asyncio.CancelledError:
                if not mine.cancelled():  # it was given a slot in the same moment
                    self._pass_on()
                raise
        if owner is not None and owner not in self._started:
            self._started.add(owner)
            for entry in self._of_owner.pop(owner, []):
                # Beside its old place in the line, which is skipped once this one was served.
                heapq.heappush(self._waiting, (False, *entry))
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            *_, other = heapq.heappop(self._waiting)
            if not other.done():
                other.set_result(None)
                return
        self._free += 1


class Clock:
    """A time limit that starts with the first request that runs.

    Args:
        limit: ``asyncio.timeout(None)``, entered.
        seconds: from the start on; None for no limit.
        until_reward: stop when the first response has its reward.
    """

    def __init__(self, limit: asyncio.Timeout, seconds: float | None, until_reward: bool = False) -> None:
        self._limit, self._seconds, self._until_reward = limit, seconds, until_reward

    def start(self) -> None:
        """Begin to count, unless it has begun."""
        seconds, self._seconds = self._seconds, None
        if seconds is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + seconds)

    def rewarded(self) -> None:
        """Note that a response has its reward."""
        if self._until_reward:
            self._limit.reschedule(None)


class AbortingHandle:
    """A server's Ray handle; a ``generate`` whose caller is cancelled is aborted at the server, too."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    @property
    def generate(self) -> "AbortingHandle":
        """The method, called by ``.remote`` as Ray's."""
        return self

    def remote(self, *args: Any, **kwargs: Any) -> "_Answer":
        """Call ``generate`` at the server."""
        return _Answer(self._handle.generate.remote(*args, **kwargs))


class _Answer:
    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        try:
            return await self._reference
        except asyncio.CancelledError:
            # Cancels the server's task, in which vLLM aborts the request.
            ray.cancel(self._reference)
            raise
