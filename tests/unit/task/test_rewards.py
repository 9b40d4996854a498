"""The border where a reward arrives: what counts as one, and how a function is called."""

import datetime
import math
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from recipe.skpo.task.rewards import RewardCall, RewardError, finite_number, plain_value, read_verdict


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "value",
    [
        *(0.5, Fraction(1, 2), Decimal("0.5"), np.float16(0.5), np.float32(0.5), np.float64(0.5), np.array(0.5)),
        *(np.array([0.5]), np.array([[0.5]]), np.array(Fraction(1, 2), dtype=object)),
        *(torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.bfloat16)),
        torch.tensor(0.5, requires_grad=True),
    ],
    ids=repr,
)
def test_one_number_of_any_library_is_a_reward(value: Any) -> None:
    assert finite_number(value) == 0.5 and type(finite_number(value)) is float
    assert read_verdict(value).score == read_verdict({"score": value}).score == 0.5


@pytest.mark.parametrize(
    "value", [1, True, np.int8(1), np.uint64(1), np.bool_(True), np.array(True), torch.tensor(1), torch.tensor(True)]
)
def test_whole_numbers_and_truth_values_are_rewards(value: Any) -> None:
    assert finite_number(value) == 1.0


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1.0", b"1", "", [1.0], (1.0,), {1.0}, {}, object(), float, datetime.date(2026, 1, 1), Colour.RED),
        *(math.nan, math.inf, -math.inf, Decimal("nan"), Decimal("sNaN"), Decimal("inf"), np.float32("nan")),
        *(torch.tensor(math.nan), 10**400, Decimal("1e400"), 1j, np.complex64(1), torch.tensor(1j)),
        *(np.array([]), np.zeros(2), torch.zeros(0), torch.zeros(1, 2), np.array("1.0"), np.array([None])),
        *(np.timedelta64(1, "ns"), np.datetime64("2026-01-01"), pd.NA, pd.NaT),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_what_is_not_one_finite_number_is_not_a_reward(value: Any) -> None:
    assert finite_number(value) is None
    with pytest.raises(RewardError, match=r"^it returned .*(not a finite number|without 'score')") as error:
        read_verdict(value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        *((None, None), (True, True), (3, 3), (0.5, 0.5), ("a", "a"), (Colour.RED, "red"), (np.str_("a"), "a")),
        *((np.bool_(False), False), (np.int64(3), 3), (torch.tensor([2]), 2), (Decimal("0.5"), 0.5)),
        *((Fraction(1, 4), 0.25), (math.inf, math.inf), (np.array(0.5), 0.5)),
    ],
)
def test_numbers_and_texts_of_a_record_become_pythons_own(value: Any, kept: Any) -> None:
    assert plain_value(value) == kept and type(plain_value(value)) is type(kept)


@pytest.mark.parametrize(
    "value", [{}, {"a": 1}, [], [1.0], (1, 2), {1}, b"x", datetime.date(2026, 1, 1), np.zeros(2), 1j, object, pd.NA]
)
def test_what_has_no_mean_is_left_out_of_a_record(value: Any) -> None:
    verdict = read_verdict({"score": 1, "acc": 1, "other": value})
    assert verdict.record == {"score": 1, "acc": 1} and list(verdict.left_out) == ["other"]


FOUR = {"data_source": "s", "response": "r", "ground_truth": "5", "extra_info": {"level": 3}}


@pytest.mark.parametrize(
    "text",
    [
        "def f(data_source, solution_str, ground_truth, extra_info=None): return 0.5",
        "def f(*, solution_str, **kwargs): return 0.5",
        "async def f(data_source, solution_str, ground_truth, extra_info): return {'score': 0.5}",
        "f = lambda **kwargs: 0.5",
        "class F:\n    def __call__(self, data_source, solution_str, ground_truth, extra_info): return 0.5\nf = F()",
        "import functools\ndef g(k, **kwargs): return k\nf = functools.partial(g, 0.5)",
        "def f(extra_info, ground_truth, solution_str, data_source): return 0.5 * (extra_info['level'] == 3)",
    ],
)
def test_a_function_is_called_as_verl_calls_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    call = RewardCall(str(tmp_path / "mine.py"), "f", {})
    call.check_signature()
    assert call(**FOUR).score == 0.5


def test_reward_kwargs_are_given_with_every_call(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(data_source, solution_str, ground_truth, extra_info, scale): return scale")
    call = RewardCall(str(tmp_path / "mine.py"), "f", {"scale": 0.25})
    call.check_signature()
    assert call(**FOUR).score == 0.25
