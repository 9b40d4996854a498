"""vLLM's HTTP server answers nobody who has not the key of its process."""

from typing import Any

import pytest

from recipe.skpo.isolation.http_guard import OPEN_PATHS, RequireKey


async def ask(scope: dict[str, Any]) -> Any:
    """Status or close code that the guard sends itself, or "served" where the request reaches the server."""
    sent: list[dict[str, Any]] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"served": True})

    async def send(message: Any) -> None:
        sent.append(message)

    await RequireKey(server)({"headers": [], **scope}, None, send)  # type: ignore[arg-type]
    return "served" if "served" in sent[0] else sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/load_lora_adapter", "/invocations", "/metrics", "/openapi.json", "/"]
)
async def test_no_path_is_answered_without_the_key(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "right")
    for value in (None, b"", b"Bearer ", b"Bearer wrong", b"right", b"bearer right", b"Bearer right2", b"\xff"):
        headers = [] if value is None else [(b"authorization", value)]
        assert await ask({"type": "http", "path": path, "headers": headers}) == 401
    assert await ask({"type": "http", "path": path, "headers": [(b"authorization", b"Bearer right")]}) == "served"
    assert await ask({"type": "websocket", "path": path}) == 1008
    assert await ask({"type": "lifespan"}) == "served"


async def test_prometheus_may_read_the_metrics_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "right")
    monkeypatch.setenv(OPEN_PATHS, "/metrics")
    assert await ask({"type": "http", "path": "/metrics"}) == "served"
    assert await ask({"type": "http", "path": "/metrics/x"}) == 401
    assert await ask({"type": "http", "path": ""}) == 401
