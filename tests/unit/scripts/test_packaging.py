"""What pyproject.toml, requirements/, Dockerfile and the workflows say about each other and about the code."""

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import recipe.skpo

ROOT = Path(__file__).resolve().parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(
    r'([a-z0-9][a-z0-9.-]*)==([0-9][^ ;]*)(?: ; platform_machine == "x86_64")?(?: --hash=sha256:[0-9a-f]{64})+'
)


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text().replace(" \\\n   ", "")
    found = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip() or line.startswith("    #"):
            continue
        match = PIN.fullmatch(line)
        assert match, f"{name}: {line!r} is not a plain pin with its hashes"
        found[match[1]] = match[2]
    return found


# --- the package


def test_version_is_written_once_and_released_versions_have_an_entry():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "recipe.skpo.__version__"}
    version = recipe.skpo.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(("name", "value"), PYPROJECT["project"]["scripts"].items())
def test_console_scripts_are_commands(name, value, capsys, monkeypatch):
    command = EntryPoint(name, value, "console_scripts").load()
    monkeypatch.setattr("sys.argv", [name, "--help"])
    try:
        code = command()
    except SystemExit as stopped:
        code = stopped.code
    assert code in (0, None) and capsys.readouterr().out


def test_entry_points_are_the_plugin_seams_of_verl_and_vllm():
    entry_points = PYPROJECT["project"]["entry-points"]
    assert entry_points["verl.plugins"] == {"skpo_cpu": "recipe.skpo.cpu.verl_plugin"}
    assert entry_points["vllm.general_plugins"] == {"skpo_cpu": "recipe.skpo.cpu.vllm_plugin:register"}


def test_recipe_is_a_namespace_package_that_is_found():
    from setuptools import find_namespace_packages

    assert not (ROOT / "recipe/__init__.py").exists()
    options = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    found = find_namespace_packages(str(ROOT), include=options["include"])
    assert options["namespaces"] is True and "recipe.skpo" in found
    assert not {name.split(".")[0] for name in found} & {"tests", "scripts", "docs", "requirements"}


# --- the pins


@pytest.mark.parametrize(("name", "extra"), [("cpu.txt", "cpu"), ("cuda.txt", "cuda")])
def test_requirements_are_pins_of_what_the_project_declares_and_name_no_place(name, extra):
    text, pinned = (ROOT / "requirements" / name).read_text(), pins(name)
    assert len(pinned) > 200
    assert not re.search(r"://| @ |--find-links|index-url|(^|\s)/\w", text), "a place, or an absolute path"
    groups = PYPROJECT["project"]["optional-dependencies"]
    for requirement in map(
        Requirement, [*PYPROJECT["project"]["dependencies"], *groups[extra], *groups["dev"], *groups["docs"]]
    ):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (
            f"{requirement} is pinned to {version}: run requirements/compile.sh"
        )


def test_cpu_pins_hold_no_accelerator_build_and_the_tools_of_the_gpu_pins():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert cpu["torch"].endswith("+cpu")
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-", "cupy", "flash"))]
    assert not {"vllm", "torchvision", "torchaudio", "torchcodec"} & cpu.keys()
    # The build tool is bounded by vLLM on GPUs.
    for name in {Requirement(line).name for line in PYPROJECT["project"]["optional-dependencies"]["dev"]} - {
        "setuptools"
    }:
        assert cpu[name] == cuda[name]


def test_required_verl_names_the_release_that_is_pinned():
    text = (ROOT / "recipe/skpo/REQUIRED_VERL.txt").read_text()
    fields = dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))
    release = pins("cpu.txt")["verl"]
    # What verl-recipe's install_verl.sh reads.
    assert fields["MODE"] == "pinned_tag" and fields["TAG"] == f"v{release}" and len(fields["COMMIT"]) == 40
    assert fields["PIP_INSTALL"] == f"pip install verl=={release}"
    assert pins("cuda.txt")["verl"] == pins("cpu.txt")["verl"]


# --- uv, the container and the workflows


def test_the_platforms_exclude_each_other_and_torch_for_cpus_has_its_index():
    settings = PYPROJECT["tool"]["uv"]
    assert settings["conflicts"] == [[{"extra": "cpu"}, {"extra": "cuda"}]]
    (index,) = settings["index"]
    assert index["explicit"] and settings["sources"]["torch"] == {"index": index["name"], "extra": "cpu"}
    assert pins("uv.txt").keys() == {"uv"}


def files_in(command: str) -> set[str]:
    """Words of a command that are files of the project."""
    return set(
        re.findall(r"(?<![\w./-])(?:(?:scripts|requirements|tests|docs)/[\w./*-]+|\w+\.(?:sh|toml|md))", command)
    )


@pytest.mark.parametrize("path", ["Dockerfile", *sorted(map(str, (ROOT / ".github/workflows").glob("*.yml")))])
def test_container_and_workflows_name_files_that_exist(path):
    text = (ROOT / path).read_text()
    named = files_in(text)
    assert named
    assert all(list(ROOT.glob(name)) for name in named), named


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_may_only_read_and_pin_what_they_use(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
