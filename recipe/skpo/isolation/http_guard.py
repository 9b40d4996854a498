"""ASGI middleware for vLLM's HTTP server: no path is answered without the key of the process.

verl starts that server on the node's address, and nobody in a run calls it: rollouts go through Ray.  vLLM's own
VLLM_API_KEY guards what begins with /v1 alone.  ``worker.set_up`` gives every process a random one, unless the user has
set it; vLLM imports this class by name (``--middleware``).
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN_PATHS = "SKPO_OPEN_PATHS"
"""Paths that need no key, separated by commas: /metrics, where the user has Prometheus read it."""

Message = MutableMapping[str, Any]


class RequireKey:
    """Answer 401, or close a web socket, unless the request bears ``Authorization: Bearer <VLLM_API_KEY>``."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
        self.open_paths = set(filter(None, os.environ.get(OPEN_PATHS, "").split(",")))

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or scope["path"] in self.open_paths or self._bears_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    def _bears_key(self, scope: Message) -> bool:
        return hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self.expected)
