"""TransferQueue's ports serve the run alone: the attack that ran code through each of them, on the real servers.

Controller, storage and client are TransferQueue's own classes, each with its threads and sockets, without Ray.
"""

import json
import os
from pathlib import Path

import pytest

from recipe.skpo.isolation import folder as folders
from recipe.skpo.isolation import messages, worker

ATTACK = """
import json, os, pickle, sys, time
import torch, zmq
from tensordict import TensorDict
folder, signed = sys.argv[1], sys.argv[2] == "signed"
if signed:
    from recipe.skpo.isolation import messages
    messages.install(lambda: b"the run's own key")
    messages.bind_to_loopback()
import transfer_queue as tq
from transfer_queue import interface
from transfer_queue.client import TransferQueueClient
from transfer_queue.controller import TransferQueueController
from transfer_queue.storage.simple_storage import SimpleStorageUnit
from transfer_queue.utils import serial_utils, zmq_utils

controller = TransferQueueController.__ray_actor_class__(sampler=tq.SequentialSampler())
unit = SimpleStorageUnit.__ray_actor_class__({"num_data_storage_units": 1})
honest, stored = controller.zmq_server_info, unit.zmq_server_info
client = TransferQueueClient("client", honest)
client.initialize_storage_manager("SimpleStorage", {"zmq_info": {stored.id: stored}})
interface._TQ_CLIENT = client

def round_trip(value):
    fields = TensorDict({"x": torch.full((2, 3), value)}, batch_size=2)
    tq.kv_batch_put(keys=["a", "b"], partition_id="p", fields=fields, tags=[{}, {}])
    return tq.kv_batch_get(keys=["a", "b"], partition_id="p")["x"].values().tolist()

class Payload:
    def __init__(self, name):
        self.name = name
    def __reduce__(self):
        return os.mkdir, (os.path.join(folder, self.name),)

def sealed(key, frames):
    return [*frames, messages._Signature(lambda: key).of(frames)]

def forged(name):
    frames = [b"\\xc1\\xfe\\xed", pickle.dumps(Payload(name))]
    yield frames
    yield frames[1:]
    yield [b""]
    yield [*frames, os.urandom(32)]
    yield [*frames, b"x"]
    if signed:
        request = zmq_utils.ZMQMessage.create(
            zmq_utils.ZMQRequestType.KV_LIST, "me", {"x": torch.zeros(4), "y": torch.ones(4)}
        )
        head, x, y, signature = request.serialize()
        yield sealed(b"another run's key", frames)
        yield [*frames, signature]
        yield [head, y, x, signature]
        yield [head, x, y, b"", signature]
        yield [head, bytes(x) + bytes(y), signature]

ports = [(honest, name) for name in honest.ports] + [(stored, "put_get_socket")]
before, sent = round_trip(1), 0
for number, (server, port) in enumerate(ports):
    for frames in forged(str(number)):
        attacker = zmq.Context.instance().socket(zmq.DEALER)
        attacker.setsockopt(zmq.IDENTITY, f"TQ_STORAGE_{sent}".encode())
        attacker.connect(server.to_addr(port))
        attacker.send_multipart(frames)
        sent += 1
deadline = time.monotonic() + (2 if signed else 20)
while time.monotonic() < deadline and len(os.listdir(folder)) < len(ports):
    time.sleep(0.1)
threads = (controller.wait_connection_thread, controller.process_request_thread, unit.worker_thread, unit.proxy_thread)
print(json.dumps({
    "before": before, "after": round_trip(3), "ran": sorted(os.listdir(folder)), "sent": sent,
    "alive": sum(thread.is_alive() for thread in threads), "addresses": [server.ip for server, _ in ports],
}), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("how", ["signed", "open"])
def test_nobody_runs_code_through_the_three_ports(tmp_path: Path, how: str, preloaded) -> None:
    """``open`` is TransferQueue as it is: the payload runs, so the attack is a real one."""
    done = preloaded.run(ATTACK, str(tmp_path), how, variables={**os.environ, "TQ_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    if how == "open":
        assert result["ran"] == ["0", "1", "2"], "one per port"
        return
    assert result["ran"] == []
    assert (result["before"], result["after"], result["alive"]) == ([1] * 6, [3] * 6, 4), "the servers go on"
    assert set(result["addresses"]) == {"127.0.0.1"}
    log = done.stdout + done.stderr
    refused = [line for line in log.splitlines() if "not signed with this run's key, so it was not decoded" in line]
    empty = [line for line in log.splitlines() if "leading frame is empty" in line]
    assert len(refused) + len(empty) == result["sent"] == 30, "one line each"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Stands for the store of Ray's GCS."""
    import ray
    from ray.experimental import internal_kv

    kept: dict[str, bytes] = {}

    def put(key: str, value: bytes, overwrite: bool = True, *, namespace: str) -> None:
        assert not overwrite and key not in kept
        kept[key] = value

    def no_queue(name: str, namespace: str) -> None:
        raise ValueError("no such actor")

    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, *, namespace: kept.get(key))
    monkeypatch.setattr(ray, "get_actor", no_queue)
    monkeypatch.setattr(messages, "_WAIT_S", 0.0)
    return kept


def test_every_run_has_a_key_of_its_own(store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("skpo-one", "skpo-two"):
        monkeypatch.setenv(folders.VARIABLE, name)
        with pytest.raises(RuntimeError, match=r"this run has no key for TransferQueue"):
            messages.stored_key()
        messages.create_key()
        assert messages.stored_key() == store[name]
    assert len(store["skpo-one"]) == 32 and store["skpo-one"] != store["skpo-two"]


def test_a_second_run_in_one_cluster_is_refused(store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: "TransferQueueController of the first")
    with pytest.raises(RuntimeError) as error:
        messages.create_key()
    assert str(error.value) == (
        "another verl run is using this Ray cluster, and the two would share one TransferQueue: wait until it has "
        "ended, or give this run a cluster of its own (ray_kwargs.ray_init.address=local)"
    )
    assert not store


@pytest.mark.parametrize("own", [True, False])
def test_a_process_of_a_run_is_set_up_before_it_does_anything(tmp_path: Path, monkeypatch, own: bool) -> None:
    done = []
    monkeypatch.setattr(messages, "install", lambda: done.append("signs"))
    monkeypatch.setattr(messages, "bind_to_loopback", lambda: done.append("listens to this machine alone"))
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "skpo-abcdefgh"))
    monkeypatch.setenv(worker.OWN_CLUSTER, "1" if own else "")
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    worker.set_up()
    assert os.environ["VLLM_API_KEY"] == "mine" and (tmp_path / "skpo-abcdefgh/lock").exists()
    assert done == ["signs", "listens to this machine alone"][: 1 + own]
    keys = set()
    for _ in range(2):
        monkeypatch.delenv("VLLM_API_KEY")
        worker.set_up()
        keys.add(os.environ["VLLM_API_KEY"])
    assert len(keys) == 2 and min(map(len, keys)) > 40
    folders.remove(tmp_path / "skpo-abcdefgh")
