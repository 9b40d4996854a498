"""Faults in a real run: a rollout manager and a reward function that the config names instead of the product's.

Servers: ``FaultyClient`` stands between vLLM's answer and everything that checks it.  Rewards: ``compute_score``.  The
rate is the environment variable ``FAULT_RATE``; draws are seeded by the request, so a run can be repeated.  Each
kind hits that share of requests or rewards; the two that cost a whole time-out hit it per prompt.
"""

import asyncio
import math
import os
import random
from typing import Any

from recipe.skpo.rollout.manager import SkpoAgentLoopManager
from recipe.skpo.rollout.two_phases import SkpoAgentLoopWorker
from tests.e2e import tiny

RATE = float(os.environ.get("FAULT_RATE", "0.02"))
FOREVER = 3600.0
PER_PROMPT = 8
"""Requests, and about as many rewards, of a prompt of the tiny run."""

SERVER = ("error", "empty", "token out of range", "log-prob NaN", "log-probs missing", "slow")
REWARD = ("raises", "NaN", "wrong type", "hangs")


def fault(kinds: tuple[str, ...], last: str, seed: str) -> str | None:
    """The fault of one request or reward, None for most; ``last`` is the kind whose rate is per prompt."""
    draw = random.Random(seed).random()
    for kind in kinds:
        share = RATE / PER_PROMPT if kind == last else RATE
        if draw < share:
            return kind
        draw -= share
    return None


class FaultyClient:
    """verl's client, some of whose answers are wrong; training only."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict, **kwargs: Any) -> Any:
        seed = sampling_params.get("seed")
        kind = None if seed is None else fault(SERVER, "slow", f"{seed} {len(prompt_ids)}")
        if kind == "error":
            raise ConnectionError("injected: the server failed")
        if kind == "slow":
            await asyncio.sleep(FOREVER)
        output = await self._client.generate(
            request_id=request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs
        )
        if kind == "empty":
            output.token_ids, output.log_probs = [], []
        elif kind == "token out of range":
            output.token_ids = [*output.token_ids[:-1], 10**6]
        elif kind == "log-prob NaN":
            output.log_probs = [*output.log_probs[:-1], math.nan]
        elif kind == "log-probs missing":
            output.log_probs = output.log_probs[:-1]
        return output


class FaultyWorker(SkpoAgentLoopWorker):
    """The product's worker over a client that fails."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.llm_client._client = FaultyClient(self.llm_client._client)


class FaultyManager(SkpoAgentLoopManager):
    """Named by ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``."""

    worker_class = FaultyWorker


async def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs: Any
) -> Any:
    """The tiny run's reward, some of whose answers are wrong; training only."""
    given = extra_info or {}
    # An empty response is what the start-up check tries.
    faulty = given.get("split") == "train" and solution_str
    kind = fault(REWARD, "hangs", f"{given.get('question')} {solution_str}") if faulty else None
    if kind == "raises":
        raise ValueError("injected: the reward function failed")
    if kind == "NaN":
        return math.nan
    if kind == "wrong type":
        return "right"
    if kind == "hangs":
        await asyncio.sleep(FOREVER)
    return tiny.compute_score(data_source, solution_str, ground_truth)


def overrides() -> list[str]:
    """What makes a run of ``tiny`` a faulty one."""
    return [
        "actor_rollout_ref.rollout.agent.agent_loop_manager_class=tests.e2e.injected.FaultyManager",
        f"reward.custom_reward_function.path={os.path.abspath(__file__)}",
    ]
