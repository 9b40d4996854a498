"""Compare two tidy answers by structure (`math_reading`) and, at the leaves, by value (`math_values`).

Lists are equal in any order, tuples in theirs, sets without repetition. Two equations are equal if the differences of
their sides have a constant quotient, two inequalities if that constant is positive. Text without a value is equal only
to the same text, so two answers that can be read only in part are never equal because of that part.
"""

import re
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from operator import sub
from typing import Any

import mpmath
import sympy
from sympy import Expr, Rational, Set, Symbol

from reward_fns.math_reading import Builder, Chain, Group, Leaf, Node, Operation, Ratio, read
from reward_fns.math_values import (
    POINT_TOLERANCE,
    Unread,
    close,
    constant,
    functions_or_products,
    is_real,
    pairs_at_points,
    reading,
    same_text,
    same_value,
    to_mpmath,
    variables,
    without_calls,
)

FEWEST_QUOTIENTS = 4

_WORDY_NAME = re.compile(
    r"(?:\\(?:text|mathrm|overline|operatorname)\s*\{[^{}]*\}|\\(?:angle|triangle|measuredangle)|[a-zA-Z\s'()|])+"
)


def equal(answer: str, truth: str) -> bool:
    """Return whether two tidy answers are equal."""
    return same(read(answer), read(truth))


def same(given: Node, truth: Node) -> bool:
    """Return whether two structures are equal; an assignment counts by its value if the truth has no name."""
    if given == truth:
        return True
    match given, truth:
        case Chain(), Chain():
            one_subject = _subject(given) == _subject(truth) is not None
            return same_chain(given, truth) or (one_subject and _same_set(given, truth))
        case Chain(), _ if _assigns(given):
            return any(same(value, truth) for value in candidates(given))
        case _, Chain() if _assigns(truth) and _names_something(truth):
            return any(same(given, value) for value in candidates(truth))
        case Leaf(), Leaf():
            return same_text(given.text, truth.text)
        case (Ratio(), _) | (_, Ratio()):
            return same_ratio(given, truth)
        case (Group("set", (item,)), Leaf() as other) | (Leaf() as other, Group("set", (item,))):
            return same(item, other)
        case Builder(), Builder() if same(given.element, truth.element) and same(given.condition, truth.condition):
            return True
        case Group(), Group() if same_group(given, truth):
            return True
        case Operation(), Operation() if _same_operation(given, truth):
            return True
    return _same_set(given, truth)


def _value(node: Node) -> Any:
    """Return the value of a leaf; None for other nodes and for text without a value."""
    return reading(node.text).value if isinstance(node, Leaf) else None


def _subject(chain: Chain) -> Symbol | None:
    """Return the variable that a relation is solved for, or that is in a set."""
    place = 0 if chain.operators == ("in",) else _unknown(chain)
    return None if place is None else _variable(chain.members[place])


def _assigns(chain: Chain) -> bool:
    return set(chain.operators) <= {"=", "~"} or chain.operators == ("in",)


def _names_something(chain: Chain) -> bool:
    """Return whether a chain assigns a value to a name, or an approximation to a value."""
    reversed_ = len(chain.members) == 2 and _is_name(chain.members[1])
    return _is_name(chain.members[0]) or reversed_ or "~" in chain.operators


def _is_name(node: Node) -> bool:
    """Return whether a value can be assigned to a node: a variable, a function, a product of variables, or words."""
    if isinstance(node, Group):
        return node.kind == "()" and all(_is_name(item) for item in node.items)
    if isinstance(node, Ratio):
        return all(_is_name(part) for part in node.parts)
    if not isinstance(node, Leaf):
        return False
    value = reading(node.text).value
    if value is None:
        return bool(_WORDY_NAME.fullmatch(node.text))
    if not isinstance(value, Expr):
        return False
    flat = without_calls(value)
    return bool(flat.free_symbols) and not any(
        atom.is_number and atom != -1 for atom in flat.atoms() if isinstance(atom, Expr)
    )


def candidates(chain: Chain) -> list[Node]:
    """Return the values that an assignment gives: its last member, with which every other constant must agree.

    After an approximation sign, the exact value before it counts too.
    """
    if chain.operators == ("in",):
        return [chain.members[1]] if _is_name(chain.members[0]) else []
    last = chain.members[-1]
    if len(chain.members) == 2 and _is_constant(chain.members[0]) and _is_name(last):
        return [chain.members[0]]
    if _is_unsolved(chain.members[0]):
        return []
    constants = [member for member in chain.members[:-1] if _is_constant(member)]
    if chain.operators[-1] == "~" and constants:
        if not all(_roughly(member, last) for member in constants):
            return []
        return [constants[-1], last]
    return [last] if all(same(member, last) for member in constants) else []


