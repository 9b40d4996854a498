"""vLLM's side of the weight sync, with its socket in the run's folder; vLLM imports the class by name.

verl names the socket ``/tmp/rl-colocate-zmq-<job id>-...``.  Every Ray that a run starts for itself counts its jobs
from 01000000, so all runs of a machine had the same name, and two syncs at the same moment could swap weights.
"""

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from recipe.skpo.isolation.folder import socket_address


class PrivateReceiver(vLLMColocateWorkerExtension):
    """verl's extension of vLLM's worker; a ``worker_extension_cls`` of your own must extend it."""

    def _get_zmq_handle(self) -> str:
        return socket_address(super()._get_zmq_handle())
