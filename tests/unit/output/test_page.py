"""The report's data and how it is embedded; what a browser makes of it is in test_page_browser.py."""

import base64
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.skpo.output import page as page_module
from recipe.skpo.output import page_data
from recipe.skpo.output.metrics import MetricsFile
from recipe.skpo.output.page import page, write_comparison, write_report
from recipe.skpo.output.page_data import (
    LARGEST_PAGE,
    LONGEST_TEXT,
    MOST_POINTS,
    ReportError,
    curves,
    cut,
    embed,
    headline,
    number,
    page_tree,
    read_config,
    settings_of,
    that_fit,
    trees_for_page,
)
from recipe.skpo.output.trees import FOLDER, TreeStore, read_trees
from tests.support.report_run import HARM, SOURCE, make_hostile_run, make_run, tree, validation

REPOSITORY = Path(__file__).resolve().parents[3]


class Scripts(HTMLParser):
    """Collects what an HTML parser takes for scripts, styles and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.inside: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("script", "style", "meta"):
            self.inside.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("script", "style") and self.inside[-1][0] == self.tags[-1]:
            tag, attrs, text = self.inside[-1]
            self.inside[-1] = (tag, attrs, text + data)


def data_of(text: str) -> dict[str, Any]:
    (block,) = (body for tag, attrs, body in Scripts(text).inside if attrs.get("type") == "application/json")
    return json.loads(block)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hostile_run(tmp_path_factory.mktemp("runs") / "hostile")


# ---------------------------------------------------------------- embedding

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters())  # lone surrogates are not among them, see below
    | st.sampled_from(HARM[:9]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_whatever_is_embedded_comes_back_and_ends_no_script(value: Any) -> None:
    text = embed(value)
    assert json.loads(text) == value
    assert text.isascii() and not set(text) & set("<>&\u2028\u2029\x00") and text.isprintable()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(categories=("Cs", "Cc", "Cf", "Zl", "Zp", "Sm"))))
def test_characters_that_make_trouble_come_back(text: str) -> None:
    # Two halves that stand side by side are one character, in JSON as in JavaScript.
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert json.loads(embed(text)) == whole
    assert embed(text).isascii()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_have_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embed([value])


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(4, 40))
def test_a_cut_text_keeps_its_beginning_and_its_end(text: str, longest: int) -> None:
    result = cut(text, longest)
    assert cut(None, longest) is None
    if len(text) <= longest:
        assert result == text
    else:
        assert text.startswith(result["head"]) and text.endswith(result["tail"])
        assert len(result["head"]) + len(result["tail"]) == longest and result["length"] == len(text)
        assert len(result["head"]) > len(result["tail"]) > 0


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1, 1.0), (1 / 3, 0.333333), (123456789.0, 123457000.0), (math.nan, None), (-math.inf, None), ("1", None)]
    + [(None, None), (True, None)],
)
def test_numbers_are_short_and_finite(value: Any, shown: float | None) -> None:
    assert number(value) == shown


def test_headline_goes_from_the_first_to_the_last_validation() -> None:
    steps = [
        {"step": 0, **validation(0.25, 0.5)},
        {"step": 1, "skpo/upstream/tokens_generated": 10.0, "skpo/downstream/tokens_generated": 30.0},
        # Twenty of them were discarded.
        {"step": 2, **validation(0.9, 0.9), "skpo/downstream/tokens_generated": 2.0, "timing_s/testing": 30.0}
        | {"skpo/tokens/generated": 22.0},
        {"step": 3, **validation(0.5, 1.0), "timing_s/step": 60.0},
        {"step": 4, "timing_s/step": 90.0},
    ]
    rows = [["acc", 0.25, 0.5], ["well_formed", 0.5, 1.0], ["acc_of_well_formed", 0.5, 0.5]]
    told = {"problems": None, "interval": None, "change": None}
    assert headline(steps, {}) == {
        "sources": [{"source": SOURCE, "first": 0, "last": 3, "rows": rows} | told],
        "steps": 4,
        "tokens": 62.0,
        "minutes": 3.0,
    }
    (found,) = headline(steps, {SOURCE: 100})["sources"]
    assert found["problems"] == 100 and found["interval"] == pytest.approx([0.404, 0.596], abs=5e-4)
    assert found["change"].startswith("rose (+0.250 +- 0.")


def test_headline_of_a_run_that_says_little() -> None:
    assert headline([{"step": 3, "x": 1.0}], {}) == {"sources": [], "steps": 3, "tokens": None, "minutes": None}
    late = [{"step": 0, **validation(0.25, 0.5)}, {"step": 1, "val-core/math/acc/mean@1": 0.5}]
    (found,) = headline(late, {"math": 8})["sources"]
    assert found["rows"] == [["acc", None, 0.5]] and (found["first"], found["last"], found["change"]) == (0, 1, None)


def test_curves_hold_every_metric_and_draw_the_known_ones() -> None:
    lines = [
        {"step": 1, "skpo/upstream/loss": 0.5, "mine": 7.0, **validation(0.5, 1.0)},
        {"step": 2, "skpo/upstream/loss": math.nan, "mine": 8.0},
        {"step": 3, "skpo/upstream/loss": 0.25, "mine": "text"},
    ]
    notes: list[str] = []
    found = curves(lines, notes, "greedy")
    assert found["series"]["skpo/upstream/loss"] == [[1, 3], [0.5, 0.25]]
    assert found["series"]["mine"] == [[1, 2], [7.0, 8.0]]
    assert found["series"][f"held-out {SOURCE}: accuracy"] == [[1], [0.5]]
    titles = {group["title"]: [line["label"] for line in group["lines"]] for group in found["groups"]}
    assert titles == {
        f"held-out {SOURCE}, greedy": ["accuracy", "share of well-formed answers", "accuracy among well-formed"],
        "Loss": ["upstream"],
    }
    assert notes == []


def test_long_series_are_sampled_evenly_and_rare_ones_are_whole() -> None:
    lines = [{"step": step, "often": float(step), **({"rare": 1.0} if step % 500 == 0 else {})} for step in range(5001)]
    notes: list[str] = []
    series = curves(lines, notes)["series"]
    steps = series["often"][0]
    assert len(steps) == MOST_POINTS and (steps[0], steps[-1]) == (0, 5000) and steps == series["often"][1]
    assert {later - earlier for earlier, later in pairwise(steps)} == {12, 13}
    assert series["rare"][0] == list(range(0, 5001, 500))
    assert notes == [
        f"Curves: at most {MOST_POINTS} of 5001 points per line, evenly spaced, first and last among them."
    ]


def test_endless_names_and_very_many_metrics_are_left_out_and_said() -> None:
    notes: list[str] = []
    assert list(curves([{"step": 1, "x" * 301: 1.0, "x" * 300: 1.0}], notes)["series"]) == ["x" * 300]
    many = {f"{'<' * 290}{number}": 1.0 for number in range(2000)}
    series = curves([{"step": 1} | many], notes)["series"]
    assert page_data.LARGEST_CURVES * 0.9 < len(embed(series)) < page_data.LARGEST_CURVES + 10
    assert notes == ["Metrics: 1 of 2.", f"Metrics: {len(series)} of 2000."]


def test_what_fits_is_counted_as_it_is_embedded() -> None:
    assert that_fit(["<", "<", "<"], 18) == ["<", "<"]  # "\\u003c", and a comma
    assert that_fit([], 5) == []


# ---------------------------------------------------------------- config


def test_settings_are_dotted_paths_and_secrets_are_hidden() -> None:
    config = {"a": {"b": 1, "c": {"d": None, "e": [1, "x"]}}, "f": "ünï", "g": {}, 3: True, "h": {"HF_TOKEN": "abc"}}
    shown = {"a.b": "1", "a.c.d": "null", "a.c.e": '[1, "x"]', "f": '"ünï"', "g": "{}", "3": "true"}
    shown |= {"h.HF_TOKEN": "(hidden)"}
    assert settings_of(config) == [list(pair) for pair in shown.items()]


@pytest.mark.parametrize("content", [b"a: [1", b"a: &x *y", b"\xff\xfe\x00"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ReportError, match=r"config\.yaml: cannot be read as a config .*; repair or remove it"):
        read_config(tmp_path, [])


def test_a_large_config_is_cut_and_said(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("".join(f"k{n}: '{'v' * 1000}'\n" for n in range(1800)))
    notes: list[str] = []
    found = read_config(tmp_path, notes)
    assert found[0][0] == "k0" and all(len(value) == 301 for _, value in found)
    assert len(embed(found)) < page_data.LARGEST_CONFIG + 10
    assert notes == [
        "Config: names and values are cut after 300 characters.",
        f"Config: the first {len(found)} of 1800 settings.",
    ]


# ---------------------------------------------------------------- trees


def test_a_tree_of_the_page_has_all_that_is_stored() -> None:
    stored = tree(4, random.Random(1), skill=0.5)

    def short(value: float) -> Any:
        return pytest.approx(value, 1e-5)

    expected = {
        "step": 4,
        "prompt": stored["prompt_id"],
        "problem": stored["problem"],
        "answer": stored["answer"],
        "skip": stored["skip_prompt"],
        "split": stored["split_position"],
        "segment": {name: short(stored["segment"][name]) for name in ("reward", "baseline", "advantage")},
        "candidates": [
            {
                "text": item["text"],
                "rest": item["rest"],
                "d": short(item["deviation"]),
                "early": item["ended_early"],
                "chosen": item["chosen"],
            }
            for item in stored["candidates"]
        ],
        "responses": [item | {"advantage": short(item["advantage"])} for item in stored["responses"]],
    }
    assert page_tree(stored) == expected


def test_as_many_trees_as_fit_evenly_from_first_to_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, steps=50)
    notes: list[str] = []
    whole = trees_for_page(run, 10**7, notes)
    assert [json.loads(text)["step"] for text in whole] == list(range(1, 51)) and notes == []
    room = sum(len(text) + 1 for text in whole) // 4
    read: list[int] = []

    def counting(places: Sequence[tuple[Path, int]]) -> Iterator[dict[str, Any]]:
        read.append(len(places))
        return read_trees(places)

    monkeypatch.setattr(page_data, "read_trees", counting)
    some = trees_for_page(run, room, notes)
    assert sum(read) <= 4 + 2.25 * len(some) + 2, "not all, of which few fit"
    steps = [json.loads(text)["step"] for text in some]
    assert sum(len(text) + 1 for text in some) <= room
    assert 9 <= len(steps) <= 12 and (steps[0], steps[-1]) == (1, 50)
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1
    assert notes == [f"Trees: {len(steps)} of 50 stored ones, evenly spaced from first to last."]
    assert trees_for_page(run, 10, notes) == [] and notes[-1].startswith("Trees: 0 of 50")


def test_a_tree_of_very_many_long_texts_stays_small(tmp_path: Path) -> None:
    large = tree(1, random.Random(1), skill=0.5, group=500)
    for item in [*large["candidates"], *large["responses"]]:
        item["text"] = "<" * 50_000
    TreeStore(tmp_path / FOLDER, 64.0, 0).write(1, [large])
    notes: list[str] = []
    (text,) = trees_for_page(tmp_path, 2_000_000, notes)
    assert len(json.loads(text)["responses"]) == 500
    assert any("keep their beginning and end" in note for note in notes)


# ---------------------------------------------------------------- the page


def test_the_page_holds_the_run(run_folder: Path) -> None:
    text = page(run_folder)
    assert text == page(run_folder)
    data = data_of(text)
    assert data["run"] == "demo" and data["headline"]["steps"] == 60
    assert len(data["trees"]) == 60 and data["notes"] == []
    assert ["skpo.group_size", "8"] in data["config"]
    assert data["headline"]["sources"][0]["rows"][0] == ["acc", 0.32, 0.945312]


@pytest.mark.parametrize("which", [["run_folder"], ["hostile_folder"], ["run_folder", "hostile_folder"]])
def test_the_page_is_self_contained_and_allows_nothing_else(
    request: pytest.FixtureRequest, which: list[str], tmp_path: Path
) -> None:
    folders = [request.getfixturevalue(name) for name in which]
    several = len(folders) > 1
    text = write_comparison(folders, tmp_path / "both.html").read_text() if several else page(folders[0])
    parsed = Scripts(text)
    policy = next(attrs["content"] for tag, attrs, _ in parsed.inside if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None and "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    bodies = [(tag, body) for tag, attrs, body in parsed.inside if tag in ("script", "style") and "type" not in attrs]
    assert [tag for tag, _ in bodies] == ["style", "script"]
    for tag, body in bodies:
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert set(parsed.tags) & {"link", "img", "iframe", "base", "object", "b", "svg"} == set()
    assert not re.search(r"\b(src|href)=\"(?!#)", text.split('<script type="application/json"')[0])
    assert "do-not-show-me" not in text


def test_the_script_never_makes_html_of_text() -> None:
    script = (page_module.PAGE / "page.js").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in script
    assert "</script" not in script and "<!--" not in script


def test_a_hostile_run_gives_a_small_page_with_all_of_it(hostile_folder: Path) -> None:
    text = page(hostile_folder)
    assert len(text.encode()) < LARGEST_PAGE
    data = data_of(text)
    shown = [tree["problem"] for tree in data["trees"]][3:]
    assert len(shown) == len(HARM)
    for problem, text in zip(shown, HARM, strict=True):
        storable = text.encode("utf-8", "backslashreplace").decode()
        if len(storable) <= LONGEST_TEXT:
            assert problem == storable
        else:
            assert storable.startswith(problem["head"]) and len(problem["head"]) + len(problem["tail"]) == LONGEST_TEXT
    assert data["trees"][3]["responses"][0]["reward"] is None


def test_a_page_of_endless_everything_stays_below_its_bound(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_at=0)
    for step in range(25):
        file.log({f"{'é<' * 60}{number}": step / 7 for number in range(3000)}, step)
    store = TreeStore(tmp_path / FOLDER, 64.0, 0)
    for step in range(1, 16):
        one = tree(step, random.Random(step), 0.5)
        for item in one["responses"]:
            item["text"] = "\x00<" * 50_000
        store.write(step, [one])
    (tmp_path / "config.yaml").write_text("".join(f"k{n}: '{'<' * 1000}'\n" for n in range(1000)))
    target = write_report(tmp_path)
    assert 2_000_000 < target.stat().st_size < LARGEST_PAGE
    data = data_of(target.read_text())
    assert data["trees"][0]["step"] == 1 and data["trees"][-1]["step"] == 15 and len(data["notes"]) >= 4


def test_a_template_mark_inside_of_a_text_is_left_alone(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    one = tree(2, random.Random(1), 0.5) | {"problem": "<!--script--> <!--nothing-->"}
    TreeStore(tmp_path / FOLDER, 64.0, 1).write(2, [one])
    assert data_of(page(tmp_path))["trees"][-1]["problem"] == "<!--script--> <!--nothing-->"


def test_a_run_without_trees_has_a_page(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl", resumed_at=0).log({"skpo/loss": 1.0}, 1)
    data = data_of(page(tmp_path))
    assert data["trees"] == [] and data["notes"] == ["Config: the run folder holds no config.yaml."]


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run ``python -m recipe.skpo.output.page``."""

    def run(*words: Path | str) -> None:
        monkeypatch.setattr(sys, "argv", ["page", *map(str, words)])
        page_module.main()

    return run


