"""An OpenAI-compatible endpoint, by a real HTTP server on this machine that fails when it is told to."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipe.skpo.analysis import implicit_advantage
from recipe.skpo.analysis.endpoint import ChatRequest, EndpointConfig, ask_stored, estimate
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.sampling import Completion, read_completions
from tests.unit.analysis.test_implicit_advantage import row, write

KEY = "sk-very-secret-0123456789"
Answer = tuple[int, dict[str, Any]]


class Endpoint:
    """A chat endpoint; ``script`` maps (number of the request, its body) to status and body, None to the usual one."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Answer | None]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.times.append(time.monotonic())
                    outer.keys.add(self.headers["authorization"])
                assert self.path == "/v1/chat/completions"
                status, answer = outer.script(number, body) or (200, usual(body))
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.send_header("retry-after-ms", "5")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def usual(body: dict[str, Any], choices: int | None = None) -> dict[str, Any]:
    """``n`` continuations that give the answer 2."""
    count = body["n"] if choices is None else choices
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": f"{i}\n#### 2"}}
            for i in range(count)
        ],
    }


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    monkeypatch.setenv("ANALYSIS_KEY", KEY)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    started: list[Endpoint] = []

    def start(script: Callable[[int, dict[str, Any]], Answer | None] = lambda number, body: None) -> Endpoint:
        started.append(Endpoint(script))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.close()


def config(url: str, **changes: Any) -> EndpointConfig:
    values: dict[str, Any] = {"key_variable": "ANALYSIS_KEY", "requests_per_minute": 0, "concurrency": 3}
    return EndpointConfig(url, "judge", **(values | {"max_retries": 3} | changes))


def states(count: int = 6) -> list[ChatRequest]:
    chat = ({"role": "system", "content": "S"}, {"role": "user", "content": "1 + 1?"})
    return [ChatRequest(f"s{n}", chat, "one " * n, 40 - 4 * n, 1000 * n) for n in range(count)]


def ask(setting: EndpointConfig, store: Path, requests: list[ChatRequest] | None = None, samples: int = 4) -> Any:
    return ask_stored(
        setting,
        requests or states(),
        store,
        samples=samples,
        temperature=0.5,
        top_p=0.9,
        max_tokens=32,
        confirm=lambda _: None,
    )


# ---------------------------------------------------------------- what is sent


def test_request_carries_settings_key_and_all_samples_at_once(serve: Any, tmp_path: Path) -> None:
    endpoint = serve()
    found = ask(config(endpoint.url), tmp_path / "c.jsonl")
    assert list(found) == [f"s{n}" for n in range(6)]
    assert found["s1"] == [Completion((), f"{i}\n#### 2", "stop") for i in range(4)]
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert len(endpoint.bodies) == 6
    body = next(body for body in endpoint.bodies if body["seed"] == 2000)
    sent = {"model": "judge", "n": 4, "temperature": 0.5, "top_p": 0.9, "max_tokens": 32}
    assert sent.items() <= body.items()
    assert body["messages"][0] == {"role": "system", "content": "S"}
    asked = body["messages"][1]["content"]
    assert asked.startswith("1 + 1?") and asked.endswith("one one ") and "continue_final_message" not in body
    empty = next(body for body in endpoint.bodies if body["seed"] == 0)
    assert empty["messages"][1]["content"] == "1 + 1?"


def test_prefill_sends_the_partial_response_as_the_assistants(serve: Any, tmp_path: Path) -> None:
    endpoint = serve()
    ask(config(endpoint.url, mode="prefill", max_tokens_field="max_completion_tokens"), tmp_path / "c.jsonl")
    by_seed = {body["seed"]: body for body in endpoint.bodies}
    assert by_seed[1000]["messages"][-1] == {"role": "assistant", "content": "one "}
    assert by_seed[1000]["continue_final_message"] is True and by_seed[1000]["add_generation_prompt"] is False
    assert by_seed[0]["messages"][-1]["role"] == "user" and "continue_final_message" not in by_seed[0]
    assert by_seed[0]["max_completion_tokens"] == 32 and "max_tokens" not in by_seed[0]


