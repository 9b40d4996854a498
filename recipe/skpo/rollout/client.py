"""verl's LLM client with counted tokens, checked answers and bounded requests in flight."""

import math
from contextvars import ContextVar
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from recipe.skpo.rollout.admission import AbortingHandle, Admission, Clock
from recipe.skpo.rollout.failures import RolloutError

CLOCK: ContextVar[Clock | None] = ContextVar("skpo_clock", default=None)
"""The clock of the prompt, or of the baseline's response, that this task works on."""

REQUEST_ID: ContextVar[str | None] = ContextVar("skpo_request_id", default=None)
"""Name of the response that this task samples, if verl would give all of them the same name."""


def cached_tokens(output: TokenOutput) -> int:
    """Prompt tokens of a request that came from the server's prefix cache."""
    return int(output.extra_fields.get("num_cached_tokens") or 0)


def invalid_reason(output: TokenOutput, vocabulary: int) -> str | None:
    """Why an answer of the server cannot be used; None for a good one.

    Good are at least one token id within ``[0, vocabulary)`` with one finite log-prob each, of a request that was not
    aborted.
    """
    tokens, logprobs = output.token_ids, output.log_probs or ()
    if not tokens or len(tokens) != len(logprobs):
        return f"{len(tokens)} tokens with {len(logprobs)} log-probs"
    if output.stop_reason == "aborted":
        return f"aborted after {len(tokens)} tokens"
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        return f"token ids from {min(tokens)} to {max(tokens)}, the model has {vocabulary}"
    if not math.isfinite(math.fsum(logprobs)):
        return "a log-prob that is not finite"
    return None


class CheckedLLMClient:
    """verl's LLM client, which counts the tokens of every request, discarded ones included, and checks its answer.

    Requests beyond what the servers run at once wait here, lowest ``priority`` first; the clock of a request's prompt
    starts when the first of them is sent.

    Args:
        client: verl's.
        vocabulary: number of token ids that the model knows.
        slots: requests in flight.
    """

    def __init__(self, client: Any, vocabulary: int, slots: int) -> None:
        self._client, self._vocabulary = client, vocabulary
        self._admission = Admission(slots)
        if hasattr(client, "_acquire_server"):
            acquire = client._acquire_server

            async def acquire_aborting(*args: Any, **kwargs: Any) -> tuple[str, AbortingHandle]:
                server_id, server = await acquire(*args, **kwargs)
                return server_id, AbortingHandle(server)

            client._acquire_server = acquire_aborting
        self.tokens = {"generated": 0, "prefilled": 0, "cached": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, request_id: str, *, prompt_ids: list[int], **kwargs: Any) -> TokenOutput:
        """As verl's client; prompt tokens and generated ones are added up.

        Raises:
            RolloutError: an answer that cannot be used, see ``invalid_reason``.
        """
        request_id = REQUEST_ID.get() or request_id
        clock = CLOCK.get()
        async with self._admission.slot(kwargs.get("priority") or 0, clock):
            if clock is not None:
                clock.start()
            output = await self._client.generate(request_id=request_id, prompt_ids=prompt_ids, **kwargs)
        self.tokens["generated"] += len(output.token_ids)
        self.tokens["prefilled"] += len(prompt_ids)
        self.tokens["cached"] += cached_tokens(output)
        problem = invalid_reason(output, self._vocabulary)
        if problem is not None:
            raise RolloutError(f"{problem} (stop reason {output.stop_reason})")
        return output
