"""How a run ends early: by a signal, by a process of it that died, by a start that never finishes.

The command's last line says in one sentence what happened and how to continue.  ``Ending`` turns signals into an exit,
``Watch`` looks after the run's processes from the command's own.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import psutil
from omegaconf import DictConfig

from data_prep.untrusted import error_line
from recipe.skpo.errors import ConfigError, describe
from recipe.skpo.output.console import say
from recipe.skpo.output.run_folder import marked_step

logger = logging.getLogger(__name__)

_LOOK_S = 3.0
"""Seconds between two looks at the processes."""

_GRACE_S = 10.0
"""Seconds in which the run may end by itself, with what it knows, after one of its processes died."""

_LAST_LOOK_S = 1.0
"""Seconds in which a process answers once the run has failed; a dead one's answer comes from Ray, at once."""

_END_S = 5.0
"""Seconds that processes get to end by themselves after Ray was shut down."""

_NOTE_S = 60.0
"""Seconds after which a start says what it waits for."""

_ON_PURPOSE = ("ray.kill", "references to the actor were removed", "owner has died")
"""Parts of Ray's message about an actor that the run itself ended."""


def last_words(error: BaseException, died: str | None, config: DictConfig) -> str:
    """Compose the last line of a run that an error ended.

    Args:
        error: raised by the run.
        died: the process that ``Watch`` found dead, which the error itself may not name.
        config: of the run.
    """
    what = describe(error)
    if died is not None and died not in what:
        what = f"{died}: {what}"
    why = "; its log, or the kernel's (dmesg) if it was killed for memory, says why" if " died" in what else ""
    return error_line(f"{what}{why}; {way_on(config)}")


def way_on(config: DictConfig) -> str:
    """Say how to continue after an early end: which checkpoint counts, and what the same command does."""
    trainer = config.trainer
    try:
        step = marked_step(Path(trainer.default_local_dir))
    except (ConfigError, OSError):
        return "the same command says which checkpoint it resumes from"
    if step is None:
        return "nothing has been saved yet, so the same command starts from the beginning"
    other = {"disable": "trainer.resume_mode=disable", "resume_path": "trainer.resume_mode and resume_from_path"}
    without = f" without {other[trainer.resume_mode]}" if trainer.resume_mode in other else ""
    return f"the same command{without} resumes from step {step}"


# ---------------------------------------------------------------- signals


