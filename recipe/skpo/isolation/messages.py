"""TransferQueue's messages, signed: a message without this run's key is refused before it is decoded.

TransferQueue unpickles everything that reaches its ports (transfer_queue/utils/serial_utils.py:419), so a stranger who
reached one could run code.  ``encode`` and ``decode`` there, through which every message of every process goes, get
one frame more: an HMAC-SHA256 over the others.  The servers answer a refused message with an error, log one line, and
continue.

The key is random per run.  It lies in the store of Ray's own server, which gives it to those who may run code in the
cluster anyway: no file, variable or log has it.  Nothing is encrypted, and who can record a run's traffic on a network
can send a recorded message again.
"""

import functools
import hmac
import os
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from recipe.skpo.cpu.override import FunctionOverride
from recipe.skpo.isolation.folder import VARIABLE

_NAMESPACE = "skpo_isolation"
_QUEUE = {"name": "TransferQueueController", "namespace": "transfer_queue"}
_WAIT_S = 30.0
"""Seconds in which the queue of a run that has just ended goes away."""


class MessageRefused(ValueError):
    """A message without a signature of this run."""


def create_key() -> None:
    """Make the run's key and store it in the Ray cluster; once per run, before the queue starts.

    Raises:
        RuntimeError: another run's queue is in this cluster.  verl would use it for both runs.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            ray.get_actor(**_QUEUE)
        except ValueError:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(
                "another verl run is using this Ray cluster, and the two would share one TransferQueue: wait until it "
                "has ended, or give this run a cluster of its own (ray_kwargs.ray_init.address=local)"
            )
        time.sleep(1)
    _internal_kv_put(os.environ[VARIABLE], secrets.token_bytes(32), overwrite=False, namespace=_NAMESPACE)


def stored_key() -> bytes:
    """Return the run's key from the Ray cluster that this process belongs to.

    Raises:
        RuntimeError: there is none yet.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    key = _internal_kv_get(os.environ[VARIABLE], namespace=_NAMESPACE)
    if not key:
        raise RuntimeError("this run has no key for TransferQueue; start it by recipe.skpo.main")
    return key


def install(key: Callable[[], bytes] = stored_key) -> None:
    """Sign and check every message of this process from now on; ``key`` is called at the first one.

    Raises:
        OverrideError: TransferQueue does not look as it did when this was written.
    """
    signature = _Signature(key)

    def signing(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def encode(obj: Any) -> list[Any]:
            frames = original(obj)
            return [*frames, signature.of(frames)]

        return encode

    def checking(original: Callable[..., Any]) -> Callable[..., Any]:
        def decode(frames: Sequence[Any]) -> Any:
            *content, given = frames
            if not content or not hmac.compare_digest(bytes(given), signature.of(content)):
                raise MessageRefused("not signed with this run's key, so it was not decoded")
            return original(content)

        return decode

    for function, parameter, wrap in (("encode", "obj", signing), ("decode", "frames", checking)):
        FunctionOverride(
            module="transfer_queue.utils.serial_utils",
            function=function,
            parameters=(parameter,),
            place=f"transfer_queue/utils/serial_utils.py: {function} of TransferQueue 0.1.11",
            wrap=wrap,
            active=lambda: True,
        ).install()


def bind_to_loopback() -> None:
    """Let the queue's servers of this process listen on 127.0.0.1: where the run has one node, nobody else calls."""
    FunctionOverride(
        module="transfer_queue.utils.zmq_utils",
        function="get_node_ip_address",
        parameters=(),
        place="transfer_queue/utils/zmq_utils.py: get_node_ip_address of TransferQueue 0.1.11",
        wrap=lambda original: lambda: "127.0.0.1",
        active=lambda: True,
    ).install()


class _Signature:
    """HMAC-SHA256 of frames, each after its length, so that no two sequences of frames have the same text."""

    def __init__(self, key: Callable[[], bytes]) -> None:
        self._key = key

    @functools.cached_property
    def _start(self) -> hmac.HMAC:
        return hmac.new(self._key(), digestmod="sha256")

    def of(self, frames: Sequence[Any]) -> bytes:
        mac = self._start.copy()
        for frame in frames:
            view = memoryview(frame)
            mac.update(struct.pack("<Q", view.nbytes))
            mac.update(view)
        return mac.digest()
