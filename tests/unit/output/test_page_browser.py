"""The report in a real browser, from file://: every control works, it reads in light and dark, and no text harms it."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.page import write_comparison, write_report
from recipe.skpo.output.page_data import CURVES
from recipe.skpo.output.trees import read_trees, tree_index
from tests.support.browser import NAMES, Browser, find_chromium
from tests.support.report_run import HARM, SOURCE, make_hostile_run, make_run

CHROMIUM = find_chromium()

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason=f"no chromium is installed (looked for {', '.join(NAMES)}; apt-get install chromium)"
    ),
]

ENTER, SPACE, TAB, ESCAPE = ("Enter", 13), (" ", 32), ("Tab", 9), ("Escape", 27)
LEFT, RIGHT, HOME = ("ArrowLeft", 37), ("ArrowRight", 39), ("Home", 36)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of 60 steps, one tree each; responses are long enough to be folded."""
    return write_report(make_run(tmp_path_factory.mktemp("run") / "demo", words=250))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_hostile_run(tmp_path_factory.mktemp("run") / "hostile"))


@pytest.fixture
def at_demo(browser: Browser, demo: Path) -> Browser:
    browser.look()
    browser.open(demo)
    return browser


def text(browser: Browser, selector: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


def fill(browser: Browser, selector: str, value: str) -> None:
    """Select what a field holds and type over it."""
    browser.click(selector)
    browser.run(f"document.querySelector({json.dumps(selector)}).select()")
    browser.type(value) if value else browser.press("Delete", 46)


def choose(browser: Browser, selector: str, entry: str) -> None:
    """Choose from a list with the keyboard: focus it and type how the entry begins."""
    browser.run(f"document.querySelector({json.dumps(selector)}).focus()")
    for key in entry:
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)


def shown_steps(browser: Browser) -> list[int]:
    return [int(step.removeprefix("step ")) for step in texts(browser, "#list .tree .step")]


def assert_quiet(browser: Browser) -> None:
    """Nothing was thrown, logged or asked, no policy was broken, and only the file itself was loaded."""
    kinds = [event["method"] for event in browser.events]
    loaded = [event["params"]["request"]["url"] for event in browser.events if "request" in event["params"]]
    assert set(kinds) <= {"Network.requestWillBeSent"}, browser.events
    assert all(url.startswith("file:") and url.endswith(".html") for url in loaded), loaded


# ---------------------------------------------------------------- what is there


def test_the_page_shows_the_run_and_loads_nothing(at_demo: Browser) -> None:
    assert at_demo.run("document.title") == "SKPO run demo"
    assert text(at_demo, "h1") == "demo"
    assert text(at_demo, "#about") == "smollm2-135m-instruct  ·  G = 8  ·  smollm2_135m-arithmetic"
    assert text(at_demo, ".card.main .value") == "0.320 → 0.945"
    table = text(at_demo, "#held-out table")
    assert SOURCE in table and "share of well-formed answers0.8911.000+0.109" in table
    assert at_demo.run("document.querySelector('#left-out').hidden")
    assert_quiet(at_demo)


def test_every_known_curve_is_drawn(at_demo: Browser) -> None:
    titles = texts(at_demo, "#charts .chart h3")
    assert titles == [f"held-out {SOURCE}, greedy", *(title for title, _ in CURVES)]
    at_demo.wait("[...document.querySelectorAll('#charts svg[role]')].every(s => s.querySelector('polyline'))")
    inside = """[...document.querySelectorAll('#charts svg[role]')].every(s => {
        const box = s.viewBox.baseVal;
        return [...s.querySelectorAll('polyline')].every(line => line.getAttribute('points').split(' ').every(p => {
            const [x, y] = p.split(',').map(Number);
            return x >= 0 && x <= box.width && y >= 0 && y <= box.height; })) })"""
    assert at_demo.run(inside)


def test_the_page_stays_below_five_megabytes(demo: Path, hostile: Path) -> None:
    assert demo.stat().st_size < 5_000_000 and hostile.stat().st_size < 5_000_000


# ---------------------------------------------------------------- curves


