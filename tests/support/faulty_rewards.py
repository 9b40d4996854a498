"""Reward functions that are wrong, each in its own way; named by ``reward.custom_reward_function.name``."""

import asyncio
import datetime
import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch


def raises(*args: Any, **kwargs: Any) -> float:
    raise ZeroDivisionError("a reward function of a user's own")


async def hangs(*args: Any, **kwargs: Any) -> float:
    await asyncio.Event().wait()
    return 1.0


def not_a_number(*args: Any, **kwargs: Any) -> float:
    return math.nan


def infinite(*args: Any, **kwargs: Any) -> dict[str, float]:
    return {"score": -math.inf, "acc": 0.0}


def text(*args: Any, **kwargs: Any) -> str:
    return "1.0"


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.tensor([1.0, -1.0])


def no_score(*args: Any, **kwargs: Any) -> dict[str, float]:
    return {"acc": 1.0}


def too_large(*args: Any, **kwargs: Any) -> float:
    return 2.0


def too_small_for_long_ones(data_source: str, solution_str: str, ground_truth: str, **kwargs: Any) -> float:
    return 1.0 - len(solution_str) / 4


CALLS = itertools.count()


def rich_record(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Everything that people put beside a score, and a key that is now a number, now a text."""
    return {
        "score": np.float32(1.0),
        "acc": np.bool_(True),
        "pred": np.str_("5"),
        "word": "five",
        "tokens": np.int64(7),
        "margin": torch.tensor(0.5),
        "share": Decimal("0.25"),
        "ratio": Fraction(1, 2),
        "nothing": None,
        "sometimes": "high" if next(CALLS) % 2 else 1.0,
        # without a mean
        "detail": {"a": 1},
        "steps": [1, 2],
        "seen": {1},
        "day": datetime.date(2026, 1, 1),
        "vector": np.zeros(3),
        "flag": b"x",
        "reward": 1.0,
    }


def for_five_only(data_source: str, solution_str: str, ground_truth: str, **kwargs: Any) -> float:
    """Good unless the response has a 6 in it, or a 7."""
    if "7" in solution_str:
        raise ZeroDivisionError("a reward function of a user's own")
    return math.nan if "6" in solution_str else 1.0


def plain_number(*args: Any, **kwargs: Any) -> float:
    """Return half a point without a record."""
    return 0.5
