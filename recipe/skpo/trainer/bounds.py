"""A bound on a wait for a server, told apart from a time-out that the server itself reports."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def answer_within(seconds: float, error: Exception) -> AsyncIterator[None]:
    """Wait no longer than ``seconds`` for what is awaited inside.

    Raises:
        Exception: ``error``, when the time is over.  A TimeoutError of what is awaited passes as it is.
    """
    try:
        async with asyncio.timeout(seconds) as bound:
            yield
    except TimeoutError as timeout:
        if not bound.expired():
            raise
        raise error from timeout
