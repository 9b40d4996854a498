"""Cleaning /dev/shm: what this run made and nobody uses, and nothing else."""

import mmap
import os
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest

from recipe.skpo.cpu.shared_memory import SHARED_MEMORY, leftover_segments, remove_segments, segments


def _segment(folder: Path, name: str, mode: int = 0o600) -> Path:
    path = folder / name
    path.write_bytes(bytes(mmap.PAGESIZE))
    path.chmod(mode)
    return path


def test_only_new_segments_of_the_two_kinds_are_left_over(tmp_path: Path) -> None:
    _segment(tmp_path, "psm_before")
    before = segments(tmp_path)
    new = [_segment(tmp_path, "psm_new"), _segment(tmp_path, "verl_weights_new")]
    _segment(tmp_path, "plasma_new")
    assert before == {"psm_before"}
    assert leftover_segments(before, tmp_path) == new
    assert remove_segments(leftover_segments(before, tmp_path)) == new
    assert {path.name for path in tmp_path.iterdir()} == {"psm_before", "plasma_new"}


@pytest.mark.parametrize("mapped", [True, False])
def test_a_segment_in_use_stays(tmp_path: Path, mapped: bool) -> None:
    path = _segment(tmp_path, "psm_in_use")
    with path.open("r+b") as file:
        user = mmap.mmap(file.fileno(), 0) if mapped else os.fdopen(os.dup(file.fileno()))
    with user:
        assert leftover_segments(set(), tmp_path) == [] == remove_segments([path])
    assert remove_segments(leftover_segments(set(), tmp_path)) == [path]


@pytest.mark.parametrize("why", ["of another user", "others may open it", "a link", "another name"])
def test_what_may_be_somebody_elses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A process of another user could hold a segment that it may open, and we cannot look into that."""
    path = tmp_path / "psm_theirs"
    if why == "a link":
        path.symlink_to(_segment(tmp_path, "valuable"))
    else:
        path = _segment(tmp_path, "valuable" if why == "another name" else path.name, 0o666 if "open" in why else 0o600)
    if why == "of another user":
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert leftover_segments(set(), tmp_path) == []
    assert remove_segments([path]) == []


def test_a_segment_that_vanishes_is_not_counted(tmp_path: Path) -> None:
    path = _segment(tmp_path, "psm_gone")
    leftover = leftover_segments(set(), tmp_path)
    path.unlink()
    assert remove_segments(leftover) == []


def test_no_folder_no_segments(tmp_path: Path) -> None:
    assert segments(tmp_path / "absent") == set()


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm here")
def test_a_real_segment_is_found_once_its_process_has_closed_it() -> None:
    """The real thing, by its own path only: other runs may be at work on this machine."""
    before = segments()
    segment = shared_memory.SharedMemory(create=True, size=mmap.PAGESIZE)
    resource_tracker.unregister(segment._name, "shared_memory")  # type: ignore[attr-defined]  # as when killed
    path = SHARED_MEMORY / segment.name
    try:
        assert path not in leftover_segments(before)
        segment.close()
        assert path in leftover_segments(before)
        assert remove_segments([path]) == [path]
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_nothing_is_left_over_while_a_process_of_ours_keeps_its_files_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def secret(process: Path) -> set[str]:
        if process.name == str(os.getpid()):
            raise PermissionError(process)
        return set()

    _segment(tmp_path, "psm_perhaps_in_use")
    monkeypatch.setattr("recipe.skpo.cpu.shared_memory._mapped_files", secret)
    assert leftover_segments(set(), tmp_path) == []
