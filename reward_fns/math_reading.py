"""Parse the structure of a tidy answer: lists, sets, tuples and intervals, relations, ratios; the rest is a `Leaf`.

Only text is looked at here. Nothing is dropped: every character ends up in a leaf, an operator or a bracket. So
`math_compare` can require that text without a value is equal as text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

DEEPEST = 8
MOST_SIGNS = 4
"""Plus-minus signs in one element; 2^4 answers."""


@dataclass(frozen=True)
class Leaf:
    """An expression, or text."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several answers.

    Attributes:
        kind: "list", "set" or the two brackets, as in "[)".
        items: the answers.
        joined: the last separator.
    """

    kind: str
    items: tuple["Node", ...]
    joined: str = ","


@dataclass(frozen=True)
class Chain:
    """Members with a relation between neighbours: one operator fewer than members."""

    members: tuple["Node", ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """Sets with ``cup``, ``cap`` or ``setminus`` between them."""

    operator: str
    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Ratio:
    """a:b or a:b:c."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Builder:
    """The set of all `element` with `condition`."""

    element: "Node"
    condition: "Node"


Node = Leaf | Group | Chain | Operation | Ratio | Builder

RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "\\le": "<=",
    "\\ge": ">=",
    "\\ne": "!=",
    "\\approx": "~",
    "\\in": "in",
    "\\notin": "not in",
    "\\equiv": "==",
    "\\subset": "subset",
    "\\subseteq": "subseteq",
    "\\to": "to",
    "\\Rightarrow": "implies",
    "\\implies": "implies",
    "\\iff": "iff",
    "\\Leftrightarrow": "iff",
    "\\sim": "sim",
    "\\cong": "cong",
    "\\propto": "propto",
    "\\perp": "perp",
    "\\parallel": "parallel",
}
OPERATIONS = ("\\setminus", "\\cup", "\\cap")

_TOKEN = re.compile(
    r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+|\\.|(?<![0-9.,a-zA-Z])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9.]+"
    r"|(?<![a-zA-Z])(?:and|or|to)(?![a-zA-Z])|.",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_WORD = re.compile(r"\\text\s*\{\s*,?\s*(and|or|to)\s*\}|(and|or|to)")
_OPENING = {"(", "[", "\\{", "{", "\\langle", "\\lfloor", "\\lceil"}
_CLOSING = {")", "]", "\\}", "}", "\\rangle", "\\rfloor", "\\rceil"}
_BRACKETS = {"(": "(", "[": "[", "\\{": "{", "\\langle": "(", "\\lbrack": "["}
_END_BRACKETS = {")": ")", "]": "]", "\\}": "}", "\\rangle": ")"}


def read(text: str) -> Node:
    """Parse the structure of a tidy answer."""
    return _read_list(text, 0)


@lru_cache(maxsize=1024)
def _tokens(text: str) -> tuple[tuple[str, int], ...]:
    """Return the tokens and the bracket depth of each; a bracket itself has the depth outside of it."""
    tokens = []
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token == "\\begin") - (token in _CLOSING)
        tokens.append((token, depth))
        depth += (token in _OPENING) - (token == "\\end")
    return tuple(tokens)


def _split(text: str, separator: re.Pattern[str], thousands: bool = True) -> tuple[list[str], list[str]]:
    """Split at depth 0; return the parts and the separators between them."""
    parts, separators = [""], []
    for token, depth in _tokens(text):
        if depth == 0 and not thousands and _THOUSANDS.fullmatch(token):
            first, *others = token.split(",")
            parts[-1] += first
            parts += others
            separators += [","] * len(others)
        elif depth == 0 and separator.fullmatch(token):
            parts.append("")
            separators.append(token)
        else:
            parts[-1] += token
    return [part.strip() for part in parts], separators


_LIST = re.compile(r"[,;]|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|and|or")
_SEMICOLON = re.compile(";")
_RELATION = re.compile("|".join(map(re.escape, RELATIONS)))
_RATIO = re.compile(r":|\\colon|\\text\s*\{\s*to\s*\}|to")
_BUILDER = re.compile(r"\\mid|\||:|\\colon")


