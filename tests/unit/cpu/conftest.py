"""Processes of their own for the tests of the CPU platform: what it changes, it changes for the whole process."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.skpo.cpu import environment
from tests.support.preloaded import Done, Preloaded

REPOSITORY = Path(__file__).resolve().parents[3]

ENTRY_POINTS = """\
[verl.plugins]
skpo_cpu = recipe.skpo.cpu.verl_plugin

[vllm.general_plugins]
skpo_cpu = recipe.skpo.cpu.vllm_plugin:register
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes our entry points visible, so that the tests do not depend on `pip install -e .`."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "skpo_cpu_entry_points-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: skpo-cpu-entry-points\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture(scope="session")
def run_python(installed: Path, preloaded: Preloaded) -> Callable[..., Done]:
    """Run a script in a process of its own, without any variable of a CPU run but those given."""

    def run(script: str, **variables: str) -> Done:
        ours = {*environment(num_threads=1, kv_cache_gib=1), "VLLM_PLUGINS", "CUDA_VISIBLE_DEVICES"}
        ours |= {"VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS"}
        clean = {name: value for name, value in os.environ.items() if name not in ours}
        path = os.pathsep.join([str(REPOSITORY), str(installed)])
        return preloaded.run(script, variables={**clean, "PYTHONPATH": path, **variables})

    return run