@pytest.mark.parametrize("mode", ["quote", "prefill"])
def test_options_of_the_chat_template_are_sent(serve: Any, tmp_path: Path, mode: str) -> None:
    endpoint = serve()
    options = {"enable_thinking": False}
    asked = {"samples": 4, "temperature": 0.5, "top_p": 0.9, "max_tokens": 32, "confirm": lambda _: None}
    ask_stored(config(endpoint.url, mode=mode), states(2), tmp_path / "c.jsonl", **asked, template_options=options)
    assert [body["chat_template_kwargs"] for body in endpoint.bodies] == [options] * 2
    assert sum("continue_final_message" in body for body in endpoint.bodies) == (mode == "prefill")


@pytest.mark.parametrize(
    ("returned", "most", "asked"),
    [(1, 0, [(3, 0), (2, 1), (1, 2)]), (None, 2, [(2, 0), (1, 2)])],
    ids=["the endpoint returns fewer", "samples_per_request"],
)
def test_what_one_request_does_not_give_the_next_ones_do_with_other_seeds(
    serve: Any, tmp_path: Path, returned: int | None, most: int, asked: list[tuple[int, int]]
) -> None:
    endpoint = serve(lambda number, body: (200, usual(body, choices=returned)))
    found = ask(config(endpoint.url, samples_per_request=most), tmp_path / "c.jsonl", states(1), samples=3)
    assert len(found["s0"]) == 3
    assert [(body["n"], body["seed"]) for body in endpoint.bodies] == asked


# ---------------------------------------------------------------- failures


def test_rate_limits_and_server_errors_are_retried(serve: Any, tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> Answer | None:
        return {0: (429, {"error": {"message": "slow down"}}), 2: (500, {"error": {}}), 3: (503, {})}.get(number)

    endpoint = serve(script)
    found = ask(config(endpoint.url), tmp_path / "c.jsonl")
    assert all(len(completions) == 4 for completions in found.values())
    assert len(endpoint.bodies) == 6 + 3


def test_retries_are_bounded_and_what_was_completed_stays(serve: Any, tmp_path: Path) -> None:
    broken = [True]

    def script(number: int, body: dict[str, Any]) -> Answer | None:
        return (429, {"error": {"message": "quota"}}) if body["seed"] == 3000 and broken[0] else None

    endpoint = serve(script)
    store = tmp_path / "c.jsonl"
    setting = config(endpoint.url, max_retries=2, concurrency=1)
    with pytest.raises(ConfigError, match=r"quota.*; 3 of 6 states are in .*c\.jsonl"):
        ask(setting, store)
    assert sum(body["seed"] == 3000 for body in endpoint.bodies) == 1 + 2
    assert set(read_completions(store)) == {"s0", "s1", "s2"}
    broken[0] = False
    asked = len(endpoint.bodies)
    ask(setting, store)
    assert [body["seed"] for body in endpoint.bodies[asked:]] == [3000, 4000, 5000]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), r"Incorrect API key provided: \*\*\*"),
        ((200, {"choices": []}), "without choices"),
    ],
)
def test_first_failure_for_good_stops_the_rest_and_no_message_has_the_key(
    serve: Any, tmp_path: Path, answer: Answer, message: str
) -> None:
    endpoint = serve(lambda number, body: answer)
    with pytest.raises(ConfigError, match=message) as caught:
        ask(config(endpoint.url, concurrency=1), tmp_path / "c.jsonl")
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert len(endpoint.bodies) == 1


