r"""LaTeX of an answer without typesetting, with one spelling per command.

`tidy` returns the text that is compared: sizes, spaces, dollars, colours and emphasis are removed, arguments are in
braces (``\frac12`` -> ``\frac{1}{2}``), synonyms are one command (``\leq`` -> ``\le``); texts keep their wrapper.
`plain` goes further, for comparison as text: it removes wrappers, units and signs behind a number, and the case of
words. Both are linear in the text up to a bounded number of passes.
"""

import re
from functools import lru_cache

from reward_fns.forms import group_end

_CHARACTERS = {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt "}
_CHARACTERS |= {"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∩": "\\cap "}
_CHARACTERS |= {"±": "\\pm ", "∓": "\\mp ", "÷": "/", "\u00a0": " ", "\u202f": " ", "²": "^2", "³": "^3"}
_CHARACTERS |= {"…": "\\ldots ", "→": "\\to ", "∈": "\\in ", "∅": "\\emptyset ", "∖": "\\setminus ", "’": "'", "′": "'"}
_CHARACTERS |= {
    "°": "^\\circ ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}",
    "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}",
    "ℂ": "\\mathbb{C}",
}
_TRANSLATION = str.maketrans(_CHARACTERS)

_NAMES = {
    "\\frac": "dfrac tfrac cfrac",
    "\\binom": "dbinom tbinom",
    "\\le": "leq leqslant",
    "\\ge": "geq geqslant",
    "\\ne": "neq",
    "<": "lt",
    ">": "gt",
    "\\ldots": "dots cdots dotsc",
    "\\to": "rightarrow",
    "\\emptyset": "varnothing",
    "\\{": "lbrace",
    "\\}": "rbrace",
    "[": "lbrack",
    "]": "rbrack",
    "|": "lvert rvert vert",
    "\\setminus": "backslash",
    "*": "ast",
    "^\\circ": "degree",
    "i": "imath",
    "\\text{ or }": "lor",
    "\\text{ and }": "land",
    "\\text": "mbox textrm textnormal textit textbf",
    " ": "quad qquad",
    "": "thinspace displaystyle textstyle left right middle limits rm bf underline",
}
_SYNONYMS = {name: text for text, names in _NAMES.items() for name in names.split()}
_SYNONYMS |= {f"{size}{side}": "" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")}

_COMMAND = re.compile(r"\\\\|\\([a-zA-Z]+)(\s*)")
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
_DROPPED = re.compile(r"(?<!\\)\\[!,;:()\[\]]")
_DOLLAR = re.compile(r"(?<!\\)\\?\$")
_LATEX_SPACE = re.compile(r"(?<!\\)\\ |~|\s")
_COLOUR = re.compile(
    r"\\(?:textcolor|colorbox)\s*(?:\[[a-zA-Z]*\])?\s*\{[a-zA-Z0-9!, ]*\}|\\color\s*\{[a-zA-Z0-9!, ]*\}"
)
_UPRIGHT = re.compile(r"\\(?:mathrm|text|operatorname|mathit)\s*\{\s*(i|e|d)\s*\}(?![a-zA-Z])")
_FUNCTIONS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh"}
_OPERATOR = re.compile(
    r"\\(?:operatorname|mathrm|text)\s*"
    r"\{(asin|acos|atan|sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|ln|log|exp|gcd|lcm|max|min)\}"
)
_BLACKBOARD = re.compile(r"\\mathbb\s*([A-Z])")
_EMPHASIS = re.compile(r"(\*\*|__|\*)(.*[^*])\1")
# "1, 234" are two numbers, "1,234" and "1,\! 234" are one.
_THOUSANDS = re.compile(r",\\!\s*(?=[0-9]{3}(?![0-9]))|\{,\}")
_SPACE = re.compile(r"(?<![0-9a-zA-Z,])\s+|(?<=,)\s+(?![0-9])|(?<=,)(?<![0-9],)\s+|\s+(?![0-9a-zA-Z])")
_PERIOD = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]{1,12})\}")
_BARE = re.compile(
    r"(?<![a-zA-Z\\])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|infty|infinity)(?![a-zA-Z])"
)
_SCRIPTS = re.compile(r"\^\s*(\{[^{}]*\})\s*_\s*(\{[^{}]*\})")
_LEADING = re.compile(r"(?:=|\\approx|\\therefore)\s*")
_SYSTEM = re.compile(
    r"(?:\\left\s*\\\{)?\s*\\begin\{(?:cases|aligned)\}(.*?)\\end\{(?:cases|aligned)\}(?:\s*\\right\s*\.)?", re.DOTALL
)
_TEXT_WITH_NUMBER = re.compile(r"\\text\s*\{([^{}\\]*[0-9][^{}\\]*)\}")
# "1 000" is one number.
_SPACED = re.compile(r"(?<![0-9.,a-zA-Z])([1-9][0-9]{0,2})((?: [0-9]{3})+)(?![0-9])")
_MIXED = re.compile(r"(?<![0-9.,/^_{])([0-9]{1,12}) ([0-9]{1,12})/([0-9]{1,12})(?![0-9/.])")
_NOT = re.compile(r"\\not\s*=")
_TRAILING = re.compile(r"[.,;:]$|(?<!\\)\\{1,2}$")
_SIGN = re.compile(r"\^\{?\\circ\}?$|\\?%$")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}\\]*)\}")
_LONE_LETTER = re.compile(r"\(([a-zA-Z])\)")
_WORDS = re.compile(r"[a-zA-Z]{2,}(?: [a-zA-Z]+)*")

ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1} | dict.fromkeys(["vec", "overline", "bar", "hat", "tilde", "mathbf"], 1)
DEEPEST = 40
"""Depth of nested arguments; deeper text stays as it is, and `math_answer` refuses it."""


