"""How a run ends early: the last line, whatever ended it, and that nothing is waited for without end."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from recipe.skpo import ending
from recipe.skpo import launch as module
from recipe.skpo.ending import Ending, Watch, last_words, way_on
from recipe.skpo.errors import ConfigError, RunError, describe
from recipe.skpo.rollout.failures import RolloutError
from recipe.skpo.trainer.checkpoints import mark
from recipe.skpo.trainer.timeouts import BatchError

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.faults

# ---------------------------------------------------------------- what happened


def died(class_name: str, why: str = "The actor is dead because its worker process has died.") -> RayActorError:
    lines = (f"class_name: {class_name}", "actor_id: 0f", "pid: 71", "name: x", "namespace: y", "ip: 10.0.0.5")
    text = "The actor died unexpectedly before finishing this task.\n\t" + "\n\t".join(lines) + f"\n{why}"
    return RayActorError("0f", text)


def remote(error: Exception) -> Exception:
    """The error as ``ray.get`` raises it when another process did."""
    text = f"\x1b[36mray::f()\x1b[39m (pid=71)\n  File ...\n{type(error).__name__}: {error}"
    return RayTaskError("f", text, error).as_instanceof_cause()


def after(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


ENGINE = type("EngineDeadError", (Exception,), {})(
    "EngineCore encountered an issue. See stack trace (above) for the root cause."
)
DROPPED = (
    "training at step 3: all 4 prompts were dropped; causes: 16 x candidate: EngineDeadError: EngineCore encountered "
    "an issue. See stack trace (above) for the root cause."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (died("vLLMHttpServer"), "a vLLM server died (vLLMHttpServer, pid 71, 10.0.0.5)"),
        (
            remote(died("create_colocated_worker_cls.<locals>.WorkerDict")),
            "an actor rank died (WorkerDict, pid 71, 10.0.0.5)",
        ),
        (died("SkpoAgentLoopWorker"), "a rollout worker died (SkpoAgentLoopWorker, pid 71, 10.0.0.5)"),
        (died("RewardLoopWorker"), "a reward worker died (RewardLoopWorker, pid 71, 10.0.0.5)"),
        (died("SimpleStorageUnit"), "a storage unit of TransferQueue died (SimpleStorageUnit, pid 71, 10.0.0.5)"),
        (
            died("TransferQueueController"),
            "TransferQueue's controller died (TransferQueueController, pid 71, 10.0.0.5)",
        ),
        (died("SkpoTaskRunner"), "the trainer died (SkpoTaskRunner, pid 71, 10.0.0.5)"),
        (
            died("WorkerDict", "The actor died because its node has died."),
            "an actor rank died with its node (WorkerDict, pid 71, 10.0.0.5)",
        ),
        (ActorDiedError(), "a process of the run died (The actor died unexpectedly before finishing this task.)"),
        (
            ActorDiedError(RayTaskError("f", "ray::f()\nValueError: no such model", ValueError("no such model"))),
            "a process of the run could not be started: ValueError: no such model",
        ),
        (remote(remote(ENGINE)), "a vLLM engine died"),
        (
            BatchError(DROPPED),
            "a vLLM engine died: training at step 3: all 4 prompts were dropped; causes: 16 x candidate: "
            "EngineDeadError",
        ),
        (remote(RunError("vLLM did not\nanswer sleep")), "vLLM did not answer sleep"),
        # What the run says counts, not what fails while it is cleaned up after.
        (after(died("TransferQueueController"), RolloutError("it cannot go on")), "it cannot go on"),
        (
            after(died("TransferQueueController"), died("RewardLoopWorker")),
            "a reward worker died (RewardLoopWorker, pid 71, 10.0.0.5)",
        ),
        (remote(ValueError("too long\nmore")), "ValueError: too long"),
        (AssertionError(), "AssertionError"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_ended_a_run_is_one_sentence(error: Exception, said: str) -> None:
    assert describe(error) == said


@pytest.mark.parametrize(
    ("mode", "saved", "said"),
    [
        ("auto", 4, "the same command resumes from step 4"),
        ("auto", None, "nothing has been saved yet, so the same command starts from the beginning"),
        ("disable", 4, "the same command without trainer.resume_mode=disable resumes from step 4"),
        (
            "resume_path",
            4,
            "the same command without trainer.resume_mode and resume_from_path resumes from step 4",
        ),
    ],
)
def test_the_way_on_names_the_checkpoint_that_counts(tmp_path: Path, mode: str, saved: int | None, said: str) -> None:
    config = OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path), "resume_mode": mode}})
    if saved is not None:
        mark(tmp_path, saved)
    assert way_on(config) == said
    dead = "a reward worker died (RewardLoopWorker, pid 71)"
    log = "its log, or the kernel's (dmesg) if it was killed for memory, says why"
    assert last_words(RunError("no prompt has ended"), None, config) == f"error: no prompt has ended; {said}"
    assert last_words(RunError("x"), dead, config) == f"error: {dead}: x; {log}; {said}"
    assert last_words(RunError(f"in step 3: {dead}"), dead, config) == f"error: in step 3: {dead}; {log}; {said}"


# ---------------------------------------------------------------- signals

WAITING = """\
import time
from recipe.skpo.ending import Ending

