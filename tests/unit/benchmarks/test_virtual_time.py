"""The event loop whose clock jumps."""

import asyncio
import time

import pytest

from benchmarks.virtual_time import StalledError, run_virtual


def test_everything_happens_in_the_order_of_its_time_and_nobody_waits() -> None:
    happened: list[tuple[str, float]] = []

    async def act(name: str, *pauses: float) -> None:
        for pause in pauses:
            await asyncio.sleep(pause)
            happened.append((name, asyncio.get_running_loop().time()))

    async def main() -> None:
        await asyncio.gather(act("slow", 100.0), act("fast", 30.0, 30.0, 60.0))

    start = time.perf_counter()
    run_virtual(main())
    assert time.perf_counter() - start < 1.0
    assert [name for name, _ in happened] == ["fast", "fast", "slow", "fast"]
    assert [moment for _, moment in happened] == pytest.approx([30.0, 60.0, 100.0, 120.0])


def test_time_outs_fire_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(50):
                await asyncio.sleep(51)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(50)


def test_work_for_threads_is_done_at_once_and_its_errors_arrive() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, sum, [1, 2, 3]) == 6
        assert loop.time() == 0
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, divmod, 1, 0)

    run_virtual(main())


def test_tasks_that_wait_for_each_other_are_an_error_and_no_hang() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StalledError):
        run_virtual(main())