def _read_list(text: str, depth: int, thousands: bool = True) -> Node:
    if depth > DEEPEST:
        return Leaf(text)
    rows, _ = _split(text, _SEMICOLON)
    if len(rows) > 1 and all(len(_split(row, _LIST)[0]) > 1 for row in rows):
        # "x = 1, y = 2; x = 3, y = 4"
        return Group("list", tuple(_read_list(row, depth + 1, thousands) for row in rows))
    parts, separators = _split(text, _LIST, thousands)
    kept = [part for part in parts if part]
    items = [node for part in kept for node in _read_element(part, depth)]
    if len(items) == 1 and len(parts) == 1:
        return items[0]
    if not items or (len(kept) == 1 and len(items) == 1):
        return Leaf(text)
    words = "".join(separators)
    return Group("list", tuple(items), "or" if "or" in words else "and" if "and" in words else ",")


def _read_element(text: str, depth: int) -> Iterator[Node]:
    """Yield an element once per choice of its plus-minus signs, all together if one is a minus-plus."""
    if _bracketed(text) and text.startswith("\\{"):
        yield _read_single(text, depth)
        return
    places = re.findall(r"\\pm(?![a-zA-Z])|\\mp(?![a-zA-Z])", text)
    if not places or len(places) > MOST_SIGNS or re.search(r"\\\{[^}]*\\[pm][pm](?![a-zA-Z])", text):
        yield _read_single(text, depth)
        return
    upper, lower = {"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"}
    together = [[upper] * len(places), [lower] * len(places)]
    rest = re.split(r"\\(?:pm|mp)(?![a-zA-Z])\s*", text)
    for choice in together if "\\mp" in places else product((upper, lower), repeat=len(places)):
        signs = [signs[place] for signs, place in zip(choice, places, strict=True)]
        signed = rest[0] + "".join(sign + part for sign, part in zip(signs, rest[1:], strict=True))
        yield _read_single(re.sub(r"(^|[(\[{=,])\+", r"\1", signed), depth)


def _read_single(text: str, depth: int) -> Node:
    if depth > DEEPEST:
        return Leaf(text)
    if re.fullmatch(r"\\text\s*\{[^{}]*\}", text):
        return Leaf(text)
    members, operators = _split(text, _RELATION)
    if operators:
        if not all(members):
            return Leaf(text)
        return Chain(
            tuple(_read_single(member, depth + 1) for member in members), tuple(RELATIONS[each] for each in operators)
        )
    for operator in OPERATIONS:
        parts, separators = _split(text, re.compile(re.escape(operator)))
        if separators and all(parts):
            return Operation(operator[1:], tuple(_read_single(part, depth + 1) for part in parts))
    parts, separators = _split(text, _RATIO)
    if separators:
        return Ratio(tuple(_read_single(part, depth + 1) for part in parts)) if all(parts) else Leaf(text)
    return _read_brackets(text, depth) if _bracketed(text) else Leaf(text)


def _bracketed(text: str) -> bool:
    """Return whether the first token opens a bracket that the last one closes."""
    tokens = _tokens(text)
    if len(tokens) < 2 or tokens[0][0] not in _BRACKETS | {"{": ""} or tokens[-1][0] not in _CLOSING:
        return False
    return tokens[-1][1] == 0 and all(depth > 0 for _, depth in tokens[1:-1])


def _read_brackets(text: str, depth: int) -> Node:
    tokens = _tokens(text)
    opening, closing = tokens[0][0], tokens[-1][0]
    inner = text[len(opening) : -len(closing)].strip()
    if opening == "{" or closing == "}":
        return _read_list(inner, depth + 1) if (opening, closing) == ("{", "}") else Leaf(text)
    kind = _BRACKETS[opening] + _END_BRACKETS.get(closing, "?")
    if kind == "{}":
        return _read_set(inner, text, depth)
    if kind not in ("()", "[]", "[)", "(]"):
        return Leaf(text)
    parts, _ = _split(inner, re.compile("[,;]"), thousands=False)
    if not all(parts):
        return Leaf(text)
    if len(parts) == 1:
        node = _read_list(inner, depth + 1) if kind == "()" else Leaf(text)
        return Leaf(text) if isinstance(node, Leaf) else node
    return Group(kind, tuple(_read_single(part, depth + 1) for part in parts))


def _read_set(inner: str, text: str, depth: int) -> Node:
    if not inner:
        return Leaf("\\emptyset")
    parts, _ = _split(inner, _BUILDER)
    if len(parts) == 2 and all(parts) and "," not in parts[0]:
        return Builder(_read_single(parts[0], depth + 1), _read_list(parts[1], depth + 1))
    node = _read_list(inner, depth + 1, thousands=False)
    if isinstance(node, Group) and node.kind == "list":
        return Group("set", node.items)
    return Group("set", (node,))
