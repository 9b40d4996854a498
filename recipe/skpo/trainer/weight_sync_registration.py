"""Names our adapter of vLLM's weight transfer to verl; ``main`` puts this module into ``model.external_lib``.

verl imports that list in every process that reads the model's config.  The adapter itself is imported by name, and with
it vLLM, only where weights are sent.
"""

from verl.workers.rollout import base

ADAPTER = "recipe.skpo.trainer.weight_sync.ServerAdapterWithTimeout"

base._ROLLOUT_REGISTRY[("vllm", "async")] = ADAPTER
