"""The folder of a run: its owner's alone, short enough for sockets, and removed once nobody uses it."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from recipe.skpo.isolation import folder as folders

HOLDER = """
import os, sys, time
from pathlib import Path
from recipe.skpo.isolation import folder
made = folder.make(False, [sys.argv[1]])
if sys.argv[2] == "fork" and os.fork():
    os._exit(0)
print(made, os.getpid(), flush=True)
time.sleep(60)
"""
UUID = "0026109c-c055-4ea5-b7f0-e85de6fe8176"


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A short folder, used by its relative name because pytest's own are too long for a socket."""
    monkeypatch.chdir(tmp_path_factory.mktemp("base"))
    yield "."
    for folder in list(folders._locks):
        folders.remove(folder)


def age(path: Path) -> Path:
    """Make a path old enough to be swept."""
    os.utime(path, (time.time() - 3600,) * 2, follow_symlinks=False)
    return path


def test_only_its_owner_can_enter_whatever_the_umask(base: str) -> None:
    before = os.umask(0)
    try:
        made = [folders.make(True, [base]) for _ in range(2)]
    finally:
        os.umask(before)
    assert made[0] != made[1]
    for folder in made:
        assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "lock").stat().st_mode & 0o777 == 0o600
    folders.remove(made[0])
    assert not made[0].exists() and made[1].exists()


def test_it_is_removed_while_the_last_processes_still_write(base: str) -> None:
    made, end = folders.make(False, [base]), time.monotonic() + 0.5

    def write() -> None:
        while time.monotonic() < end and made.exists():
            with suppress(OSError):
                (made / "ray").mkdir(exist_ok=True)
                (made / "ray/logs").mkdir(exist_ok=True)
                (made / f"ray/logs/{time.monotonic_ns()}").touch()
                (made / UUID).touch()

    writer = threading.Thread(target=write)
    writer.start()
    folders.remove(made)
    writer.join()
    assert not made.exists()


def test_what_cannot_be_removed_in_time_is_left_to_the_next_start(base: str, monkeypatch) -> None:
    made = folders.make(False, [base])
    (made / "ray").mkdir()
    with monkeypatch.context() as busy:
        busy.setattr(folders, "_END_S", 0.0)
        busy.setattr(folders, "_remove_all_but_lock", lambda folder: True)
        folders.remove(made)
    assert made.exists() and folders.sweep([base]) == []
    age(made)
    assert folders.sweep([base]) == [made] and not made.exists()


