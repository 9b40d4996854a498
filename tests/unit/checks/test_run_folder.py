"""The folder of a run: one command at a time, of its owner, without ways out of it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipe.skpo.checks import run_folder
from recipe.skpo.checks.run_folder import HELD, LINKS, LOCK, Holder, check_owner, locked, run_folders
from recipe.skpo.errors import ConfigError

HOLDER = """\
import os, subprocess, sys, time
from pathlib import Path
from recipe.skpo.checks.run_folder import locked

with locked(Path(sys.argv[1])):
    # As Ray is started, with everything inherited that can be; and a fork.
    child = subprocess.Popen(["sleep", "300"], close_fds=False)
    forked = os.fork()
    if not forked:
        time.sleep(300)
    print(child.pid, forked, flush=True)
    time.sleep(300)
"""


def test_a_killed_command_frees_its_folder_while_its_children_live(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    children: list[int] = []
    try:
        assert holder.stdout is not None
        children = [int(pid) for pid in holder.stdout.readline().split()]
        with pytest.raises(ConfigError) as error, locked(tmp_path):
            pass
        started = f"the command with process {holder.pid} on {os.uname().nodename}, started 20"
        assert f"{tmp_path} is in use by {started}" in str(error.value) and str(error.value).isprintable()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert len(children) == 2 and all(psutil.pid_exists(pid) for pid in children)
        deadline = time.monotonic() + 10  # a child that was just forked may not have dropped the lock yet
        while True:
            try:
                with locked(tmp_path):
                    assert Holder.read(tmp_path / LOCK) == Holder.here()
                break
            except ConfigError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        for pid in (holder.pid, *children):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        holder.wait()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


HERE = Holder.here()
ENDED = Holder(HERE.host, HERE.pid, HERE.started - 1000)
ELSEWHERE = Holder("elsewhere", 1, 0.0)


@pytest.mark.parametrize(
    ("content", "free"),
    [(None, True), (ENDED, True), (HERE, False), (ELSEWHERE, False), ("", False)],
    ids=["nobody", "ended", "running", "another machine", "not readable"],
)
def test_without_locks_a_file_keeps_others_out(tmp_path: Path, no_locks, content, free: bool) -> None:
    if content is not None:
        (tmp_path / HELD).write_text(content and json.dumps(vars(content)))
    if free:
        with locked(tmp_path):
            assert Holder.read(tmp_path / HELD) == HERE
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on .*if that command is over, remove"):
                locked(tmp_path).__enter__()
        assert not (tmp_path / HELD).exists()
    else:
        with pytest.raises(ConfigError, match=f"is in use by .*; if that command is over, remove {tmp_path / HELD}$"):
            locked(tmp_path).__enter__()


def test_what_stays_empty_is_removed(tmp_path: Path) -> None:
    with run_folders(tmp_path / "a/b", tmp_path / "c/d"):
        assert (tmp_path / "a/b" / LOCK).exists() and (tmp_path / "c/d" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with run_folders(tmp_path / "a/b", tmp_path / "a/b/checkpoints"):
        (tmp_path / "a/b/config.yaml").touch()
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == [LOCK, "config.yaml"]


def test_checkpoints_elsewhere_are_locked_too(tmp_path: Path) -> None:
    with (
        run_folders(tmp_path / "one", tmp_path / "shared"),
        pytest.raises(ConfigError, match=f"{tmp_path}/shared is in use"),
        run_folders(tmp_path / "two", tmp_path / "shared"),
    ):
        pass


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("../elsewhere")
    with pytest.raises(ConfigError) as error, run_folders(tmp_path / "run", tmp_path / "run/checkpoints"):
        pass
    assert str(error.value).startswith(f"output_dir: {tmp_path}/run/{name} is a symbolic link to ../elsewhere, and no")
    assert not (tmp_path / "elsewhere").exists()


def test_the_lock_is_no_way_out_either(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "outside")
    with pytest.raises(OSError), run_folders(tmp_path / "run", tmp_path / "run/checkpoints"):
        pass
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_owner(tmp_path)
    real = os.fstat

    def mapped(descriptor: int) -> os.stat_result:
        """What this process makes belongs to user 4711 on this file system."""
        return os.stat_result(4711 if index == 4 else value for index, value in enumerate(real(descriptor)))

    monkeypatch.setattr(run_folder.os, "fstat", mapped)
    with pytest.raises(
        ConfigError, match=rf"^output_dir: {tmp_path} belongs to user \d+, this command runs as user 47"
    ):
        check_owner(tmp_path)
