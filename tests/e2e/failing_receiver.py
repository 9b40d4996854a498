"""A vLLM worker that fails when it receives weights; the config names it in place of verl's worker extension."""

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class FailingExtension(vLLMColocateWorkerExtension):
    """Takes the first weights, which are there before training, and fails on the second ones."""

    received = 0

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        self.received += 1
        if self.received > 1:
            raise ValueError("injected: no such weight")
        super().update_weights_from_ipc(*args, **kwargs)