def test_endpoint_or_key_that_is_not_there_is_one_line(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = serve()
    endpoint.close()
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1.*0 of 6 states"):
        ask(config(endpoint.url, max_retries=0), tmp_path / "c.jsonl")
    monkeypatch.delenv("ANALYSIS_KEY")
    with pytest.raises(ConfigError, match="environment variable ANALYSIS_KEY is not set"):
        ask(config(endpoint.url), tmp_path / "c.jsonl")


# ---------------------------------------------------------------- rate


def test_every_attempt_passes_the_rate_limit(serve: Any, tmp_path: Path) -> None:
    """Three requests of which one is retried: four attempts, 0.1 s apart."""
    endpoint = serve(lambda number, body: (429, {}) if number == 0 else None)
    began = time.monotonic()
    ask(config(endpoint.url, requests_per_minute=600), tmp_path / "c.jsonl", states(3))
    assert len(endpoint.times) == 4
    assert endpoint.times[-1] - began >= 0.3


# ---------------------------------------------------------------- cost


def test_estimate_counts_requests_tokens_and_dollars() -> None:
    requests = [ChatRequest("a", ({"role": "user", "content": "x" * 400},), "", 80, 0)]
    setting = config("http://h/v1", prompt_price=2000.0, completion_price=10000.0)
    found = estimate(setting, requests, samples=8, max_tokens=50)
    # 100 prompt tokens, 20 tokens left of the response, 8 times.
    price = f"about {(100 * 2000 + 160 * 10000) / 1e6:.2f} US dollars, at most {(100 * 2000 + 400 * 10000) / 1e6:.2f}"
    assert found == f"1 requests, about 100 prompt and 160 completion tokens (at most 400); {price}"
    split = estimate(config("http://h/v1", samples_per_request=3), requests, samples=8, max_tokens=10)
    assert split.startswith("3 requests, about 300 prompt and 80 completion tokens") and "--prompt-price" in split


# ---------------------------------------------------------------- the command


def command(url: str, folder: Path, *more: str) -> list[str]:
    path = write(folder / "r.jsonl", [row("a"), row("b", response="it is #### 2")])
    flags = ["measure", "--responses", str(path), "--base-url", url, "--evaluator", "judge", "--positions", "4"]
    flags += ["--samples", "2", "--max-tokens", "16", "--key-variable", "ANALYSIS_KEY", "--requests-per-minute", "0"]
    return [*flags, "--out", str(folder / "out"), *more]


@pytest.mark.parametrize(("typed", "sent"), [("y", 7), ("", 0), ("no", 0), (None, 0)])
def test_command_sends_nothing_before_a_person_agrees(
    serve: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed: str | None,
    sent: int,
) -> None:
    endpoint = serve()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: typed is not None))
    monkeypatch.setattr("builtins.input", lambda _: typed)
    assert implicit_advantage.main(command(endpoint.url, tmp_path)) == (0 if sent else 1)
    said = capsys.readouterr()
    assert "estimate: 7 requests" in said.out and len(endpoint.bodies) == sent
    assert said.err.startswith("error: --yes") == (typed is None)


def test_command_writes_no_key_anywhere_and_a_second_run_sends_nothing(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = serve()
    assert implicit_advantage.main(command(endpoint.url, tmp_path, "--yes")) == 0
    sent = len(endpoint.bodies)
    assert sent == 7  # the empty beginning is one state for both methods
    for path in (tmp_path / "out").iterdir():
        assert KEY.encode() not in path.read_bytes(), path
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    monkeypatch.delenv("ANALYSIS_KEY")
    assert implicit_advantage.main(command(endpoint.url, tmp_path, "--concurrency", "2")) == 0
    assert len(endpoint.bodies) == sent
    assert implicit_advantage.main([*command(endpoint.url, tmp_path, "--yes"), "--evaluator", "other"]) == 1
    assert "endpoint.model='judge', now it is 'other'" in capsys.readouterr().err


def test_killed_command_resumes_and_ends_as_one_that_was_not(serve: Any, tmp_path: Path) -> None:
    """SIGKILL after three answers; the fourth hangs until then."""
    hanging, release = threading.Event(), threading.Event()

    def script(number: int, body: dict[str, Any]) -> Answer | None:
        if number == 3:
            hanging.set()
            release.wait(280)
        return None

    endpoint = serve(script)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    flags = command(endpoint.url, tmp_path / "killed", "--yes", "--concurrency", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "recipe.skpo.analysis.implicit_advantage", *flags], stdout=subprocess.DEVNULL
    )
    try:
        assert hanging.wait(240)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        release.set()
    store = tmp_path / "killed/out/continuations.jsonl"
    assert len(read_completions(store)) == 3
    # As if the kill had come in the middle of a line.
    with store.open("a") as file:
        file.write('{"key": "half a li')
    before = len(endpoint.bodies)
    assert implicit_advantage.main(flags) == 0
    assert len(endpoint.bodies) - before == 7 - 3
    assert implicit_advantage.main(command(endpoint.url, tmp_path / "whole", "--yes")) == 0
    for name in ("by_position.csv", "implicit_advantage.json", "implicit_advantage.png"):
        assert (tmp_path / "killed/out" / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes()