def test_pointing_at_a_chart_reads_a_step(at_demo: Browser) -> None:
    second = "#charts .chart:nth-child(2)"
    assert text(at_demo, f"{second} .at") == "step 60, the last"
    last = texts(at_demo, f"{second} .legend b")
    at_demo.point(f"{second} svg[role]")
    at_demo.wait(f"/^step (2[89]|3[0-3])$/.test(document.querySelector('{second} .at').textContent)")
    assert texts(at_demo, f"{second} .legend b") != last
    at_demo.point("h2")
    at_demo.wait(f"document.querySelector('{second} .at').textContent === 'step 60, the last'")


def test_arrow_keys_read_single_steps(at_demo: Browser) -> None:
    at_demo.run("document.querySelector('#charts .chart:nth-child(2) svg[role]').focus()")
    found = []
    for key in (LEFT, LEFT, RIGHT, HOME, LEFT, ESCAPE):
        at_demo.press(*key)
        found.append(text(at_demo, "#charts .chart:nth-child(2) .at"))
    assert found == ["step 59", "step 58", "step 59", "step 1", "step 1", "step 60, the last"]


def test_the_numbers_of_a_chart_are_a_table(at_demo: Browser) -> None:
    at_demo.click("#charts .chart:nth-child(1) summary")
    at_demo.wait("document.querySelectorAll('#charts .chart:nth-child(1) tbody tr').length === 7")
    rows = texts(at_demo, "#charts .chart:nth-child(1) tbody tr")
    assert rows[0] == "00.320.8910.3591"  # step, accuracy, well-formed, accuracy among them


def test_any_metric_can_be_picked(at_demo: Browser) -> None:
    names = texts(at_demo, "#metric option")
    assert "actor/grad_norm" in names and len(names) > 30
    choose(at_demo, "#metric", "t")
    at_demo.wait("document.querySelector('#metric-chart h3').textContent === 'timing_s/gen'")


# ---------------------------------------------------------------- trees


def test_a_tree_shows_all_of_a_rollout(at_demo: Browser, demo: Path) -> None:
    stored = next(iter(read_trees(tree_index(demo.parent)[:1])))
    first = "#list .tree:first-child"
    assert at_demo.run(f"document.querySelector('{first}').open")
    body = text(at_demo, f"{first} .body")
    assert stored["problem"] in body and f"expected answer {stored['answer']}" in body and stored["prompt_id"] in body
    chosen = next(candidate for candidate in stored["candidates"] if candidate["chosen"])
    assert text(at_demo, f"{first} .row.chosen mark") == chosen["text"]
    assert f"d {chosen['deviation']:.3f}" in text(at_demo, f"{first} .row.chosen")
    assert "chosen" in text(at_demo, f"{first} .row.chosen .chip")
    distances = [float(d) for d in texts(at_demo, f"{first} .stack .row .head b")]
    assert distances == sorted(round(candidate["deviation"], 3) for candidate in stored["candidates"])
    rests = [candidate["rest"] for candidate in stored["candidates"] if candidate["rest"]]
    assert sorted(texts(at_demo, f"{first} .rest")) == sorted(rests) != []
    assert text(at_demo, f"{first} .block mark") == chosen["text"], "s is marked inside of [s, q]"
    assert text(at_demo, f"{first} .stack .block") == stored["skip_prompt"]
    signs = ["+1 ✓ right" if response["reward"] > 0 else "−1 ✗ wrong" for response in stored["responses"]]
    assert texts(at_demo, f"{first} .body > :last-child .chip") == signs
    advantages = texts(at_demo, f"{first} .body > :last-child .head span:nth-child(2) b")
    assert [float(a.replace("−", "-")) for a in advantages] == [round(r["advantage"], 2) for r in stored["responses"]]
    segment = stored["segment"]
    facts = text(at_demo, f"{first} .stack .facts").replace("−", "-")
    for name, label in (("reward", "segment reward"), ("baseline", "baseline"), ("advantage", "advantage")):
        assert f"{label} {segment[name]:+.2f}" in facts
    right = sum(response["reward"] > 0 for response in stored["responses"])
    label = at_demo.run(f"document.querySelector('{first} .squares').getAttribute('aria-label')")
    assert label == f"{right} of 8 responses right"


