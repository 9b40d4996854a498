"""Continuations from any OpenAI-compatible endpoint: rate-limited, retried, stored as they come.

The key is read from an environment variable and goes into the request header only: it is in no file, and it is taken
out of every error message.  Retries with exponential back-off (``Retry-After`` if the server sends it) are the
``openai`` package's own.  The first request that fails for good stops the rest, so that a wrong key or an empty account
costs one request; completed requests are in the store and are not sent again.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.untrusted import one_line
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.options import check_options, option, require
from recipe.skpo.evaluation.sampling import Completion, append_completions, read_completions

INSTRUCTION = (
    "{problem}\n\nA solution has been begun below. Continue it from exactly where it stops and finish it, without "
    "repeating what is there, and give the answer in the form that the problem asks for.\n\n{partial}"
)
CHARACTERS_PER_TOKEN = 4.0
"""For the estimate of costs; English text and formulas are near it."""


@dataclass(frozen=True)
class EndpointConfig:
    """Where to ask and how gently; each option's help says what it is."""

    base_url: str
    model: str
    key_variable: str = option("OPENAI_API_KEY", "environment variable with the key")
    mode: str = option(
        "quote",
        "quote puts the partial response into the user's turn (any endpoint); prefill makes it the beginning of the "
        "assistant's (vLLM's continue_final_message)",
        choices=("quote", "prefill"),
    )
    max_tokens_field: str = option("max_tokens", "or max_completion_tokens if the endpoint wants that")
    samples_per_request: int = option(0, "choices requested at once (n); 0: all of them", least=0)
    requests_per_minute: float = option(300.0, "attempts, retries included; 0: no limit", least=0)
    concurrency: int = option(8, "requests at the same time", least=1)
    max_retries: int = option(6, "of one request, after 408, 409, 429, 5xx and lost connections", least=0)
    timeout: float = option(120.0, "seconds of one attempt")
    prompt_price: float | None = option(None, "US dollars per million prompt tokens, for the estimate")
    completion_price: float | None = option(None, "US dollars per million completion tokens, for the estimate")

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        require(parts.scheme in ("http", "https") and bool(parts.hostname), "--base-url: must be like https://host/v1")
        # It would be written into config.json and shown in errors.
        require(
            parts.username is None and parts.password is None and not parts.query,
            "--base-url: holds a user name, password or query; put the key into the environment variable instead",
        )
        require(bool(self.model), "--evaluator: is empty; give the name that the endpoint knows the model by")
        require(self.timeout > 0, f"--timeout: must be > 0, got {self.timeout}")
        check_options(self)


FREE = tuple(
    f"endpoint.{name}" for name in EndpointConfig.__dataclass_fields__ if name not in ("base_url", "model", "mode")
)
"""What may differ when an interrupted run resumes: no continuation depends on it."""


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
        """Return the messages to send."""
        messages = [dict(message) for message in self.messages]
        if not self.partial:
            return messages
        if mode == "prefill":
            return [*messages, {"role": "assistant", "content": self.partial}]
        last = messages[-1]
        quoted = INSTRUCTION.format(problem=last["content"], partial=self.partial)
        return [*messages[:-1], {"role": last["role"], "content": quoted}]


def estimate(config: EndpointConfig, requests: Sequence[ChatRequest], samples: int, max_tokens: int) -> str:
    """Say what requests will cost, retries not counted; a continuation counts as long as the rest of its response."""
    calls = -(-samples // (config.samples_per_request or samples))
    characters = sum(sum(len(message["content"]) for message in request.chat(config.mode)) for request in requests)
    prompt = round(calls * characters / CHARACTERS_PER_TOKEN)
    expected = round(sum(min(max_tokens, request.remaining / CHARACTERS_PER_TOKEN) for request in requests) * samples)
    most = max_tokens * samples * len(requests)
    price = "cost unknown: give --prompt-price and --completion-price in US dollars per million tokens"
    if config.prompt_price is not None and config.completion_price is not None:
        low, high = (
            (prompt * config.prompt_price + tokens * config.completion_price) / 1e6 for tokens in (expected, most)
        )
        price = f"about {low:.2f} US dollars, at most {high:.2f}"
    return (
        f"{calls * len(requests)} requests, about {prompt} prompt and {expected} completion tokens (at most {most}); "
        f"{price}"
    )


def read_key(config: EndpointConfig) -> str:
    """Read the key.

    Raises:
        ConfigError: the environment variable is not set, or holds what no key has.
    """
    where = f"--key-variable: the environment variable {config.key_variable}"
    key = os.environ.get(config.key_variable, "").strip()
    require(bool(key), f"{where} is not set; export the key in it")
    # It goes into a header, which holds nothing else; the HTTP client would answer with a traceback.
    require(
        key.isascii() and key.isprintable() and " " not in key,
        f"{where} holds characters that no key has; export it again, without quotes, blanks and line ends",
    )
    parts = urlsplit(config.base_url)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"note: {config.base_url} is not https, so the key and the prompts can be read on the way")
    return key


