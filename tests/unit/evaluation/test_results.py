"""Files of an analysis."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recipe.skpo.analysis.common import write_results
from recipe.skpo.analysis.drawing import draw_curves
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.results import check_same_config, plain, run_cli


@dataclass(frozen=True)
class Inner:
    speed: int = 1
    kind: str = "a"


@dataclass(frozen=True)
class Config:
    path: Path = Path("x")
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner | None = None


def test_plain_values_are_what_json_can_hold() -> None:
    assert plain({"a": np.float64("nan"), "b": np.int64(3), "c": [float("inf"), np.array([1.5])]}) == {
        "a": None,
        "b": 3,
        "c": [None, [1.5]],
    }
    assert plain(Config(inner=Inner())) == {"path": "x", "sizes": [1, 2], "inner": {"speed": 1, "kind": "a"}}


def test_folder_belongs_to_one_config_but_for_what_is_free(tmp_path: Path) -> None:
    check_same_config(tmp_path, Config(inner=Inner()))
    check_same_config(tmp_path, Config(inner=Inner()))
    check_same_config(tmp_path, Config(inner=Inner(speed=2)), free=("inner.speed",))
    assert json.loads((tmp_path / "config.json").read_text())["inner"]["speed"] == 2
    with pytest.raises(ConfigError, match=r"made with inner\.kind='a', now it is 'b'; give another output folder"):
        check_same_config(tmp_path, Config(inner=Inner(kind="b")))
    with pytest.raises(ConfigError, match=r"sizes=\[1, 2\], now it is \[1, 2, 3\]"):
        check_same_config(tmp_path, Config(inner=Inner(speed=2), sizes=(1, 2, 3)))
    with pytest.raises(ConfigError, match="inner"):
        check_same_config(tmp_path, Config())


def test_config_that_cannot_be_read_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: is not JSON"):
        check_same_config(tmp_path, Config())
    assert (tmp_path / "config.json").read_text() == "{"


def test_results_are_strict_json_and_csv(tmp_path: Path) -> None:
    table = pd.DataFrame({"step": [1, 2], "value": [0.5, float("nan")]})
    empty = pd.DataFrame(columns=["metric", "group", "x", "mean", "low", "high", "runs"])
    one = pd.DataFrame([("m", "step", 1.0, 1.0, 1.0)], columns=["group", "phase", "seconds", "min", "max"])
    write_results(tmp_path, "name", Config(), {"x": 1}, {"rows": table}, draw_curves(empty, one, "steps"))
    numbers = json.loads((tmp_path / "name.json").read_text())
    assert numbers == {"summary": {"x": 1}, "rows": [{"step": 1, "value": 0.5}, {"step": 2, "value": None}]}
    assert (tmp_path / "rows.csv").read_text() == "step,value\n1,0.5\n2,\n"
    assert (tmp_path / "name.svg").read_text().startswith("<?xml")


def test_errors_of_the_user_are_one_line_and_errors_of_ours_are_not_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> list[Path]:
        raise OSError("first\nsecond")

    def wrong() -> list[Path]:
        raise AssertionError("ours")

    assert run_cli(fail) == 1
    assert capsys.readouterr().err == "error: first second\n"
    with pytest.raises(AssertionError):
        run_cli(wrong)
    assert run_cli(lambda: [Path("a")]) == 0
    assert capsys.readouterr().out == "a\n"
