"""scripts/bootstrap.sh with the real uv and pip, and indexes on this machine: one has torch, one does not."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[3]
TORCH, OTHERS = "torch-2.13.0+cpu", ("setuptools-77.0.3", "verl-0.9.1")
NOBODY = "http://127.0.0.1:1/whl/cpu"

BACKEND = """
from pathlib import Path
from zipfile import ZipFile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "small-1.0-py3-none-any.whl", "small-1.0.dist-info"
    with ZipFile(Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


def wheel(folder: Path, name: str) -> str:
    """Write an empty package; returns its pin with the digest of the file."""
    distribution, version = name.split("-")
    path = folder / f"{name}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{distribution}.py", "")
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        archive.writestr(f"{name}.dist-info/METADATA", metadata)
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{distribution}=={version} \\\n    --hash=sha256:{digest}\n    # via small\n"


class Index(SimpleHTTPRequestHandler):
    """Folders of wheels as package indexes."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def environment_with_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the pinned pip, which `python -m venv` may not have."""
    folder = tmp_path_factory.mktemp("pip") / ".venv"
    venv.create(folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    # Importing pip would turn off setuptools' own distutils in this process.
    shutil.copytree(Path(sysconfig.get_path("purelib")) / "pip", packages / "pip")
    return folder


def real_uv() -> str | None:
    beside = Path(sys.prefix).parent / ".uv/bin/uv"
    return shutil.which("uv") or (str(beside) if beside.exists() else None)


@pytest.fixture(params=["uv", "pip"])
def installer(request: pytest.FixtureRequest) -> str:
    if request.param == "uv" and real_uv() is None:
        pytest.skip("there is no uv")
    return request.param


@pytest.fixture
def install(installer: str, served, tmp_path: Path, request: pytest.FixtureRequest):
    """Run the first command of a fresh clone, whose pip knows a package index without torch and nothing else."""
    folder, address = served
    project = tmp_path / "project"
    pins = "".join(wheel(folder / "simple" / name.split("-")[0], name) for name in OTHERS) + wheel(
        tmp_path / "torch", TORCH
    )
    (folder / "whl/cpu").mkdir(parents=True)
    shutil.copytree(tmp_path / "torch", folder / "whl/cpu/torch")
    (project / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/bootstrap.sh", project / "scripts")
    (project / "requirements").mkdir()
    (project / "requirements/cpu.txt").write_text(pins, encoding="utf-8")
    (project / "backend.py").write_text(BACKEND, encoding="utf-8")

    def run(torch_index: str, **changes: str) -> subprocess.CompletedProcess[str]:
        build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        index = f'[[tool.uv.index]]\nname = "pytorch-cpu"\nurl = "{torch_index}"\nexplicit = true\n'
        small = '[project]\nname = "small"\nversion = "1.0"\n'
        (project / "pyproject.toml").write_text(build + small + index, encoding="utf-8")
        if installer == "pip":
            shutil.copytree(request.getfixturevalue("environment_with_pip"), project / ".venv", symlinks=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
        places = {"HOME": str(tmp_path), "UV_CACHE_DIR": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull}
        impatient = {"UV_HTTP_RETRIES": "0", "PIP_RETRIES": "0"}
        given = {"PYTHON": sys.executable, "SKPO_PLATFORM": "cpu", "SKPO_INSTALLER": installer}
        given["PIP_INDEX_URL"] = f"{address}/simple"
        if installer == "uv":
            given["PATH"] = f"{Path(real_uv() or '').parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "scripts/bootstrap.sh"],
            cwd=project,
            env=clean | places | impatient | given | changes,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def installed(project: Path) -> set[str]:
    return {path.stem for path in project.glob(".venv/lib/python3*/site-packages/*.py")} & {"torch", "verl"}


def test_torch_comes_from_pytorchs_index_if_the_package_index_lacks_it(install, served, tmp_path):
    result = install(f"{served[1]}/whl/cpu")
    assert result.returncode == 0, result.stderr
    assert installed(tmp_path / "project") == {"torch", "verl"}


def test_wheel_that_the_environment_brings_is_taken_though_pytorchs_index_does_not_answer(install, tmp_path):
    result = install(NOBODY, PIP_FIND_LINKS=str(tmp_path / "torch"))
    assert result.returncode == 0, result.stderr
    assert installed(tmp_path / "project") == {"torch", "verl"}


def test_one_sentence_says_what_to_do_if_nobody_has_torch(install):
    result = install(NOBODY)
    assert result.returncode == 1 and result.stdout == ""
    _, refusal = result.stderr.splitlines()
    assert f"The CPU build of torch is not where your other packages come from, and {NOBODY} does not" in refusal
    assert "PIP_FIND_LINKS" in refusal


def test_a_file_with_another_digest_is_refused(install, served, tmp_path):
    with zipfile.ZipFile(next((served[0] / "whl/cpu/torch").iterdir()), "a") as archive:
        archive.writestr("more.py", "")
    result = install(f"{served[1]}/whl/cpu")
    assert result.returncode == 1
    assert re.search("Hash mismatch|DO NOT MATCH THE HASHES", result.stderr), result.stderr
    assert not installed(tmp_path / "project")
