"""Replace one function of verl or vLLM, and refuse when it is not the function we know any more.

Only for behaviour that no configuration and no plugin point reaches. A replacement calls the function it
replaces and changes one argument; it contains nothing of it. It is marked, so that installing twice does
nothing, and installed only while it is active: by default while VERL_PLATFORM=cpu.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipe.skpo.cpu import is_selected

_MARK = "_skpo_cpu_override"


class OverrideError(RuntimeError):
    """The verl or vLLM that is installed does not look as it did when the override was written."""


@dataclass(frozen=True)
class FunctionOverride:
    """One function to replace: where it is, the parameters it is known to have, and how to wrap it."""

    module: str
    function: str
    parameters: tuple[str, ...]
    place: str  # file, line and version, for whoever has to look
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    active: Callable[[], bool] = is_selected

    def install(self) -> None:
        if not self.active():
            return
        module = importlib.import_module(self.module)
        current = getattr(module, self.function, None)
        if hasattr(current, _MARK):
            return
        if not callable(current):
            raise OverrideError(
                f"{self.module}.{self.function} ({self.place}) is gone; this override must be looked at again"
            )
        found = tuple(inspect.signature(current).parameters)
        if found != self.parameters:
            raise OverrideError(
                f"{self.module}.{self.function} ({self.place}) has changed: expected the parameters "
                f"{', '.join(self.parameters)}, found {', '.join(found) or 'none'}; "
                f"this override must be looked at again"
            )
        replacement = functools.wraps(current)(self.wrap(current))
        setattr(replacement, _MARK, True)
        setattr(module, self.function, replacement)
        self._rebind(current, replacement)

    def is_installed(self) -> bool:
        return hasattr(getattr(sys.modules.get(self.module), self.function, None), _MARK)

    def _rebind(self, current: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """Reach modules that already hold the function by `from ... import`.

        A module of VERL_USE_EXTERNAL_MODULES is imported before our plugin and may have brought such modules
        in.
        """
        package = self.module.partition(".")[0] + "."
        for name, module in list(sys.modules.items()):
            if name.startswith(package) and vars(module).get(self.function) is current:
                setattr(module, self.function, replacement)
