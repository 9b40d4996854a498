"""The ground truth of a programming problem: its tests as JSON text, and how an output is compared.

`kind` is "stdin" (tests are pairs of input and output), "call" (tests are `[arguments, result, ...]`, with every result
that counts, of the function or method `names[0]`) or "assert" (`tests` is Python that calls the functions `names`,
`setup` Python that precedes it). `tolerance` holds for numbers with a fraction, relative or absolute. Larger tests are
compressed, as `zlib` in base64, and the largest are in a file of their own, which `file` and `sha256` name.

Outputs are compared as LiveCodeBench does: without the space at both ends of every line, then line by line as text, and
if that differs number by number, exactly as decimals ("1.0" is "1").
"""

import base64
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

LARGEST_FILE = 512 * 2**20
"""Bytes of the tests of one problem, before and after compression."""
LONGEST_PLAIN, LONGEST_INLINE = 20_000, 100_000
"""Characters of a ground truth that is written as it is, and of one within a data file."""
KINDS = ("stdin", "call", "assert")


@dataclass(frozen=True)
class CodeTests:
    """The tests of one problem; see above."""

    kind: str
    tests: Any
    names: Sequence[str] = ()
    setup: str = ""
    tolerance: float = 0.0

    def text(self) -> str:
        """Return the ground truth as text, compressed if it is long."""
        text = json.dumps({key: value for key, value in asdict(self).items() if value or key == "tests"})
        if len(text) <= LONGEST_PLAIN:
            return text
        return json.dumps({"zlib": base64.b64encode(zlib.compress(text.encode())).decode()})


def read_tests(ground_truth: str) -> CodeTests:
    """Read a ground truth.

    Raises:
        ValueError: it is not one, or its file is missing or not the one that was written; the data are wrong.
    """
    content = _json(ground_truth, "ground_truth")
    if isinstance(content, dict) and set(content) == {"file", "sha256"}:
        content = _json(_from_file(str(content["file"]), str(content["sha256"])), "its file")
    elif isinstance(content, dict) and set(content) == {"zlib"}:
        content = _json(_decoded(str(content["zlib"])).decode(), "its content")
    known = {"kind", "tests", "names", "setup", "tolerance"}
    if not isinstance(content, dict) or not set(content) <= known or content.get("kind") not in KINDS:
        raise ValueError(
            f"ground_truth {ground_truth!r:.60} is not the tests of a program; prepare the data with "
            "`python -m data_prep.code`"
        )
    tests = CodeTests(**{**{"tests": None}, **content})
    fault = _fault(tests)
    if fault:
        raise ValueError(f"ground_truth {ground_truth!r:.60}: {fault}")
    return tests


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {text!r:.60} is not JSON; a program is checked by tests") from error


@lru_cache(maxsize=8)  # siblings have the same tests
def _from_file(file: str, digest: str) -> str:
    path = Path(file)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"the tests in {path} have more than {LARGEST_FILE} bytes")
        stored = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the tests in {path} cannot be read ({error.strerror}); prepare the data again") from error
    if hashlib.sha256(stored).hexdigest() != digest:
        raise ValueError(f"the tests in {path} are not those that were prepared; prepare the data again")
    return inflated(stored).decode()


def _decoded(text: str) -> bytes:
    try:
        return inflated(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise ValueError(f"ground_truth {text!r:.60} {error}; prepare the data again") from error


def stored(ground_truth: str, folder: Path) -> str:
    """Return a ground truth as a data file holds it: long tests go to a file in `folder`, other text is left alone."""
    if len(ground_truth) <= LONGEST_INLINE:
        return ground_truth
    content = base64.b64decode(json.loads(ground_truth)["zlib"])
    digest = hashlib.sha256(content).hexdigest()
    path = folder.resolve() / f"{digest[:16]}.json.zlib"
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return json.dumps({"file": str(path), "sha256": digest})


def inflated(stored: bytes) -> bytes:
    """Decompress zlib data.

    Raises:
        ValueError: it is not that, or larger than `LARGEST_FILE`.
    """
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(stored, LARGEST_FILE)
    except zlib.error as error:
        raise ValueError(f"is not compressed by zlib ({error})") from error
    if inflater.unconsumed_tail or not inflater.eof:
        raise ValueError(f"is cut short, or has more than {LARGEST_FILE} bytes")
    return content


def _fault(tests: CodeTests) -> str:
    """Return what is wrong with a record of tests, "" if nothing is."""
    texts = [tests.setup, *(tests.names if isinstance(tests.names, list | tuple) else [None])]
    if not all(isinstance(text, str) for text in texts):
        return "'names' is not a list of names, or 'setup' not a text"
    if (
        isinstance(tests.tolerance, bool)
        or not isinstance(tests.tolerance, int | float)
        or not 0 <= tests.tolerance < 1
    ):
        return "'tolerance' is not a number of at least 0 and below 1"
    if tests.kind != "stdin" and not tests.names:
        return "'names' does not say which function is tested"
    if tests.kind == "assert":
        return "" if isinstance(tests.tests, str) and tests.tests.strip() else "'tests' is not a text of Python"
    if not isinstance(tests.tests, list) or not tests.tests:
        return "'tests' is not a list with at least one test"
    for test in tests.tests:
        if not isinstance(test, list) or len(test) < 2:
            return f"the test {test!r:.60} is not a pair"
        if tests.kind == "stdin" and not (len(test) == 2 and all(isinstance(part, str) for part in test)):
            return f"the test {test!r:.60} is not a pair of texts"
        if tests.kind == "call" and not isinstance(test[0], list):
            return f"the test {test!r:.60} does not begin with a list of arguments"
    return ""


# ---------------------------------------------------------------- comparison


def same_output(output: str, expected: str, tolerance: float = 0.0) -> bool:
    """Return whether the output of a program is the expected one."""
    lines, expected_lines = (text.strip().split("\n") for text in (output, expected))
    return len(lines) == len(expected_lines) and all(
        _same_line(line.strip(), other.strip(), tolerance) for line, other in zip(lines, expected_lines, strict=True)
    )


def _same_line(line: str, expected: str, tolerance: float) -> bool:
    if line == expected:
        return True
    words, expected_words = line.split(), expected.split()
    return len(words) == len(expected_words) and all(
        _same_number(word, other, tolerance) for word, other in zip(words, expected_words, strict=True)
    )


def _same_number(word: str, expected: str, tolerance: float) -> bool:
    if tolerance and word == expected:
        return True
    try:
        number, other = Decimal(word), Decimal(expected)
    except InvalidOperation:
        return False
    if number.is_nan() or other.is_nan():
        return False
    whole = expected.lstrip("+-").isdigit()
    return number == other or (
        bool(tolerance) and not whole and math.isclose(number, other, rel_tol=tolerance, abs_tol=tolerance)
    )


def same_value(answer: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Return whether two values of JSON are equal; `tolerance` holds for an expected number with a fraction."""
    if isinstance(answer, list) and isinstance(expected, list):
        return len(answer) == len(expected) and all(
            same_value(one, other, tolerance) for one, other in zip(answer, expected, strict=True)
        )
    if isinstance(answer, Mapping) and isinstance(expected, Mapping):
        return answer.keys() == expected.keys() and all(
            same_value(answer[key], expected[key], tolerance) for key in expected
        )
    if tolerance and isinstance(expected, float) and isinstance(answer, int | float):
        return math.isclose(answer, expected, rel_tol=tolerance, abs_tol=tolerance)
    return bool(answer == expected)
