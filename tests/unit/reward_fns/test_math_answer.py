"""Mathematical answers: what is equal and what is not, by kind, and that nothing a model writes is run."""

import json
import re
from itertools import product
from pathlib import Path

import pytest

from benchmarks.perturbations import PERTURBATIONS, perturbed
from reward_fns import compute_score, judge, math_answer
from reward_fns.forms import last_boxed
from reward_fns.math_answer import equal, number, refusal
from reward_fns.math_text import plain, tidy

REPOSITORY = Path(__file__).parents[3]
DATA = REPOSITORY.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside the repository")

Pairs = list[tuple[str, str]]

EQUAL: dict[str, Pairs] = {
    "typesetting": [
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"\frac \pi4+2-\sqrt2", r"2+\frac{\pi}{4}-\sqrt{2}"),
        (r"\textcolor{red}{42}", "42"),
        (r"{\color{blue} x+1}", "1+x"),
        ("**42**", "42"),
        (r"\boxed{7}", "7"),
        (r"\mathbf{7}", "7"),
        (r"\underline{7}", "7"),
        ("$5$.", "5"),
        ("2π", r"2\pi"),
        ("x**2", "x^2"),
        ("sqrt(2)", r"\sqrt2"),
        ("x^10", "x^{10}"),
        (r"x^2_1", "x_1^2"),
        (r"\\frac{1}{2}", "0.5"),
        ("52_{8}", "52_8"),
        (r"x\leq 3", r"x\le3"),
    ],
    "numbers": [
        ("1/2", r"\frac{1}{2}"),
        ("1 000", "1000"),
        (r"-\frac{3}{4}", r"\frac{-3}{4}"),
        ("1,234,567", "1234567"),
        (r"11,\!111", "11111"),
        ("2{,}000", "2000"),
        (r"1.6 \times 10^{3}", "1600"),
        ("2.5e-3", "0.0025"),
        (r"3\frac{1}{2}", r"\frac{7}{2}"),
        ("2 3/4", "2.75"),
        (r"-2\frac34", r"-\frac{11}{4}"),
        (r"0.1\overline{6}", r"\frac16"),
        (r"\sqrt[3]{-8}", "-2"),
        ("3(4)", "12"),
        (r"\log_2 8", "3"),
        (r"\sin 30^\circ", r"\frac12"),
        (r"\frac{1}{\sqrt2+1}", r"\sqrt2-1"),
        ("1.414214", r"\sqrt2"),
    ],
    "units": [
        (r"24\text{ cm}^2", "24"),
        (r"24\,\text{cm}^2", "24"),
        (r"24\;\text{cm}^2", "24"),
        (r"24\,\mathrm{m/s}", "24"),
        ("24 cm^2", "24"),
        ("24 km/h", "24"),
        (r"3\times10^8 m/s^2", "300000000"),
        (r"25^\circ C", "25"),
        (r"25^{\circ}\text{C}", r"25^\circ"),
        (r"\text{24 cm}", "24"),
        (r"24\mathrm{~cm^2}", "24"),
        (r"2\pi\text{ cm}^2", r"2\pi"),
        (r"3\sqrt{2} \text{ m}", r"3\sqrt2"),
        (r"12\text{ inches}", r"12\text{ in}"),
        (r"12\text{ m/s}", r"12\,\mathrm{m}/\mathrm{s}"),
        (r"12\text{ square feet}", r"12\text{ ft}^2"),
        ("5 dollars", r"\$5"),
        (r"36^{\circ}", r"36\text{ degrees}"),
        (r"50\%", "50"),
        (r"5\text{ million}", "5,000,000"),
        (r"5\text{ cm}, 6\text{ cm}", "5, 6"),
    ],
    "algebra": [
        ("(x+1)^2", "x^2+2x+1"),
        ("ab+ac", "a(b+c)"),
        ("4x^2-12x+9", "(2x-3)^2"),
        (r"\frac{x+y}{xy}", r"\frac1x+\frac1y"),
        (r"\frac{x^3-1}{x-1}", "x^2+x+1"),
        (r"\tan^2(y)+1", r"\sec^2(y)"),
        (r"2^{n+1}", r"2\cdot2^n"),
        (r"\frac{1}{yz}+\frac{1}{xz}", r"\frac{x+y}{xyz}"),
        (r"\frac13 E_1+\frac23 E_2", r"\frac{E_1+2E_2}{3}"),
        (r"\ln(ab)", r"\ln a+\ln b"),
        (r"\log_2 x", r"\frac{\ln x}{\ln 2}"),
        (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        ("n!", "n(n-1)!"),
        ("x^{1/3}", r"\sqrt[3]{x}"),
        ("x^{2021}+1", "1+x^{2021}"),
        ("0.5x", r"\frac{x}{2}"),
        ("ab+cd", "dc+ba"),
        (r"\gamma+1", r"1+\gamma"),
        (r"\arctan x", r"\tan^{-1}x"),
        ("|x-1|", "|1-x|"),
    ],
    "complex": [
        ("2+3i", "2+3 i"),
        ("2+3i", "3 i + 2"),
        ("2+3i", r"2+3\mathrm{i}"),
        ("2+3i", r"2+3\cdot i"),
        (r"\frac{1+3i}{2}", r"\frac12+\frac{3}{2}i"),
        (r"\frac{5}{1+2i}", "1-2i"),
        (r"\sqrt{-4}", "2i"),
        (r"e^{i\pi/2}", "i"),
    ],
    "equations": [
        ("x = 5", "5"),
        ("5=x", "5"),
        ("x+y=7", "7"),
        ("S=1+2+3=6", "6"),
        ("f(2)=9", "9"),
        (r"\text{Area}=5", "5"),
        ("y=2x+1", "2x+1"),
        ("y = 2x + 1", "2x-y+1=0"),
        ("2x+4y-3=0", r"y=-\frac12x+\frac34"),
        ("9x^2+4y^2=36", r"\frac{x^2}{4}+\frac{y^2}{9}=1"),
        ("E=mc^2", "mc^2=E"),
        ("1+1=2", "2=1+1"),
        (r"\approx 16.75", "16.75"),
        (r"x\approx 16.75", "x=16.75"),
        (r"\sqrt{2}\approx 1.414", r"\sqrt2"),
    ],
    "inequalities and sets": [
        ("x<3", r"(-\infty,3)"),
        (r"-7<a\le 10", "(-7,10]"),
        (r"x\ge2", r"[2,\infty)"),
        ("x \\ge 3", "3 \\le x"),
        ("4>m>3", "3<m<4"),
        ("x+y<3", "6>2x+2y"),
        (r"x\in[-2,7]", r"-2\le x\le7"),
        ("0<f(x)<1", "(0,1)"),
        (r"x\ne 3", r"(-\infty,3)\cup(3,\infty)"),
        (r"x<1\text{ or }x>2", r"(-\infty,1)\cup(2,\infty)"),
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
        (r"[1,2]\cup[3,4]", r"[3,4]\cup[1,2]"),
        (r"\{x\mid x\leq 3\}", r"\{x : x\le 3\}"),
        (r"\{x\in\mathbb{R}\mid x>0\}", r"(0,\infty)"),
        (r"x\in(1,2)", "(1,2)"),
        (r"\{2,1\}", r"\{1,2\}"),
        (r"\{1,1,2\}", r"\{1,2\}"),
        (r"\{\}", r"\varnothing"),
    ],
    "lists and tuples": [
        ("2,1", "1, 2"),
        (r"2 \text{ and } 3", "3,2"),
        ("x=1, x=2", "1,2"),
        ("x=1 or 2", "2,1"),
        (r"\{3,5\}", "5, 3"),
        ("(3,5),(1,2)", "(1,2),(3,5)"),
        ("(1,2)", "1,2"),
        ("(x,y)=(1,2)", "(1,2)"),
        ("x=1,y=2", "(1,2)"),
        ("a=1,b=2", "b=2,a=1"),
        ("x=1,y=2;x=3,y=4", "(3,4),(1,2)"),
        ("AB=4,CD=5", "4,5"),
        (r"\begin{cases}x=1\\y=2\end{cases}", "x=1,y=2"),
        ("(1,2,3)", "[1,2,3]"),
        (r"\pm\sqrt{2}", r"\sqrt2,-\sqrt2"),
        (r"x=1\pm2", "3,-1"),
        (r"1\pm\sqrt{19}", r"1-\sqrt{19},1+\sqrt{19}"),
        (r"2k\pi, k\in\mathbb{Z}", r"2\pi k,k\in \mathbb{Z}"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1/2\\2\end{pmatrix}", r"\begin{bmatrix}0.5\\2\end{bmatrix}"),
        (r"\begin{pmatrix}2\\4\end{pmatrix}", r"2\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"),
    ],
    "ratios": [
        ("S:T=7:32", "7:32"),
        (r"3\text{ to }1", "3:1"),
        ("3:2", "6:4"),
        ("1:2:3", "2:4:6"),
        ("3:2", "1.5"),
        ("12:30", "12:30"),
    ],
    "words": [(r"\text{Evelyn}", "evelyn"), ("(C)", r"\text{C}"), (r"\text{no solution}", "No solution")],
}

DIFFERENT: dict[str, Pairs] = {
    "numbers": [
        ("6", "5"),
        ("-5", "5"),
        ("0.333333", r"\frac{1}{3}"),
        ("3.1416", r"\pi"),
        ("1, 234", "1234"),
        ("1 2", "12"),
        ("1 2", "3"),
        ("2(3)", "5"),
        (r"2\frac{3}{2}", "3"),
        ("2^3^2", "64"),
        ("10^{30}+1", "10^{30}"),
        ("1/0", "2/0"),
        ("nan", "5"),
        ("?", "5"),
    ],
    "a base": [("-221_3", "-221_4"), ("52_7", "52_8"), ("52_8", "52"), ("52_8", "42"), ("1A_{16}", "1A_{17}")],
    "units": [
        (r"15\text{ cm}^2", r"15\text{ cm}^3"),
        (r"5\text{ cm}", r"5\text{ m}"),
        (r"5\text{ cents}", r"5\text{ dollars}"),
        (r"25^\circ C", r"25^\circ F"),
        (r"3:30\text{ PM}", r"3:30\text{ AM}"),
        (r"5\text{ million}", "5"),
        ("5 squared", "5"),
        (r"5\text{ or more}", "5"),
        (r"5\text{ and a half}", "5"),
        (r"5\text{ thirds}", "5"),
        (r"50\%", "0.5"),
        ("3t", "3"),
        ("3 xy", "3"),
        ("3 pi", "3"),
        (r"\text{not }5", "5"),
        ("minus 5", "5"),
        ("24 m n", "24"),
    ],
    "algebra": [
        ("2(x-1)", "2x+2"),
        (r"\sqrt{x^2}", "x"),
        ("|x-50|", "50-x"),
        (r"\lfloor x/20\rfloor", r"\lfloor x/30\rfloor"),
        (r"\ln x", r"\log x"),
        (r"\sin^{-1}x", r"\frac{1}{\sin x}"),
        ("X", "x"),
        (r"\gamma", r"\Gamma"),
        ("e_1", "e"),
        ("x_1", "x_2"),
        (r"\vec{v}", "v"),
        ("f(x)=x", "g(x)=x^2"),
        (r"\frac{dy}{dx}", r"\frac{y}{x}"),
        ("A^T", "A"),
        (r"\sum_{n=1}^{10} n", "55"),
        (r"\int_0^1 2x dx", "1"),
    ],
    "complex": [("2+3i", "2-3i"), ("2+3i", "3+2i"), ("2+3i", "2+3j"), ("|3+4i|", "3+4i"), ("I=5", "I=6")],
    "equations": [
        ("f(2)=9", "f(2)=8"),
        ("f(2)=9", "f(3)=9"),
        ("p(0)=1", "p(0)=2"),
        ("1+1=2", "1+1=3"),
        (r"\log_2 8=3", r"\log_2 8=4"),
        (r"\sqrt4=2", r"\sqrt9=3"),
        ("T=-10+110e^{-t}", "T=-11+110e^{-t}"),
        ("f'(2)=3", "f(2)=3"),
        ("x=1", "y=1"),
        ("x=2", r"x\ne2"),
        ("a=b=c", "a=b=d"),
        ("x^2=4", "x^2=5"),
        ("4=5", "5"),
        ("2x=4", "4"),
        ("2x=4", "x=2"),
        ("x+1=3", "3"),
        (r"\sqrt2\approx1.5", "1.5"),
    ],
    "read in part": [
        (r"\neq\frac{7}{2}", r"\frac72"),
        (r"\not=5", "5"),
        (r"\frac{1}{2} \to \frac{7}{2}", r"\frac72"),
        (r"d=5, M=(-1, \frac{7}{2})", r"\frac72"),
        (r"\frac23", r"\frac13 E_1+\frac23 E_2"),
        ("12:00", "1:00"),
        ("7:30", "15:60"),
        (r"\pm 2021", "2021"),
        (r"1,2,\ldots,n", r"1,3,5,\ldots,2n-1"),
        (r"1,2,\ldots,10", r"1,2,\ldots,11"),
        ("5!", "5"),
        (r"5\to6", "5"),
        ("5 or 6", "5"),
        (r"\ge5", "5"),
        (r"a\mid b", "ab"),
        (r"a\equiv 1\pmod 5", r"a\equiv 1\pmod 7"),
        (r"\mathbb{R}^2", r"\mathbb{R}"),
        (r"\phantom{5}3", "3"),
        (r"\overline{AB}", "AB"),
        ("$1$2$", "12"),
        ("", "5"),
    ],
    "inequalities and sets": [
        (r"x \ge 3", r"x \le 3"),
        ("x<3", r"(-\infty,3]"),
        ("x>2", "y>2"),
        ("-x>3", "x>3"),
        ("2x<6", "x<3"),
        ("2x<6", r"(-\infty,3)"),
        ("0<2x<6", "0<x<3"),
        ("x<1, x>3", "1<x<3"),
        ("[1,2]", "[1,2)"),
        (r"(1,2)\cup(3,4)", r"(1,2)\cap(3,4)"),
        (r"\{x\mid x>0\}", r"\{x\mid x<0\}"),
        (r"\emptyset", r"\{0\}"),
        (r"\infty", r"-\infty"),
    ],
    "lists and tuples": [
        ("1,2", "1,1,2"),
        ("(2, 1)", "(1, 2)"),
        ("(1,2)", r"\{1,2\}"),
        ("[1,2]", "1,2"),
        (r"\{1,2,3\}", r"\{1,2\}"),
        ("(1,2),(3,4)", "(1,4),(3,2)"),
        ("x=1,y=2", "x=2,y=1"),
        ("y=1,x=2", "(1,2)"),
        ("a=1,b=2", "2,1"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    ],
    "ratios": [("3:2", "2:3"), ("1:2:3", "3:2:1"), (r"3\text{ to }4", "3")],
    "words": [
        (r"\text{Evelyn}", r"\text{Carla}"),
        (r"\text{evil}", r"\text{live}"),
        ("north", "thorn"),
        (r"\text{increasing}", r"\text{decreasing}"),
    ],
}


@pytest.mark.parametrize("kind", EQUAL)
def test_the_same_answer_written_differently_is_right(kind: str) -> None:
    pairs = [pair for one, other in EQUAL[kind] for pair in ((one, other), (other, one))]
    assert [pair for pair in pairs if not equal(*pair)] == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_answer_is_wrong(kind: str) -> None:
    pairs = [pair for one, other in DIFFERENT[kind] for pair in ((one, other), (other, one))]
    assert [pair for pair in pairs if equal(*pair)] == []


def test_the_rules_in_the_documentation_hold() -> None:
    text = (REPOSITORY / "docs" / "rewards.md").read_text(encoding="utf-8")
    table = text.partition("## How answers are compared")[2].partition("\n\n## ")[0]
    checked, wrong = 0, []
    for row in re.findall(r"(?m)^\| .*\|$", table)[1:]:
        for cell, right in zip(re.split(r" \|(?: |$)", row)[2:4], (True, False), strict=True):
            for given, truth in re.findall(r"((?:`[^`]+`(?:, | or | and )?)+) for ((?:`[^`]+`(?:, | and )?)+)", cell):
                for pair in product(re.findall("`([^`]+)`", given), re.findall("`([^`]+)`", truth)):
                    checked += 1
                    wrong += [] if equal(*pair) == right else [pair]
    assert checked > 60 and wrong == []


def test_the_guard_refuses_nothing_that_these_comparisons_need() -> None:
    assert equal("x+(1+y)", "y+x+1")
    assert (judge.counts().refused, judge.counts().failed) == (0, 0)


def test_plain_numbers_are_decided_without_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "equal", lambda *_: pytest.fail("asked the worker"))
    assert equal("1,234.50", "1234.5") and not equal("1235", "1234") and equal("\\frac{10}{4}", "2.5")
    assert equal("  x^2 ", "x^2") and equal("\\text{even}", "Even")
    assert not equal("9" * 500, "9") and not equal("(" * 100, "9")


def test_numbers_are_exact() -> None:
    assert number("0.1") == number("\\frac{1}{10}") == number("1/10") == number("1e-1")
    assert number("1" * 40) == int("1" * 40)
    for text in ("", "-", ".", "1/0", "1..2", "1,23", "x", "1e9999", "--1"):
        assert number(text) is None, text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("x\0", "control"),
        ("x\ud800", "control"),
        ("(" * 13 + "x" + ")" * 13, "nested"),
        ("{x", "braces"),
        ("x} + {y", "braces"),
        ("x" + "9" * 41, "digits"),
        ("x^{99999}", "power"),
        ("9^{9^{9}}", "power of a power"),
        ("9^9^9", "power of a power"),
        ("9999!", "factorial"),
        ("(9!)!", "factorial"),
        ("\\binom{10000}{5000}", "binomial"),
    ],
)
def test_what_could_run_away_is_refused_by_its_text(answer: str, reason: str) -> None:
    assert reason in refusal(answer)


