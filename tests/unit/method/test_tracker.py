"""The KL-adaptive tracker and the drift clock (docs/method.md, section 6) against plain loops."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method.tracker import DriftClock, KLAdaptiveTracker, PromptRows

seeds = st.integers(0, 2**32)


def test_key_never_seen_has_the_initial_value_and_no_count() -> None:
    tracker = KLAdaptiveTracker(0.5)
    assert (tracker.value("a"), tracker.count("a"), len(tracker)) == (0.5, 0.0, 0)


def test_reading_a_key_does_not_visit_it() -> None:
    tracker = KLAdaptiveTracker(0.5)
    tracker.value("a"), tracker.count("a")
    assert len(tracker) == 0 and tracker.state_dict()["keys"].size == 0


def test_first_observation_replaces_the_initial_value() -> None:
    tracker = KLAdaptiveTracker(0.5)
    assert tracker.update("a", 0.875, drift=3.0) == 0.875
    assert (tracker.value("a"), tracker.count("a")) == (0.875, 1.0)


def test_second_observation_weighs_one_over_rho_n_plus_one() -> None:
    tracker = KLAdaptiveTracker(0.5)
    tracker.update("a", 0.0, drift=0.0)
    # drift 1 of half-life 8: rho = 2^(-1/8) = 0.917, N = 1.917, eta = 1 / 1.917
    assert tracker.update("a", 1.0, drift=1.0) == pytest.approx(1 / (2 ** (-1 / 8) + 1), rel=1e-12)
    assert tracker.count("a") == pytest.approx(2 ** (-1 / 8) + 1, rel=1e-12)


@pytest.mark.parametrize(
    ("drift", "rho"), [(0.0, 0.96), (0.4, 0.96), (1.0, 2 ** (-1 / 8)), (8.0, 0.875), (math.inf, 0.875)]
)
def test_retention_is_clipped_to_its_bounds(drift: float, rho: float) -> None:
    tracker = KLAdaptiveTracker(0.5)
    tracker.update("a", 0.2, 0.0)
    tracker.update("a", 0.8, drift)
    assert tracker.count("a") == pytest.approx(rho + 1, rel=1e-12)


def test_defaults_are_those_of_the_paper() -> None:
    tracker = KLAdaptiveTracker(0.0)
    assert (tracker.rho_min, tracker.rho_max, tracker.half_life) == (0.875, 0.96, 8.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=1, max_size=50))
def test_value_stays_within_what_was_observed(visits: list[tuple[float, float]]) -> None:
    tracker = KLAdaptiveTracker(0.5)
    for observation, drift in visits:
        tracker.update("a", observation, drift)
    seen = [observation for observation, _ in visits]
    assert min(seen) - 1e-12 <= tracker.value("a") <= max(seen) + 1e-12
    assert 1 <= tracker.count("a") <= 1 / (1 - 0.96)


@given(seeds)
def test_prompts_do_not_touch_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    visits = [(f"p{rng.integers(4)}", float(rng.uniform()), float(rng.exponential())) for _ in range(60)]
    together = KLAdaptiveTracker(0.5)
    for visit in visits:
        together.update(*visit)
    for key in {visit[0] for visit in visits}:
        alone = KLAdaptiveTracker(0.5)
        for visit in visits:
            if visit[0] == key:
                alone.update(*visit)
        assert (alone.value(key), alone.count(key)) == (together.value(key), together.count(key))


def test_thousands_of_prompts_keep_their_values_while_the_table_grows() -> None:
    tracker = KLAdaptiveTracker(0.5)
    for index in range(5000):
        tracker.update(f"p{index}", index / 5000, 0.0)
    assert len(tracker) == 5000
    assert all(tracker.value(f"p{index}") == pytest.approx(index / 5000, abs=1e-12) for index in range(5000))
    assert {tracker.count(f"p{index}") for index in range(5000)} == {1.0}


@pytest.mark.parametrize("observation", [math.nan, math.inf])
def test_observation_that_is_no_number_is_refused_and_names_the_prompt(observation: float) -> None:
    tracker = KLAdaptiveTracker(0.5)
    with pytest.raises(ValueError, match="observation of prompt a"):
        tracker.update("a", observation, 0.0)
    assert len(tracker) == 0


@pytest.mark.parametrize("drift", [-0.1, math.nan])
def test_negative_drift_is_refused_and_names_the_prompt(drift: float) -> None:
    tracker = KLAdaptiveTracker(0.5)
    with pytest.raises(ValueError, match="drift of prompt a"):
        tracker.update("a", 0.5, drift)
    assert len(tracker) == 0


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
        KLAdaptiveTracker(0.5, **constants)


@given(seeds)
def test_tracker_state_comes_back_and_goes_on_identically(seed: int) -> None:
    rng = np.random.default_rng(seed)
    visits = [(f"prompt/é {rng.integers(9)}", float(rng.uniform()), float(rng.exponential())) for _ in range(40)]
    unbroken, before = KLAdaptiveTracker(0.5), KLAdaptiveTracker(0.5)
    for visit in visits[:20]:
        unbroken.update(*visit)
        before.update(*visit)
    after = KLAdaptiveTracker(0.5)
    after.update("left over", 1.0, 0.0)
    after.load_state_dict(before.state_dict())
    assert len(after) == len(before) and after.value("left over") == 0.5
    for visit in visits[20:]:
        assert after.update(*visit) == unbroken.update(*visit)
        assert after.count(visit[0]) == unbroken.count(visit[0])


def test_saved_state_does_not_change_with_later_updates() -> None:
    tracker = KLAdaptiveTracker(0.5)
    tracker.update("a", 0.25, 0.0)
    state = tracker.state_dict()
    loaded = KLAdaptiveTracker(0.5)
    loaded.load_state_dict(state)
    tracker.update("a", 1.0, 0.0)
    loaded.update("a", 1.0, 0.0)
    assert state["values"].tolist() == [0.25] and state["counts"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": None}, "lacks .*values"),
        ({"counts": [1.0]}, "different lengths"),
        ({"keys": ["a", "a"]}, "key twice"),
        ({"values": [math.nan, 0.5]}, "not a number in range"),
        ({"counts": [math.inf, 1.0]}, "not a number in range"),
        ({"counts": [-1.0, 1.0]}, "not a number in range"),
    ],
)
def test_damaged_tracker_state_is_refused(change: dict[str, Any], message: str) -> None:
    state = {"keys": ["a", "b"], "values": [0.1, 0.2], "counts": [1.0, 2.0]} | change
    with pytest.raises(ValueError, match=message):
        KLAdaptiveTracker(0.5).load_state_dict({name: value for name, value in state.items() if value is not None})


# ---------------------------------------------------------------- drift


def test_drift_of_a_prompt_never_visited_is_zero() -> None:
    clock = DriftClock()
    clock.advance(0.5)
    assert clock.drift("a") == 0.0


def test_an_even_policy_drifts_by_one_per_step() -> None:
    clock = DriftClock()
    for step in range(12):
        if step == 5:
            clock.visit("a")
        clock.advance(0.003)
    assert clock.drift("a") == pytest.approx(7.0)


def test_a_step_that_moves_further_drifts_by_more_than_one() -> None:
    clock = DriftClock()
    clock.advance(0.01)
    clock.visit("a")
    clock.advance(0.03)
    assert clock.drift("a") == pytest.approx(1.5)  # 0.03 over a mean of 0.02


def test_without_any_kl_drift_counts_steps() -> None:
    clock = DriftClock("kl_steps")
    clock.visit("a")
    for _ in range(3):
        clock.advance(0.0)
    assert clock.drift("a") == 3.0


def test_in_nats_drift_is_the_undivided_sum() -> None:
    clock = DriftClock("nats")
    clock.advance(5.0)
    clock.visit("a")
    clock.advance(0.25)
    clock.advance(0.5)
    assert clock.drift("a") == 0.75


def test_a_visit_starts_the_count_anew() -> None:
    clock = DriftClock("nats")
    clock.visit("a")
    clock.advance(1.0)
    clock.visit("a")
    assert clock.drift("a") == 0.0
    clock.advance(0.5)
    assert clock.drift("a") == 0.5


def test_kl_estimates_below_zero_count_as_zero() -> None:
    clock = DriftClock("nats")
    clock.visit("a")
    clock.advance(-0.5)
    clock.advance(0.25)
    assert clock.drift("a") == 0.25


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_kl_that_is_no_number_is_refused(kl: float) -> None:
    clock = DriftClock()
    with pytest.raises(ValueError, match="policy KL"):
        clock.advance(kl)
    assert (clock.steps, clock.total_kl) == (0, 0.0)


def test_unknown_drift_unit_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"kl_steps, nats.*'days'"):
        DriftClock("days")


def test_clock_state_comes_back_and_goes_on_identically() -> None:
    clock = DriftClock()
    clock.advance(0.02)
    clock.visit("a")
    clock.advance(0.01)
    clock.visit("b")
    clock.advance(0.04)
    loaded = DriftClock()
    loaded.visit("left over")
    loaded.load_state_dict(clock.state_dict())
    for each in (clock, loaded):
        each.advance(0.03)
    assert [loaded.drift(key) for key in ("a", "b")] == [clock.drift(key) for key in ("a", "b")]
    assert loaded.drift("left over") == 0.0
    assert loaded.drift("a") == pytest.approx(0.08 / 0.025)


@pytest.mark.parametrize("name", ["keys", "visit_steps", "visit_kl", "steps", "total_kl"])
def test_incomplete_clock_state_is_refused(name: str) -> None:
    clock = DriftClock()
    clock.visit("a")
    state = clock.state_dict()
    del state[name]
    with pytest.raises(ValueError, match=name):
        DriftClock().load_state_dict(state)


def test_clock_state_with_arrays_of_different_lengths_is_refused() -> None:
    clock = DriftClock()
    clock.visit("a")
    with pytest.raises(ValueError, match="different lengths"):
        DriftClock().load_state_dict(clock.state_dict() | {"visit_kl": np.zeros(2)})


@pytest.mark.parametrize("unit", DriftClock.UNITS)
def test_clock_state_without_visits_comes_back(unit: str) -> None:
    clock = DriftClock(unit)
    clock.advance(0.5)
    loaded = DriftClock(unit)
    loaded.load_state_dict(clock.state_dict())
    assert (loaded.steps, loaded.total_kl, loaded.drift("a")) == (1, 0.5, 0.0)


# ---------------------------------------------------------------- rows shared by several tables


def shared_tables() -> tuple[PromptRows, KLAdaptiveTracker, KLAdaptiveTracker, DriftClock]:
    rows = PromptRows()
    return rows, KLAdaptiveTracker(0.5, rows=rows), KLAdaptiveTracker(9.0, rows=rows), DriftClock("nats", rows)


def test_tables_that_share_rows_do_not_know_each_others_prompts() -> None:
    _, values, lengths, clock = shared_tables()
    values.update("a", 1.0, 0.0)
    lengths.update("b", 30.0, 0.0)
    clock.visit("c")
    clock.advance(2.0)
    assert (len(values), len(lengths)) == (1, 1)
    assert (values.value("b"), values.count("b"), lengths.value("a"), lengths.count("c")) == (0.5, 0.0, 9.0, 0.0)
    assert (clock.drift("a"), clock.drift("b"), clock.drift("c")) == (0.0, 0.0, 2.0)


@given(seeds)
def test_sharing_rows_changes_no_number(seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, values, lengths, clock = shared_tables()
    own = KLAdaptiveTracker(0.5), KLAdaptiveTracker(9.0), DriftClock("nats")
    for _ in range(200):
        key, table, number = f"p{rng.integers(3000)}", int(rng.integers(3)), float(rng.uniform())
        for tables in ((values, lengths, clock), own):
            if table < 2:
                tables[table].update(key, number, 0.5)  # type: ignore[union-attr]
            else:
                tables[2].advance(number)
                tables[2].visit(key)
        assert [values.value(key), lengths.count(key), clock.drift(key)] == [
            own[0].value(key),
            own[1].count(key),
            own[2].drift(key),
        ]


def test_shared_rows_come_back_with_every_table() -> None:
    rows, values, lengths, clock = shared_tables()
    clock.visit("only/é visited")
    values.update("", 0.25, 0.0)
    lengths.update("日本", 12.0, 0.0)
    clock.advance(1.5)
    states = [table.state_dict() for table in (rows, values, lengths, clock)]
    assert "keys" not in states[1] and "keys" not in states[3]
    loaded = shared_tables()
    loaded[1].update("left over", 1.0, 0.0)
    for table, state in zip(loaded, states, strict=True):
        table.load_state_dict(state)
    assert list(loaded[0]) == ["only/é visited", "", "日本"]
    assert (loaded[1].value(""), loaded[1].value("日本"), loaded[2].value("日本")) == (0.25, 0.5, 12.0)
    assert (loaded[3].drift("only/é visited"), loaded[3].drift("")) == (1.5, 0.0)
    assert loaded[1].value("left over") == 0.5 and len(loaded[1]) == 1


@given(st.lists(st.text(), unique=True, max_size=20))
def test_any_prompt_id_comes_back(keys: list[str]) -> None:
    rows, loaded = PromptRows(), PromptRows()
    for key in keys:
        rows.add(key)
    loaded.load_state_dict(rows.state_dict())
    assert list(loaded) == keys
    assert [loaded.find(key) for key in keys] == list(range(len(keys)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "lack .*text"),
        ({"lengths": np.array([1, 2], dtype=np.int32)}, "do not fit"),
        ({"text": np.frombuffer(b"aa", dtype=np.uint8)}, "key twice"),
    ],
)
def test_damaged_rows_are_refused(change: dict[str, Any], message: str) -> None:
    rows = PromptRows()
    rows.add("a")
    rows.add("b")
    state = {name: value for name, value in (rows.state_dict() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        PromptRows().load_state_dict(state)


def test_a_table_of_other_rows_is_refused() -> None:
    rows, values, _, clock = shared_tables()
    values.update("a", 0.5, 0.0)
    states = values.state_dict(), clock.state_dict()
    rows.add("b")
    for table, state in zip((values, clock), states, strict=True):
        with pytest.raises(ValueError, match="different lengths"):
            table.load_state_dict(state)