def paced(per_minute: float) -> Callable[[Any], Any]:
    """Return a hook for the HTTP client that starts attempts evenly, at most ``per_minute``; 0 sets no limit."""
    interval, following = (60.0 / per_minute if per_minute else 0.0), 0.0

    async def wait(_request: Any) -> None:
        nonlocal following
        now = time.monotonic()
        start = max(now, following)
        # Taken before waiting, so that others who ask meanwhile come after it.
        following = start + interval
        if start > now:
            await asyncio.sleep(start - now)

    return wait


async def _complete(
    client: Any, config: EndpointConfig, request: ChatRequest, samples: int, settings: Mapping[str, Any]
) -> list[Completion]:
    """Ask for ``samples`` continuations, again if the endpoint returns fewer choices than requested."""
    body = dict(settings["extra_body"])
    if config.mode == "prefill" and request.partial:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    completions: list[Completion] = []
    while len(completions) < samples:
        count = min(samples - len(completions), config.samples_per_request or samples)
        answer = await client.chat.completions.create(
            model=config.model,
            messages=request.chat(config.mode),
            n=count,
            seed=request.seed + len(completions),
            **{**settings, "extra_body": body},
        )
        choices = list(answer.choices or [])[:count]
        require(bool(choices), f"{config.base_url}: an answer without choices; is it an OpenAI-compatible endpoint?")
        completions += [Completion((), choice.message.content or "", choice.finish_reason or "") for choice in choices]
    return completions


async def _ask_all(
    config: EndpointConfig,
    requests: Sequence[ChatRequest],
    store: Path,
    key: str,
    samples: int,
    settings: Mapping[str, Any],
) -> None:
    import openai

    places = asyncio.Semaphore(config.concurrency)
    async with openai.AsyncOpenAI(
        api_key=key,
        base_url=config.base_url,
        max_retries=config.max_retries,
        timeout=config.timeout,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [paced(config.requests_per_minute)]}),
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
    confirm: Callable[[str], None],
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, list[Completion]]:
    """Return K = ``samples`` continuations of each request by its key, stored ones from the store.

    The store is appended to after every request.  ``confirm`` is called with the estimate of the missing requests
    before anything is sent, and raises to stop.  ``template_options`` are for the endpoint's chat template, in the
    field of vLLM and SGLang.

    Raises:
        ConfigError: no key, or a request failed for good; the message says how many are stored.
    """
    stored = read_completions(store)
    missing = [request for request in requests if len(stored.get(request.key, ())) != samples]
    if missing:
        import openai

        key = read_key(config)
        confirm(estimate(config, missing, samples, max_tokens))
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, config.max_tokens_field: max_tokens}
        settings["extra_body"] = {"chat_template_kwargs": dict(template_options)} if template_options else {}
        try:
            asyncio.run(_ask_all(config, missing, store, key, samples, settings))
        except ExceptionGroup as failures:
            first = failures.exceptions[0]
            if not isinstance(first, openai.OpenAIError | ConfigError):
                raise
            reason = one_line(f"{type(first).__name__}: {first}".replace(key, "***"))
            done = sum(len(read_completions(store).get(request.key, ())) == samples for request in requests)
            raise ConfigError(
                f"{config.base_url}: {reason}; {done} of {len(requests)} states are in {store}, run the same command "
                f"to resume"
            ) from None
        stored = read_completions(store)
    return {request.key: stored[request.key] for request in requests}