@pytest.mark.parametrize("answer", ["(" * 12 + "x" + ")" * 12, "2^{1000}x", "x^{2021}", "\\{\\}", "5!", "|x|"])
def test_usual_answers_are_not_refused(answer: str) -> None:
    assert refusal(answer) == ""


def test_tidy_text_keeps_what_matters() -> None:
    assert tidy("\\left( 3 ,\\; \\dfrac12 \\right)") == "(3,\\frac{1}{2})"
    assert tidy("\\leftarrow x") == "\\leftarrow x"
    assert plain(tidy("two words")) == "two words" and plain(tidy("x  y")) == "x y"


CODE = [
    "__import__('os').system('touch {file}')",
    "\\text{{__import__('os').system('touch {file}')}}",
    "\\operatorname{{exec}}(open('{file}','w'))",
    "\\mathrm{{eval}}(\\text{{open('{file}','w')}})",
    "open('{file}','w')_{{1}}",
    "[].__class__.__base__.__subclasses__()",
    "x; import os; os.mkdir('{file}')",
    "\\f{{open('{file}','w')}}",
]


def test_no_answer_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in CODE:
        for form in ("\\boxed{{{}}}", "Answer: {}", "#### {}"):
            text = form.format(code.format(file=tmp_path / "hacked"))
            for truth in ("x+1", "7"):
                assert compute_score("math", text, truth)["score"] == -1.0, text
    assert not list(tmp_path.iterdir())


