"""Errors of every room, and one sentence for whatever ended a run.

The lowest module of the recipe: it imports no other one, and Ray only where an error is described, because the command
imports this module before it has checked its packages.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.exceptions import RayActorError

_PROCESSES = {
    "vLLMHttpServer": "a vLLM server",
    "AgentLoopWorker": "a rollout worker",
    "RolloutWorker": "a rollout worker",
    "RewardLoopWorker": "a reward worker",
    "RewardComputeWorker": "a reward worker",
    "WorkerDict": "an actor rank",
    "TransferQueueController": "TransferQueue's controller",
    "StorageUnit": "a storage unit of TransferQueue",
    "TaskRunner": "the trainer",
    "LoadBalancer": "the load balancer of the vLLM servers",
}
"""Part of a Ray actor's class name to what the process is for a user."""

_ENGINE = "EngineDeadError"
_VLLM_SAYS = re.compile(rf"{_ENGINE}: EngineCore encountered an issue\.[^;]*?root cause\.")


class ConfigError(ValueError):
    """A config value, file or folder that cannot work; the message names it and the fix in one line."""


class RunError(RuntimeError):
    """A run that cannot continue; the message is one sentence that says what happened, and where."""


def brief(error: BaseException) -> str:
    """Name an error by its type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, the last one first, across the borders of Ray's processes."""
    from ray.exceptions import RayTaskError

    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        # Ray's wrapper has the type of the error it wraps, too, and a traceback as its message.
        remote = found.cause if isinstance(found, RayTaskError) else None
        if remote is None:
            yield found
        hidden = found.__suppress_context__
        found = remote or found.__cause__ or (None if hidden else found.__context__)


def describe(error: BaseException) -> str:
    """Say in one sentence what ended a run: the message of a ``RunError``, else which process died, else the error."""
    from ray.exceptions import RayActorError

    chain = list(causes(error))
    ours = next((found for found in chain if isinstance(found, RunError)), None)
    if ours is not None:
        said = " ".join(str(ours).split())
        return f"a vLLM engine died: {_VLLM_SAYS.sub(_ENGINE, said)}" if _ENGINE in said else said
    if any(type(found).__name__ == _ENGINE for found in chain):
        return "a vLLM engine died"
    # The one that died first is at the end.
    died = [found for found in chain if isinstance(found, RayActorError)]
    if died:
        return _death(died[-1])
    lines = str(chain[0]).strip().splitlines()
    return f"{type(chain[0]).__name__}: {lines[0]}" if lines else type(chain[0]).__name__


def _death(error: "RayActorError") -> str:
    text = str(error)
    if error.actor_init_failed:
        return f"a process of the run could not be started: {text.strip().splitlines()[-1].strip()}"
    told = dict(re.findall(r"^\s*(class_name|pid|ip|name): (\S.*)$", text, re.MULTILINE))
    class_name = told.get("class_name", "")
    who = next((who for part, who in _PROCESSES.items() if part in class_name), "a process of the run")
    details = [class_name.rpartition(".")[2], f"pid {told['pid']}" if "pid" in told else "", told.get("ip", "")]
    where = ", ".join(filter(None, details)) or text.splitlines()[0]
    if re.search(r"node (has )?died", text):
        return f"{who} died with its node ({where})"
    return f"{who} died ({where})"
