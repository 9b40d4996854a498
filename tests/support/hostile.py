"""Outputs that are meant to hurt a reward function: a corpus, and strategies that make more of their kind."""

from hypothesis import strategies as st

HOSTILE_ANSWERS = [
    # powers and factorials that do not fit into any memory
    "10^{10^{10}}",
    "10^10^10",
    "10**10**10",
    "9^{9^{9^{9}}}",
    "(10^{9999})^{9999}",
    "((10^{99})^{99})^{99}",
    "2^{(3^{(4^{5})})}",
    "e^{e^{e^{e^{10}}}}",
    "99999999!",
    "((99!)!)!",
    "\\binom{99999999}{49999999}",
    "1" * 5000,
    "0." + "3" * 5000,
    "1e999999999",
    "1 \\times 10^{999999999}",
    # sums, products, integrals, limits that take forever
    "\\sum_{n=1}^{10000000} n^n",
    "\\sum_{n=1}^{\\infty} \\frac{\\sin(n^n)}{n!}",
    "\\prod_{n=1}^{1000000} (x+n)",
    "\\int_0^1 x^{x^{x^x}} dx",
    "\\int \\int \\int \\sin(\\cos(\\tan(xyz))) dx dy dz",
    "\\lim_{n \\to \\infty} (1+\\frac{1}{n})^{n^{n}}",
    # algebra that explodes
    "(a+b+c+d+e+f)^{500}",
    "(x+y)^{9999}",
    "\\frac{(x+1)^{999}-1}{x}",
    "\\sin(x)^{50}\\cos(y)^{50}\\tan(z)^{50}",
    "\\sqrt{" * 11 + "2" + "}" * 11,
    "x^{99}+" * 60 + "1",
    "+".join(f"\\sqrt{{{n}}}" for n in range(2, 60)),
    "x^{97} + x^{89} - 3x^{5} + 1 = 0",
    "\\{" + ",".join(f"x^{{{n}}}" for n in range(60)) + "\\}",
    "\\begin{pmatrix}" + "\\\\".join(["&".join(["aa", "bb"] * 4)] * 8) + "\\end{pmatrix}^{50}",
    "\\det(\\begin{pmatrix}a&b\\\\c&d\\end{pmatrix})^{999}",
    # these pass the textual checks and are stopped by the timer
    "(a+b+c+d+e+f)^{150}",
    "(x+y+z+w)^{200}",
    "\\binom{999}{x}^{99}",
    "\\sin(\\cos(\\tan(x)))^{99}=\\tan(\\sin(x))^{98}",
    "(\\sqrt{2}+\\sqrt{3}+\\sqrt{5}+\\sqrt{7}+\\sqrt{11})^{150}",
    # nesting
    "{" * 5000 + "}" * 5000,
    "(" * 300 + ")" * 300,
    "\\frac{1}{" * 200 + "x" + "}" * 200,
    "\\sqrt{" * 3000,
    "[" * 390,
    "\\left(" * 60 + "1" + "\\right)" * 60,
    "-" * 390 + "1",
    "\\boxed{" * 50 + "1" + "}" * 50,
    # code
    "__import__('os').system('touch hacked')",
    "().__class__.__bases__[0].__subclasses__()",
    "\\text{__import__('os').system('touch hacked')}",
    "\\operatorname{exec}(\\text{open('hacked','w')})",
    "eval(compile('1','','eval'))",
    "lambda: 1",
    "\\input{/etc/passwd}",
    # text
    "\0",
    "5\0",
    "\ud800",
    "5\udfff",
    "\u202e5",
    "５",
    "٧",
    "𝟕",
    "\U0010ffff",
    "\\",
    "\\\\",
    "$",
    "$$$$",
    "%",
    "#",
    "\r\n\x0b\x0c\x85\u2028",
    "\\text{" + "a" * 380 + "}",
    " " * 390 + "5",
    "," * 390,
    "=" * 390,
    "1=" * 190 + "1",
    "\\text{and}" * 38,
    "nan",
    "inf",
    "\\infty",
    "zoo",
    "1/0",
    "\\frac{0}{0}",
    "\\frac{1}{0}",
]