class Ending:
    """The reason for an early end; signal handlers note it and interrupt whatever the main thread waits for."""

    NAMES: ClassVar[dict[int, str]] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}

    def __init__(self) -> None:
        """Start without a reason."""
        self.number: int | None = None
        self.reason: str | None = None
        self.held = False
        """Set while the run is shut down, which nothing may interrupt; it takes a bounded time."""

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        before = {number: signal.getsignal(number) for number in self.NAMES}
        try:
            self.install()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Handle the signals that end a command; again after ``ray.init``, which takes SIGTERM for itself.

        SIGINT and SIGHUP stay ignored where the shell ignores them (``command &`` in a script, ``nohup``).
        """
        for number in self.NAMES:
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.held:
            return
        if self.reason is None and self.number is None:
            self.number = number
        # Of all exceptions the one that Ray lets through from its waits.
        raise KeyboardInterrupt

    def stop(self, reason: str) -> None:
        """End the command from another thread."""
        self.reason = reason
        os.kill(os.getpid(), signal.SIGTERM)

    def leave(self, way_on: str) -> NoReturn:
        """Print the last line and exit: with 1 for the run's own reason, else with 128 plus the signal's number."""
        number = self.number or signal.SIGINT
        what = f"error: {self.reason}" if self.reason else f"stopped by {self.NAMES[number]}"
        # Nobody may be there to read it: after a SIGHUP the terminal is gone.
        with suppress(OSError):
            print(f"{what}; {way_on}", file=sys.stderr, flush=True)
        sys.exit(1 if self.reason else 128 + number)


# ---------------------------------------------------------------- processes


class Watch(threading.Thread):
    """Looks after the run's processes: one that died ends the run, and so does a start that takes too long.

    Some deaths the run notices by itself, at once or at its next call; others, such as a reward worker's or a storage
    unit's, it would wait for.  So every named actor is pinged; a dead one answers with Ray's error.

    Args:
        ending: told when the run is to end.
        begun: whether the start is over.
        start_timeout_s: seconds that the start may take.
    """

    def __init__(self, ending: Ending, begun: Callable[[], bool], start_timeout_s: float) -> None:
        """Prepare the thread; ``start`` begins to look."""
        super().__init__(name="skpo-watch", daemon=True)
        self.ending, self.begun, self.start_timeout_s = ending, begun, start_timeout_s
        self.over = threading.Event()
        self.died: str | None = None
        self._asked: dict[str, Any] = {}
        self._handles: dict[str, Any] = {}
        self._answered: set[str] = set()
        self._gone: set[str] = set()

    def run(self) -> None:
        """Look until ``over`` is set or the run is told to end."""
        started, noted = time.monotonic(), False
        while not self.over.wait(_LOOK_S):
            try:
                self.died = self._look()
            except Exception:  # process border: Ray itself cannot be asked; the run's own calls will say why
                logger.debug("the processes could not be asked", exc_info=True)
                continue
            if self.died is not None:
                if not self.over.wait(_GRACE_S):
                    self.ending.stop(self.died)
                return
            if self.begun():
                started = float("inf")
            waited = time.monotonic() - started
            if waited > self.start_timeout_s:
                limit = f"skpo.start_timeout_s={self.start_timeout_s:g} s"
                self.ending.stop(f"the run has not started within {limit}: it waits for {self._waits_for()}")
                return
            if waited > _NOTE_S and not noted and self._handles.keys() - self._answered:
                noted = True
                say(f"note: the start waits for {self._waits_for()}")

    def end(self, failed: bool) -> None:
        """Stop looking, with a last look if the run failed; a question to a Ray that is gone would start another."""
        self.over.set()
        if not self.is_alive():
            return
        self.join(_LAST_LOOK_S)
        if failed and self.died is None:
            with suppress(Exception):  # process border: Ray may be gone itself
                self.died = self._look(_LAST_LOOK_S)

    def _look(self, seconds: float = 0.0) -> str | None:
        """Return which process died since the last look."""
        import ray
        from ray.exceptions import RayActorError

        spaces = (ray.get_runtime_context().namespace, "transfer_queue")
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name, space = actor["name"], actor["namespace"]
            if space in spaces and name not in self._handles and name not in self._gone:
                with suppress(ValueError):  # it has ended meanwhile
                    self._handles[name] = ray.get_actor(name, space)
        for name, handle in self._handles.items():
            if name not in self._asked:
                self._asked[name] = handle.__ray_ready__.remote()
        questions = list(self._asked.values())
        answered = set(ray.wait(questions, num_returns=len(questions), timeout=seconds)[0]) if questions else set()
        for name in [name for name, question in self._asked.items() if question in answered]:
            question = self._asked.pop(name)
            try:
                ray.get(question)
            except RayActorError as error:
                del self._handles[name]
                self._gone.add(name)
                if not any(said in str(error) for said in _ON_PURPOSE):
                    return describe(error)
            else:
                self._answered.add(name)
        return None

    def _waits_for(self) -> str:
        import ray

        pending = sorted(set(self._handles) - self._answered)
        what = ", ".join(pending[:5]) + (f" and {len(pending) - 5} more" if len(pending) > 5 else "")
        free, total = ray.available_resources(), ray.cluster_resources()
        shares = [f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s" for name in ("CPU", "GPU")]
        return f"{what or 'the model, the vLLM servers or their first weights'} (Ray has {' and '.join(shares)} free)"


class WatchedRunner:
    """The task runner's actor class as ``run_ppo`` uses it; ``ready`` runs between ``ray.init`` and its start."""

    def __init__(self, actor_class: Any, ready: Callable[[], None]) -> None:
        """Wrap a Ray actor class."""
        self.actor_class, self.ready = actor_class, ready

    def options(self, **options: Any) -> "WatchedRunner":
        """Do as Ray's."""
        return WatchedRunner(self.actor_class.options(**options), self.ready)

    def remote(self) -> Any:
        """Do as Ray's."""
        self.ready()
        return self.actor_class.remote()


def begun(config: DictConfig) -> Callable[[], bool]:
    """Check whether the start is over: the trainer reopens its metrics file after the first weight sync."""
    path = Path(config.output_dir) / "metrics.jsonl"

    def state() -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    before = state()
    return lambda: state() not in (before, None)


# ---------------------------------------------------------------- what is left


@contextmanager
def clean_shared_memory(active: bool) -> Iterator[None]:
    """Remove the shared-memory segments that this run leaves behind, however it ends."""
    if not active:
        yield
        return
    from recipe.skpo.cpu.shared_memory import leftover_segments, remove_segments, segments

    before = segments()
    try:
        yield
    finally:
        remove_segments(leftover_segments(before))


def shut_down() -> None:
    """Shut Ray down, and end what its node on this machine had started, directly or not.

    A server that hangs is killed with the node, and its engine, which does not notice, would keep its memory for good.
    Of a cluster that was there before, nothing is a child of this process.
    """
    import ray

    started: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "raylet":
                started += child.children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=_END_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # Shared memory counts as used while they are there.
    psutil.wait_procs(left, timeout=_END_S)


@contextmanager
def shutting_down(watch: Watch) -> Iterator[None]:
    """Shut Ray down at the end of the block, which no signal interrupts; it takes a bounded time."""
    failed = False
    try:
        yield
    except Exception:
        failed = True
        raise
    finally:
        watch.ending.held = True
        try:
            watch.end(failed)
            shut_down()
        finally:
            watch.ending.held = False
