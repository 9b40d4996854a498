"""Replace one function of verl or vLLM, and refuse if it is no longer the known one.

Only for behaviour that no configuration and no plugin point reaches. A replacement copies nothing of the original; most
call it with one argument changed. It is marked, so that a second installation does nothing, and installed only while
active: by default while VERL_PLATFORM=cpu.
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
    """The installed verl or vLLM differs from the one the override was written for."""


@dataclass(frozen=True)
class FunctionOverride:
    """A function to replace.

    Attributes:
        module: dotted name of its module.
        function: its name.
        parameters: the parameters it is known to have.
        place: file, line and version, for the error message.
        wrap: original to replacement.
        active: whether the override applies in this process.
    """

    module: str
    function: str
    parameters: tuple[str, ...]
    place: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    active: Callable[[], bool] = is_selected

    def install(self) -> None:
        """Replace the function, if the override is active.

        Raises:
            OverrideError: the function is gone or has other parameters.
        """
        if not self.active():
            return
        module = importlib.import_module(self.module)
        current = getattr(module, self.function, None)
        if hasattr(current, _MARK):
            return
        if not callable(current):
            raise OverrideError(
                f"{self.module}.{self.function} ({self.place}) is gone; adapt this override to the installed version"
            )
        parameters = tuple(inspect.signature(current).parameters)
        if parameters != self.parameters:
            raise OverrideError(
                f"{self.module}.{self.function} ({self.place}) has changed: expected the parameters "
                f"{', '.join(self.parameters)}, found {', '.join(parameters) or 'none'}; "
                f"adapt this override to the installed version"
            )
        replacement = functools.wraps(current)(self.wrap(current))
        setattr(replacement, _MARK, True)
        # Modules that imported it by name too, as one of VERL_USE_EXTERNAL_MODULES, which comes before our plugin, may.
        package = self.module.partition(".")[0] + "."
        for name, user in [(self.module, module), *sys.modules.items()]:
            if name.startswith(package) and vars(user).get(self.function) is current:
                setattr(user, self.function, replacement)

    def is_installed(self) -> bool:
        """Return whether the function is replaced in this process."""
        return hasattr(getattr(sys.modules.get(self.module), self.function, None), _MARK)
