"""Weights to vLLM with a bound on every wait for its answer.

verl's sender waits without a time-out for the acknowledgement of every bucket, and its receiver sends none when it
fails (verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py): the run would stand still for good.  Here every
socket that is opened during a sync gets a time-out, and what vLLM says about its failure becomes the error.  So does
every call to the server around it, such as the one that wakes it up: a server may be alive and hang.

Importing ``recipe.skpo.weight_sync_registration`` (``model.external_lib``) puts this class in place of verl's.
"""

import asyncio
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import zmq
from verl.workers.rollout.vllm_rollout import ServerAdapter

from recipe.skpo.bounds import answer_within
from recipe.skpo.isolation.folder import socket_address

RECEIVE = "update_weights_from_ipc"
_TELL_S = 10.0
"""Seconds that vLLM gets to tell why it did not answer."""


class WeightSyncError(RuntimeError):
    """Weights did not reach the inference server; the message says why, where that is known."""


class BoundedHandle:
    """A server's Ray handle that waits for no answer longer than ``seconds``, counted from when it is awaited."""

    def __init__(self, handle: Any, seconds: float) -> None:
        self._handle, self._seconds = handle, seconds

    def __getattr__(self, method: str) -> "_BoundedMethod":
        return _BoundedMethod(method, getattr(self._handle, method), self._seconds)


@dataclass(frozen=True)
class _BoundedMethod:
    name: str
    method: Any
    seconds: float

    def remote(self, *args: Any, **kwargs: Any) -> "_BoundedAnswer":
        return _BoundedAnswer(self.name, self.method.remote(*args, **kwargs), self.seconds)


@dataclass(frozen=True)
class _BoundedAnswer:
    name: str
    answer: Any
    seconds: float

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        error = WeightSyncError(f"vLLM did not answer {self.name} within skpo.weight_sync_timeout_s={self.seconds:g} s")
        async with answer_within(self.seconds, error):
            return await self.answer


class BoundedServerAdapter(ServerAdapter):
    """verl's adapter of an actor to its vLLM server; ``rollout.custom.weight_sync_timeout_s`` bounds its waits."""

    receiving: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Where ``isolation.receiver`` looks for it.
        self.zmq_handle = socket_address(self.zmq_handle)

    @property
    def timeout_s(self) -> float:
        """Seconds within which the server must have answered."""
        return float(self.config.custom["weight_sync_timeout_s"])

    def _ensure_server_handle(self) -> bool:
        reached = super()._ensure_server_handle()
        if reached and not isinstance(self.server_handle, BoundedHandle):
            self.server_handle: Any = BoundedHandle(self.server_handle, self.timeout_s)
        return reached

    async def _execute_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        result = await super()._execute_method(method, *args, **kwargs)
        if method == RECEIVE:
            # Not awaited by verl before the sender is through, so its failure would never be seen.
            self.receiving = result
        return result

    async def update_weights(self, weights: Any, *args: Any, **kwargs: Any) -> None:
        """As verl's.

        Raises:
            WeightSyncError: the server did not acknowledge a bucket, or answer a call, in time.
        """
        seconds = self.timeout_s
        context: Any = zmq.Context.instance()
        before = dict(context.sockopts)
        # What a context is told holds for the sockets it makes from then on, verl's among them.
        for option in (zmq.RCVTIMEO, zmq.SNDTIMEO):
            context.setsockopt(option, int(seconds * 1000))
        context.setsockopt(zmq.LINGER, 0)
        try:
            await super().update_weights(weights, *args, **kwargs)
        except zmq.Again as error:
            raise WeightSyncError(
                f"vLLM did not acknowledge weights within skpo.weight_sync_timeout_s={seconds:g} s: {await self._why()}"
            ) from error
        finally:
            context.sockopts = before

    async def _why(self) -> str:
        if self.receiving is None:
            return "this rank does not talk to the server itself; see the log of the vLLM process"
        try:
            await asyncio.wait_for(self.receiving, _TELL_S)
        except TimeoutError:
            return "it has not reported a failure, so it hangs or is slower than that"
        except Exception as error:  # process border: whatever vLLM reports is what has to be shown
            return f"{type(error).__name__}: {error}"
        return "it reports success, so an answer was lost"
