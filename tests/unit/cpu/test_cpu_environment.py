"""`environment` and `apply_environment`: what a CPU run needs, and whose value wins."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from recipe.skpo.cpu import (
    VERL_PLUGIN_MODULE,
    _vllm_problems,
    _why_not_loaded,
    apply_environment,
    check_active,
    environment,
)
from tests.conftest import REPOSITORY


@pytest.fixture
def variables() -> Iterator[None]:
    """Let a test set variables freely, starting without any of ours."""
    before = dict(os.environ)
    for name in [*environment(2, 1), "CUDA_VISIBLE_DEVICES", "VERL_USE_EXTERNAL_MODULES"]:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_numbers_end_up_in_the_variables() -> None:
    env = environment(num_threads=3, kv_cache_gib=2)
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert 1 <= int(env["TQ_NUM_THREADS"]) <= 3
    assert env["VERL_PLATFORM"] == "cpu"


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        environment(*arguments)


def test_unset_and_empty_variables_are_filled_and_a_users_value_wins(variables: None) -> None:
    env = environment(2, 1)
    os.environ |= {"VERL_PLATFORM": "", "OMP_NUM_THREADS": "7"}
    assert apply_environment(env) == {name: os.environ[name] for name in env} == env | {"OMP_NUM_THREADS": "7"}
    assert "VERL_USE_EXTERNAL_MODULES" not in os.environ


def test_another_platform_is_a_conflict_and_changes_nothing(variables: None) -> None:
    os.environ["VERL_PLATFORM"] = "nvidia"
    with pytest.raises(RuntimeError, match="VERL_PLATFORM=nvidia"):
        apply_environment(environment(2, 1))
    assert "OMP_NUM_THREADS" not in os.environ


def test_only_an_empty_cuda_visible_devices_is_removed(variables: None) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    apply_environment(environment(2, 1))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    apply_environment(environment(2, 1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_plugin_goes_before_a_users_external_modules(variables: None) -> None:
    os.environ["VERL_USE_EXTERNAL_MODULES"] = f"theirs,{VERL_PLUGIN_MODULE}"
    apply_environment(environment(2, 1))
    assert os.environ["VERL_USE_EXTERNAL_MODULES"] == f"{VERL_PLUGIN_MODULE},theirs"


def test_check_says_nothing_on_another_platform(variables: None) -> None:
    check_active()


def test_package_imports_the_standard_library_only() -> None:
    """Plugins are loaded through it while verl and vLLM are half imported."""
    script = "import sys, recipe.skpo.cpu; print({'torch', 'verl', 'vllm', 'ray', 'psutil'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_policy_that_leaves_our_plugin_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "theirs, others")
    assert _why_not_loaded() == "VERL_USE_EXTERNAL_PLUGINS='theirs, others' leaves out 'skpo_cpu'"


def test_a_missing_entry_point_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr("recipe.skpo.cpu.metadata.entry_points", lambda group: [])
    assert _why_not_loaded() == "there is no entry point 'skpo_cpu' in the group verl.plugins"
    assert _vllm_problems() == ["no entry point 'skpo_cpu' in the group vllm.general_plugins"]