def test_pages_are_turned(at_demo: Browser) -> None:
    assert shown_steps(at_demo) == list(range(1, 9)) and text(at_demo, "#page") == "page 1 of 8"
    assert at_demo.run("document.querySelector('#previous').disabled")
    at_demo.click("#next")
    assert shown_steps(at_demo) == list(range(9, 17)) and text(at_demo, "#page") == "page 2 of 8"
    at_demo.click("#previous")
    assert shown_steps(at_demo) == list(range(1, 9))
    at_demo.run("document.querySelector('#next').focus()")
    for _ in range(7):
        at_demo.press(*ENTER)
    assert shown_steps(at_demo) == list(range(57, 61)) and text(at_demo, "#page") == "page 8 of 8"
    assert at_demo.run("document.querySelector('#next').disabled")
    assert at_demo.run("document.activeElement.id") == "previous", "the focus is not lost"


def test_trees_are_opened_and_closed_with_the_keyboard(at_demo: Browser) -> None:
    at_demo.run("document.querySelector('#list .tree:nth-child(2) summary').focus()")
    at_demo.press(*ENTER)
    at_demo.wait("document.querySelectorAll('#list .tree:nth-child(2)[open] .row').length === 16")
    at_demo.press(*SPACE)
    at_demo.wait("!document.querySelector('#list .tree:nth-child(2)').open")
    at_demo.press(*TAB)
    assert at_demo.run("document.activeElement.closest('.tree') === document.querySelector('#list .tree:nth-child(3)')")


def test_trees_are_found_by_step_text_and_outcome(at_demo: Browser) -> None:
    fill(at_demo, "#from", "21")
    fill(at_demo, "#to", "23")
    assert shown_steps(at_demo) == [21, 22, 23] and text(at_demo, "#found") == "3 of 60 trees"
    fill(at_demo, "#to", "")
    assert shown_steps(at_demo)[0] == 21 and text(at_demo, "#found") == "40 of 60 trees"
    at_demo.click("#filter button[type=reset]")
    at_demo.wait("document.querySelector('#found').textContent === '60 trees'")

    fill(at_demo, "#search", "  OMAR HAS ")
    found = at_demo.run("document.querySelector('#found').textContent")
    assert re.fullmatch(r"\d+ of 60 trees", found) and 3 < int(found.split()[0]) < 40
    assert all(snippet.startswith("Omar has") for snippet in texts(at_demo, "#list .snippet"))
    choose(at_demo, "#outcome", "m")
    assert int(text(at_demo, "#found").split()[0]) < int(found.split()[0])
    squares = texts(at_demo, "#list .squares")
    assert squares and all("+" in group and "−" in group for group in squares)

    fill(at_demo, "#search", "no such text")
    assert shown_steps(at_demo) == [] and "Nothing matches" in text(at_demo, "#list")
    assert text(at_demo, "#page") == "page 1 of 1"
    at_demo.click("#filter button[type=reset]")
    at_demo.wait("document.querySelectorAll('#list .tree').length === 8")
    assert at_demo.run("document.querySelector('#outcome').value") == "all"


@pytest.mark.parametrize(("wanted", "sign"), [("right", "+"), ("wrong", "−")])
def test_groups_of_one_outcome_are_found(at_demo: Browser, demo: Path, wanted: str, sign: str) -> None:
    stored = read_trees(tree_index(demo.parent))
    rewards = [{response["reward"] for response in tree["responses"]} for tree in stored]
    count = rewards.count({1.0 if wanted == "right" else -1.0})
    choose(at_demo, "#outcome", f"all {wanted}")
    assert count > 0 and text(at_demo, "#found") == f"{count} of 60 trees"
    assert all(set(group) == {sign} for group in texts(at_demo, "#list .squares"))


def test_words_of_a_response_are_found_too(at_demo: Browser) -> None:
    fill(at_demo, "#search", "<|im_end|>")
    assert text(at_demo, "#found") == "60 trees", "[s, q] of every tree"


def test_enter_in_the_search_box_leaves_the_page_as_it_is(at_demo: Browser) -> None:
    fill(at_demo, "#search", "eggs")
    before = text(at_demo, "#found")
    at_demo.press(*ENTER)
    assert text(at_demo, "#found") == before and at_demo.run("location.search") == ""
    assert_quiet(at_demo)


def test_long_texts_are_unfolded_and_folded(at_demo: Browser) -> None:
    row = "#list .tree:first-child .body > :last-child .row:first-child"
    folded = text(at_demo, f"{row} .text")
    assert folded.endswith(" …") and len(folded) < 720
    assert text(at_demo, f"{row} button").startswith("Show all (1,")
    at_demo.click(f"{row} button")
    unfolded = text(at_demo, f"{row} .text")
    assert unfolded.startswith(folded[:-2]) and re.search(r"#### -?\d+$", unfolded)
    assert at_demo.run(f"document.querySelector('{row} button').getAttribute('aria-expanded')") == "true"
    at_demo.click(f"{row} button")
    assert text(at_demo, f"{row} .text") == folded


