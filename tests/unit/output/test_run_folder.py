"""Where the checkpoints of a run are."""

from pathlib import Path

import pytest

from recipe.skpo.output.run_folder import checkpoints_of


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, "{run}/checkpoints"),
        ("{", "{run}/checkpoints"),
        ("trainer: 5", "{run}/checkpoints"),
        ("{output_dir: null, trainer: {default_local_dir: null}}", "{run}/checkpoints"),
        ("{output_dir: '{run}', trainer: {default_local_dir: '{run}/checkpoints'}}", "{run}/checkpoints"),
        ("{output_dir: /before, trainer: {default_local_dir: /before/saved}}", "{run}/saved"),
        ("{output_dir: '{run}', trainer: {default_local_dir: /big/disk}}", "/big/disk"),
    ],
)
def test_checkpoints_are_in_the_runs_folder_or_where_its_config_has_them(
    tmp_path: Path, config: str | None, found: str
) -> None:
    if config is not None:
        (tmp_path / "config.yaml").write_text(config.replace("{run}", str(tmp_path)))
    assert str(checkpoints_of(tmp_path)) == found.replace("{run}", str(tmp_path))
