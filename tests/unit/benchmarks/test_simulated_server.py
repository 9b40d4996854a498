"""The simulated replica against times and token counts worked out by hand."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.simulated_server import PrefixCache, Replica, ServerConstants
from benchmarks.virtual_time import run_virtual

SPEED = ServerConstants(
    step_seconds=1.0,
    sequence_seconds=0.0,
    context_seconds=0.0,
    prefill_tokens_per_second=1e9,
    request_seconds=0.0,
    slots=4,
    batched_tokens=1000,
    block_size=4,
    cache_tokens=400,
)


def serve(constants: ServerConstants, *requests: tuple[list[int], int]) -> list[tuple[float, int, int]]:
    """Requests (prompt, tokens to write) sent at once: end, generated, cached of each."""

    def write(prompt_ids: Sequence[int], params: dict[str, Any]) -> list[int]:
        return [7] * params["max_tokens"]

    async def one(replica: Replica, prompt: list[int], tokens: int) -> tuple[float, int, int]:
        output = await replica.generate(prompt, {"max_tokens": tokens}, "id")
        end = asyncio.get_running_loop().time()
        return end, len(output.token_ids), output.extra_fields["num_cached_tokens"]

    async def main() -> list[tuple[float, int, int]]:
        replica = Replica(constants, write)
        try:
            return await asyncio.gather(*(one(replica, *request) for request in requests))
        finally:
            replica.stop()

    return run_virtual(main())


def prompt(tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + tokens))


def test_a_response_takes_a_step_per_token() -> None:
    assert serve(SPEED, (prompt(6), 5)) == [(pytest.approx(5.0, abs=1e-6), 5, 0)]


def test_sequences_decode_together_and_a_short_one_leaves_early() -> None:
    ends = [end for end, _, _ in serve(SPEED, (prompt(6), 5), (prompt(6, 100), 2))]
    assert ends == pytest.approx([5.0, 2.0], abs=1e-6)


def test_a_step_costs_what_it_decodes_reads_and_prefills() -> None:
    costs = replace(SPEED, sequence_seconds=0.1, context_seconds=0.01, prefill_tokens_per_second=10.0)
    [(end, _, _)] = serve(costs, (prompt(6), 2))
    # Prefill of 6 tokens, which writes the first token; then one decoding step over a context of 7.
    assert end == pytest.approx((1.0 + 0.6) + (1.0 + 0.1 + 0.07))


def test_a_prompt_longer_than_a_step_takes_is_prefilled_in_chunks() -> None:
    [(end, _, _)] = serve(replace(SPEED, batched_tokens=4), (prompt(10), 1))
    assert end == pytest.approx(3.0, abs=1e-6)


def test_what_waits_for_a_slot_starts_when_one_is_free() -> None:
    ends = [end for end, _, _ in serve(replace(SPEED, slots=1), (prompt(6), 3), (prompt(6, 100), 3))]
    assert ends == pytest.approx([3.0, 6.0], abs=1e-6)


def test_what_waits_is_admitted_by_priority_then_in_order() -> None:
    order: list[str] = []

    async def one(replica: Replica, name: str, priority: int) -> None:
        await replica.generate(prompt(6), {"max_tokens": 2}, name, priority)
        order.append(name)

    async def main() -> None:
        replica = Replica(replace(SPEED, slots=1), lambda prompt_ids, params: [7] * params["max_tokens"])
        asked = [("first", 0), ("later", 0), ("last", 5), ("urgent", -5), ("later still", 0)]
        await asyncio.gather(*(one(replica, *request) for request in asked))
        replica.stop()

    run_virtual(main())
    assert order == ["urgent", "first", "later", "later still", "last"]


def test_siblings_share_all_full_blocks_but_the_last_token() -> None:
    # 8 tokens are two blocks of 4; the last prompt token is computed in any case, so one block is shared.
    assert [cached for _, _, cached in serve(SPEED, (prompt(8), 2), (prompt(8), 2), (prompt(8), 2))] == [0, 4, 4]
    assert [cached for _, _, cached in serve(SPEED, (prompt(9), 2), (prompt(9), 2))] == [0, 8]
    assert [cached for _, _, cached in serve(SPEED, (prompt(9), 2), (prompt(9, 1), 2))] == [0, 0]


def test_a_sequence_that_cannot_ever_fit_is_an_error() -> None:
    async def main() -> None:
        replica = Replica(SPEED, lambda prompt_ids, params: [7] * 500)
        waiting = asyncio.ensure_future(replica.generate(prompt(8), {}, "id"))
        with pytest.raises(ValueError, match="508 tokens never fits"):
            await replica._task
        waiting.cancel()

    run_virtual(main())


def test_the_cache_evicts_what_was_idle_longest_and_never_what_is_held() -> None:
    cache = PrefixCache(blocks=3)
    assert cache.admit([], 2)
    cache.share(1)
    cache.share(2)
    cache.release([1, 2], 0)
    assert cache.hits([1, 2]) == 2
    assert cache.admit([1], 2), "block 2 makes room, as it is idle"
    assert cache.hits([1, 2]) == 1
    assert not cache.admit([], 1), "all three are held or reserved"


def test_of_idle_blocks_the_one_released_first_goes_first() -> None:
    cache = PrefixCache(blocks=2)
    for key in (1, 2):
        assert cache.admit([], 1)
        cache.share(key)
        cache.release([key], 0)
    assert cache.admit([], 1)
    assert (cache.hits([1]), cache.hits([2])) == (0, 1)