HOSTILE_OUTPUTS = [
    "",
    "\0" * 1000,
    "\ud800" * 1000,
    "\\boxed{" * 200_000,
    "\\boxed" * 200_000,
    "#### " * 200_000,
    "Answer:" * 200_000,
    "answer is " * 100_000,
    "}" * 1_000_000,
    "x" * 5_000_000,
    "\n" * 1_000_000 + "\\boxed{5}",
    "\\boxed{" + "{" * 900 + "}" * 900 + "}",
    "#### " + "9" * 1990,
    "#### 9" + ",999" * 480,
    "#### " + "1," * 990,
    "#### -" + "-" * 1900 + "5",
    "Answer: " + "**" * 900,
    "The answer is" + " " * 1900,
    "#### $" + "\\text{" * 300 + "5",
    *(f"so \\boxed{{{answer}}}" for answer in HOSTILE_ANSWERS),
    *(f"Answer: {answer}" for answer in HOSTILE_ANSWERS),
    *(f"#### {answer}" for answer in HOSTILE_ANSWERS),
]

_ATOMS = st.sampled_from(
    ["0", "1", "7", "12", "0.5", "999", "x", "y", "n", "\\pi", "e", "i", "\\infty", "\\text{a b}", "\\%"]
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map(lambda ab: f"\\frac{{{ab[0]}}}{{{ab[1]}}}"),
        pairs.map(lambda ab: f"{ab[0]}^{{{ab[1]}}}"),
        pairs.map(lambda ab: f"{ab[0]} + {ab[1]}"),
        pairs.map(lambda ab: f"({ab[0]}, {ab[1]}]"),
        pairs.map(lambda ab: f"\\{{{ab[0]}, {ab[1]}\\}}"),
        pairs.map(lambda ab: f"{ab[0]} = {ab[1]}"),
        pairs.map(lambda ab: f"{ab[0]} \\le {ab[1]}"),
        pairs.map(lambda ab: f"\\log_{{{ab[0]}}}({ab[1]})"),
        pairs.map(lambda ab: f"\\sum_{{n=0}}^{{{ab[0]}}} {ab[1]}"),
        pairs.map(lambda ab: f"\\binom{{{ab[0]}}}{{{ab[1]}}}"),
        inner.map(lambda a: f"\\sqrt{{{a}}}"),
        inner.map(lambda a: f"\\int {a} dx"),
        inner.map(lambda a: f"\\sin({a})"),
        inner.map(lambda a: f"({a})!"),
        inner.map(lambda a: f"-{a}"),
        inner.map(lambda a: f"\\begin{{pmatrix}} {a} \\\\ 2 \\end{{pmatrix}}"),
    )


expressions = st.recursive(_ATOMS, _larger, max_leaves=8)
"""LaTeX that parses, of any meaning."""

soup = st.lists(
    st.sampled_from(
        [
            *"0123456789xyn{}()[]^_!,.=+-*/<>$% \n#",
            "\\frac",
            "\\sqrt",
            "\\boxed{",
            "\\text{",
            "\\left(",
            "\\right)",
            "\\sum",
        ]
        + [
            "\\int",
            "\\cup",
            "\\infty",
            "\\begin{pmatrix}",
            "\\end{pmatrix}",
            "####",
            "Answer:",
            "\\\\",
            "\\{",
            "\\}",
            "\0",
        ]
    ),
    max_size=60,
).map("".join)
"""LaTeX that hardly ever parses."""

any_text = st.text(st.characters(exclude_categories=()), max_size=300)
"""Unicode with control characters and lone surrogates."""

answers = st.one_of(expressions, soup, any_text, st.sampled_from(HOSTILE_ANSWERS))
outputs = st.one_of(
    answers.map(lambda answer: f"so \\boxed{{{answer}}}"),
    answers.map(lambda answer: f"Answer: {answer}"),
    answers.map(lambda answer: f"#### {answer}"),
    st.tuples(answers, answers).map(lambda two: f"\\boxed{{{two[0]}}} \\boxed{{{two[1]}}}"),
    st.tuples(soup, st.integers(1, 20_000)).map(lambda piece: piece[0] * piece[1]),
    soup,
    any_text,
    st.sampled_from(HOSTILE_OUTPUTS),
)
