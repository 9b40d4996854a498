"""How a reward function is called, and what it may return.

Training, validation, evaluation and the start-up checks share it.  verl calls a function by four keyword arguments and
passes its result on unchecked; results that are not finite numbers, or cannot be averaged, are found here.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

import reward_fns

VERLS_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""Keywords by which verl's reward managers call a function."""

NOT_FOR_THE_RECORD = "reward"
"""Key under which verl's validation keeps the reward itself; a second value would shift all others."""

_NUMBERS = "biuf"
"""numpy's kinds of booleans, integers and floats."""


class RewardError(ValueError):
    """A reward function that cannot be called or that did not return a reward; the message says why."""


def plain_number(value: Any) -> bool | int | float | None:
    """Convert a number of any library to Python's own.

    Args:
        value: bool, int, float, Decimal, Fraction, numpy scalar, or an array or tensor with one element.

    Returns:
        A bool, an int or a float, NaN and infinities included; None for anything but one real number.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        value = value.item()
    elif isinstance(value, (np.generic, np.ndarray)):
        # Spans of time are integers to numpy.
        if value.size != 1 or value.dtype.kind not in _NUMBERS + "O":
            return None
        value = value.item()
    if isinstance(value, (np.generic, np.ndarray)) or not isinstance(value, (Real, Decimal)):
        return None
    if isinstance(value, bool):
        return value
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer that no float can hold, a signalling NaN
        return None
    return int(value) if isinstance(value, Integral) else number


def finite_number(value: Any) -> float | None:
    """Convert as ``plain_number``; None for NaN and infinities too."""
    number = plain_number(value)
    return float(number) if number is not None and math.isfinite(number) else None


def plain_value(value: Any) -> bool | int | float | str | None:
    """Convert a value of a record to a number or a text of Python's own.

    Raises:
        RewardError: it is neither, so that it has no mean and no majority; the message is its type.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return str.__str__(value)
    number = plain_number(value)
    if number is None:
        raise RewardError(f"a {type(value).__name__}")
    return number


def shown(value: Any) -> str:
    """Show a value in a message: one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Verdict:
    """A reward function's result for one response.

    Attributes:
        score: the reward, finite.
        record: its other values, numbers and texts only.
        left_out: key to type of values that have no mean.
    """

    score: float
    record: dict[str, Any]
    left_out: dict[str, str]


def read_verdict(result: Any) -> Verdict:
    """Read what a reward function returned: a number, or a record with ``score``.

    Raises:
        RewardError: there is no score, or it is not a finite number.
    """
    record: Mapping[Any, Any] = {}
    # Only a dict is a record to verl.
    if isinstance(result, dict):
        if "score" not in result:
            raise RewardError(f"it returned a record without 'score' ({shown(result)})")
        record, result = result, result["score"]
    score = finite_number(result)
    if score is None:
        raise RewardError(f"it returned {shown(result)}, which is not a finite number")
    kept, left_out = split_record(record)
    return Verdict(score, kept, left_out)


def split_record(record: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split a reward's record into values that can be averaged or shown, in Python's own types, and others.

    Returns:
        The kept part, and key to reason of the values left out.
    """
    kept: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for key, value in record.items():
        try:
            if key == NOT_FOR_THE_RECORD:
                raise RewardError("the name of the reward itself")
            kept[str(key)] = plain_value(value)
        except RewardError as error:
            left_out[str(key)] = str(error)
    return kept, left_out


class RewardCall:
    """A reward function, loaded and called as verl does.

    Args:
        path: a Python file, or ``pkg://<module>``.
        name: of the function in it.
        kwargs: ``reward_kwargs`` of the config, given with every call.

    Attributes:
        label: the function for messages.

    Raises:
        RewardError: it cannot be loaded, or is not a function.
    """

    def __init__(self, path: str, name: str, kwargs: Mapping[str, Any]) -> None:
        """Load the function."""
        self.label = f"{name} of {path}"
        try:
            function: Any = _load(path, name)
        except Exception as error:  # a process border: the file is the user's own
            raise RewardError(f"{self.label} cannot be loaded ({_reason(error)})") from error
        if not callable(function):
            raise RewardError(f"{self.label} is a {type(function).__name__}, not a function")
        self._function: Callable[..., Any] = function
        self._kwargs = dict(kwargs)

    def check_signature(self) -> None:
        """Refuse a function that cannot take verl's arguments and ``reward_kwargs``.

        Raises:
            RewardError: naming the parameter.
        """
        taken = sorted(set(self._kwargs) & set(VERLS_ARGUMENTS))
        if taken:
            raise RewardError(f"{self.label}: reward_kwargs has {', '.join(taken)}, which verl gives by itself")
        try:
            signature = inspect.signature(self._function)
        except (TypeError, ValueError):  # built in
            return
        try:
            signature.bind(**dict.fromkeys([*VERLS_ARGUMENTS, *self._kwargs]))
        except TypeError as error:
            extra = f" and reward_kwargs ({', '.join(self._kwargs)})" if self._kwargs else ""
            raise RewardError(
                f"{self.label} cannot be called by the keywords {', '.join(VERLS_ARGUMENTS)}{extra} ({error})"
            ) from error

    def __call__(self, data_source: str, response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> Verdict:
        """Call the function for one response, an async one in an event loop of its own.

        Raises:
            RewardError: what it returned is not a reward.
        """
        given = dict(zip(VERLS_ARGUMENTS, (data_source, response, ground_truth, dict(extra_info)), strict=True))
        result = self._function(**given, **self._kwargs)
        if inspect.iscoroutinefunction(self._function):
            result = asyncio.run(result)
        elif inspect.iscoroutine(result):
            # verl would not await it.
            result.close()
            raise RewardError("it returned a coroutine; define it by `async def`, which is how verl knows")
        return read_verdict(result)


def _load(path: str, name: str) -> Any:
    """Load a reward function as verl does; this recipe's own is at hand without verl, which takes seconds to import."""
    if (path, name) == (reward_fns.OUR_REWARD, "compute_score"):
        return reward_fns.compute_score
    from verl.utils.import_utils import load_extern_object

    return load_extern_object(module_path=path, object_name=name)


def _reason(error: BaseException) -> str:
    """Name an error in one line; of a file that cannot be imported, the error inside it and its line."""
    cause = error.__cause__
    if isinstance(cause, SyntaxError):
        return f"SyntaxError: {cause.msg}, line {cause.lineno}"
    error = cause or error
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
