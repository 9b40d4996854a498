"""Trackers over whole runs, docs/method.md section 6: hundreds of visits of many prompts, drift in every unit.

The reference keeps only the history and computes each number from the first visit on.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.skpo.method.tracker import PromptTable
from recipe.skpo.settings import SkpoSettings, TrackerSettings
from recipe.skpo.trainer.state import SkpoState
from tests.support.reference import ReferenceRun, reference_drift, reference_tracker

seeds = st.integers(0, 2**32)
TOLERANCE = 1e-9
"""Both sides are float64 and add in different order; 1e-6 is what the numbers have to keep."""


@settings(max_examples=20)
@given(seed=seeds)
def test_a_table_follows_the_reference_over_hundreds_of_visits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rho_min, rho_max = sorted(rng.uniform(0, 1, 2).tolist())
    constants = (rho_min, rho_max, float(rng.uniform(0.05, 10)))
    table = PromptTable(30.0, *constants)
    visits: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(300):
        key, drift = f"prompt {rng.integers(12)}", float(rng.exponential(constants[2] / 3))
        visits.setdefault(key, []).append((float(rng.uniform(0, 1)), float(rng.uniform(1, 90)), drift))
        table.visit(key, *visits[key][-1])
    for key, seen in visits.items():
        value, count = reference_tracker([(value, drift) for value, _, drift in seen], 0.5, *constants)[-1]
        length, _ = reference_tracker([(length, drift) for _, length, drift in seen], 30.0, *constants)[-1]
        assert (table.value(key), table.length(key)) == pytest.approx((value, length), rel=TOLERANCE)
        assert table.count(key) == pytest.approx(count, rel=TOLERANCE)


@pytest.mark.parametrize("unit", ["kl_steps", "nats"])
@settings(max_examples=20)
@given(seed=seeds)
def test_the_drift_follows_the_reference(unit: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = PromptTable(unit=unit)
    steps: list[float] = []
    visited: dict[str, int] = {}
    idle = rng.random() < 0.2  # a run that never sees any KL counts steps
    for _ in range(60):
        for key in (f"prompt {number}" for number in rng.integers(0, 8, 3)):
            expected = reference_drift(steps, visited[key], unit) if key in visited else 0.0
            assert table.drift(key) == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)
            if rng.random() < 0.7:
                table.visit(key, 0.5, 1.0)
                visited[key] = len(steps)
        kl = 0.0 if idle else float(rng.normal(0.02, 0.02))
        table.clock.advance(kl)
        steps.append(max(kl, 0.0))


@pytest.mark.parametrize("drift", ["kl_steps", "nats", "logratio"])
@settings(max_examples=8)
@given(seed=seeds)
def test_a_whole_run_follows_the_reference(drift: str, seed: int) -> None:
    """Steps in the trainer's order: all baselines of the batch, then all updates, then the policy moves."""
    rng = np.random.default_rng(seed)
    half_life = float(rng.choice([0.06, 1.0, 8.0]))
    constants = TrackerSettings(drift=drift, half_life=half_life)
    state = SkpoState(SkpoSettings(tracker=constants, initial_length=300), response_budget=200)
    run = ReferenceRun(200.0, 0.875, 0.96, half_life, "kl_steps" if drift == "logratio" else drift)
    seen: set[str] = set()
    visits = 0
    while visits < 400:
        # A prompt may be twice in a batch: both visits have the baseline from before the step.
        batch = [f"prompt {number}" for number in rng.integers(0, 25, 16)]
        assert [state.baseline(key) for key in batch] == pytest.approx([run.baseline(key) for key in batch])
        for key in batch:
            reward, length = float(rng.integers(-8, 9)) / 8, float(rng.uniform(1, 200))
            measured = float(rng.exponential(0.05)) if drift == "logratio" and key in seen else None
            assert state.observe(key, reward, length, measured) == pytest.approx(
                run.visit(key, reward, length, measured), rel=TOLERANCE, abs=1e-12
            )
            seen.add(key)
        kl = float(rng.normal(0.01, 0.01))
        state.clock.advance(kl)
        run.end_step(kl)
        visits += len(batch)
        for key in (*batch, "never seen"):
            assert state.baseline(key) == pytest.approx(run.baseline(key), rel=TOLERANCE, abs=1e-12)
            assert state.prompts.length(key) == pytest.approx(run.length(key), rel=TOLERANCE)
            assert state.prompts.count(key) == pytest.approx(run.count(key), rel=TOLERANCE)


@settings(max_examples=10)
@given(seed=seeds)
def test_split_positions_of_a_run_lie_in_the_range_of_the_tracked_length(seed: int) -> None:
    rng = np.random.default_rng(seed)
    state = SkpoState(SkpoSettings(initial_length=120), response_budget=90)
    run = ReferenceRun(90.0, 0.875, 0.96, 8.0)
    for step in range(1, 60):
        key = f"prompt {rng.integers(4)}"
        length = run.length(key)
        assert length / 6 <= state.next_visit(key, step).split_position <= length / 2
        observed = float(rng.uniform(12, 90))
        state.observe(key, 0.0, observed)
        run.visit(key, 0.0, observed)
        state.clock.advance(0.01)
        run.end_step(0.01)
