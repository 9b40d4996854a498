"""Output that a run does not need: trees, dumps, loggers.  None of it may end the training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class BestEffort:
    """Writes that may fail: the first failure of each kind is logged, the training continues."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    @contextmanager
    def attempt(self, what: str, *errors: type[Exception]) -> Iterator[None]:
        """Log one of ``errors`` inside the block, once per ``what``, instead of raising it."""
        try:
            yield
        except errors as error:
            if what not in self._logged:
                self._logged.add(what)
                lines = str(error).splitlines() or [""]
                logger.warning(
                    "%s: not written (%s: %s); the training continues, and later failures of it are not logged",
                    what,
                    type(error).__name__,
                    lines[0],
                )


class BestEffortLogger:
    """The backend ``name`` of verl's logging whose ``log`` may fail; ``effort`` remembers failures."""

    def __init__(self, name: str, backend: Any, effort: BestEffort) -> None:
        self._name, self._backend, self._effort = name, backend, effort

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._backend, attribute)

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Finish the backend, which may write its last lines."""
        with self._effort.attempt(f"logger {self._name}", Exception):
            self._backend.finish(*args, **kwargs)

    def log(self, data: Any, step: int) -> None:
        """Log by the backend: a full disk, or a service that cannot be reached, costs this line alone."""
        with self._effort.attempt(f"logger {self._name}", Exception):
            self._backend.log(data=data, step=step)