ending = Ending()
ending.install()
try:
    print("ready", flush=True)
    time.sleep(5)
except KeyboardInterrupt:
    ending.leave("the same command resumes from step 4")
"""


@pytest.mark.parametrize(
    ("number", "ignored", "code", "line"),
    [
        (signal.SIGINT, False, 130, "stopped by Ctrl-C"),
        (signal.SIGTERM, False, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, False, 129, "stopped by SIGHUP"),
        (signal.SIGHUP, True, 0, None),  # nohup
        (signal.SIGINT, True, 0, None),  # in a script, with &
    ],
)
def test_a_signal_ends_the_command_with_one_line(number: int, ignored: bool, code: int, line: str | None) -> None:
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING if not ignored else WAITING.replace("sleep(5)", "sleep(0.3)")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(number, handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == (f"{line}; the same command resumes from step 4\n" if line else "")


@pytest.fixture
def launched(compose_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``launch`` with a ``run_ppo`` that does what the test says; Ray is not started."""
    import verl.trainer.main_ppo as verl_main
    import verl.utils.config as verl_config

    def launch(run_ppo: Any, saved: int | None = 2) -> SystemExit:
        config = compose_config("platform=gpu", "data=files")
        config.output_dir = str(tmp_path)
        config.trainer.default_local_dir = str(tmp_path)
        mark(tmp_path, saved)
        monkeypatch.setattr(verl_main, "run_ppo", run_ppo)
        monkeypatch.setattr(verl_config, "validate_config", lambda *args, **options: None)
        monkeypatch.setattr(ending, "shut_down", lambda: shut.append(module.ENDING.held))
        with pytest.raises(SystemExit) as left:
            module.launch(config)
        assert shut == [True], "Ray is shut down, and no second signal interrupts that"
        return left.value

    shut: list[bool] = []
    monkeypatch.setattr(module, "ENDING", Ending())
    monkeypatch.setattr(module, "isolated", lambda config: nullcontext())
    # Under nohup and in the background of a script, tests begin with these signals ignored.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        with module.ENDING.handling():
            yield launch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_run_says_what_counts(launched, capsys, number: int) -> None:
    def run_ppo(config: Any, task_runner_class: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    assert launched(run_ppo).code == 128 + number
    name = Ending.NAMES[number]
    assert capsys.readouterr().err == f"stopped by {name}; the same command resumes from step 2\n"


def test_rays_own_handler_of_sigterm_ends_the_run_in_the_same_way(launched, capsys) -> None:
    def run_ppo(config: Any, task_runner_class: Any) -> None:
        sys.exit(signal.SIGTERM)

    assert launched(run_ppo).code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command resumes from step 2\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (remote(RunError("in step 3: it cannot go on")), "error: in step 3: it cannot go on; "),
        (died("SkpoTaskRunner"), "error: the trainer died (SkpoTaskRunner, pid 71, 10.0.0.5); its log, "),
        (ConnectionError("Could not find any running Ray instance."), "error: ConnectionError: Could not find any "),
    ],
)
def test_an_error_of_the_run_ends_in_one_line(launched, capsys, tmp_path: Path, error: Exception, line) -> None:
    def run_ppo(config: Any, task_runner_class: Any) -> None:
        raise error

    said = launched(run_ppo, saved=None).code
    assert isinstance(said, str) and len(said.splitlines()) == 1
    assert said.startswith(line)
    assert said.endswith("; nothing has been saved yet, so the same command starts from the beginning")
    assert capsys.readouterr().err == f"note: all that the run's processes printed is in {tmp_path}/logs/run.log\n"
    assert "Traceback" in (tmp_path / "logs/run.log").read_text()


def test_a_cluster_that_is_too_small_is_refused_before_the_runner_starts(launched, monkeypatch) -> None:
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 8.0}}])

    def run_ppo(config: Any, task_runner_class: Any) -> None:
        task_runner_class.options(name="x").remote()

    assert str(launched(run_ppo).code).startswith("error: Ray has 4 CPUs, the run needs ")


# ---------------------------------------------------------------- processes that die, a start without an end


class Actors:
    """Ray's named actors, as far as ``Watch`` asks for them: name to None, an error, or "starting"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **states: Any) -> None:
        import ray

        self.states: dict[str, Any] = states
        self.lost = False
        for name in ("get_actor", "wait", "get", "get_runtime_context"):
            monkeypatch.setattr(ray, name, getattr(self, name))
        monkeypatch.setattr(ray.util, "list_named_actors", self.named)
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
        monkeypatch.setattr(ending, "_LOOK_S", 0.02)
        monkeypatch.setattr(ending, "_GRACE_S", 0.2)

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(namespace="mine")

    def named(self, all_namespaces: bool) -> list[dict[str, str]]:
        if self.lost:
            raise RuntimeError("Ray cannot be asked")
        others = [{"name": "of another run", "namespace": "theirs"}]
        return others + [{"name": name, "namespace": "mine"} for name in self.states]

    def get_actor(self, name: str, namespace: str) -> SimpleNamespace:
        assert namespace == "mine"
        return SimpleNamespace(__ray_ready__=SimpleNamespace(remote=lambda: name))

    def wait(self, names: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        ready = [name for name in names if self.states[name] != "starting"]
        return ready, [name for name in names if name not in ready]

    def get(self, name: str) -> None:
        if isinstance(self.states[name], Exception):
            raise self.states[name]


class Told(Ending):
    """An ending that a thread's test can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.Event()

    def stop(self, reason: str) -> None:
        self.reason = reason
        self.heard.set()


