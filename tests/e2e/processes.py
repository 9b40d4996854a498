"""What a run is for the system: its processes, their memory, and what they leave in shared memory."""

import os
import time
from collections import Counter
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; those that end meanwhile are left out."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident_bytes(processes: list[psutil.Process]) -> dict[str, int]:
    """Memory by program, a page that several processes share divided among them (PSS)."""
    total: Counter[str] = Counter()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            # Ray titles its actors "ray::WorkerDict.update_actor".
            program = process.name().split(".")[0]
        except (OSError, psutil.NoSuchProcess):
            continue
        total[program] += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return dict(total)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie does not."""
    running = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
        except psutil.NoSuchProcess:
            continue
    return running


def seconds_until_gone(processes: list[psutil.Process], limit: float) -> float:
    """Seconds until none of the processes runs any more.

    Raises:
        AssertionError: some still do after ``limit`` seconds; they are named.
    """
    started = time.monotonic()
    while running := alive(processes):
        if time.monotonic() - started > limit:
            raise AssertionError(f"still there after {limit:g} s: {[' '.join(p.cmdline())[:80] for p in running]}")
        time.sleep(0.1)
    return time.monotonic() - started


def shared_memory_files() -> set[str]:
    """Names in /dev/shm that belong to this user."""
    return {entry.name for entry in os.scandir(SHARED_MEMORY) if entry.stat().st_uid == os.getuid()}
