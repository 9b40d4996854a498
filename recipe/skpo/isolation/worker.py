"""What every process that Ray starts for a run does first; Ray calls ``set_up`` (``worker_process_setup_hook``)."""

import os
import secrets

from recipe.skpo.isolation import folder, messages

OWN_CLUSTER = "SKPO_OWN_CLUSTER"
"""Set where the run has a Ray of its own, which has one node."""


def set_up() -> None:
    """Lock the run's folder, sign TransferQueue's messages, and make a key for a vLLM server of this process."""
    folder.enter()
    os.environ.setdefault("VLLM_API_KEY", secrets.token_urlsafe(32))
    messages.install()
    if os.environ.get(OWN_CLUSTER):
        messages.bind_to_loopback()
