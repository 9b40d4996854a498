"""The table of prompts and the drift clock; whole runs are compared with plain loops in ``tests/golden``."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.tracker import DriftClock, PromptIndex, PromptTable

seeds = st.integers(0, 2**32)


def numbers(table: PromptTable, key: str = "a") -> tuple[float, float, float]:
    return table.value(key), table.length(key), table.count(key)


def test_reading_a_prompt_never_seen_gives_the_initial_values_and_is_not_a_visit() -> None:
    table = PromptTable(40.0)
    table.clock.advance(0.5)
    assert numbers(table) == (0.5, 40.0, 0.0) and table.drift("a") == 0.0
    assert len(table) == 0 and table.state_dict()["sizes"].size == 0


def test_the_first_visit_replaces_the_initial_values() -> None:
    table = PromptTable(40.0)
    assert table.visit("a", 0.875, 12.0, drift=3.0) == 3.0
    assert numbers(table) == (0.875, 12.0, 1.0)


def test_the_second_visit_weighs_one_over_rho_n_plus_one() -> None:
    table = PromptTable()
    table.visit("a", 0.0, 10.0)
    table.visit("a", 1.0, 20.0, drift=1.0)
    # Drift 1 of half-life 8: rho = 2^(-1/8) = 0.917, N = 1.917, eta = 1 / 1.917.
    eta = 1 / (2 ** (-1 / 8) + 1)
    assert numbers(table) == pytest.approx((eta, 10 + 10 * eta, 1 / eta), rel=1e-12)


@pytest.mark.parametrize(
    ("drift", "rho"), [(0.0, 0.96), (0.4, 0.96), (1.0, 2 ** (-1 / 8)), (8.0, 0.875), (math.inf, 0.875)]
)
def test_retention_is_clipped_to_its_bounds(drift: float, rho: float) -> None:
    table = PromptTable()
    table.visit("a", 0.2, 1.0)
    table.visit("a", 0.8, 1.0, drift)
    assert table.count("a") == pytest.approx(rho + 1, rel=1e-12)


def test_defaults_are_those_of_the_paper() -> None:
    table = PromptTable()
    assert (table.rho_min, table.rho_max, table.half_life) == (0.875, 0.96, 8.0)


def test_thousands_of_prompts_keep_their_values_while_the_table_grows() -> None:
    table = PromptTable()
    for index in range(5000):
        table.visit(f"p{index}", index / 5000, index)
    assert len(table) == 5000
    assert [table.value(f"p{index}") for index in range(5000)] == pytest.approx([n / 5000 for n in range(5000)])
    assert {table.count(f"p{index}") for index in range(5000)} == {1.0}


@pytest.mark.parametrize(
    ("value", "length", "drift", "message"),
    [
        (math.nan, 1.0, 0.0, "observation of prompt a"),
        (0.5, math.inf, 0.0, "observation of prompt a"),
        (0.5, 1.0, -0.1, "drift of prompt a"),
        (0.5, 1.0, math.nan, "drift of prompt a"),
    ],
)
def test_what_is_not_a_number_is_refused_with_the_prompt_and_changes_nothing(
    value: float, length: float, drift: float, message: str
) -> None:
    table = PromptTable()
    with pytest.raises(ValueError, match=message):
        table.visit("a", value, length, drift)
    assert len(table) == 0


@pytest.mark.parametrize(
    "constants",
    [
        {"rho_min": 0.97},
        {"rho_min": -0.1},
        {"rho_max": 1.01},
        {"rho_max": math.nan},
        {"half_life": 0.0},
        {"half_life": -1.0},
        {"half_life": math.nan},
    ],
)
def test_impossible_constants_are_refused(constants: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="|".join(constants)):
        PromptTable(**constants)


# ---------------------------------------------------------------- drift


@pytest.mark.parametrize(
    ("before", "after", "drift"),
    [
        ([0.003] * 5, [0.003] * 7, 7.0),  # an even policy drifts by one per step
        ([0.01], [0.03], 1.5),  # 0.03 over a mean of 0.02
        ([], [0.0] * 3, 3.0),  # without any KL, steps are counted
    ],
)
def test_drift_is_the_kl_in_units_of_the_mean_step(before: list[float], after: list[float], drift: float) -> None:
    clock = DriftClock()
    for kl in before:
        clock.advance(kl)
    then = clock.steps, clock.total_kl
    for kl in after:
        clock.advance(kl)
    assert clock.since(*then) == pytest.approx(drift)


def test_a_visit_starts_the_drift_again_and_negative_estimates_count_as_zero() -> None:
    table = PromptTable(unit="nats")
    table.clock.advance(5.0)
    table.visit("a", 0.5, 1.0)
    table.clock.advance(0.25)
    table.clock.advance(-9.0)
    table.clock.advance(0.5)
    assert table.drift("a") == 0.75
    assert table.visit("a", 0.5, 1.0) == 0.75
    assert table.drift("a") == 0.0


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_kl_that_is_not_a_number_is_refused(kl: float) -> None:
    clock = DriftClock()
    with pytest.raises(ValueError, match="policy KL"):
        clock.advance(kl)
    assert (clock.steps, clock.total_kl) == (0, 0.0)


def test_an_unknown_unit_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"kl_steps, nats.*'days'"):
        DriftClock("days")


# ---------------------------------------------------------------- state


@given(seeds, st.sampled_from(DriftClock.UNITS))
def test_the_state_comes_back_and_continues_identically(seed: int, unit: str) -> None:
    def train(table: PromptTable, rng: np.random.Generator) -> list[float]:
        said = []
        for _ in range(int(rng.integers(30))):
            said.append(table.visit(f"prompt/é {rng.integers(9)}", float(rng.uniform()), float(rng.uniform(1, 90))))
            table.clock.advance(float(rng.exponential(0.01)))
        return [*said, *(number for n in range(9) for number in numbers(table, f"prompt/é {n}"))]

    table, loaded = PromptTable(30.0, unit=unit), PromptTable(30.0, unit=unit)
    train(table, np.random.default_rng(seed))
    loaded.visit("left over", 1.0, 1.0)
    state = table.state_dict()
    kept = {name: array.copy() for name, array in state.items()}
    loaded.load_state_dict(state)
    assert len(loaded) == len(table) and numbers(loaded, "left over") == (0.5, 30.0, 0.0)
    assert train(loaded, np.random.default_rng(seed + 1)) == train(table, np.random.default_rng(seed + 1))
    assert all((kept[name] == state[name]).all() for name in kept), "saved arrays do not follow the table"


def two_prompts() -> dict[str, Any]:
    table = PromptTable()
    for key in "ab":
        table.visit(key, 0.25, 10.0)
        table.clock.advance(0.5)
    return table.state_dict()


@pytest.mark.parametrize("name", two_prompts())
def test_an_incomplete_state_is_refused(name: str) -> None:
    state = two_prompts()
    del state[name]
    with pytest.raises(ValueError, match=f"lacks .*{name}"):
        PromptTable().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [1.0]}, "different lengths"),
        ({"visit_kl": [0.0] * 3}, "different lengths"),
        ({"text": np.frombuffer(b"aa", dtype=np.uint8)}, "key twice"),
        ({"sizes": [1, 2]}, "do not fit"),
        ({"sizes": [3, -1]}, "do not fit"),
        ({"values": [math.nan, 0.5]}, "not a number in range"),
        ({"counts": [math.inf, 1.0]}, "not a number in range"),
        ({"counts": [-1.0, 1.0]}, "not a number in range"),
        ({"visit_steps": [0, 3]}, "not a number in range"),
        ({"visit_steps": [-1, 0]}, "not a number in range"),
        ({"total_kl": math.inf}, "not a number in range"),
        ({"values": [1.5, 0.5]}, "values outside 0 to 1"),
        ({"lengths": [-3.0, 0.5]}, "lengths outside 0 to 1e"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTable().load_state_dict(two_prompts() | change)


@given(st.lists(st.text(), unique=True, max_size=20))
def test_any_prompt_id_comes_back(keys: list[str]) -> None:
    index = PromptIndex()
    for key in keys:
        index.add(key)
    loaded = PromptIndex.from_state(**index.state_dict())
    assert [loaded.find(key) for key in keys] == list(range(len(keys)))


def test_squares_are_those_of_the_weights_in_the_value() -> None:
    """The weight of a visit is how much V changes with its observation."""
    drifts = [0.0, 1.0, 8.0, 0.5, 3.0]

    def table(observations: list[float]) -> PromptTable:
        table = PromptTable()
        for value, drift in zip(observations, drifts, strict=True):
            table.visit("a", value, 1.0, drift)
        return table

    weights = [table([float(place == visit) for place in range(5)]).value("a") for visit in range(5)]
    assert sum(weights) == pytest.approx(1)
    assert table([0.5] * 5).squares("a") == pytest.approx(sum(weight**2 for weight in weights), rel=1e-12)
    assert PromptTable().squares("a") == 0.0
