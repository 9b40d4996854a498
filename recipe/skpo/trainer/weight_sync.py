"""verl's adapter of an actor to its vLLM server, with a time-out.

verl's sender waits without a time-out for the acknowledgement of every bucket, and its receiver sends none when it
fails (verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py): the run would hang.  Here every socket that is
opened during a sync waits for a bounded time, and no longer once the receiver has failed, whose error becomes the
sync's.  ``weight_sync_registration`` registers this class with verl.
"""

from concurrent.futures import Future
from typing import Any

import zmq
from verl.workers.rollout.vllm_rollout import ServerAdapter

from recipe.skpo.errors import describe
from recipe.skpo.isolation.folder import socket_address
from recipe.skpo.trainer.timeouts import HandleWithTimeout, watched_socket

RECEIVE = "update_weights_from_ipc"

_LOST_S = 5.0
"""Seconds in which an acknowledgement must follow the receiver's report of success."""


class ServerAdapterWithTimeout(ServerAdapter):
    """verl's adapter of an actor to its vLLM server; ``rollout.custom.weight_sync_timeout_s`` bounds its waits."""

    receiving: Future | None = None

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
        if reached and not isinstance(self.server_handle, HandleWithTimeout):
            self.server_handle: Any = HandleWithTimeout(self.server_handle, self.timeout_s)
        return reached

    async def _execute_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        result = await super()._execute_method(method, *args, **kwargs)
        if method == RECEIVE:
            # Not awaited by verl before the sender is through, so its failure would never be seen.
            self.receiving = result.answer.future() if result is not None else None
        return result

    async def update_weights(self, weights: Any, *args: Any, **kwargs: Any) -> None:
        """As verl's.

        Raises:
            WeightSyncError: the server failed, or did not acknowledge a bucket or answer a call in time.
        """
        context: Any = zmq.Context.instance()
        before = context._socket_class, dict(context.sockopts)
        self.receiving = None
        # What a context is told holds for the sockets it makes from then on, verl's among them.
        context._socket_class = watched_socket(self.timeout_s, self._failure)
        context.setsockopt(zmq.LINGER, 0)
        try:
            await super().update_weights(weights, *args, **kwargs)
        finally:
            context._socket_class, context.sockopts = before

    def _failure(self, waited: float) -> str | None:
        """Why no acknowledgement will come any more; None while one may."""
        seconds = self.timeout_s
        if self.receiving is None or not self.receiving.done():
            if waited < seconds:
                return None
            late = f"vLLM did not acknowledge weights within skpo.weight_sync_timeout_s={seconds:g} s"
            if self.receiving is None:
                return f"{late}; this rank does not talk to the server itself, see the log of the vLLM process"
            return f"{late}; it has not reported a failure, so it hangs or is slower than that"
        error = self.receiving.exception()
        if error is not None:
            return f"vLLM failed while it received weights: {describe(error)}"
        lost = "vLLM reports that it has received the weights, but its acknowledgement was lost"
        return lost if waited > min(_LOST_S, seconds) else None
