"""A cluster of language-model servers without a model: continuous batching, prefix cache and routing in virtual time.

As vLLM 0.28 (v1 scheduler): running sequences decode one token per step; prompts are prefilled in chunks in the same
steps, within a token budget; waiting requests are admitted by priority, then in order, if there are slots and cache
blocks; full blocks of a prompt are shared once they are scheduled, also within one step; at least the last prompt token
is computed; unused blocks are evicted least recently used first.  Left out: preemption (a request is admitted when all
its tokens fit), sharing of generated tokens, speculation.  The clients and the router are verl's own.
"""

import asyncio
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.router import GlobalRequestLoadBalancer

Writer = Callable[[Sequence[int], dict[str, Any]], list[int]]
"""A model: (prompt token ids, sampling parameters) to token ids, cut at ``max_tokens``."""


@dataclass(frozen=True)
class ServerConstants:
    """Speed and size of one replica; the defaults resemble a 7B model in bf16 on one H100 that it shares with training.

    A step takes ``step_seconds`` (reading 15 GB of weights at about 2.7 TB/s, and launching kernels), per decoding
    sequence ``sequence_seconds`` (sampling, scheduling), per token of context that attention reads ``context_seconds``
    (57 kB of keys and values at about 2.7 TB/s), and the prefill of its chunk (15 GFLOP per token at 45% of peak).
    """

    step_seconds: float = 7e-3
    sequence_seconds: float = 2e-5
    context_seconds: float = 2.1e-8
    prefill_tokens_per_second: float = 30_000.0
    request_seconds: float = 2e-3
    slots: int = 256
    batched_tokens: int = 8192
    block_size: int = 16
    cache_tokens: int = 400_000


@dataclass
class _Sequence:
    """One request on a replica; ``computed`` counts prompt tokens whose keys and values exist."""

    hashes: list[int]
    prompt_tokens: int
    to_write: int
    done: asyncio.Future[None]
    cached: int = 0
    computed: int = 0
    shared: list[int] = field(default_factory=list)
    private_blocks: int = 0