def _is_unsolved(node: Node) -> bool:
    """Return whether a node is like 2x or x + 1: an equation with it is not yet an answer ("x + y = 7" may be)."""
    value = _value(node)
    if not isinstance(value, Expr) or len(variables(value)) != 1 or _is_name(node):
        return False
    return not isinstance(value.base if isinstance(value, sympy.Pow) else value, sympy.Function)


def _is_constant(node: Node) -> bool:
    value = _value(node)
    return isinstance(value, Expr) and not variables(value)


def _roughly(exact: Node, decimal: Node) -> bool:
    """Return whether a constant rounds to a decimal."""
    if not isinstance(exact, Leaf) or not isinstance(decimal, Leaf):
        return False
    left, right = reading(exact.text), reading(decimal.text)
    if right.places < 0 or not isinstance(left.value, Expr):
        return same(exact, decimal)
    number = constant(left.value)
    number = to_mpmath(number) if isinstance(number, Rational) else number
    if number is None:
        return False
    unit = mpmath.mpf(10) ** -right.places
    distance = abs(number) - abs(right.value.p) / mpmath.mpf(right.value.q)
    # Rounded, or cut off.
    return abs(number - to_mpmath(right.value)) < unit and bool(-unit / 2 <= distance * (1 - POINT_TOLERANCE))


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_SYMMETRIC = {"=", "~", "==", "!=", "cong", "sim", "iff", "perp", "parallel"}


def same_chain(given: Chain, truth: Chain) -> bool:
    """Compare relations member by member in either direction, or as equations and inequalities."""
    given, truth = _shortened(_forward(given)), _shortened(_forward(truth))
    if given.operators == truth.operators and _pairwise(given.members, truth.members):
        return True
    symmetric = set(given.operators) <= _SYMMETRIC and given.operators[::-1] == truth.operators
    if symmetric and _pairwise(given.members[::-1], truth.members):
        return True
    # "2x < 6" and "2x = 6" are questions, "x < 3" and "x = 3" their answers.
    if len(given.operators) != len(truth.operators) or (_unknown(given) is None) != (_unknown(truth) is None):
        return False
    if given.operators == truth.operators and given.operators in (("=",), ("!=",)):
        return quotient((given.members[0], given.members[1]), (truth.members[0], truth.members[1])) is not None
    left, right = _inequalities(given), _inequalities(truth)
    return bool(left) and bool(right) and _matched(left, right, _same_inequality)


def _forward(chain: Chain) -> Chain:
    """Return the chain in ascending order, with approximate values treated as exact."""
    chain = Chain(chain.members, tuple("=" if operator == "~" else operator for operator in chain.operators))
    if set(chain.operators) <= {">", ">="}:
        return Chain(chain.members[::-1], tuple(_FLIPPED[operator] for operator in chain.operators[::-1]))
    return chain


def _shortened(chain: Chain) -> Chain:
    """Reduce x = 1 + 1 = 2 to x = 2."""
    named = len(chain.members) > 2 and set(chain.operators) == {"="} and _is_name(chain.members[0])
    if named and all(same(member, chain.members[-1]) for member in chain.members[1:-1]):
        return Chain((chain.members[0], chain.members[-1]), ("=",))
    return chain


def _pairwise(given: Sequence[Node], truth: Sequence[Node]) -> bool:
    return len(given) == len(truth) and all(same(one, other) for one, other in zip(given, truth, strict=True))


Inequality = tuple[Node, str, Node]


def _inequalities(chain: Chain) -> list[Inequality]:
    if not set(chain.operators) <= set(_FLIPPED):
        return []
    return [(left, sign, right) for (left, right), sign in zip(pairwise(chain.members), chain.operators, strict=True)]


def _same_inequality(given: Inequality, truth: Inequality) -> bool:
    constant_ = quotient((given[0], given[2]), (truth[0], truth[2]))
    if constant_ is None or not is_real(constant_):
        return False
    return given[1] == (truth[1] if constant_.real > 0 else _FLIPPED[truth[1]])