@lru_cache(maxsize=4096)
def tidy(answer: str) -> str:
    """Return the answer in the spelling that is compared."""
    answer = answer.translate(_TRANSLATION)
    answer = _OPERATOR.sub(lambda match: "\\" + _FUNCTIONS.get(match[1], match[1]), answer)
    answer = _UPRIGHT.sub(r"\1", _COLOUR.sub("", answer)).strip()
    answer = _SYSTEM.sub(_listed, _THOUSANDS.sub(",", answer))
    if "\\begin" not in answer:
        answer = _DOUBLED.sub(r"\\", answer)
    answer = _COMMAND.sub(_synonym, answer)
    answer = _LATEX_SPACE.sub(" ", _DOLLAR.sub(" ", _DROPPED.sub("", answer))).strip()
    worded = _TEXT_WITH_NUMBER.fullmatch(answer)
    if worded:
        answer = worded[1].strip()
    emphasis = _EMPHASIS.fullmatch(answer)
    if emphasis:
        answer = emphasis[2].strip()
    answer = _SPACED.sub(lambda match: match[0].replace(" ", ""), answer)
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer.replace("**", "^"))
    answer = _NOT.sub(r"\\ne ", answer)
    for typed, command in (("<=", "\\le "), (">=", "\\ge "), ("!=", "\\ne "), ("...", "\\ldots ")):
        answer = answer.replace(typed, command)
    answer = _BLACKBOARD.sub(r"\\mathbb{\1}", _PERIOD.sub(_periodic, answer))
    answer = _BARE.sub(lambda match: "\\infty" if match[1] == "infinity" else "\\" + match[1], answer)
    answer = _SCRIPTS.sub(r"_\2^\1", _braced(answer, 0))
    answer = _SPACE.sub("", " ".join(answer.split()))
    while True:
        shorter = _TRAILING.sub("", _LEADING.sub("", answer, count=1) if _LEADING.match(answer) else answer).strip()
        inner = _whole_group(shorter)
        if inner is not None:
            shorter = inner
        if shorter == answer:
            return answer
        answer = shorter


@lru_cache(maxsize=4096)
def plain(answer: str) -> str:
    """Return a tidy answer as text: equal texts are equal answers."""
    answer = " ".join(_TEXT.sub(r" \1 ", _SIGN.sub("", answer)).split())
    answer = _SPACE.sub("", answer).rstrip(".")
    letter = _LONE_LETTER.fullmatch(answer)
    if letter:
        return letter[1]
    # Words are compared without their case; a letter may be a variable, whose case matters.
    return answer.casefold() if _WORDS.fullmatch(answer) else answer


def without_sign(text: str) -> str:
    """Remove a percent or degree sign at the end."""
    return _SIGN.sub("", text).rstrip()


def _listed(match: re.Match[str]) -> str:
    """Turn equations below each other into a list; a function defined by cases stays as it is."""
    rows = re.sub(r"&\s*(?==)|(?<==)\s*&", "", match[1]).split("\\\\")
    return match[0] if "&" in "".join(rows) else ", ".join(row.strip() for row in rows if row.strip())


def _synonym(match: re.Match[str]) -> str:
    replacement = _SYNONYMS.get(match[1] or "")
    if replacement is None:
        return match[0]
    # "\left x" and "\lt x" pass their space to the text before them.
    return replacement + (" " if match[2] or replacement[-1:].isalpha() else "")


