"""The pages of docs/: what is generated is up to date, the site has every page, and links reach their headings."""

import re
import runpy
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.unit.docs.test_names import DOCUMENTS

PAGES = runpy.run_path(str(REPOSITORY / "scripts/reference_pages.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_page_is_what_the_code_says(name: str) -> None:
    assert (REPOSITORY / name).read_text(encoding="utf-8") == PAGES[name](), "run python scripts/reference_pages.py"


def test_the_site_has_every_page() -> None:
    named = set(
        re.findall(r"^ +- .*: ([\w/]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    docs = {str(path.relative_to(REPOSITORY / "docs")) for path in (REPOSITORY / "docs").rglob("*.md")}
    hook = (REPOSITORY / "scripts/site_hook.py").read_text(encoding="utf-8")
    assert named == docs | set(re.findall(r'"(\w+\.md)"', hook))


def anchors(document: Path) -> set[str]:
    """The names that headings of a document get, on GitHub and on the site."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"[`*]|\]\([^)]*\)", "", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_reach_their_headings(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8"))
    missing = [
        f"{path}#{name}" for path, name in links if name not in anchors(document.parent / path if path else document)
    ]
    assert not missing
