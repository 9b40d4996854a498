"""Find what another release of verl would break here.

    python scripts/check_verl_version.py 0.9.0

Installs that release without its dependencies into a temporary folder, puts the folder first on the path and runs
tests/unit/trainer/test_verl_contracts.py (signatures) and scripts/verl_facts.py (what the source says) against it.
Prints one block per contract that does not hold: what changed upstream, with the old and the new signature, and where
we rely on it.  The environment itself is not touched.  Exit code 0 if all hold, 1 if some do not, 2 if the release
cannot be installed or the tests cannot be run.

The other packages stay as they are installed: what a release needs of them is not checked here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]
CONTRACTS = "tests/unit/trainer/test_verl_contracts.py"
FACTS = "scripts/verl_facts.py"
PIN = f"{CONTRACTS}::test_verl_is_the_pinned_release"
"""Fails with every other release, which is known."""


@dataclass(frozen=True)
class Broken:
    """A contract that does not hold: the test's name and its message."""

    test: str
    message: str


def install(version: str, folder: Path) -> None:
    """Put verl of this version into ``folder``; exits with pip's last line if that fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(folder), f"verl=={version}"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        print(f"error: verl {version} cannot be installed: {reason}", file=sys.stderr)
        raise SystemExit(2)


def run_contracts(folder: Path, report: Path) -> subprocess.CompletedProcess[str]:
    """Run the contract tests with ``folder`` first on the path; their results go to ``report`` as JUnit XML."""
    command = [sys.executable, "-m", "pytest", CONTRACTS, FACTS, f"--deselect={PIN}", "-p", "no:cacheprovider"]
    return subprocess.run(
        # -vv: shorter messages would be cut.
        [*command, "-vv", "--tb=short", f"--junitxml={report}", "-o", "junit_logging=no"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def read_report(report: Path) -> tuple[int, list[Broken]]:
    """Count the contracts that were tried, and list those that do not hold."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    broken = []
    for case in cases:
        fault = case.find("failure") if case.find("failure") is not None else case.find("error")
        if fault is not None:
            # The attribute is cut short; the text has the whole error behind "E   ", with pytest's explanation last.
            lines = [line[4:] for line in (fault.text or "").splitlines() if line.startswith("E   ")]
            message = ("\n".join(lines) or fault.get("message", "")).partition("\nassert ")[0].strip()
            broken.append(
                Broken(case.get("name", "?"), message.removeprefix("Failed: ").removeprefix("AssertionError: "))
            )
    return len(cases), broken


def summary(version: str, tried: int, broken: list[Broken]) -> str:
    """Compose the printed text."""
    lines = [f"verl {version}: {tried - len(broken)} of {tried} contracts hold"]
    for item in broken:
        lines += ["", item.test, *(f"  {line}" for line in item.message.splitlines() if line.strip())]
    return "\n".join(lines)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="a release of verl, such as 0.9.0")
    version = parser.parse_args().version
    with tempfile.TemporaryDirectory(prefix="verl-contracts-") as name:
        folder = Path(name)
        install(version, folder / "site")
        done = run_contracts(folder / "site", folder / "report.xml")
        if not (folder / "report.xml").is_file():
            print(f"error: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
            return 2
        tried, broken = read_report(folder / "report.xml")
    print(summary(version, tried, broken))
    return 1 if broken or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
