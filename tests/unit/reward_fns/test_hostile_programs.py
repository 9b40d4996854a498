"""Hostile programs end within their limits, leave nothing, reach nothing outside, and never pass."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from reward_fns import code_judge
from reward_fns.code_judge import WALL, RunOptions
from tests.support.hostile_programs import PROGRAMS, Hostile

OPTIONS = RunOptions(seconds=0.5, memory_mb=256)
MARK = f"skpo-mark-{os.getpid()}"
PLACES = ("/tmp", "/dev/shm", "/var/tmp", "/usr", "/etc", "/")


class Outside(NamedTuple):
    """What the programs must not touch."""

    folder: Path
    process: subprocess.Popen[bytes]
    listeners: list[socket.socket]


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Iterator[Outside]:
    code_judge.close()
    folder = tmp_path_factory.mktemp("home")
    (folder / "secret").write_text(MARK, encoding="utf-8")
    port, local = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    local.bind(f"\0{MARK}")
    local.listen()
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(["sleep", "1000"]) as process, port, local:
        patch.setenv("SOME_API_KEY", MARK)
        for listener in (port, local):
            listener.setblocking(False)
        # Started before the first program, whose time is measured.
        code_judge.ready(OPTIONS)
        yield Outside(folder, process, [port, local])
        process.kill()
    code_judge.close()


def filled(text: str, outside: Outside) -> str:
    places = {
        "@FOLDER": str(outside.folder),
        "@PID": str(outside.process.pid),
        "@PORT": str(outside.listeners[0].getsockname()[1]),
        "@SOCKET": MARK,
        "@MARK": MARK,
    }
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def server_processes() -> list[psutil.Process]:
    process = code_judge._judge.server("namespaces").process
    return psutil.Process(process.pid).children(recursive=True)


def segments() -> str:
    return Path("/proc/sysvipc/shm").read_text(encoding="ascii")


@pytest.mark.parametrize(
    "hostile",
    [pytest.param(item, id=f"{group}: {item.tries}") for group, items in PROGRAMS.items() for item in items],
)
def test_a_hostile_program_ends_leaves_nothing_and_never_passes(hostile: Hostile, outside: Outside) -> None:
    before, start = segments(), time.monotonic()
    verdict = code_judge.verdict(filled(hostile.program, outside), hostile.tests, OPTIONS)
    assert time.monotonic() - start < WALL * OPTIONS.seconds + 4
    assert verdict in hostile.ends and verdict != "passed"
    # The first ones are the server, the last the guard, which may need a moment to end.
    until = time.monotonic() + 2
    while len(server_processes()) > 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(server_processes()) == 2
    assert outside.process.poll() is None and psutil.Process(outside.process.pid).status() == "sleeping"
    assert os.listdir(outside.folder) == ["secret"]
    assert (outside.folder / "secret").read_text(encoding="utf-8") == MARK
    assert segments() == before
    assert not [name for place in PLACES for name in os.listdir(place) if MARK in name]
    for listener in outside.listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_table_is_as_large_as_the_documents_say() -> None:
    tries = [item.tries for items in PROGRAMS.values() for item in items]
    assert len(tries) == len(set(tries)) >= 60