def test_a_process_that_the_run_does_not_miss_ends_it_all_the_same(monkeypatch) -> None:
    actors = Actors(monkeypatch, server=None, rewards=None, shadow=died("SimpleStorageUnit", "killed by `ray.kill`"))
    told = Told()
    watch = Watch(told, begun=lambda: True, start_timeout_s=100.0)
    watch.start()
    assert not told.heard.wait(0.1), "what was ended on purpose is not missed"
    actors.lost = True
    time.sleep(0.05)
    actors.lost = False
    actors.states["rewards"] = died("RewardLoopWorker")
    assert told.heard.wait(5)
    assert told.reason == watch.died == "a reward worker died (RewardLoopWorker, pid 71, 10.0.0.5)"
    watch.end(failed=False)
    assert not watch.is_alive()


def test_a_run_that_ends_by_itself_is_left_to_it_and_asked_who_died(monkeypatch) -> None:
    actors = Actors(monkeypatch, server=None)
    monkeypatch.setattr(ending, "_LOOK_S", 0.3)
    told = Told()
    watch = Watch(told, begun=lambda: True, start_timeout_s=100.0)
    watch.start()
    time.sleep(0.4)
    actors.states["server"] = died("vLLMHttpServer")
    watch.end(failed=True)
    assert watch.died == "a vLLM server died (vLLMHttpServer, pid 71, 10.0.0.5)"
    assert told.reason is None


@pytest.mark.parametrize("begun", [False, True])
def test_a_start_has_an_end_and_names_what_it_waits_for(monkeypatch, capsys, begun: bool) -> None:
    Actors(monkeypatch, server=None, reward_loop_worker_0="starting")
    monkeypatch.setattr(ending, "_NOTE_S", 0.05)
    told = Told()
    watch = Watch(told, begun=lambda: begun, start_timeout_s=0.5)
    watch.start()
    assert told.heard.wait(1.0) is not begun
    watch.end(failed=False)
    waits = "reward_loop_worker_0 (Ray has 1 of 8 CPUs and 0 of 2 GPUs free)"
    if not begun:
        assert told.reason == f"the run has not started within skpo.start_timeout_s=0.5 s: it waits for {waits}"
        assert capsys.readouterr().out == f"note: the start waits for {waits}\n"


def test_the_start_is_over_when_the_metrics_file_is_opened_anew(tmp_path: Path) -> None:
    from recipe.skpo.output.metrics import MetricsFile

    config = OmegaConf.create({"output_dir": str(tmp_path)})
    for resumed_at in (0, 3):  # the second launch finds the file of the first
        begun = ending.begun(config)
        assert not begun()
        MetricsFile(tmp_path / "metrics.jsonl", resumed_at).log({"x": 1.0}, 3)
        assert begun()


def test_stopping_from_another_thread_interrupts_the_main_one() -> None:
    here = Ending()
    with here.handling(), pytest.raises(KeyboardInterrupt):
        threading.Timer(0.05, here.stop, ["a reward worker died"]).start()
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) != here._note
    with pytest.raises(SystemExit) as left:
        here.leave("the same command resumes from step 4")
    assert left.value.code == 1


def test_our_errors_are_sentences_of_the_run() -> None:
    assert all(issubclass(kind, RunError) for kind in (BatchError, RolloutError))
    assert not issubclass(ConfigError, RunError)


# ---------------------------------------------------------------- what is left


def test_what_a_node_of_ray_leaves_is_ended_with_it(tmp_path: Path, monkeypatch) -> None:
    """An engine whose server was killed with the node; other children of the command are none of its business."""
    program = Path(shutil.copy(str(shutil.which("bash")), tmp_path / "raylet"))
    node = subprocess.Popen([program, "-c", "(trap '' TERM; sleep 1000; true) & wait"])
    other = subprocess.Popen(["sleep", "1000"])
    below: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 20
        while len(below) < 2 and time.monotonic() < deadline:
            below = psutil.Process(node.pid).children(recursive=True)
            time.sleep(0.05)
        assert len(below) == 2
        monkeypatch.setattr(ray, "shutdown", lambda: (node.kill(), node.wait()))
        monkeypatch.setattr(ending, "_END_S", 2.0)
        ending.shut_down()
        assert not any(process.is_running() for process in below), "gone, not only told to go"
        assert other.poll() is None
    finally:
        for process in (node, other, *below):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        other.wait()
