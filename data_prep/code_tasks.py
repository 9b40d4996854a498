"""Small functions to write, generated: the task of `data=code` without a source.

Each family of functions has two numbers, a from 2 to 9 and b from 1 to 9. A quarter of the pairs of numbers, drawn with
the seed, is held out for validation in every family.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.pipeline import Problem
from reward_fns.code_tests import CodeTests

DATA_SOURCE = "skpo/code"
NUMBERS = (range(2, 10), range(1, 10))
TESTS = 8


@dataclass(frozen=True)
class Family:
    """Functions of one argument that differ in two numbers.

    Attributes:
        name: of the function.
        argument: name and type.
        says: what it returns, with {a} and {b}.
        expression: the same as Python.
        value: the same for an argument, a and b.
        draw: an argument of a test.
    """

    name: str
    argument: str
    says: str
    expression: str
    value: Callable[[Any, int, int], Any]
    draw: Callable[[random.Random], Any]


def _integer(drawn: random.Random) -> int:
    return drawn.randint(-20, 200)


def _integers(drawn: random.Random) -> list[int]:
    return [drawn.randint(-20, 50) for _ in range(drawn.randint(4, 12))]


def _word(drawn: random.Random) -> str:
    return "".join(drawn.choice("abcdefgh") for _ in range(drawn.randint(10, 30)))


FAMILIES = (
    Family("scale", "x: int", "{a} times x plus {b}", "{a} * x + {b}", lambda x, a, b: a * x + b, _integer),
    Family(
        "rest",
        "x: int",
        "the remainder of x divided by {a}, times {b}",
        "x % {a} * {b}",
        lambda x, a, b: x % a * b,
        _integer,
    ),
    Family(
        "above",
        "items: list[int]",
        "how many of the items are above {a}, plus {b}",
        "sum(item > {a} for item in items) + {b}",
        lambda items, a, b: sum(item > a for item in items) + b,
        _integers,
    ),
    Family(
        "multiples",
        "items: list[int]",
        "the items that {a} divides, each increased by {b}, in their order",
        "[item + {b} for item in items if item % {a} == 0]",
        lambda items, a, b: [item + b for item in items if item % a == 0],
        _integers,
    ),
    Family(
        "every",
        "text: str",
        "the text without its first {b} characters, and of the rest every {a}-th character, beginning with the first",
        "text[{b}::{a}]",
        lambda text, a, b: text[b::a],
        _word,
    ),
)


@dataclass(frozen=True)
class Task:
    """One function to write, its program and the tests, pairs of an argument and the result."""

    family: Family
    a: int
    b: int
    tests: tuple[tuple[Any, Any], ...]

    @property
    def heading(self) -> str:
        """The first line of the function."""
        return f"def {self.family.name}({self.family.argument}):"

    @property
    def says(self) -> str:
        """What the function returns."""
        return self.family.says.format(a=self.a, b=self.b)

    @property
    def program(self) -> str:
        """The function as Python."""
        return f"{self.heading}\n    return {self.family.expression.format(a=self.a, b=self.b)}\n"

    def problem(self) -> Problem:
        """Return the task as a problem of the data."""
        tests = CodeTests("call", [[[given], result] for given, result in self.tests], names=[self.family.name])
        return Problem(
            DATA_SOURCE, f"Write a function `{self.heading[4:-1]}` that returns {self.says}.", tests.text(), "code"
        )


def tasks(seed: int) -> tuple[list[Task], list[Task]]:
    """Return the tasks to train on and those to validate with, in an order drawn with the seed."""
    drawn = random.Random(seed)
    pairs = list(itertools.product(*NUMBERS))
    drawn.shuffle(pairs)
    held_out = pairs[: len(pairs) // 4]
    made = []
    for part in (pairs[len(held_out) :], held_out):
        made.append([_task(family, a, b, drawn) for (a, b), family in itertools.product(part, FAMILIES)])
        drawn.shuffle(made[-1])
    train, val = made
    return train, val


def _task(family: Family, a: int, b: int, drawn: random.Random) -> Task:
    given = [family.draw(drawn) for _ in range(TESTS)]
    return Task(family, a, b, tuple((argument, family.value(argument, a, b)) for argument in given))


def generated(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return the problems of `tasks`."""
    train, val = tasks(seed)
    return [task.problem() for task in train], [task.problem() for task in val]