def _matched(given: Sequence[Any], truth: Sequence[Any], equal_: Callable[[Any, Any], bool]) -> bool:
    """Return whether both hold the same elements, in any order and equally often."""
    if len(given) != len(truth):
        return False
    left = list(truth)
    for one in given:
        place = next((number for number, other in enumerate(left) if equal_(one, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def same_group(given: Group, truth: Group) -> bool:
    """Compare lists in any order, sets without repetition, tuples and intervals in order and with their brackets."""
    items, others = given.items, truth.items
    if any(_is_ellipsis(item) for item in (*items, *others)):
        return given.kind == truth.kind and _pairwise(items, others)
    kinds = given.kind, truth.kind
    if kinds == ("set", "set"):
        return _matched(_distinct(items), _distinct(others), same)
    if set(kinds) <= {"list", "set"}:
        if given.kind == truth.kind == "list" and not _names_in_order(items, others):
            return False
        return _matched(items, others, same)
    if "set" in kinds:
        return False
    if "list" in kinds:
        tuple_, list_ = (given, truth) if given.kind != "list" else (truth, given)
        return (tuple_.kind == "()" or len(items) > 2) and _names_sorted(list_.items) and _pairwise(items, others)
    alike = given.kind == truth.kind or (len(items) > 2 and set(kinds) <= {"()", "[]"})
    return alike and _pairwise(items, others)


def _is_ellipsis(node: Node) -> bool:
    return isinstance(node, Leaf) and "\\ldots" in node.text


def _names(items: Sequence[Node]) -> list[str]:
    return [
        item.members[0].text
        for item in items
        if isinstance(item, Chain) and item.operators[0] == "=" and isinstance(item.members[0], Leaf)
    ]


def _names_sorted(items: Sequence[Node]) -> bool:
    names = _names(items)
    return len(set(names)) <= 1 or names == sorted(names)


def _names_in_order(items: Sequence[Node], others: Sequence[Node]) -> bool:
    """Require names in the order of a plain list: "y = 2, x = 1" does not match "1, 2"."""
    if _names(items) and _names(others):
        return True
    names = _names(items) or _names(others)
    if len(set(names)) <= 1 or len(names) != len(items):
        return True
    if _names(others):
        return _pairwise(items, others)
    return names == sorted(names) and _pairwise(items, others)


def _distinct(items: Sequence[Node]) -> list[Node]:
    distinct: list[Node] = []
    for item in items:
        if not any(same(item, other) for other in distinct):
            distinct.append(item)
    return distinct


def same_ratio(given: Node, truth: Node) -> bool:
    """Compare ratios: a:b equals c:d if a/b = c/d, and the number a/b; times of day digit by digit."""
    if isinstance(given, Ratio) and isinstance(truth, Ratio):
        if len(given.parts) != len(truth.parts):
            return False
        if _is_time(given) and _is_time(truth):
            return _pairwise(given.parts, truth.parts)
        left, right = _values(given), _values(truth)
        if left is None or right is None:
            return _pairwise(given.parts, truth.parts)
        return all(same_value(left[n] * right[n + 1], left[n + 1] * right[n]) for n in range(len(left) - 1))
    ratio, other = (given, truth) if isinstance(given, Ratio) else (truth, given)
    assert isinstance(ratio, Ratio)
    parts, value = _values(ratio), _value(other)
    if parts is None or len(parts) != 2 or _is_time(ratio):
        return False
    return isinstance(value, Expr) and same_value(parts[0] / parts[1], value)


def _is_time(ratio: Ratio) -> bool:
    hours, *others = [part.text if isinstance(part, Leaf) else "" for part in ratio.parts]
    minutes = [re.match("[0-9]{2}(?![0-9.])", other) for other in others]
    return bool(re.fullmatch("[0-9]{1,2}", hours)) and all(minutes) and int(hours) <= 24


def _values(ratio: Ratio) -> list[Any] | None:
    values = [_value(part) for part in ratio.parts]
    return values if all(isinstance(value, Expr) and not value.is_zero for value in values) else None


def quotient(left: tuple[Node, Node], right: tuple[Node, Node]) -> Any:
    """Return the constant quotient of the differences of both pairs of sides; None if it is not constant."""
    sides = [_value(side) for side in (*left, *right)]
    if not all(isinstance(side, Expr) for side in sides):
        return None
    both = sides[0] - sides[1], sides[2] - sides[3]
    if not all(isinstance(each, Expr) and not each.has(sympy.oo, sympy.zoo, sympy.nan) for each in both):
        return None
    both = functions_or_products(*both)
    if not all(variables(each) for each in both):
        return None
    quotients: list[Any] = []
    for one, other in pairs_at_points(*both):
        if abs(one) <= POINT_TOLERANCE or abs(other) <= POINT_TOLERANCE:
            continue
        quotients.append(one / other)
        if not close(quotients[-1], quotients[0]):
            return None
    return quotients[0] if len(quotients) >= FEWEST_QUOTIENTS else None


# ---------------------------------------------------------------- sets


def _same_operation(given: Operation, truth: Operation) -> bool:
    if given.operator == truth.operator == "setminus":
        return _pairwise(given.parts, truth.parts)
    return given.operator == truth.operator and _matched(given.parts, truth.parts, same)


def _same_set(given: Node, truth: Node) -> bool:
    """Return whether both are the same set of numbers, written as intervals, unions or conditions on one variable."""
    try:
        left, right = as_set(given), as_set(truth)
    except (Unread, TypeError, ValueError, NotImplementedError, AttributeError):
        return False
    if left == right:
        return True
    return bool(sympy.SymmetricDifference(left, right).doit() is sympy.S.EmptySet)


def as_set(node: Node) -> Set:
    """Return the set of numbers that a node describes.

    Raises:
        Unread: the node is not a set of numbers.
    """
    match node:
        case Leaf() if isinstance(value := _value(node), Set):
            return value
        case Operation(operator, parts):
            sets = [as_set(part) for part in parts]
            if operator == "setminus":
                return reduce(sub, sets)
            return sympy.Union(*sets) if operator == "cup" else sympy.Intersection(*sets)
        case Group("set", items):
            return sympy.FiniteSet(*map(_exact, items))
        case Group("list", items, "or"):
            return sympy.Union(*map(as_set, items))
        case Group(kind, (first, last)) if kind != "list":
            start, end = _exact(first), _exact(last)
            if start.is_number and end.is_number and bool(start < end):
                return sympy.Interval(start, end, kind[0] == "(", kind[1] == ")")
        case Builder():
            return _conditioned(node)
        case Chain():
            return _solved(node)
    raise Unread("not a set")


def _exact(node: Node) -> Any:
    value = _value(node)
    if not isinstance(value, Expr) or variables(value):
        raise Unread("not a number")
    return value.doit()


def _conditioned(node: Builder) -> Set:
    element, within = node.element, sympy.S.Reals
    if isinstance(element, Chain) and element.operators == ("in",):
        within = as_set(element.members[1])
        element = element.members[0]
    condition = node.condition
    conditions = condition.items if isinstance(condition, Group) and condition.joined != "or" else (condition,)
    symbol = _variable(element)
    if symbol is None:
        raise Unread("not a condition on one variable")
    sets = [as_set(each) for each in conditions]
    for each in conditions:
        for chain in each.items if isinstance(each, Group) else (each,):
            if not isinstance(chain, Chain) or _subject(chain) != symbol:
                raise Unread("a condition on something else")
    return sympy.Intersection(within, *sets)


def _unknown(chain: Chain) -> int | None:
    """Return the index of the variable in a relation solved for it (all other members are constants), else None."""
    places = [place for place, member in enumerate(chain.members) if not _is_constant(member)]
    return places[0] if len(places) == 1 and _variable(chain.members[places[0]]) is not None else None


def _variable(node: Node) -> Symbol | None:
    """Return x, or f(x) as a whole."""
    value = _value(node)
    variable = without_calls(value) if isinstance(value, Expr) else None
    return variable if isinstance(variable, Symbol) else None


def _solved(chain: Chain) -> Set:
    """Return the numbers allowed by constant bounds on a variable, or by membership in a set."""
    if chain.operators == ("in",) and _is_name(chain.members[0]):
        return as_set(chain.members[1])
    place = _unknown(chain)
    if place is None:
        raise Unread("not solved for one variable")
    result: Set = sympy.S.Reals
    for number, operator in enumerate(chain.operators):
        if place not in (number, number + 1):
            raise Unread("a relation of constants")
        bound = _exact(chain.members[number + 1 if place == number else number])
        sign = operator if place == number else _FLIPPED.get(operator, operator)
        if sign not in ("<", "<=", ">", ">=", "!="):
            raise Unread("not an inequality")
        if sign == "!=":
            range_ = sympy.S.Reals - sympy.FiniteSet(bound)
        elif sign[0] == "<":
            range_ = sympy.Interval(-sympy.oo, bound, right_open=sign == "<")
        else:
            range_ = sympy.Interval(bound, sympy.oo, left_open=sign == ">")
        result = sympy.Intersection(result, range_)
    return result
