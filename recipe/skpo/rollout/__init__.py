"""From a prompt to its stored rows."""

from typing import Any

_FORMER = {"SkpoAgentLoopManager": "SkpoAgentLoopManager", "MeteredManager": "RolloutManager"}


def __getattr__(name: str) -> Any:
    """Find a manager under the name that configs of version 0.1 hold, ``recipe.skpo.rollout.<name>``."""
    if name in _FORMER:
        from recipe.skpo.rollout import manager

        return getattr(manager, _FORMER[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
