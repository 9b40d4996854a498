"""verl's rollout replicas with a bound on the wait for their answer.

After every rollout the trainer puts the servers to sleep.  One that died raises at once; one that is alive and hangs
would be waited for without end.  Weights are the actor's to send: ``weight_sync``.
"""

from typing import Any

from verl.checkpoint_engine import CheckpointEngineManager
from verl.utils.ray_utils import auto_await

from recipe.skpo.rollout.worker import RolloutError
from recipe.skpo.trainer.bounds import answer_within


class BoundedCheckpointManager(CheckpointEngineManager):
    """A manager of verl's that gives up on a server that does not fall asleep.

    Args:
        manager: verl's own, taken over as verl built it.
        timeout_s: seconds within which every server must have answered.
    """

    def __init__(self, manager: CheckpointEngineManager, timeout_s: float) -> None:
        self.__dict__.update(vars(manager))
        self.timeout_s = timeout_s

    @auto_await
    async def sleep_replicas(self) -> Any:
        """As verl's.

        Raises:
            RolloutError: a server did not answer in time.
        """
        error = RolloutError(
            f"a rollout server is alive and has not answered within skpo.weight_sync_timeout_s={self.timeout_s:g} s"
        )
        async with answer_within(self.timeout_s, error):
            await super().sleep_replicas()
