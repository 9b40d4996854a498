"""Continuations from any OpenAI-compatible endpoint: rate-limited, retried, stored as they come.

The key is read from an environment variable and goes into the request header only: it is in no file, and it is taken
out of every error message.  Retries with exponential back-off (``Retry-After`` where the server sends it) are the
``openai`` package's own; every attempt passes the rate limit.  The first request that fails for good stops the rest,
so that a wrong key or an empty account costs one request; what was completed is in the store and is not asked again.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.untrusted import one_line
from recipe.skpo.evaluation.output import AnalysisError, require
from recipe.skpo.evaluation.sampling import Completion, append_completions, read_completions

MODES = ("quote", "prefill")
INSTRUCTION = (
    "{problem}\n\nA solution has been begun below. Continue it from exactly where it stops and finish it, without "
    "repeating what is there, and give the answer in the form that the problem asks for.\n\n{partial}"
)
FREE = tuple(
    f"endpoint.{name}"
    for name in (
        "key_variable",
        "max_tokens_field",
        "samples_per_request",
        "requests_per_minute",
        "concurrency",
        "max_retries",
        "timeout",
        "prompt_price",
        "completion_price",
    )
)
"""What may differ when an interrupted run goes on: no continuation depends on it."""

CHARACTERS_PER_TOKEN = 4.0
"""For the estimate of costs; English text and formulas are near it."""


@dataclass(frozen=True)
class EndpointConfig:
    """Where to ask and how gently.

    Attributes:
        base_url: of the API, such as ``https://host/v1``; without user name or password.
        model: name that the endpoint knows.
        key_variable: name of the environment variable with the key.
        mode: ``quote`` puts the partial response into the user's turn, which every chat endpoint understands;
            ``prefill`` sends it as the beginning of the assistant's turn with vLLM's ``continue_final_message``.
        max_tokens_field: ``max_tokens``, or ``max_completion_tokens`` where the endpoint wants that.
        samples_per_request: choices asked for at once (``n``); 0 takes all of them.
        requests_per_minute: attempts, retries included; 0 sets no limit.
        concurrency: requests at the same time.
        max_retries: of one request, after 408, 409, 429, 5xx and lost connections.
        timeout: seconds of one attempt.
        prompt_price, completion_price: US dollars per million tokens, for the estimate; None where not known.
    """

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    mode: str = "quote"
    max_tokens_field: str = "max_tokens"
    samples_per_request: int = 0
    requests_per_minute: float = 300.0
    concurrency: int = 8
    max_retries: int = 6
    timeout: float = 120.0
    prompt_price: float | None = None
    completion_price: float | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            "--base-url: must be like https://host/v1",
        )
        # It would be written into config.json and shown in errors.
        require(
            parts.username is None and parts.password is None and not parts.query,
            "--base-url: holds a user name, password or query; put the key into the environment variable instead",
        )
        require(bool(self.model), "--evaluator: is empty; give the name that the endpoint knows the model by")
        require(self.mode in MODES, f"--mode: must be one of {', '.join(MODES)}, got {self.mode!r}")
        require(self.samples_per_request >= 0, f"--samples-per-request: must be >= 0, got {self.samples_per_request}")
        require(self.requests_per_minute >= 0, f"--requests-per-minute: must be >= 0, got {self.requests_per_minute}")
        require(self.concurrency >= 1, f"--concurrency: must be >= 1, got {self.concurrency}")
        require(self.max_retries >= 0, f"--max-retries: must be >= 0, got {self.max_retries}")
        require(self.timeout > 0, f"--timeout: must be > 0, got {self.timeout}")


@dataclass(frozen=True)
class ChatRequest:
    """One state to continue from.

    Attributes:
        key: unique and stable, as in ``sampling.Request``.
        messages: the problem's chat.
        partial: beginning of a response; may be empty.
        remaining: characters of the response that are left after it, for the estimate.
        seed: of the request.
    """

    key: str
    messages: tuple[Mapping[str, str], ...]
    partial: str
    remaining: int
    seed: int

    def chat(self, mode: str) -> list[dict[str, str]]:
        """The messages to send."""
        messages = [dict(message) for message in self.messages]
        if not self.partial:
            return messages
        if mode == "prefill":
            return [*messages, {"role": "assistant", "content": self.partial}]
        last = messages[-1]
        asked = INSTRUCTION.format(problem=last["content"], partial=self.partial)
        return [*messages[:-1], {"role": last["role"], "content": asked}]


@dataclass(frozen=True)
class Estimate:
    """What a set of requests will cost.

    Attributes:
        requests: HTTP requests without retries.
        prompt_tokens, completion_tokens: expected numbers, from characters.
        most_completion_tokens: if every continuation runs into its limit.
        cost, most_cost: US dollars; None where prices are not known.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    cost: float | None
    most_cost: float | None

    def __str__(self) -> str:
        price = (
            "cost unknown: give --prompt-price and --completion-price in US dollars per million tokens"
            if self.cost is None
            else f"about {self.cost:.2f} US dollars, at most {self.most_cost:.2f}"
        )
        return (
            f"{self.requests} requests, about {self.prompt_tokens} prompt and {self.completion_tokens} completion "
            f"tokens (at most {self.most_completion_tokens}); {price}"
        )


