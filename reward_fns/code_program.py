"""What runs inside the sandbox of `code_worker`: a program, with input, with arguments, or beside its tests.

The tests of a function are Python that belongs to the data. They run in a sandbox of their own ("assert") and call
the program in another ("serve") through a socket: arguments and results cross as plain values. So a program can
neither see what is expected nor change how it is compared, and it ends no process but its own.
"""

import ast
import atexit
import builtins
import json
import os
import socket
import struct
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

LINK, RESULT = 3, 4
"""File descriptors: a socket to the other process of a test, and where a result is written."""
RECURSION = 50_000
LONGEST_ITERATOR = 100_000
PASSED, WRONG = b"passed", b"wrong answer"
"""Results of the role "assert"; any other is an error."""

_IMPORTED = """
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator
import io, sys, json, typing, time, decimal, fractions
from datetime import datetime, timedelta
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from bisect import bisect, bisect_left, bisect_right, insort, insort_left, insort_right
from copy import copy, deepcopy
from math import *
from itertools import *
from functools import *
from string import *
from typing import *
from builtins import *
"""
"""Names that answers to LiveCodeBench and LeetCode's problems take for granted."""

_assumed: dict[str, Any] = {}


def preload() -> None:
    """Import what every program is given; forks then have it at once."""
    exec(compile(_IMPORTED, "imports", "exec", dont_inherit=True), _assumed)  # noqa: S102  # the text above
    _assumed.pop("__builtins__", None)
    # Of the module site, which is not loaded.
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    sys.setrecursionlimit(RECURSION)
    sys.set_int_max_str_digits(0)


def run(request: Mapping[str, Any]) -> int:
    """Run the role that is requested; returns the exit code."""
    atexit._clear()
    sys.argv = ["answer.py"]
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False))
    roles = {"stdin": _whole, "call": _called, "serve": _served, "assert": _asserted}
    code = 0
    try:
        roles[request["role"]](request)
    except SystemExit:
        pass
    except BaseException:
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter's end does
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        code = 1
    return code


def _main_module(*texts: str) -> dict[str, Any]:
    """Execute texts as the main module and return its names."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    names = module.__dict__
    names.update(_assumed)
    for text in texts:
        exec(compile(text, "answer.py", "exec", dont_inherit=True), names)  # noqa: S102  # what this process is for
    return names


def _whole(request: Mapping[str, Any]) -> None:
    _main_module(request["program"])


def _called(request: Mapping[str, Any]) -> None:
    """Call one function, of a class `Solution` if there is one, and write its results as lines of JSON."""
    names = _main_module(request["program"])
    owner = names.get("Solution")
    entry = request["entry"]
    function = getattr(owner(), entry) if isinstance(owner, type) and hasattr(owner, entry) else names[entry]
    for arguments in request["calls"]:
        os.write(RESULT, f"{json.dumps(function(*arguments), default=_as_json)}\n".encode())


def _as_json(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a scalar of numpy
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not plain data")


# ---------------------------------------------------------------- values that cross the link


class _Remote:
    """An object of the program, as the tests see it: it can be called, and has attributes; it equals only itself."""

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        vars(self).update(_ask=ask, _number=number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", self._number, list(arguments), keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self._number, [name], {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self._number, [name, value], {})


def _pack(value: Any, other: Callable[[Any], Any]) -> Any:
    """Return a value as JSON holds it; `other` packs an object that is not of a plain type."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a scalar of numpy
        return _pack(value.item(), other)
    for kind, name in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset"), (deque, "deque")):
        if isinstance(value, kind):
            return {name: [_pack(item, other) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, other), _pack(item, other)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: list(value)}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Decimal | Fraction):
        return {type(value).__name__: str(value)}
    if isinstance(value, Iterator):
        items = []
        for item in value:
            items.append(_pack(item, other))
            if len(items) > LONGEST_ITERATOR:
                raise ValueError("an iterator without an end")
        return {"iterator": items}
    return other(value)


_MADE: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "iterator": iter,
    "bytes": bytes,
    "bytearray": bytearray,
}


