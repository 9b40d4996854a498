"""The managers that start the rollout workers and collect their counts; the config of a method names one of them."""

from collections import Counter
from typing import Any

import ray
from tensordict import TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

from recipe.skpo.rollout.two_phases import SkpoAgentLoopWorker
from recipe.skpo.rollout.worker import RolloutWorker
from recipe.skpo.task.columns import sends_all, sent

_ANSWER_S = 120.0
"""Seconds within which every worker must have told its counts, whatever else it does."""


class RolloutManager(AgentLoopManagerTQ):
    """Starts our workers; ``actor_rollout_ref.rollout.agent.agent_loop_manager_class`` names it."""

    worker_class: type = RolloutWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # verl's constructor sets its own worker class; workers are started later, by ``create``.
        self.agent_loop_workers_class = ray.remote(self.worker_class)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Send prompts to the workers; overrides verl's, which sends columns of the user's that nobody reads too."""
        if not sends_all(self.config):
            prompts = prompts.select(*sent(prompts.keys()))
        super().generate_sequences(prompts)

    def take_tokens(self) -> dict[str, int]:
        """Tokens of all workers' requests since the last call: ``generated``, ``prefilled``, ``cached``."""
        counts = self._ask("take_tokens")
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    def take_failures(self) -> Counter[str]:
        """How often what failed in all workers since the last call; keys as ``cause_of`` makes them."""
        return sum(map(Counter, self._ask("take_failures")), Counter())

    def _ask(self, method: str) -> list[dict[str, int]]:
        workers: list[Any] = self.agent_loop_workers
        return ray.get([getattr(worker, method).remote() for worker in workers], timeout=_ANSWER_S)


class SkpoAgentLoopManager(RolloutManager):
    """The manager of the two SKPO phases."""

    worker_class = SkpoAgentLoopWorker