def _periodic(match: re.Match[str]) -> str:
    r"""Turn ``0.1\overline{6}`` into a fraction."""
    whole, once, period = match[1] or "0", match[2], match[3]
    if len(whole + once) > 20:
        return match[0]
    shift = 10 ** len(once)
    below = shift * (10 ** len(period) - 1)
    above = int(whole + once) * (10 ** len(period) - 1) + int(period)
    return f"\\frac{{{above}}}{{{below}}}"


def _whole_group(text: str) -> str | None:
    """Return the content if one pair of braces, or one box, surrounds the whole text."""
    start = len("\\boxed") if text.startswith("\\boxed{") else 0
    if not text.startswith("{", start) or not text.endswith("}") or text.endswith("\\}"):
        return None
    end = _group_end(text, start)
    return text[start + 1 : -1].strip() if end == len(text) else None


def _group_end(text: str, start: int) -> int:
    """Return the position behind the brace that closes the one at `start`; the end of the text if there is none."""
    end = group_end(text, start)
    return len(text) if end < 0 else end


def _braced(text: str, depth: int) -> str:
    """Put arguments of fractions, roots, binomials, powers and indices in braces."""
    if depth > DEEPEST:
        return text
    out: list[str] = []
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            match = _COMMAND.match(text, position)
            if match is None or not match[1]:
                out.append(text[position : position + 2])
                position += 2
                continue
            position = match.end()
            name = match[1]
            if name == "text" and text.startswith("{", position):
                end = _group_end(text, position)
                out.append("\\text" + text[position:end])
                position = end
                continue
            if name in ARGUMENTS:
                out.append(f"\\{name}")
                position = _arguments(text, position, name, depth, out)
            else:
                out.append(f"\\{name} ")
        elif character in "^_":
            out.append(character)
            position = _script(text, position + 1, depth, out)
        elif character == "{":
            end = _group_end(text, position)
            out.append("{" + _braced(text[position + 1 : end - 1], depth + 1) + "}")
            position = end
        else:
            out.append(character)
            position += 1
    return "".join(out)


def _arguments(text: str, position: int, name: str, depth: int, out: list[str]) -> int:
    while text.startswith(" ", position):
        position += 1
    if name == "sqrt" and text.startswith("[", position):
        end = text.find("]", position)
        if end > 0:
            out.append("[" + _braced(text[position + 1 : end], depth + 1) + "]")
            position = end + 1
    if name == "sqrt" and text.startswith("(", position):
        end = _closing(text, position)
        if end:
            out.append("{" + _braced(text[position + 1 : end - 1], depth + 1) + "}")
            return end
    for _ in range(ARGUMENTS[name]):
        position = _argument(text, position, depth, out)
    return position


def _argument(text: str, position: int, depth: int, out: list[str]) -> int:
    """Read one argument as LaTeX does: a group, a command with its own arguments, or a character."""
    while text.startswith(" ", position):
        position += 1
    if position >= len(text):
        return position
    if text[position] == "{":
        end = _group_end(text, position)
        inner = text[position + 1 : end - 1]
    elif text[position] == "\\" and (match := _COMMAND.match(text, position)) and match[1]:
        arguments: list[str] = []
        end = match.end()
        if match[1] in ARGUMENTS and depth < DEEPEST:
            end = _arguments(text, end, match[1], depth + 1, arguments)
        out.append("{\\" + match[1] + "".join(arguments) + "}")
        return end
    else:
        end = position + 1
        inner = text[position:end]
    out.append("{" + _braced(inner, depth + 1) + "}")
    return end


def _script(text: str, position: int, depth: int, out: list[str]) -> int:
    """Read the text after ``^`` or ``_``: "x^10", "10^-3" and "x^(1/2)" are read as people mean them."""
    match = re.compile(r"\s*(-?\s*[0-9]+)").match(text, position)
    if match:
        end = match.end()
        if out[-1] == "_" and len(out) > 1 and out[-2].startswith("\\log"):
            end = match.start(1) + 1
        out.append("{" + text[match.start(1) : end].replace(" ", "") + "}")
        return end
    if text.startswith("(", position) and out[-1] == "^":
        end = _closing(text, position)
        if end:
            out.append("{" + _braced(text[position + 1 : end - 1], depth + 1) + "}")
            return end
    match = re.compile(r"\s*([a-zA-Z])").match(text, position)
    if match:
        out.append("{" + match[1] + "}")
        return match.end()
    return position


def _closing(text: str, start: int) -> int:
    """Return the position behind the parenthesis that closes the one at `start`, 0 if there is none."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return 0
