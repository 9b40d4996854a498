"""What fails in a rollout: its errors, and how they are counted."""

from collections.abc import Iterable

from ray.exceptions import RayTaskError

from recipe.skpo.errors import RunError


class RolloutError(RunError):
    """A prompt that cannot be rolled out; the message names it and why."""


class RolloutStop(RolloutError):
    """A fault that no later prompt would be without: the run stops with this message after the batch."""


_STOP = "stop: "
"""How the cause of a ``RolloutStop`` begins where failures are counted."""


def cause_of(kind: str, error: BaseException) -> str:
    """Name a failure for counting: ``kind`` (prompt, candidate, sibling, session) and the error's first line.

    Of an error in another Ray actor it is the first line of that error: Ray's own line has process numbers in it, by
    which equal causes would be counted apart.
    """
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, RolloutStop):
        return f"{_STOP}{error}"
    lines = str(error).splitlines() or [""]
    return f"{kind}: {type(error).__name__}: {lines[0]}"[:300]


def stop_reason(failures: Iterable[str]) -> str | None:
    """Find the message of a ``RolloutStop`` among causes as ``cause_of`` makes them."""
    return next((cause.removeprefix(_STOP) for cause in failures if cause.startswith(_STOP)), None)
