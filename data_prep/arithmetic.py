"""One-digit word problems over reasoning-gym's `chain_sum`: the default task of a machine without a GPU.

`chain_sum` draws expressions such as "4 - 1"; the template (`templates/arithmetic.yaml`) tells each as a story, in as
many wordings as it has pairs of a name and a thing. Expressions with an operand below 1 or a negative running total are
left out; 126 with two terms remain, and of more than 4,096 the first 4,096 drawn are used.

Train and val are disjoint by expression: the distinct expressions without the template's solved example are shuffled
with the seed, and the first quarter is held out for val in every wording. By default that makes 32 x 12 = 384 problems
for val and 93 x 12 = 1116 for train. Neither split depends on the size of the other.

    python -m data_prep.arithmetic --out DIR [--train N] [--val N] [--seed S] [--min-terms 2] [--max-terms 2]
"""

import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.command import generated, run
from data_prep.pipeline import Problem, write_split
from data_prep.prompts import PromptTemplate, read_messages, read_template
from data_prep.schema import DataError

DATA_SOURCE = "skpo/arithmetic"
TEMPLATE = Path(__file__).parent / "templates" / "arithmetic.yaml"
TRAIN_ROWS = 1024
VAL_ROWS = 128
# There are 30,036 expressions with four terms and about 16 times as many with each term more.
MAX_EXPRESSIONS = 4096
# Drawing the last few of a finite set needs many draws (about 100,000 for all 2025 of two or three terms).
MAX_DRAWS = 5_000_000
# Of the expressions with 20 terms one in 31 has no zero and no negative total, of those with 100 one in 300,000.
MOST_TERMS = 20


@dataclass(frozen=True)
class Expression:
    """A chain sum; `signs` ("+" or "-") has one entry fewer than `operands`."""

    operands: tuple[int, ...]
    signs: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Expression":
        """Parse chain_sum's own form, e.g. "3 + 4 - 2".

        Raises:
            ValueError: it is anything else.
        """
        parts = text.split()
        signs = tuple(parts[1::2])
        if len(parts) % 2 == 0 or not set(signs) <= {"+", "-"}:
            raise ValueError(f"{text!r} is not a chain sum")
        return cls(tuple(int(part) for part in parts[::2]), signs)

    def totals(self) -> list[int]:
        """Return the running totals, beginning with the first operand; the last one is the answer."""
        changes = (
            operand if sign == "+" else -operand for sign, operand in zip(self.signs, self.operands[1:], strict=True)
        )
        return list(itertools.accumulate(changes, initial=self.operands[0]))

    def __str__(self) -> str:
        return str(self.operands[0]) + "".join(
            f" {sign} {operand}" for sign, operand in zip(self.signs, self.operands[1:], strict=True)
        )


@dataclass(frozen=True)
class Template:
    """The wording: sentence parts, the names and things that vary them, and the chat around the {question}.

    A wording is a (name, thing) pair; a template without names or things has "" instead.
    """

    first: str
    plus: str
    minus: str
    end: str
    wordings: tuple[tuple[str, str], ...]
    example: Expression | None
    chat: PromptTemplate

    def question(self, expression: Expression, wording: tuple[str, str]) -> str:
        """Tell the problem as a story."""
        parts = [self.first.replace("{a}", str(expression.operands[0]))]
        for sign, operand in zip(expression.signs, expression.operands[1:], strict=True):
            parts.append((self.plus if sign == "+" else self.minus).replace("{b}", str(operand)))
        name, thing = wording
        return ("".join(parts) + self.end).replace("{name}", name).replace("{thing}", thing)

    def prompt(self, question: str) -> list[dict[str, str]]:
        """Return the chat that asks the question, after the solved example if there is one."""
        example = self.question(self.example, self.wordings[0]) if self.example else ""
        return [
            {**message, "content": message["content"].replace("{example}", example)}
            for message in self.chat.prompt(question)
        ]


def load_template(path: Path = TEMPLATE) -> Template:
    """Read a template file.

    Raises:
        DataError: it cannot be read, a key is missing or a placeholder is not where it belongs.
    """
    content = read_template(path)

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise DataError(f"{path}: {what}")

    for key, placeholder in {"first": "{a}", "plus": "{b}", "minus": "{b}", "end": ""}.items():
        text = content.get(key)
        check(isinstance(text, str), f"key {key!r} is missing or not a string; add it as in {TEMPLATE.name}")
        check(placeholder in str(text), f"key {key!r} lacks {placeholder}; write {placeholder} for the operand")
    story = content["first"] + content["plus"] + content["minus"] + content["end"]
    for key, placeholder in {"names": "{name}", "things": "{thing}"}.items():
        words = content.setdefault(key, [])
        listed = isinstance(words, list) and all(isinstance(word, str) for word in words)
        check(listed, f"key {key!r} is not a list of strings; write it as in {TEMPLATE.name}")
        both = bool(words) == (placeholder in story)
        check(both, f"key {key!r} and {placeholder} need each other; add or remove one")
    chat, example = read_messages(path, content, TEMPLATE.name), content.get("example")
    shown = any("{example}" in message["content"] for message in chat.messages)
    check((example is not None) == shown, "key 'example' and {example} need each other; add or remove one")
    try:
        solved = None if example is None else Expression.parse(str(example))
    except ValueError as error:
        raise DataError(f"{path}: key 'example' is not a chain sum; write it like 3 + 4") from error
    return Template(
        first=content["first"],
        plus=content["plus"],
        minus=content["minus"],
        end=content["end"],
        wordings=tuple(itertools.product(content["names"] or [""], content["things"] or [""])),
        example=solved,
        chat=chat,
    )


