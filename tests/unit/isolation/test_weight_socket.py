"""Two runs that send weights at the same moment, by verl's own sender and receiver."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipe.skpo.isolation import folder as folders
from tests.support.preloaded import Done

CPU = {"VERL_PLATFORM": "cpu", "VLLM_TARGET_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

SYNC = """
import asyncio, importlib.util, json, sys, threading, time
from pathlib import Path
import torch, verl, zmq
import recipe.skpo.cpu.verl_plugin
from recipe.skpo.isolation.folder import socket_address

# By its path, because its package imports vLLM, which takes half a minute.
place = Path(verl.__file__).parent / "workers/rollout/vllm_rollout/bucketed_weight_transfer.py"
spec = importlib.util.spec_from_file_location("bucketed_weight_transfer", place)
transfer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(transfer)
address, value, meeting = socket_address(f"ipc://{sys.argv[1]}"), float(sys.argv[2]), Path(sys.argv[3])
for option, number in ((zmq.RCVTIMEO, 20_000), (zmq.SNDTIMEO, 20_000), (zmq.LINGER, 0)):
    zmq.Context.instance().setsockopt(option, number)
weights = {f"w{n}": torch.full((50_000,), value) for n in range(12)}

def meet(name):
    (meeting / f"{name} {value}").touch()
    while len(list(meeting.glob(f"{name} *"))) < 2:
        time.sleep(0.01)

def sync():
    errors, received = [], {}

    class Sender(transfer.BucketedWeightSender):
        def _init_socket(self):
            super()._init_socket()
            meet("bound")

    def run(action):
        try:
            action()
        except Exception as error:
            errors.append(type(error).__name__)

    sender = Sender(address, bucket_size_mb=1, use_shm=True)
    receiver = transfer.BucketedWeightReceiver(address, torch.device("cpu"), use_shm=True)
    keep = lambda bucket, is_last: received.update({key: tensor.clone() for key, tensor in bucket})
    send = lambda: asyncio.run(sender.async_send_weights(iter(weights.items())))
    sending = threading.Thread(target=run, args=(send,))
    sending.start()
    meet("bound")  # both senders have their sockets now
    run(lambda: receiver.receive_weights(keep))
    sending.join()
    meet("done")
    return [errors, len(received), sorted({float(x) for w in received.values() for x in w})]

print(json.dumps(sync()))
"""


def test_two_runs_that_send_weights_at_once_get_their_own(tmp_path: Path, preloaded) -> None:
    """verl gives both the same name, under which weights of the other run arrive, or none."""
    made = [folders.make(False) for _ in range(2)]
    # As short as the socket that verl has in /tmp.
    shared = made[0] / "rl-colocate-zmq-01000000-replica-0-rank-0.sock"
    try:

        def run(value: int) -> Done:
            variables = {**os.environ, **CPU, folders.VARIABLE: str(made[value])}
            return preloaded.run(SYNC, str(shared), str(value), str(tmp_path), variables=variables)

        with ThreadPoolExecutor(2) as both:
            runs = list(both.map(run, (0, 1)))
        assert [run.returncode for run in runs] == [0, 0], runs
    finally:
        for folder in made:
            folders.remove(folder)
    results = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    assert results == [[[], 12, [float(value)]] for value in (0, 1)]


BOTH_SIDES = """
import json, os, sys
from types import SimpleNamespace
import ray
import recipe.skpo.cpu.verl_plugin
import recipe.skpo.trainer.weight_sync_registration
from verl.workers.rollout import base
from verl.workers.rollout.base import get_rollout_class
from recipe.skpo.isolation.receiver import PrivateReceiver

os.environ |= {"RANK": "3", "RAY_LOCAL_WORLD_SIZE": "4", "VERL_REPLICA_RANK": "1", "VERL_RAY_JOB_ID": "01000000"}
ray.get_runtime_context = lambda: SimpleNamespace(get_job_id=lambda: "01000000")
base.BaseRollout.__init__ = lambda self, config, model_config, mesh: setattr(self, "config", config)
sizes = {"tensor_model_parallel_size": 2, "data_parallel_size": 1, "pipeline_model_parallel_size": 1}
config = SimpleNamespace(**sizes, layered_summon=False)
adapter = get_rollout_class("vllm", "async")(config, None, None)
receiver = PrivateReceiver.__new__(PrivateReceiver)
receiver.local_rank, receiver.model_runner = 1, SimpleNamespace()
print(json.dumps([adapter.zmq_handle, receiver._get_zmq_handle()]))
"""


def test_adapter_and_receiver_meet_in_the_runs_folder(preloaded) -> None:
    made = folders.make(False)
    try:
        done = preloaded.run(BOTH_SIDES, variables={**os.environ, **CPU, folders.VARIABLE: str(made)})
    finally:
        folders.remove(made)
    assert done.returncode == 0, done.stderr[-3000:]
    sender, receiver = json.loads(done.stdout.splitlines()[-1])
    assert sender == receiver == f"ipc://{made}/rl-colocate-zmq-01000000-replica-1-rank-1.sock"
