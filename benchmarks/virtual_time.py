"""An asyncio event loop whose clock jumps: nothing sleeps, yet everything happens in the order of its time.

When nothing is ready, the loop sets its clock to its next timer instead of waiting.  Work for threads runs at once and
takes no time, so a run depends only on its seeds.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

Result = TypeVar("Result")


class StalledError(RuntimeError):
    """Every task waits, and no timer is left to wake one."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits for files; adds up the time that it was asked to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise StalledError("every task waits, and no timer is left to wake one up")
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 and moves only when all tasks wait for a later time."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._jumping.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Result], *args: Any
    ) -> asyncio.Future[Result]:
        """Call ``func`` now: a thread would finish at a real time, which has no place on this clock."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # the border that a thread would be: the caller gets it from the future
            future.set_exception(error)
        return future


def run_virtual(main: Coroutine[Any, Any, Result]) -> Result:
    """Run as ``asyncio.run``, in virtual time.

    Raises:
        StalledError: the tasks wait for each other.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
