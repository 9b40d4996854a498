"""Child processes with torch, transformers and Ray imported already: a script in one takes what is its own.

A new interpreter spends four seconds on those imports. The children are forked from one server, which imports nothing
of verl, of vLLM or of this project.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


@dataclass(frozen=True)
class Done:
    """What a script printed, and its exit code."""

    returncode: int | None
    stdout: str
    stderr: str


def _execute(script: str, arguments: Sequence[str], variables: dict[str, str], folder: str) -> None:
    """Run a script as ``python -c`` would; in the child."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["-c", *arguments]
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    code = 0
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no thread of the script is waited for


class Preloaded:
    """Starts scripts in forked processes."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.support.heavy_imports"])

    def run(self, script: str, *arguments: str, variables: dict[str, str], timeout: float = 120) -> Done:
        """Run a script to its end; an exit code of None means that it was stopped after ``timeout`` seconds."""
        with TemporaryDirectory() as folder:
            child: Any = self.context.Process(target=_execute, args=(script, arguments, variables, folder))
            child.start()
            child.join(timeout)
            code = child.exitcode
            if code is None:
                child.kill()
            printed = [(Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return Done(code, *printed)

    def run_ranks(self, module: str, *arguments: Sequence[str], timeout: float = 280) -> None:
        """Run ``python -m module`` once per tuple of arguments, side by side; raises AssertionError if one fails."""
        script = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"

        def rank(words: Sequence[str]) -> Done:
            return self.run(script, *words, variables=dict(os.environ), timeout=timeout)

        with ThreadPoolExecutor(len(arguments)) as threads:
            for done in threads.map(rank, arguments):
                assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
