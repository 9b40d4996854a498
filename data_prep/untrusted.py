"""Files of strangers: JSON and YAML within bounds, and their text in one line of a terminal.

``json`` and ``yaml`` answer hostile text with six kinds of exceptions, or not at all.  Here a file is read, or refused
in one sentence, in time and memory that grow with its size alone.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

LONGEST_NUMBER = 100
"""Digits of an integer: a 128-bit state of a random generator has 39, and a float holds 308."""

LARGEST_JSON = 256 * 2**20
LARGEST_YAML = 2 * 2**20
DEEPEST_YAML = 40

LONGEST_QUOTE = 300
"""Characters of a stranger's text in a message."""

LONGEST_LINE = 1_500
"""Characters of a whole message: its place, what a stranger wrote, and the fix at its end."""

_AS_ZEROS = bytes.maketrans(b"123456789E", b"000000000e")
_LONG_NUMBERS = (b"0" * (LONGEST_NUMBER + 1), b"e000", b"e+000")
_YAML_NUMBER = re.compile(rf"[-+]?(0[xX][\da-fA-F_]{{{LONGEST_NUMBER},}}|[\d_:.]{{{LONGEST_NUMBER},}})")
_LINE_ENDS = re.compile("\\s*[\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029]\\s*")


class UntrustedError(ValueError):
    """Text that is refused; the message says what was found, without the place."""


# ---------------------------------------------------------------- JSON


def parse_json(text: str | bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON text; NaN and infinities that are written as such are kept.

    ``pairs_hook`` makes an object of its keys and values; without it the last of equal keys wins.

    Raises:
        UntrustedError: it is not JSON, is nested too deeply, or has a number that no float can hold.
    """
    try:
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        # The hooks are slow, so they are left to texts that may need them; a string may look like a number.
        zeros = raw.translate(_AS_ZEROS)
        if any(digits in zeros for digits in _LONG_NUMBERS):
            return json.loads(raw, parse_int=_whole, parse_float=_finite, object_pairs_hook=pairs_hook)
        return json.loads(raw, object_pairs_hook=pairs_hook)
    except UntrustedError:
        raise
    except RecursionError:
        raise UntrustedError("is nested too deeply") from None
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UntrustedError(f"is not JSON ({one_line(error)})") from None


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise UntrustedError(f"has a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UntrustedError(f"has a number that is too large ({one_line(text, 20)})")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file as a whole.

    Raises:
        UntrustedError: as ``parse_json``, or a file larger than ``LARGEST_JSON``.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise UntrustedError(f"has {size} bytes, at most {LARGEST_JSON} are read")
    return parse_json(path.read_bytes())


# ---------------------------------------------------------------- YAML


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values: no tags of Python, no aliases, no interpolation.

    Raises:
        UntrustedError: it is not such a file, or is too large or too deep.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_YAML:
        raise UntrustedError(f"has {size} bytes, at most {LARGEST_YAML} are read")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        _check_yaml(text)
        return yaml.CSafeLoader(text).get_single_data()
    except UntrustedError:
        raise
    # Dates and numbers that do not exist, texts that are not UTF-8: ValueErrors.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise UntrustedError(f"is not YAML of plain values ({one_line(error)})") from None


def _check_yaml(text: str) -> None:
    """Refuse what makes a small file large in memory; events are read one by one."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UntrustedError(f"line {event.start_mark.line + 1}: has an alias (*{one_line(event.anchor, 40)})")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST_YAML:
                raise UntrustedError(f"line {event.start_mark.line + 1}: is nested more than {DEEPEST_YAML} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _YAML_NUMBER.fullmatch(event.value):
            raise UntrustedError(f"line {event.start_mark.line + 1}: has a number of {len(event.value)} digits")


# ---------------------------------------------------------------- terminal

_HARMLESS = frozenset("\u200c\u200d")
"""The joiners, which letters and emoji need."""


def one_line(text: object, longest: int = LONGEST_QUOTE) -> str:
    r"""Show text of a stranger inside a message: one line, no control character, at most ``longest`` characters.

    The end of a line becomes a blank; escape sequences, marks of the reading direction and invisible characters become
    escapes such as ``\x1b``.  Of a longer text the beginning and the end are kept.
    """
    given = str(text)
    # What is cut away anyway need not be escaped.
    if len(given) > 4 * longest:
        given = f"{given[: 2 * longest]}...{given[-2 * longest :]}"
    shown = "".join(map(_escaped, _LINE_ENDS.sub(" ", given.strip())))
    if len(shown) <= longest:
        return shown
    tail = longest // 3
    return f"{shown[: longest - tail - 3]}...{shown[len(shown) - tail :]}"


def _escaped(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def visible(text: str) -> str:
    """Show text of a stranger as it is, but for what cannot be seen or moves a cursor: that becomes escapes."""
    return "".join(character if character in "\n\t" else _escaped(character) for character in text)


def error_line(error: object) -> str:
    """Show an error as the one line that a command ends with: ``error: <place>: <what>; <fix>``."""
    return f"error: {one_line(error, LONGEST_LINE)}"
