"""Requests wait before they are sent, not at the server: order, cancellation, clocks, and aborts."""

import asyncio
from types import SimpleNamespace

import pytest

from recipe.skpo.rollout import admission
from recipe.skpo.rollout.admission import AbortingHandle, Admission, Clock, slots_of_worker


async def test_the_lowest_priority_goes_first_and_no_slot_is_lost() -> None:
    slots, order = Admission(2), []
    release = asyncio.Event()

    async def request(priority: int, name: str) -> None:
        async with slots.slot(priority):
            order.append(name)
            await release.wait()

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(request(priority, f"{priority}{letter}"))
            for priority, letter in [(0, "a"), (0, "b"), (-1, "c"), (-5, "d"), (-5, "e"), (-9, "f")]
        ]
        await asyncio.sleep(0)
        assert order == ["0a", "0b"]
        tasks[5].cancel()  # the first in line has gone
        await asyncio.sleep(0)
        release.set()
    assert order == ["0a", "0b", "-5d", "-5e", "-1c"]
    async with slots.slot(), slots.slot():
        pass


async def test_a_prompt_that_has_begun_goes_on_before_others_begin() -> None:
    slots, order = Admission(1), []
    short, long = (Clock(asyncio.timeout(None), None) for _ in range(2))

    async def request(priority: int, owner: Clock, name: str) -> None:
        async with slots.slot(priority, owner):
            order.append(name)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(request(-1, short, f"short {number}"))
        for number in range(2):
            group.create_task(request(-9, long, f"long {number}"))
    assert order == ["short 0", "short 1", "short 2", "long 0", "long 1"]


async def test_a_slot_given_to_a_cancelled_request_is_passed_on() -> None:
    slots = Admission(1)
    served = []

    async def request(name: str) -> None:
        async with slots.slot():
            served.append(name)

    async with slots.slot():
        first, second = asyncio.create_task(request("first")), asyncio.create_task(request("second"))
        await asyncio.sleep(0)
    first.cancel()  # in the same moment in which it is given the slot
    await asyncio.wait([first, second])
    assert served == ["second"]


async def test_the_clock_starts_with_the_first_request_and_can_end_with_the_reward() -> None:
    async with asyncio.timeout(None) as limit:
        clock = Clock(limit, 0.01)
        await asyncio.sleep(0.03)
    async with asyncio.timeout(None) as limit:
        clock = Clock(limit, 0.01, until_reward=True)
        clock.start()
        clock.rewarded()
        await asyncio.sleep(0.03)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            clock = Clock(limit, 0.01)
            clock.start()
            clock.rewarded()
            await asyncio.sleep(1)


async def test_a_request_whose_caller_gives_up_is_aborted_at_the_server(monkeypatch) -> None:
    cancelled = []
    monkeypatch.setattr(admission.ray, "cancel", cancelled.append)
    pending = asyncio.get_running_loop().create_future()
    done = asyncio.get_running_loop().create_future()
    done.set_result("answer")
    answers = [done, pending]
    server = SimpleNamespace(generate=SimpleNamespace(remote=lambda **kwargs: answers.pop(0)), sleep="others pass")
    handle = AbortingHandle(server)
    assert await handle.generate.remote(prompt_ids=[1]) == "answer" and handle.sleep == "others pass"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await handle.generate.remote(prompt_ids=[1])
    assert cancelled == [pending]


@pytest.mark.parametrize(
    ("overrides", "slots"),
    [
        (["platform=cpu"], 160),
        (["platform=gpu", "trainer.n_gpus_per_node=4"], 80),
        (["platform=gpu", "trainer.n_gpus_per_node=4", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"], 40),
    ],
)
def test_slots_are_what_the_servers_run_at_once_and_a_quarter(overrides, slots: int, compose_config) -> None:
    assert slots_of_worker(compose_config(*overrides)) == slots
