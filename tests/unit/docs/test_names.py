"""Every file, function and command module that README and docs name exists."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DOCUMENTS = sorted({*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")})
ROOTS = [REPOSITORY, REPOSITORY / "recipe/skpo", REPOSITORY / "recipe/skpo/method", REPOSITORY / "tests/golden"]
FOLDERS = tuple(
    f"{name}/" for name in ("recipe", "tests", "scripts", "rollout", "checks", "method", "output", "engine", "examples")
)


def resolve(path: str) -> Path | None:
    return next((root / path for root in ROOTS if (root / path).exists()), None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_a_document_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = []
    for path, names in re.findall(r"`([\w./]+\.(?:py|yaml|sh|toml|txt))(?:: ([\w., ]+?))?`", text):
        file = resolve(path)
        if file is None:
            # A file of a run, or of another package, has no folder of ours.
            missing += [path] * path.startswith(FOLDERS)
            continue
        words = set(re.findall(r"\w+", file.read_text(encoding="utf-8")))
        missing += [f"{path}: {name}" for name in re.findall(r"\w+", names) if name not in words]
    for module, name in re.findall(r"`(segments|tracker|advantage|loss|loss_weights)\.(\w+)`", text):
        file = resolve(f"{module}.py")
        assert file is not None
        if name != "py" and name not in set(re.findall(r"\w+", file.read_text(encoding="utf-8"))):
            missing.append(f"{module}.{name}")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        if not (document.parent / link).exists():
            missing.append(link)
    assert not missing, missing