def test_the_command_writes_the_page_and_says_where(command, run_folder: Path, capsys) -> None:
    (run_folder / "report.html").unlink(missing_ok=True)
    command(run_folder)
    assert capsys.readouterr().out.startswith(f"{run_folder / 'report.html'} (0.")
    assert data_of((run_folder / "report.html").read_text())["run"] == "demo"


def test_a_folder_that_is_no_run_is_refused_in_one_line(command, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        command(tmp_path)
    message = f"error: {tmp_path / 'metrics.jsonl'}: missing or empty; name the folder of a run (output_dir)"
    assert error.value.code == message


def test_the_command_compares_several_runs(
    command, run_folder: Path, hostile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command(run_folder, hostile_folder)
    command(run_folder, hostile_folder, "--out", "other.html")
    text = (tmp_path / "comparison.html").read_text()
    assert text == (tmp_path / "other.html").read_text() and len(text.encode()) < LARGEST_PAGE
    assert [run["name"] for run in data_of(text)["runs"]] == ["demo", "hostile"]


def test_a_page_of_one_run_goes_where_it_is_told(command, run_folder: Path, tmp_path: Path) -> None:
    command(run_folder, "--out", tmp_path / "one.html")
    assert data_of((tmp_path / "one.html").read_text())["run"] == "demo"