def count_expressions(min_terms: int, max_terms: int) -> int:
    """Count the distinct expressions with one-digit operands >= 1 and no negative running total."""
    ways: Counter[int] = Counter(range(1, 10))  # running total -> number of beginnings that reach it
    count = ways.total() if min_terms == 1 else 0
    for terms in range(2, max_terms + 1):
        longer: Counter[int] = Counter()
        for total, number in ways.items():
            for operand in range(1, 10):
                longer[total + operand] += number
                if operand <= total:
                    longer[total - operand] += number
        ways = longer
        if terms >= min_terms:
            count += ways.total()
    return count


def draw_expressions(seed: int, min_terms: int, max_terms: int) -> list[Expression]:
    """Draw all distinct expressions, at most MAX_EXPRESSIONS, in chain_sum's order."""
    import reasoning_gym  # takes a second to load

    terms, digits = {"min_terms": min_terms, "max_terms": max_terms}, {"min_digits": 1, "max_digits": 1}
    generator = reasoning_gym.create_dataset("chain_sum", size=MAX_DRAWS, seed=seed, **terms, **digits)
    enough = min(count_expressions(min_terms, max_terms), MAX_EXPRESSIONS)
    drawn: dict[Expression, None] = {}  # a set that keeps the order
    for draw in range(MAX_DRAWS):
        if len(drawn) == enough:
            break
        expression = Expression.parse(generator[draw]["metadata"]["expression"])
        if min(expression.operands) >= 1 and min(expression.totals()) >= 0:
            drawn[expression] = None
    return list(drawn)


def refuse_ambiguous(expressions: Sequence[Expression], template: Template) -> None:
    """Refuse a template under which two problems read the same, so that one could be in both splits.

    Raises:
        DataError: naming both.
    """
    problem_of: dict[str, str] = {}
    for expression, wording in itertools.product(expressions, template.wordings):
        question = template.question(expression, wording)
        problem = " ".join((f"'{expression}'", *filter(None, wording)))
        if question in problem_of:
            raise DataError(
                f"template: {problem_of[question]} and {problem} both read {question!r}; "
                "give first, plus and minus, names and things different words"
            )
        problem_of[question] = problem


def choose(
    expressions: Sequence[Expression], wordings: Sequence[tuple[str, str]], rows: int
) -> list[tuple[Expression, tuple[str, str]]]:
    """Choose `rows` different pairs that use every expression and every wording equally often (give or take one)."""
    # Both lists are walked in step; where they would meet in the same pairs again, wordings moves on by one.
    period = math.lcm(len(expressions), len(wordings))
    return [
        (expressions[row % len(expressions)], wordings[(row + row // period) % len(wordings)]) for row in range(rows)
    ]


def prepare(
    out: Path,
    *,
    train: int = TRAIN_ROWS,
    val: int = VAL_ROWS,
    seed: int = 1,
    min_terms: int = 2,
    max_terms: int = 2,
    template: Path = TEMPLATE,
) -> dict[str, Path]:
    """Write `out`/train.parquet and `out`/val.parquet, print a short summary, and return the paths by split.

    The arguments are the options of the command.

    Raises:
        DataError: for impossible arguments, e.g. more rows than problems (it says how many exist).
    """
    if train < 1 or val < 1:
        raise DataError(f"--train {train} --val {val}: both need at least 1 row")
    if not 1 <= min_terms <= max_terms <= MOST_TERMS:
        raise DataError(
            f"--min-terms {min_terms} --max-terms {max_terms}: need 1 <= min-terms <= max-terms <= {MOST_TERMS}"
        )
    wording = load_template(template)
    expressions = draw_expressions(seed, min_terms, max_terms)
    refuse_ambiguous(expressions, wording)
    if wording.example in expressions:
        expressions.remove(wording.example)
    wordings = list(wording.wordings)
    shuffler = random.Random(seed)
    shuffler.shuffle(expressions)
    shuffler.shuffle(wordings)
    held_out = math.ceil(len(expressions) / 4)

    shares = {"val": (val, expressions[:held_out]), "train": (train, expressions[held_out:])}
    problems: dict[str, list[tuple[Expression, tuple[str, str]]]] = {}
    for split, (rows, share) in shares.items():
        exist = len(share) * len(wordings)
        if rows > exist:
            raise DataError(
                f"--{split} {rows}: only {exist} problems exist for {split} with {min_terms} to {max_terms} "
                f"terms ({len(share)} expressions x {len(wordings)} wordings); "
                "ask for fewer or raise --max-terms"
            )
        problems[split] = choose(share, wordings, rows)

    paths = {split: out / f"{split}.parquet" for split in problems}
    for split, chosen in problems.items():
        told = [
            Problem(DATA_SOURCE, wording.question(expression, pair), str(expression.totals()[-1]))
            for expression, pair in chosen
        ]
        write_split(paths[split], split, told, wording.prompt)
        different = {expression for expression, _ in chosen}
        by_terms = Counter(len(expression.operands) for expression in different)
        counts = ", ".join(f"{number} with {terms} terms" for terms, number in sorted(by_terms.items()))
        print(f"{paths[split]}: {len(chosen)} rows, {len(different)} expressions ({counts})")
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 with one line on stderr if the request cannot be met."""
    options = generated("arithmetic", "One-digit word problems.", TRAIN_ROWS, VAL_ROWS)
    options.add_argument("--min-terms", type=int, default=2, help="fewest operands (default %(default)s)")
    options.add_argument("--max-terms", type=int, default=2, help="most operands (default %(default)s)")
    options.add_argument("--template", type=Path, default=TEMPLATE, help="another wording (yaml)")
    return run(lambda: prepare(**vars(options.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
