"""An actor update beside another process's idle thread pool: what threads and OpenMP's wait policy cost.

On the CPU platform vLLM and the actor share the cores and take turns.  Here a second process computes once, as vLLM
does, and then waits with its pool of threads, while ``benchmarks.update`` (one prompt, shared) runs.  Reported per
number of threads and wait policy, which both processes get; ``alone`` has no second process.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks import embedded
from benchmarks.report import parser_of, table, write_json

_IDLE_POOL = """
import sys, torch
a = torch.rand(512, 512)
for _ in range(50):
    a = a @ a / 512
print("ready", flush=True)
sys.stdin.read()
"""


def update_seconds(threads: int, policy: str, beside: bool, options: Sequence[str]) -> float:
    """Measure the median seconds of an update with shared prompts, beside an idle pool of threads or alone."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy}
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "update.json"
        if beside:
            pipe = subprocess.PIPE
            command = [sys.executable, "-c", _IDLE_POOL]
            # Leaving it closes its standard input, at which it ends.
            pool = stack.enter_context(subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, encoding="utf-8"))
            assert pool.stdout is not None
            pool.stdout.readline()
        command = [sys.executable, "-m", "benchmarks", "update", "--out", str(out), f"--threads={threads}", *options]
        subprocess.run(command, env=env, check=True, capture_output=True)
        return median(json.loads(out.read_text(encoding="utf-8"))["seconds"]["shared prompts"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = parser_of("threads", __doc__ or "")
    parser.add_argument("--model", default="", help="checkpoint folder, or random (default: the embedded model)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(argv)
    model = options.model or embedded.model_folder()
    passed = [f"--model={model}", f"--repeats={options.repeats}", "--prompts=1", "--shared-only"]
    seconds = {
        f"{threads} threads, {name}": update_seconds(threads, policy, beside, passed)
        for threads in options.threads
        for name, policy, beside in (
            ("alone", "PASSIVE", False),
            ("beside a pool that sleeps", "PASSIVE", True),
            ("beside a pool that spins", "ACTIVE", True),
        )
    }
    print(table(["threads of each process", "seconds"], [[name, f"{value:.2f}"] for name, value in seconds.items()]))
    write_json(options.out, {"repeats": options.repeats, "seconds": seconds})
    return 0
