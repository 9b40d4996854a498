"""The pages of docs/: what is generated is up to date."""

import runpy

import pytest

from tests.conftest import REPOSITORY

PAGES = runpy.run_path(str(REPOSITORY / "scripts/reference_pages.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_page_is_what_the_code_says(name: str) -> None:
    assert (REPOSITORY / name).read_text(encoding="utf-8") == PAGES[name](), "run python scripts/reference_pages.py"