def estimate(config: EndpointConfig, requests: Sequence[ChatRequest], samples: int, max_tokens: int) -> Estimate:
    """Expected cost at four characters per token; a continuation counts as long as the rest of its response."""
    calls = -(-samples // (config.samples_per_request or samples))
    characters = sum(sum(len(message["content"]) for message in request.chat(config.mode)) for request in requests)
    prompt = round(calls * characters / CHARACTERS_PER_TOKEN)
    expected = round(sum(min(max_tokens, request.remaining / CHARACTERS_PER_TOKEN) for request in requests) * samples)
    most = max_tokens * samples * len(requests)

    def cost(completion: int) -> float | None:
        if config.prompt_price is None or config.completion_price is None:
            return None
        return (prompt * config.prompt_price + completion * config.completion_price) / 1e6

    return Estimate(calls * len(requests), prompt, expected, most, cost(expected), cost(most))


class RateLimit:
    """Spaces attempts evenly: never more than one per interval.

    Args:
        per_minute: attempts; 0 sets no limit.
        clock, sleep: seconds, and how to wait for them.
    """

    def __init__(
        self,
        per_minute: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = 0.0

    async def wait(self, _request: Any = None) -> None:
        """Return when the next attempt may start; called by the HTTP client before each one."""
        now = self._clock()
        start = max(now, self._next)
        # The place is taken before waiting, so that others who ask meanwhile come after it.
        self._next = start + self._interval
        if start > now:
            await self._sleep(start - now)


def read_key(config: EndpointConfig) -> str:
    """The key.

    Raises:
        AnalysisError: the environment variable is not set.
    """
    key = os.environ.get(config.key_variable, "").strip()
    require(
        bool(key), f"--key-variable: the environment variable {config.key_variable} is not set; export the key in it"
    )
    # It goes into a header, which holds nothing else; the HTTP client would answer with a traceback.
    require(
        key.isascii() and key.isprintable() and " " not in key,
        f"--key-variable: the environment variable {config.key_variable} holds characters that no key has; export it "
        f"again, without quotes, blanks and line ends",
    )
    parts = urlsplit(config.base_url)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"note: {config.base_url} is not https, so the key and the prompts can be read on the way")
    return key


async def _complete(
    client: Any, config: EndpointConfig, request: ChatRequest, samples: int, settings: Mapping[str, Any]
) -> list[Completion]:
    """``samples`` continuations; an endpoint that returns fewer choices than asked for is asked again."""
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    body = extra if config.mode == "prefill" and request.partial else None
    found: list[Completion] = []
    while len(found) < samples:
        wanted = min(samples - len(found), config.samples_per_request or samples)
        answer = await client.chat.completions.create(
            model=config.model,
            messages=request.chat(config.mode),
            n=wanted,
            seed=request.seed + len(found),
            extra_body=body,
            **settings,
        )
        choices = list(answer.choices or [])[:wanted]
        require(bool(choices), f"{config.base_url}: an answer without choices; is it an OpenAI-compatible endpoint?")
        found += [Completion((), choice.message.content or "", choice.finish_reason or "") for choice in choices]
    return found


async def _ask_all(
    config: EndpointConfig,
    requests: Sequence[ChatRequest],
    store: Path,
    key: str,
    samples: int,
    settings: Mapping[str, Any],
) -> None:
    import openai

    limit = RateLimit(config.requests_per_minute)
    places = asyncio.Semaphore(config.concurrency)
    async with openai.AsyncOpenAI(
        api_key=key,
        base_url=config.base_url,
        max_retries=config.max_retries,
        timeout=config.timeout,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [limit.wait]}),
    ) as client:
        done = 0

        async def ask(request: ChatRequest) -> None:
            nonlocal done
            async with places:
                completions = await _complete(client, config, request, samples, settings)
            append_completions(store, {request.key: completions})
            done += 1
            if done % 100 == 0 or done == len(requests):
                print(f"{store.name}: {done} of {len(requests)} states continued")

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(ask(request))


def ask_stored(
    config: EndpointConfig,
    requests: Sequence[ChatRequest],
    store: Path,
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    confirm: Callable[[Estimate], None],
) -> dict[str, list[Completion]]:
    """Continuations of all requests, from the store where they are there.

    Args:
        config: where to ask.
        requests: with distinct keys.
        store: JSON lines, appended to after every completed request.
        samples: K, continuations per request.
        temperature, top_p, max_tokens: of each continuation.
        confirm: called with the estimate of what is missing before anything is sent; raises to stop.

    Returns:
        Completions by key.

    Raises:
        AnalysisError: no key, or a request failed for good; the message says how many are stored.
    """
    stored = read_completions(store)
    missing = [request for request in requests if len(stored.get(request.key, ())) != samples]
    if missing:
        key = read_key(config)
        confirm(estimate(config, missing, samples, max_tokens))
        settings = {"temperature": temperature, "top_p": top_p, config.max_tokens_field: max_tokens}
        import openai

        try:
            asyncio.run(_ask_all(config, missing, store, key, samples, settings))
        except ExceptionGroup as failures:
            first = failures.exceptions[0]
            if not isinstance(first, openai.OpenAIError | AnalysisError):
                raise
            reason = one_line(f"{type(first).__name__}: {first}".replace(key, "***"))
            done = sum(len(read_completions(store).get(request.key, ())) == samples for request in requests)
            raise AnalysisError(
                f"{config.base_url}: {reason}; {done} of {len(requests)} states are in {store}, run the same command "
                f"to go on"
            ) from None
        stored = read_completions(store)
    return {request.key: stored[request.key] for request in requests}
