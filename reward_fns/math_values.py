"""Values of expressions: LaTeX parsed completely or not at all, by math-verify's grammar, and compared by value.

Two expressions are equal if they have equal values: exact ones for rational numbers, 60 digits for other constants, and
with variables at twelve points, positive and negative, where both are real. Text that cannot be parsed has no value.

Only `math_worker` uses this module: sympy may run forever on a model's text.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import pairwise
from operator import mul
from typing import Any

import mpmath
import sympy
from antlr4 import Token
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from sympy import Expr, MatrixBase, Rational, Set, Symbol
from sympy.core.function import AppliedUndef

from reward_fns import units
from reward_fns.math_text import plain, without_sign

DIGITS = 60
TOLERANCE = mpmath.mpf(10) ** -42
"""Relative, of constants; integers of `math_answer.MOST_DIGITS` digits that differ by one are further apart."""
POINT_DIGITS = 40
POINT_TOLERANCE = mpmath.mpf(10) ** -15
POINTS = (
    *((0, 1, True), (0, 1, True), (1, 3, True), (1, 3, True)),
    *((0, 1, False), (1, 3, False), (0, 3, False), (3, 5, False)),
    *((10, 100, True), (10, 100, False), (1000, 10000, True), (1000, 10000, False)),
)
"""Range of the variables, and whether all of them are positive; far ones for what changes far from 0, as |x-50|."""
FEWEST_POINTS = 2
ROUNDED_DIGITS = 6
"""A decimal with so many significant digits counts for the irrational number that it is the rounding of."""

SETS: dict[str, Set] = {
    "\\mathbb{N}": sympy.S.Naturals,
    "\\mathbb{Z}": sympy.S.Integers,
    "\\mathbb{Q}": sympy.S.Rationals,
    "\\mathbb{R}": sympy.S.Reals,
    "\\mathbb{C}": sympy.S.Complexes,
    "\\emptyset": sympy.S.EmptySet,
}

LARGEST_MATRIX_POWER = 20

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,400})?(?:\.[0-9]{1,400}|\.)?")
_WORDS = re.compile(r"(?:\\text\s*\{[^{}]*\}|[a-zA-Z ])+")
_WORD = re.compile(
    r"\{\s*[^{}\s][^{}]*[^{}\s]\s*\}|(?<![a-zA-Z])[a-zA-Z]{4,}|[a-zA-Z]{3,} [a-zA-Z]|[a-zA-Z] [a-zA-Z]{3,}"
)
"""A whole word in a text of letters; "ab" and "x y" are products."""
_LETTERS_ONLY = re.compile("[a-zA-Z]{3,}")
_LETTERS = re.compile(r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+|\\.|[EI]|(?<![a-zA-Z])e(?=_)|d(?=\s*[a-zA-Z\\])")
_UNREAD = re.compile(
    "|".join(
        (
            r"\^\s*\{[^{}]*\}\s*\^",
            r"\\frac\{\s*d[^{}]*\}\{\s*d\s*[a-zA-Z\\]|(?<![a-zA-Z])d\s*[a-zA-Z]\s*/\s*d\s*[a-zA-Z]|'|\\prime",
            r"\\(?:i*int|oint|sum|prod|lim|pm|mp|not|phantom|ldots)(?![a-zA-Z])",
            r"[0-9)\]]\s*_|\|\s*[_^]",
            r"[0-9]\s+[0-9]|\.\s",
            r"\\text\s*\{[^}]*\}\s*\(",
        )
    )
)
"""Double powers, derivatives, what is not evaluated, an index of a number, numbers side by side, words as functions."""
_FUNCTION = "sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|log|ln|exp|max|min|gcd|lcm|det|pi"
_NAME = rf"(?<![a-zA-Z\\])[a-df-zA-DF-Z]|\\text\{{[^{{}}]*\}}|\\(?!(?:{_FUNCTION})(?![a-z]))[a-zA-Z]+ ?"
_POWER_OF_NAME = re.compile(rf"((?:{_NAME})(?:_\{{[^{{}}]*\}})?)(?=\^)")
"""A name with a power; in braces it is parsed by the fast way."""
_DEGREES = re.compile(r"([0-9.]+|\\[a-z]+|[a-z])\^(?:\{\\circ\s*\}|\\circ(?![a-zA-Z]))")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_TRANSPOSED = re.compile(r"(?<!matrix\})\^\s*(?:T|\{T\}|\{\\top\s*\}|\\top)")
_GAMMA = re.compile(r"\\(gamma|Gamma)(?![a-zA-Z])(?!\s*\()")


class Unread(Exception):
    """The text has no such meaning."""


class _Parser(_Latex2Sympy):
    """The LaTeX grammar, without the readings of math-verify that would make different answers equal."""

    def __init__(self) -> None:
        """Use one kind of symbol: whether a letter is real must not depend on how the rest is typeset."""
        super().__init__(is_real=None, config=ConversionConfig(lowercase_symbols=False))

    def parse(self, latex_str: str) -> Any:
        """Return the value of one expression; the whole text must be consumed."""
        latex_str = _POWER_OF_NAME.sub(r"{\1}", latex_str)
        try:
            tree = self._tree(latex_str, PredictionMode.SLL)  # several times faster, and usually enough
        except Exception:  # the grammar raises plain Exception
            tree = self._tree(latex_str, PredictionMode.LL)
        return self.convert_expr(tree)

    def _tree(self, latex_str: str, mode: PredictionMode) -> Any:
        parser = self.create_parser(latex_str)
        parser._interp.predictionMode = mode
        tree = parser.expr()
        if parser.getCurrentToken().type != Token.EOF:
            raise Unread("something behind the expression")
        return tree

    def convert_postfix_list(self, arr: list[Any], i: int = 0) -> Any:
        r"""Multiply; ``3\frac{1}{2}`` is a mixed number, "1 2" and "3(4)" are not sums."""
        texts = [each.getText() for each in arr]
        if any(left[-1].isdigit() and right[0].isdigit() for left, right in pairwise(texts)):
            raise Unread("two numbers side by side")
        factors = [self.convert_postfix(each) for each in arr]
        if any(isinstance(each, list) for each in factors):
            return super().convert_postfix_list(arr, i)
        if len(texts) > 1 and texts[0].isdigit():
            fraction = re.fullmatch(r"\\frac\{([0-9]+)\}\{([0-9]+)\}", texts[1])
            if fraction and int(fraction[1]) >= int(fraction[2]):
                raise Unread("neither a mixed number nor clearly a product")
            if fraction:
                factors[:2] = [factors[0] + factors[1]]
        if len(factors) == 1:
            return factors[0]
        if any(getattr(each, "is_Matrix", False) for each in factors):
            return reduce(mul, factors)
        return sympy.Mul(*factors, evaluate=False)

    def convert_func(self, func: Any) -> Any:
        """Make odd roots of negative numbers real."""
        if func.FUNC_SQRT() and func.root:
            degree = self.convert_expr(func.root)
            base = self.convert_expr(func.base)
            if degree.is_Integer and degree.is_odd and degree > 1 and not base.has(sympy.I):
                return sympy.sign(base) * sympy.Pow(sympy.Abs(base), Rational(1, degree), evaluate=False)
        return super().convert_func(func)


@dataclass(frozen=True)
class Reading:
    """A parsed leaf.

    Attributes:
        value: its value, None if it could not be parsed.
        unit: its unit as written.
        text: its text.
        places: decimal places of a plain decimal, else -1.
        significant: significant digits of a plain decimal.
    """

    value: Any
    unit: str
    text: str
    places: int = -1
    significant: int = 0


@lru_cache(maxsize=2048)
def reading(text: str) -> Reading:
    """Parse the text of a leaf."""
    body, factor, unit = units.split_unit(text)
    stripped = without_sign(body)
    decimal = stripped.replace(" ", "").replace("\\!", "")
    if re.fullmatch(r"[+-]?[.,0-9]*[0-9][.,0-9]*", decimal) and _NUMBER.fullmatch(decimal):
        digits = decimal.replace(",", "").lstrip("+")
        if " " in stripped.strip():
            return Reading(None, "", plain(text))
        places = len(digits.partition(".")[2])
        significant = len(digits.replace(".", "").replace("-", "").lstrip("0"))
        return Reading(Rational(digits.rstrip(".")) * factor, unit, plain(text), places, significant)
    try:
        value = _parsed(body if _TRIGONOMETRIC.search(body) else stripped)
    except MemoryError:
        raise
    except Exception:  # the grammar may raise anything; unreadable text is compared as text
        return Reading(None, "", plain(text))
    if factor != 1:
        value = value * factor
    return Reading(value, unit, plain(text))


def _parsed(text: str) -> Any:
    if text.strip() in SETS:
        return SETS[text.strip()]
    if not text or (_WORDS.fullmatch(text) and _WORD.search(text.replace("\\text", ""))):
        raise Unread("words")
    if _UNREAD.search(text):
        raise Unread(text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = _TRANSPOSED.sub(r"^{\\text{T}}", _GAMMA.sub(r"\\text{letter\1}", text))
    exponents = re.sub(r"([0-9])E(?=[+-]?[0-9])", r"\1\\exponent", text)

    def wrapped(match: "re.Match[str]") -> str:
        letter = match[0]
        if letter == "\\exponent":
            return "E"
        return letter if letter.startswith("\\") else f"\\text{{{letter}}}"

    value = _Parser().parse(_LETTERS.sub(wrapped, exponents))
    if not isinstance(value, Expr | MatrixBase | sympy.MatrixExpr) or value.has(sympy.Derivative):
        raise Unread("not an expression")
    if isinstance(value, sympy.MatrixExpr):
        powers = [power.exp for power in value.atoms(sympy.MatPow)]
        if not all(isinstance(power, sympy.Integer) and abs(power) <= LARGEST_MATRIX_POWER for power in powers):
            raise Unread("a power of a matrix")
        value = value.doit()
    if not isinstance(value, MatrixBase) and value.has(MatrixBase, sympy.MatrixExpr):
        raise Unread("a function of a matrix")
    imaginary = Symbol("i")
    return value.xreplace({imaginary: sympy.I}) if value.has(imaginary) else value


def same_text(given: str, truth: str) -> bool:
    """Compare two texts of expressions: equal values without contradicting units, or the same text."""
    left, right = reading(given), reading(truth)
    if units.differ(left.unit, right.unit):
        return False
    if left.text == right.text:
        return True
    if left.value is None or right.value is None:
        return False
    if _LETTERS_ONLY.fullmatch(given) and _LETTERS_ONLY.fullmatch(truth):
        return False  # words more likely than a product in another order
    return same_value(left.value, right.value) or _rounded(left, right) or _rounded(right, left)


def _rounded(decimal: Reading, exact: Reading) -> bool:
    """Return whether the first is a long decimal to which the second, an irrational constant, rounds."""
    if decimal.significant < ROUNDED_DIGITS or exact.places >= 0 or not isinstance(exact.value, Expr):
        return False
    number = constant(exact.value)
    if number is None or isinstance(number, Rational) or number.imag:
        return False
    distance = abs(number.real - mpmath.mpf(decimal.value.p) / decimal.value.q)
    return bool(distance <= mpmath.mpf(10) ** -decimal.places / 2)


def same_value(left: Any, right: Any) -> bool:
    """Compare two expressions, matrices or sets by value."""
    if isinstance(left, Expr) and isinstance(right, Expr):
        left, right = functions_or_products(left, right)
        return _same_expression(left, right)
    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        return left.shape == right.shape and all(
            same_value(one, other) for one, other in zip(left.flat(), right.flat(), strict=True)
        )
    return isinstance(left, Set) and isinstance(right, Set) and bool(left == right)


def functions_or_products(left: Expr, right: Expr) -> tuple[Expr, Expr]:
    """Read ``a(b)`` as a product if the other side has no such functions."""
    calls = left.atoms(AppliedUndef), right.atoms(AppliedUndef)
    if bool(calls[0]) == bool(calls[1]):
        return left, right

    def multiplied(expression: Expr, calls: set[Any]) -> Expr:
        return expression.xreplace(
            {call: sympy.Mul(Symbol(call.func.__name__), *call.args, evaluate=False) for call in calls}
        )

    return multiplied(left, calls[0]), multiplied(right, calls[1])


def _same_expression(left: Expr, right: Expr) -> bool:
    if left == right:
        return left is not sympy.nan and left is not sympy.zoo
    if not variables(left) and not variables(right):
        constants = constant(left), constant(right)
        if None in constants:
            return False
        if all(isinstance(each, Rational) for each in constants):
            return bool(constants[0] == constants[1])
        one, other = (to_mpmath(each) if isinstance(each, Rational) else each for each in constants)
        return bool(abs(one - other) <= TOLERANCE * max(abs(one), abs(other), mpmath.mpf(10) ** -10))
    everywhere = left.has(sympy.I) or right.has(sympy.I)
    real, other_pairs = 0, []
    for one, other in pairs_at_points(left, right):
        if not everywhere and not (is_real(one) and is_real(other)):
            other_pairs.append((one, other))
        elif close(one, other):
            real += 1
        else:
            return False
    if real >= FEWEST_POINTS:
        return True
    return len(other_pairs) >= FEWEST_POINTS and all(close(one, other) for one, other in other_pairs)


def pairs_at_points(left: Expr, right: Expr) -> Iterator[tuple[Any, Any]]:
    """Yield the values of both at the points where both have one."""
    for number in range(len(POINTS)):
        one = value_at(left, number)
        other = None if one is None else value_at(right, number)
        if other is not None:
            yield one, other


def to_mpmath(number: Rational) -> Any:
    """Return a rational number as a complex number of mpmath."""
    return mpmath.mpc(mpmath.mpf(number.p) / number.q)


def is_real(value: Any) -> bool:
    """Return whether the imaginary part is within the tolerance."""
    return bool(abs(value.imag) <= POINT_TOLERANCE * max(1, abs(value)))


def close(one: Any, other: Any) -> bool:
    """Return whether two values are equal within the tolerance at a point."""
    return bool(abs(one - other) <= POINT_TOLERANCE * max(abs(one), abs(other), mpmath.mpf(10) ** -12))


@lru_cache(maxsize=2048)
def variables(expression: Expr) -> tuple[Symbol, ...]:
    """Return the free symbols by name, applied functions among them."""
    return tuple(sorted(without_calls(expression).free_symbols, key=str))


@lru_cache(maxsize=2048)
def without_calls(expression: Expr) -> Expr:
    """Return the expression with each call such as f(x) replaced by a variable of its own."""
    calls = expression.atoms(AppliedUndef)
    if not calls:
        return expression
    return expression.xreplace(
        {call: Symbol(f"{call.func.__name__}({', '.join(str(arg.doit()) for arg in call.args)})") for call in calls}
    )


@lru_cache(maxsize=2048)
def constant(expression: Expr) -> Any:
    """Return the exact Rational of an expression without variables, else its complex value; None if it has none."""
    expression = without_calls(expression)
    exact = expression.doit()
    if isinstance(exact, Rational):
        return exact
    if exact.is_finite is False:
        return None
    return _complex(exact.evalf(DIGITS))


@lru_cache(maxsize=8192)
def value_at(expression: Expr, number: int) -> Any:
    """Return the complex value of an expression at one of `POINTS`; None if it has none."""
    low, high, positive = POINTS[number]
    values = {name: _coordinate(str(name), number, low, high, positive) for name in variables(expression)}
    try:
        return _complex(without_calls(expression).xreplace(values).evalf(POINT_DIGITS))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError, NotImplementedError, AttributeError):
        return None


@lru_cache(maxsize=4096)
def _coordinate(name: str, point: int, low: int, high: int, positive: bool) -> sympy.Float:
    """Return the value of a variable at a point: the same in every expression that has it."""
    digest = int.from_bytes(hashlib.sha256(f"{name} {point}".encode()).digest()[:8])
    value = Rational(digest >> 1, 2**63) * (high - low) + low + Rational(1, 97)
    return sympy.Float(value if positive or digest & 1 else -value, POINT_DIGITS)


def _complex(value: Any) -> Any:
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
        return None
    return mpmath.mpc(real._to_mpmath(200), imaginary._to_mpmath(200))
