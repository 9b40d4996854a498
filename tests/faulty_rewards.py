"""Reward functions that are wrong, each in its own way; named by ``reward.custom_reward_function.name``."""

import asyncio
import math
from typing import Any

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


def boolean(*args: Any, **kwargs: Any) -> bool:
    return True


def for_five_only(data_source: str, solution_str: str, ground_truth: str, **kwargs: Any) -> float:
    """Good unless the response has a 6 in it."""
    return math.nan if "6" in solution_str else 1.0
