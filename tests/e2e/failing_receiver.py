"""A vLLM worker that fails when it receives weights; the config names it instead of the recipe's worker extension."""

from typing import Any

from recipe.skpo.isolation.receiver import PrivateReceiver


class FailingExtension(PrivateReceiver):
    """Takes the first weights, which are there before training, and fails on the second ones."""

    received = 0

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        self.received += 1
        if self.received > 1:
            raise ValueError("injected: no such weight")
        super().update_weights_from_ipc(*args, **kwargs)