def test_an_empty_or_endless_ground_truth_is_a_fault_of_the_data() -> None:
    for truth in ("", "  ", "x" * (math_answer.LONGEST + 1)):
        with pytest.raises(ValueError, match="ground_truth"):
            compute_score("math", "\\boxed{5}", truth)


# ---------------------------------------------------------------- real answers


def math500() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "math500" / "test.jsonl").read_text(encoding="utf-8").splitlines()]


@needs_data
def test_every_gold_solution_of_math500_is_right() -> None:
    rows = math500()
    assert len(rows) == 500
    wrong = [row["answer"] for row in rows if compute_score("math", row["solution"], row["answer"])["acc"] != 1.0]
    assert wrong == []


@needs_data
def test_every_gold_of_the_benchmarks_is_right_when_it_is_boxed() -> None:
    for name, count in {"aime24": 30, "amc23": 40, "minerva_math": 272}.items():
        lines = (DATA / "bench" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        golds = [str(row["answer"]) if "answer" in row else last_boxed(row["solution"]) for row in rows]
        assert len(golds) == count
        for gold in golds:
            assert compute_score(name, f"so \\boxed{{{gold}}}.", gold)["acc"] == 1.0, gold


def accepted(count: int) -> list[tuple[str, str, str]]:
    """The perturbed answers of MATH-500 that the reward takes for right."""
    wrong = list(perturbed([row["answer"] for row in math500()], count, seed=1))
    assert len(wrong) == count and len({kind for _, _, kind in wrong}) == len(PERTURBATIONS)
    return [case for case in wrong if compute_score("math", f"\\boxed{{{case[1]}}}", case[0])["acc"] == 1.0]


@needs_data
def test_perturbed_answers_are_wrong() -> None:
    assert accepted(60) == []


@needs_data
@pytest.mark.fuzz
def test_two_thousand_perturbed_answers_are_wrong() -> None:
    found = accepted(2000)
    print(f"\n{len(found)} of 2000 perturbed answers were taken for right: {found}")
    assert len(found) <= 4