@pytest.mark.parametrize("holds_ray", [True, False])
def test_the_longest_socket_fits_and_a_longer_base_is_passed_over(base: str, holds_ray: bool) -> None:
    for length in range(1, 80):
        first = Path("/".join("x" * 40)[:length].rstrip("/"))
        first.mkdir(parents=True, exist_ok=True)
        made = folders.make(holds_ray, [str(first), base])
        socket_path = str(made) + folders._SOCKETS[holds_ray]
        assert len(socket_path) <= 107
        fits = len(str(first)) + 14 + len(folders._SOCKETS[holds_ray]) <= 107
        assert made.parent == (first if fits else Path(base))
        Path(socket_path).parent.mkdir(parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(socket_path)


@pytest.mark.parametrize("bad", ["/nowhere/at/all", "x" * 60])
def test_without_any_folder_one_line_says_what_to_do(base: str, bad: str) -> None:
    Path("x" * 60).mkdir()
    with pytest.raises(folders.FolderError) as error:
        folders.make(True, [bad])
    assert str(error.value) == (
        f"TMPDIR: no folder for this run's sockets, since {bad} cannot be written or are longer than 25 characters; "
        f"set TMPDIR to a short folder that you can write"
    )


def test_another_node_makes_the_folder_by_its_name(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(folders.VARIABLE, "skpo-abcdefgh")
    folder_of("skpo-12345678")
    assert folders.enter() == folders.enter() == Path("skpo-abcdefgh")
    assert Path("skpo-abcdefgh").stat().st_mode & 0o777 == 0o700
    assert not Path("skpo-12345678").exists(), "left there by a run before"
    assert folders.socket_address("ipc:///tmp/weights.sock") == "ipc://skpo-abcdefgh/weights.sock"


@pytest.mark.parametrize("spoil", ["open to others", "a link", "another owner's", "no variable"])
def test_a_folder_that_others_could_enter_is_not_used(base: str, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    monkeypatch.setenv(folders.VARIABLE, "skpo-abcdefgh")
    Path("real").mkdir(mode=0o700)
    if spoil == "open to others":
        Path("skpo-abcdefgh").mkdir(mode=0o755)
    elif spoil == "a link":
        Path("skpo-abcdefgh").symlink_to("real")
    elif spoil == "another owner's":
        Path("skpo-abcdefgh").mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        monkeypatch.delenv(folders.VARIABLE)
    with pytest.raises(folders.FolderError, match=r"only this user can enter|is not set in this"):
        folders.enter()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_cannot_take_the_name_of_a_socket_first(base: str) -> None:
    """In a folder open to all, as /tmp, he binds it; the receiver connects to him and unpickles what he sends."""
    made = folders.make(False)
    shared = made.parent / f"{made.name}-shared.sock"

    def binds(path: Path) -> bool:
        child = os.fork()
        if child == 0:
            try:
                os.setgid(65534)
                os.setuid(65534)
                listener_at(path)
            except PermissionError:
                os._exit(13)
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    try:
        assert binds(shared) and not binds(made / "weights.sock")
    finally:
        shared.unlink()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_runs_folder_is_removed_once_no_process_of_it_lives(base: str, how: str) -> None:
    """A process that the killed one had forked, such as an engine without its server, still uses the folder."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, base, how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert holder.stdout is not None
    name, pid = holder.stdout.readline().split()
    (Path(name) / "ray").mkdir()
    age(Path(name))
    assert folders.sweep([base]) == [] and Path(name).exists()
    os.kill(int(pid), 9)
    holder.wait()
    deadline = time.monotonic() + 10
    while not (removed := folders.sweep([base])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [path.name for path in removed] == [Path(name).name] and not Path(name).exists()


def listener_at(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def dead_socket(name: str) -> Path:
    listener_at(Path(name)).close()
    return age(Path(name))


def folder_of(name: str, lock: bool = True) -> Path:
    Path(name).mkdir(mode=0o700)
    if lock:
        (Path(name) / "lock").touch(0o600)
    return age(Path(name))


KEPT: dict[str, Callable[[], object]] = {
    "a young folder": lambda: os.utime(folder_of("skpo-abcdefgh")),
    "a folder without a lock": lambda: folder_of("skpo-abcdefgh", lock=False),
    "a folder of another name": lambda: folder_of("skpo-results"),
    "a folder open to others": lambda: age(folder_of("skpo-abcdefgh").rename("x")) and os.chmod("x", 0o755),
    "a link to a folder": lambda: age(Path("skpo-abcdefgh")) if Path("skpo-abcdefgh").symlink_to("elsewhere") else None,
    "a file of the name of a socket": lambda: age(Path(UUID)) if Path(UUID).touch() is None else None,
    "a socket of another name": lambda: dead_socket("mine.sock"),
    "a young socket": lambda: os.utime(dead_socket(UUID)),
}


@pytest.mark.parametrize("name", KEPT)
def test_nothing_else_is_removed(base: str, name: str) -> None:
    kept = KEPT[name]()
    there = sorted(os.listdir())
    assert folders.sweep([base, base, "/nowhere"]) == []
    assert sorted(os.listdir()) == there, kept


def test_a_socket_of_vllm_is_removed_when_nobody_listens(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = dead_socket(UUID), Path(UUID.replace("0", "a"))
    with listener_at(alive):
        age(alive)
        with monkeypatch.context() as other:
            other.setattr(os, "getuid", lambda: 12345)
            assert folders.sweep([base]) == []
        assert folders.sweep([base]) == [Path(base) / dead] and alive.exists()


def test_the_name_of_a_run_is_not_to_be_guessed(base: str) -> None:
    names = {folders.make(False, [base]).name for _ in range(20)}
    assert len(names) == 20 and all(re.fullmatch(r"skpo-[a-z0-9_]{8}", name) for name in names)