def _unpack(packed: Any, other: Callable[[int], Any]) -> Any:
    """Return the value that `_pack` packed, of Python's own types; `other` makes an object of its number."""
    if isinstance(packed, list):
        raise ValueError("a value without a type")
    if not isinstance(packed, dict):
        return packed
    ((name, held),) = packed.items()
    if name == "object":
        return other(int(held))
    if name == "dict":
        return {_unpack(key, other): _unpack(item, other) for key, item in held}
    if name in ("bytes", "bytearray"):
        return _MADE[name](held)
    if name == "range":
        return range(*map(int, held))
    if name == "complex":
        return complex(*map(float, held))
    if name in ("Decimal", "Fraction"):
        return {"Decimal": Decimal, "Fraction": Fraction}[name](str(held))
    return _MADE[name]([_unpack(item, other) for item in held])


def _send(link: socket.socket, value: Any) -> None:
    content = json.dumps(value).encode("utf-8", "surrogatepass")
    link.sendall(struct.pack("!I", len(content)) + content)


def _receive(link: socket.socket) -> Any:
    parts = bytearray()
    size = 4
    while len(parts) < size:
        part = link.recv(min(size - len(parts), 1 << 16))
        if not part:
            raise EOFError("the other process has ended")
        parts += part
        if size == 4 == len(parts):
            size += struct.unpack("!I", parts)[0]
    return json.loads(parts[4:])


# ---------------------------------------------------------------- the program's side


def _served(request: Mapping[str, Any]) -> None:
    """Execute the program and answer the calls of the tests."""
    link = socket.socket(fileno=LINK)
    try:
        names = _main_module(request["setup"], request["program"])
        fault: BaseException | None = None
    except BaseException as error:
        names, fault = {}, error
    objects: list[Any] = []

    def keep(value: Any) -> Any:
        objects.append(value)
        return {"object": len(objects) - 1}

    while True:
        try:
            operation, number, arguments, keywords = _receive(link)
        except (EOFError, OSError):
            return
        try:
            if fault is not None:
                raise fault
            held = [_unpack(item, objects.__getitem__) for item in arguments]
            if operation == "name":
                result = names[held[0]]
            elif operation == "get":
                result = getattr(objects[number], held[0])
            elif operation == "set":
                setattr(objects[number], held[0], held[1])
                result = None
            else:
                named = {name: _unpack(item, objects.__getitem__) for name, item in keywords.items()}
                result = objects[number](*held, **named)
            reply = ["value", _pack(result, keep)]
        except BaseException as error:
            reply = ["error", type(error).__name__]
        _send(link, reply)


# ---------------------------------------------------------------- the tests' side


class ProgramError(Exception):
    """The program raised an exception that Python itself does not have."""


def _asserted(request: Mapping[str, Any]) -> None:
    """Run the tests of a function and write `PASSED` or `WRONG`."""
    link = socket.socket(fileno=LINK)
    calls = 0

    def number_of(value: Any) -> Any:
        if isinstance(value, _Remote):
            return {"object": vars(value)["_number"]}
        raise TypeError(f"a {type(value).__name__} cannot be given to the program")

    def ask(operation: str, number: int, arguments: list[Any], keywords: Mapping[str, Any]) -> Any:
        nonlocal calls
        calls += operation == "call"
        packed = {name: _pack(value, number_of) for name, value in keywords.items()}
        _send(link, [operation, number, [_pack(value, number_of) for value in arguments], packed])
        kind, reply = _receive(link)
        if kind == "value":
            return _unpack(reply, lambda number: _Remote(ask, number))
        error = vars(builtins).get(str(reply))
        if isinstance(error, type) and issubclass(error, Exception) and not issubclass(error, AssertionError):
            raise error(str(reply))
        raise ProgramError(str(reply))

    names: dict[str, Any] = {**_assumed, "__name__": "tests"}
    exec(compile(request["setup"], "setup", "exec", dont_inherit=True), names)  # noqa: S102  # the data's own
    # The data say which names are the program's: a program that redefines `abs` must not replace it.
    functions = {name: ask("name", 0, [name], {}) for name in request["names"]}
    names.update(functions)
    tree = ast.parse(request["tests"])
    try:
        exec(compile(tree, "tests", "exec", dont_inherit=True), names)  # noqa: S102  # the data's own
        if any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
            names["check"](functions[request["names"][0]])
        result = PASSED if calls else b"no call"
    except AssertionError:
        result = WRONG
    os.write(RESULT, result)