class PrefixCache:
    """Blocks of one replica: held by sequences, or idle and evictable."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._held: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0

    def hits(self, hashes: Sequence[int]) -> int:
        """Count the first blocks that are in the cache."""
        return sum(1 for _ in itertools.takewhile(lambda key: key in self._held or key in self._idle, hashes))

    def admit(self, hits: Sequence[int], others: int) -> bool:
        """Hold the ``hits`` and reserve ``others`` more blocks; False, and nothing changes, if they do not fit."""
        woken = sum(key in self._idle for key in hits)
        if len(self._held) + woken + self._private + others > self.blocks:
            return False
        self._private += others
        for key in hits:
            self._hold(key)
        self._evict()
        return True

    def share(self, key: int) -> None:
        """Let others use a reserved block, which is full of prompt tokens."""
        self._private -= 1
        self._hold(key)

    def release(self, shared: Sequence[int], private: int) -> None:
        """End a sequence; its shared blocks become idle once no other holds them, the last ones evicted first."""
        self._private -= private
        for key in reversed(shared):
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                self._idle[key] = None

    def _hold(self, key: int) -> None:
        self._idle.pop(key, None)
        self._held[key] = self._held.get(key, 0) + 1

    def _evict(self) -> None:
        while self._idle and len(self._held) + self._private + len(self._idle) > self.blocks:
            self._idle.popitem(last=False)


class Replica:
    """One server; ``generate`` has the signature of verl's vLLM server."""

    def __init__(self, constants: ServerConstants, write: Writer) -> None:
        self.constants, self.write = constants, write
        self.cache = PrefixCache(constants.cache_tokens // constants.block_size)
        self._waiting: list[tuple[int, int, _Sequence]] = []  # heap by priority and arrival
        self._prefilling: list[_Sequence] = []
        self._decoding: list[tuple[int, int, _Sequence]] = []  # heap by the step of the last token
        self._context = 0
        self._steps = 0
        self._numbers = itertools.count()
        self._arrived = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        priority: int = 0,
        **media: Any,
    ) -> TokenOutput:
        """Return one completion, when it is written; a lower ``priority`` is admitted first."""
        tokens = self.write(prompt_ids, sampling_params)
        await asyncio.sleep(self.constants.request_seconds)
        sequence = _Sequence(
            self._hashes(prompt_ids), len(prompt_ids), len(tokens), asyncio.get_running_loop().create_future()
        )
        heapq.heappush(self._waiting, (priority, next(self._numbers), sequence))
        self._arrived.set()
        await sequence.done
        return TokenOutput(
            token_ids=tokens,
            # Of no interest here but for the choice of a segment: any numbers that differ.
            log_probs=[-(token % 97) / 97 for token in tokens],
            stop_reason="completed",
            extra_fields={"global_steps": 0, "num_cached_tokens": sequence.cached},
        )

    def stop(self) -> None:
        """End the server's task."""
        self._task.cancel()

    def _hashes(self, prompt_ids: list[int]) -> list[int]:
        size, keys, key = self.constants.block_size, [], 0
        for start in range(0, len(prompt_ids) - size + 1, size):
            key = hash((key, *prompt_ids[start : start + size]))
            keys.append(key)
        return keys

    async def _serve(self) -> None:
        while True:
            while not (self._waiting or self._prefilling or self._decoding):
                self._arrived.clear()
                await self._arrived.wait()
            prefilled = self._schedule()
            speed, decoding = self.constants, len(self._decoding)
            await asyncio.sleep(
                speed.step_seconds
                + speed.sequence_seconds * decoding
                + speed.context_seconds * self._context
                + prefilled / speed.prefill_tokens_per_second
            )
            self._steps += 1
            self._context += decoding
            self._collect()

    def _schedule(self) -> int:
        """Spend the step's token budget; returns the prompt tokens computed in it."""
        budget = self.constants.batched_tokens - len(self._decoding)
        granted = 0
        for sequence in self._prefilling:
            granted += self._prefill(sequence, budget - granted)
        while self._waiting and granted < budget and self._running() < self.constants.slots:
            sequence = self._waiting[0][2]
            if not self._admit(sequence):
                if not self._running():
                    raise ValueError(f"a sequence of {sequence.prompt_tokens + sequence.to_write} tokens never fits")
                break
            heapq.heappop(self._waiting)
            self._prefilling.append(sequence)
            granted += self._prefill(sequence, budget - granted)
        return granted

    def _running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def _admit(self, sequence: _Sequence) -> bool:
        size = self.constants.block_size
        # The last prompt token is computed in any case: its logits are needed.
        usable = sequence.hashes[: (sequence.prompt_tokens - 1) // size]
        hits = usable[: self.cache.hits(usable)]
        others = -(-(sequence.prompt_tokens + sequence.to_write) // size) - len(hits)
        if not self.cache.admit(hits, others):
            return False
        sequence.shared, sequence.private_blocks = list(hits), others
        sequence.cached = sequence.computed = len(hits) * size
        return True

    def _prefill(self, sequence: _Sequence, budget: int) -> int:
        granted = min(budget, sequence.prompt_tokens - sequence.computed)
        sequence.computed += granted
        for key in sequence.hashes[len(sequence.shared) : sequence.computed // self.constants.block_size]:
            self.cache.share(key)
            sequence.shared.append(key)
            sequence.private_blocks -= 1
        return granted

    def _collect(self) -> None:
        """End a step: complete prompts have written their first token, others perhaps their last one."""
        complete = [sequence for sequence in self._prefilling if sequence.computed == sequence.prompt_tokens]
        if complete:
            self._prefilling = [sequence for sequence in self._prefilling if sequence.computed < sequence.prompt_tokens]
        for sequence in complete:
            last = self._steps + sequence.to_write - 1
            heapq.heappush(self._decoding, (last, next(self._numbers), sequence))
            self._context += sequence.prompt_tokens + 1
        while self._decoding and self._decoding[0][0] <= self._steps:
            _, _, sequence = heapq.heappop(self._decoding)
            self._context -= sequence.prompt_tokens + sequence.to_write
            self.cache.release(sequence.shared, sequence.private_blocks)
            sequence.done.set_result(None)


class LocalHandle:
    """A Ray handle of an object in this process: ``handle.method.remote(...)`` gives something to await."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)

        def remote(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if asyncio.iscoroutine(result):
                return result
            # Done at once: verl does not wait for every call.
            future = asyncio.get_running_loop().create_future()
            future.set_result(result)
            return future

        return SimpleNamespace(remote=remote)


class Cluster:
    """Replicas behind verl's router, and the client that verl's workers talk to; use inside a running loop."""

    def __init__(self, config: Any, replicas: int, constants: ServerConstants, write: Writer) -> None:
        self.replicas = [Replica(constants, write) for _ in range(replicas)]
        servers: dict[str, Any] = {str(number): LocalHandle(replica) for number, replica in enumerate(self.replicas)}
        router: Any = LocalHandle(GlobalRequestLoadBalancer(servers))
        self.client = LLMServerClient(config, load_balancer_handle=router)

    def stop(self) -> None:
        """End all servers."""
        for replica in self.replicas:
            replica.stop()
