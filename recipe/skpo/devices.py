"""The GPUs of this machine, listed by the NVIDIA driver without importing torch."""

import shutil
import subprocess


def query_gpus(field: str) -> list[str]:
    """Return a field of ``nvidia-smi`` for every NVIDIA GPU; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def list_gpus() -> list[int]:
    """Return the total memory in bytes of every NVIDIA GPU, 0 where it is unknown; empty without a driver."""
    lines = query_gpus("memory.total")
    # Some devices report "[N/A]"; a driver without devices says so in a sentence.
    return [int(line) * 2**20 if line.isdecimal() else 0 for line in lines if line.isdecimal() or line.startswith("[")]


def detect_platform() -> str:
    """Return ``gpu`` if an NVIDIA driver lists a GPU, else ``cpu``."""
    return "gpu" if list_gpus() else "cpu"