# ---------------------------------------------------------------- config


def test_the_config_is_folded_and_searched(at_demo: Browser) -> None:
    assert at_demo.run("document.querySelectorAll('#settings details[open]').length") == 0
    at_demo.click("#settings details:nth-child(2) summary")
    assert "skpo.group_size8" in text(at_demo, "#settings details[open] tbody")
    fill(at_demo, "#setting", "RHO_")
    assert texts(at_demo, "#settings details[open] th") == ["skpo.tracker.rho_min", "skpo.tracker.rho_max"]
    assert re.fullmatch(r"2 of \d+ settings", text(at_demo, "#settings-found"))
    fill(at_demo, "#setting", "wandb")
    assert texts(at_demo, "#settings td") == ["(hidden)"]
    fill(at_demo, "#setting", "")
    assert at_demo.run("document.querySelectorAll('#settings details[open]').length") == 0


# ---------------------------------------------------------------- a comparison


@pytest.fixture(scope="module")
def compared(demo: Path, hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    short = make_run(tmp_path_factory.mktemp("run") / "short", steps=20)
    # A run of a former release, without numbers of tokens.
    lines = read_lines(short / "metrics.jsonl")
    bare = [{name: value for name, value in line.items() if "tokens" not in name} for line in lines]
    (short / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    return write_comparison([demo.parent, short, hostile.parent], short / "comparison.html")


def test_final_numbers_stand_side_by_side(browser: Browser, compared: Path) -> None:
    browser.look()
    browser.open(compared)
    assert browser.run("document.title") == "Comparison of 3 runs"
    assert texts(browser, "#held-out thead th") == ["", "demo", "short", "hostile"]
    cells = "[...document.querySelectorAll('#held-out tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    rows = {head: found for head, *found in browser.run(cells)}
    assert rows["steps"] == ["60", "20", "4"]
    assert rows[f"held-out {SOURCE}: accuracy"][0] == "0.945step 60, from 0.320 at step 0\ngreedy"
    (equal,) = (found for head, found in rows.items() if "generated tokens, which each of these runs has" in head)
    assert [bool(re.match(r"0\.\d{3}$", cell)) for cell in equal] == [True, False, True] and equal[1] == "–"
    assert rows["tokens generated in training, discarded ones included"][1] == "–"
    shown = "[...document.querySelectorAll('section, nav a')].filter(e => !e.hidden).map(e => e.id || e.textContent)"
    assert browser.run(shown) == ["Overview", "Curves", "Settings", "overview", "curves", "differences"]
    assert_quiet(browser)


def test_the_switch_draws_the_curves_over_tokens_and_seconds(browser: Browser, compared: Path) -> None:
    browser.look()
    browser.open(compared)
    reward = next(
        place for place, title in enumerate(texts(browser, "#charts h3"), 1) if title == "Reward and baseline: reward"
    )
    chart = f"#charts .chart:nth-child({reward})"
    assert texts(browser, f"{chart} .legend span") == ["demo", "short", "hostile"]
    browser.run(f"document.querySelector('{chart} svg[role]').focus()")
    browser.press(*LEFT)
    assert text(browser, f"{chart} .at") == "step 59"
    assert texts(browser, f"{chart} .legend b")[1:] == ["–", "–"], "the other runs have ended"

    browser.click("#axis input[value=tokens]")
    assert texts(browser, f"{chart} .legend span") == ["demo", "hostile"]
    assert text(browser, "#missing").endswith(": short")
    last = texts(browser, f"{chart} .legend b")[1]
    browser.run(f"document.querySelector('{chart} svg[role]').focus()")
    browser.press(*LEFT)
    assert text(browser, f"{chart} .at") == "86.8k generated tokens"  # 59 steps of 64 * (6 + 17)
    assert texts(browser, f"{chart} .legend b")[1] == last, "read at its last step before"

    browser.click("#axis input[value=seconds]")
    assert len(texts(browser, f"{chart} .legend span")) == 3 and text(browser, "#missing") == ""
    assert_quiet(browser)


def test_settings_of_the_runs_are_compared(browser: Browser, compared: Path) -> None:
    browser.look()
    browser.open(compared)
    assert texts(browser, "#differing thead th") == ["setting", "demo", "short", "hostile"]
    (row,) = texts(browser, "#differing tbody tr")
    assert row.startswith("harm––[\"</script><script>document.title='owned'</script>")


# ---------------------------------------------------------------- looks

CONTRAST = """(() => {
  const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
    .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
  const found = {};
  for (const selector of SELECTORS) for (const e of document.querySelectorAll(selector)) {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    found[selector] = Math.min(found[selector] ?? 99, (a + 0.05) / (b + 0.05)); }
  return found; })()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_background(at_demo: Browser, dark: bool) -> None:
    at_demo.look(dark=dark)
    selectors = [
        "body",
        "h1",
        ".brand",
        ".about",
        ".hint",
        ".card .more",
        ".at",
        ".legend li",
        ".chip",
        ".head",
        ".rest",
    ]
    selectors += [".square", "mark", ".facts", ".text", "button:not(:disabled)", "input", "label", ".step"]
    found = at_demo.run(CONTRAST.replace("SELECTORS", json.dumps(selectors)))
    assert set(found) == set(selectors)
    assert {selector: ratio for selector, ratio in found.items() if ratio < 4.5} == {}


def test_light_and_dark_follow_the_system(at_demo: Browser) -> None:
    colours = []
    for dark in (False, True):
        at_demo.look(dark=dark)
        colours.append(at_demo.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(246, 247, 249)", "rgb(16, 20, 27)"]


@pytest.mark.parametrize("width", [320, 390, 768, 1600])
@pytest.mark.parametrize("which", ["demo", "hostile", "compared"])
def test_nothing_is_wider_than_the_window(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int
) -> None:
    browser.look(width=width, height=800)
    browser.open(request.getfixturevalue(which))
    browser.run("document.querySelectorAll('#list details, #settings details').forEach(d => { d.open = true; })")
    browser.run("new Promise(done => setTimeout(done, 50))")
    assert browser.run("document.documentElement.scrollWidth") <= width
    cut_off = "[...document.querySelectorAll('.text')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.run(cut_off) == 0, "lines break, none is hidden"


@pytest.mark.parametrize(
    ("name", "options"),
    [("light", {}), ("dark", {"dark": True}), ("phone", {"width": 390, "height": 844, "scale": 2.0})],
)
def test_screenshots_are_pictures_of_the_page(
    browser: Browser, demo: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    browser.look(**options)
    browser.open(demo)
    browser.run("document.querySelector('#trees').scrollIntoView()")
    browser.screenshot(tmp_path / f"{name}.png")
    content = (tmp_path / f"{name}.png").read_bytes()
    size = struct.unpack(">II", content[16:24])
    scale = options.get("scale", 1.0)
    assert size == (options.get("width", 1200) * scale, options.get("height", 900) * scale)
    assert len(content) > 40_000, "an empty page is smaller"


# ---------------------------------------------------------------- texts that mean harm


def test_hostile_texts_run_nothing_and_load_nothing(browser: Browser, hostile: Path) -> None:
    browser.look()
    browser.open(hostile)
    foreign = "img, iframe, base, object, embed, link, audio, video, [onclick], [onerror], [onload], [href]:not(nav a)"
    seen = []
    while True:
        browser.run("document.querySelectorAll('#list details').forEach(d => { d.open = true; })")
        browser.wait("[...document.querySelectorAll('#list details')].every(d => d.querySelector('.body'))")
        browser.run("document.querySelectorAll('#list .more-button').forEach(b => b.click())")
        seen.append(text(browser, "#list"))
        assert browser.run(f"document.querySelectorAll({json.dumps(foreign)}).length") == 1, "the skip link alone"
        assert browser.run("document.scripts.length") == 2
        if browser.run("document.querySelector('#next').disabled"):
            break
        browser.click("#next")
    fill(browser, "#setting", "harm")
    options = texts(browser, "#metric option")
    for index in range(len(options)):
        browser.run(
            f"(() => {{ const m = document.querySelector('#metric'); m.value = '{index}';"
            "m.dispatchEvent(new Event('change')); })()"
        )
        assert browser.run("document.querySelectorAll('#metric-chart svg[role]').length") == 1
    assert browser.run("document.title") == "SKPO run hostile"
    assert any(option.startswith("</script><b><img src=x") for option in options) and "__proto__" in options
    assert any("<b>half \\ud83d of a pair \\udc00 line\\u2028separator" in option for option in options)
    whole = "".join(seen)
    for shown in (HARM[0], HARM[1], HARM[2], HARM[3]):
        assert shown in whole, "as text, letter for letter"
    assert_quiet(browser)


def test_what_cannot_be_seen_is_shown_as_an_escape(browser: Browser, hostile: Path) -> None:
    browser.look()
    browser.open(hostile)
    fill(browser, "#search", "right-to-left override")
    problem = text(browser, "#list .tree:first-child .plain")
    assert problem.startswith("left \\u202eright-to-left override\\u202c \\u2066isolate\\u2069 \\u200fmark \\u061c מִלָּה")
    fill(browser, "#search", "bell")
    problem = text(browser, "#list .tree:first-child .plain")
    assert problem == "null\\x00byte bell\\x07 escape\\x1b[31m delete\\x7f c1\\x9b carriage\\x0dreturn"
    assert "\\x00" in text(browser, "#list .snippet")
    fill(browser, "#search", "of a pair")
    problem = text(browser, "#list .tree:first-child .plain")
    assert problem.startswith("half \\ud83d of a pair \\udc00 line\\u2028separator paragraph\\u2029separator bom")
    assert problem.endswith("bom\\ufeff tag\\u{e0041}")
    fill(browser, "#search", "family")
    assert text(browser, "#list .tree:first-child .plain") == HARM[8], "joiners of emoji stay"
    # Nothing anywhere on the page can turn the direction of what follows it.
    assert not browser.run(r"/[\u202a-\u202e\u2066-\u2069\u200e\u200f\0]/.test(document.body.innerText)")


def test_texts_of_a_megabyte_are_cut_and_said(browser: Browser, hostile: Path) -> None:
    browser.look()
    browser.open(hostile)
    fill(browser, "#search", "aaaaaaaaaaaaaaaa")
    block = "#list .tree:first-child .body > :first-child"
    browser.click(f"{block} button")
    shown = text(browser, f"{block} .text")
    assert shown.startswith("AAAA") and "characters left out of this page" in shown
    assert shown.endswith("[cut here: 1000000 characters in all]") and len(shown) < 7000
    browser.click("#left-out summary")
    assert "keep their beginning and end" in text(browser, "#left-out li:last-child")


def test_rewards_that_are_no_numbers_are_shown_as_none(browser: Browser, hostile: Path) -> None:
    browser.look()
    browser.open(hostile)
    fill(browser, "#from", "4")
    chips = texts(browser, "#list .tree:first-child .body > :last-child .chip")
    assert chips[:2] == ["no reward", "+0.25"]


def outcome_of(browser: Browser, statements: str) -> str:
    """Name of the error that some statements throw in the page, or "ran"."""
    return browser.run(f"(() => {{ try {{ {statements} }} catch (error) {{ return error.name; }} return 'ran'; }})()")


def test_the_policy_stops_what_would_slip_through(at_demo: Browser) -> None:
    """Scripts, markup, styles and requests that something put into the page would do nothing."""
    node = "const e = document.createElement({0!r}); document.body.append(e);"
    assert outcome_of(at_demo, node.format("script") + "e.textContent = 'document.title = 1';") == "TypeError"
    assert outcome_of(at_demo, node.format("p") + "e.innerHTML = '<b>';") == "TypeError"
    assert outcome_of(at_demo, node.format("p") + "e.setAttribute('onclick', 'document.title = 1');") == "TypeError"
    outcome_of(at_demo, node.format("img") + "e.src = 'https://example.invalid/x.png';")
    outcome_of(at_demo, node.format("p") + "e.id = 'styled'; e.setAttribute('style', 'position: fixed');")
    assert at_demo.run("fetch('https://example.invalid/').then(() => 'loaded', () => 'refused')") == "refused"
    assert at_demo.run("document.title") == "SKPO run demo"
    assert at_demo.run("getComputedStyle(document.querySelector('#styled')).position") == "static"
    said = [event["params"]["entry"]["text"] for event in at_demo.events if event["method"] == "Log.entryAdded"]
    for broken in ("Loading the image", "Applying inline style", "Connecting to"):
        assert any(broken in line and "Content Security Policy" in line for line in said), said
