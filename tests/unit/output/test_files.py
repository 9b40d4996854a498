"""Files that are replaced as a whole, whatever stands in their place."""

import os
from pathlib import Path

import pytest

from recipe.skpo.output.files import replacing, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(OSError, match="disk"), replacing(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("planted", ["file", f".file.{os.getpid()}"], ids=["the file", "its temporary name"])
def test_a_link_is_replaced_and_never_written_through(tmp_path: Path, planted: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.write_text("mine")
    folder.mkdir()
    (folder / planted).symlink_to(outside)
    write_atomic(folder / "file", "γ")
    assert outside.read_text() == "mine"
    assert [item.name for item in folder.iterdir()] == ["file"] and not (folder / "file").is_symlink()
    assert (folder / "file").read_bytes() == "γ".encode()
    assert (folder / "file").stat().st_mode & 0o777 == outside.stat().st_mode & 0o777, "the umask's, not a secret's"
