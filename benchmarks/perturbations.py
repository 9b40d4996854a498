"""Wrong answers made from right ones, as a nearly correct model would write them.

Each kind makes one change to the value: a number by one, a sign, a fraction upside down, an element of a list, an
interval's bracket, an operator, a root, a factor of pi, a word. `agreement` and the tests measure the reward with them.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

_INTEGER = re.compile(r"(?<![0-9.])[0-9]{1,12}(?![0-9.])")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_WORD = re.compile(r"[a-zA-Z]{3,}")
_BINARY = re.compile(r"(?<=[0-9a-zA-Z})])\s*[+-]\s*(?=[0-9a-zA-Z\\({])")

PASSES = 8
"""How often every answer is offered to every kind; a kind that draws makes another wrong answer each time."""

Perturb = Callable[[str, random.Random], str]
"""A right answer -> a wrong one, "" where the kind does not apply."""


def _one_changed(
    answer: str, places: Iterable[re.Match[str]], rng: random.Random, change: Callable[[re.Match[str]], str]
) -> str:
    """Change one of the places; "" if there are none."""
    listed = list(places)
    if not listed:
        return ""
    place = rng.choice(listed)
    return answer[: place.start()] + change(place) + answer[place.end() :]


def number_by_one(answer: str, rng: random.Random) -> str:
    """Change one of the integers by one."""

    def change(place: re.Match[str]) -> str:
        return "1" if int(place[0]) == 0 else str(int(place[0]) + rng.choice((-1, 1)))

    return _one_changed(answer, _INTEGER.finditer(answer), rng, change)


def sign_flipped(answer: str, _: random.Random) -> str:
    """Flip the sign of a number or fraction other than 0."""
    if not re.fullmatch(r"-?(?:[0-9.,]*[1-9][0-9.,]*|\\[dt]?frac\{[1-9][0-9]*\}\{[0-9]+\})", answer):
        return ""
    return answer[1:] if answer.startswith("-") else f"-{answer}"


def fraction_inverted(answer: str, rng: random.Random) -> str:
    """Turn a/b into b/a if the two differ and are not 0."""
    places = (place for place in _FRACTION.finditer(answer) if place[1] != place[2] and place[1] != "0")
    return _one_changed(answer, places, rng, lambda place: f"\\frac{{{place[2]}}}{{{place[1]}}}")


def element_dropped(answer: str, rng: random.Random) -> str:
    """Drop one element of a list, set or tuple."""
    elements = re.split(r",(?![0-9]{3}(?![0-9])|\\!)", answer)
    if len(elements) < 2 or any(part.count("{") != part.count("}") for part in elements[1:-1]):
        return ""
    opening = re.match(r"\s*(?:\\left)?(?:\\\{|[(\[])?", elements[0])
    closing = re.search(r"(?:\\right)?(?:\\\}|[)\]])?\s*$", elements[-1])
    assert opening is not None and closing is not None
    inner = [elements[0][opening.end() :], *elements[1:]]
    inner[-1] = inner[-1][: len(inner[-1]) - len(closing[0])]
    dropped = rng.randrange(len(inner))
    if inner.count(inner[dropped]) > 1:
        return ""
    kept = [part for index, part in enumerate(inner) if index != dropped]
    return opening[0] + ",".join(kept) + closing[0]


def element_added(answer: str, rng: random.Random) -> str:
    """Add one element to a plain list of numbers."""
    if not re.fullmatch(r"-?[0-9]+(?:,\s*-?[0-9]+)+", answer) or re.fullmatch(r"-?[0-9]{1,3}(?:,[0-9]{3})+", answer):
        return ""
    return f"{answer}, {rng.randint(1000, 9999)}"


def swapped(answer: str, _: random.Random) -> str:
    """Swap the first two elements of a tuple."""
    match = re.fullmatch(r"(\s*(?:\\left)?\()([^(),]+),([^(),]+)((?:,.*)?(?:\\right)?\)\s*)", answer)
    if match is None or match[2].strip() == match[3].strip() or "\\infty" in answer:
        return ""
    return f"{match[1]}{match[3].removesuffix(chr(92) + 'right')},{match[2]}{match[4]}"


def bracket_changed(answer: str, rng: random.Random) -> str:
    """Open a closed end of an interval, or close an open one."""
    if "\\infty" not in answer and "\\cup" not in answer and answer.count("[") == answer.count("]"):
        return ""
    finite = re.finditer(r"[(\[](?!\s*-?\\infty)|(?<!\\infty)(?<!\\infty\\right)[)\]]", answer)
    return _one_changed(answer, finite, rng, lambda place: {"(": "[", "[": "(", ")": "]", "]": ")"}[place[0]])


def operator_changed(answer: str, rng: random.Random) -> str:
    """Exchange a plus between two terms with a minus, or the reverse."""
    exchange = str.maketrans("+-", "-+")
    return _one_changed(answer, _BINARY.finditer(answer), rng, lambda place: place[0].translate(exchange))


def root_lost(answer: str, _: random.Random) -> str:
    """Replace a square root of a number by the number."""
    changed = re.sub(r"\\sqrt\{?([0-9]+)\}?", r"(\1)", answer, count=1)
    return changed if changed != answer and "(1)" not in changed else ""


def pi_lost(answer: str, _: random.Random) -> str:
    """Drop a factor pi."""
    changed = re.sub(r"(?<=[0-9}])\s*\\pi(?![a-z])", "", answer, count=1)
    return changed if changed != answer else ""


def digit_appended(answer: str, rng: random.Random) -> str:
    """Append a digit to a number."""
    return answer + str(rng.randint(0, 9)) if re.fullmatch(r"-?[1-9][0-9]{0,10}", answer) else ""


def word_changed(answer: str, rng: random.Random) -> str:
    """Change a word of an answer that is text; a unit after a number is ignored by design."""
    if re.search("[0-9]", answer) or ("\\text" not in answer and not re.fullmatch(r"[a-zA-Z ]+", answer)):
        return ""
    places = (place for place in _WORD.finditer(answer) if not answer[: place.start()].endswith("\\"))
    words = ("Monday", "purple", "neither")
    return _one_changed(
        answer,
        places,
        rng,
        lambda place: rng.choice([word for word in words if word.casefold() != place[0].casefold()]),
    )


PERTURBATIONS: dict[str, Perturb] = {
    perturb.__name__: perturb
    for perturb in (
        number_by_one,
        sign_flipped,
        fraction_inverted,
        element_dropped,
        element_added,
        swapped,
        bracket_changed,
        operator_changed,
        root_lost,
        pi_lost,
        digit_appended,
        word_changed,
    )
}


def perturbed(answers: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield at most `count` triples (right answer, wrong answer, kind), the kinds in turn, no pair twice."""
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    streams = {
        kind: _stream(perturb, answers, random.Random(f"{seed} {kind}")) for kind, perturb in PERTURBATIONS.items()
    }
    while streams:
        for kind in rng.sample(sorted(streams), len(streams)):
            pair = next((pair for pair in streams[kind] if pair not in seen), None)
            if pair is None:
                del streams[kind]
                continue
            seen.add(pair)
            yield *pair, kind
            if len(seen) == count:
                return


def _stream(perturb: Perturb, answers: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    for _ in range(PASSES):
        for right in rng.sample(answers, len(answers)):
            wrong = perturb(right, rng)
            if wrong and wrong != right:
                yield right, wrong
