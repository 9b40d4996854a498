"""All measurements, or one of them: ``python -m benchmarks [NAME [OPTIONS]]``.

    rollout    SKPO, GRPO and two-batch SKPO on clusters in virtual time, at the paper's shape among others
    engine     the same methods on this machine's vLLM, with the embedded model and task
    recipe     the recipe's own Python against its limits
    scale      how the cost of each part grows, and its share of a large step
    update     one actor update with and without share_prefixes
    slopes     log-probs of a micro-batch with and without entropy slopes
    threads    an actor update beside an idle thread pool, by number of threads and OpenMP's wait policy
    programs   answers to programming problems judged per second

Each prints Markdown tables and writes every single number to outputs/benchmarks/<name>.json; ``--help`` behind a name
lists its options.  Without a name all run in turn with their defaults, each in a process of its own.
"""

import importlib
import subprocess
import sys
from collections.abc import Sequence

PARTS = ("rollout", "engine", "recipe", "scale", "update", "slopes", "threads", "programs")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code, of the first part that failed if all are run."""
    if argv and argv[0] in PARTS:
        return int(importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:]))
    if argv:
        print(__doc__)
        return 0 if argv[0] in ("-h", "--help") else 2
    codes = []
    for part in PARTS:
        print(f"\n## {part}\n", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", "benchmarks", part]).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
