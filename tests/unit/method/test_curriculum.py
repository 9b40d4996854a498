"""Which prompts come next: weights, draws without replacement, and batches that a resume continues."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from recipe.skpo.method.curriculum import PrioritisedBatches, draw_prompts, prompt_weights
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.state import SkpoState
from tests.support import reference  # noqa: F401  sets how property tests run

# ---------------------------------------------------------------- weights


def test_the_weight_is_the_spread_of_a_coin_with_that_value() -> None:
    values = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    np.testing.assert_allclose(prompt_weights(values, 0.05), [0.05, 0.35, 0.55, 0.35, 0.05], rtol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(1e-6, 2))
def test_weights_follow_the_formula(values: list[float], epsilon: float) -> None:
    weights = prompt_weights(np.array(values), epsilon)
    assert weights.dtype == np.float64
    assert weights.tolist() == pytest.approx([math.sqrt(v * (1 - v)) + epsilon for v in values])
    assert (weights >= epsilon).all() and (weights <= 0.5 + epsilon).all()


def test_a_value_that_rounding_put_outside_counts_as_the_end() -> None:
    assert prompt_weights(np.array([-1e-17, 1 + 2e-16]), 0.05).tolist() == [0.05, 0.05]


def test_a_prompt_never_visited_has_the_largest_weight() -> None:
    state = SkpoState(SkpoSettings(), 64)
    for key, reward in (("solved", 1.0), ("failed", -1.0), ("nearly", 0.75)):
        state.observe(key, reward, 10)
    values = np.array([state.prompts.value(key) for key in ("new", "solved", "failed", "nearly")])
    weights = prompt_weights(values, 0.05)
    assert weights[0] == 0.55 and weights[1] == weights[2] == 0.05
    assert weights[0] > weights[3] > weights[1]


def test_a_prompt_that_fails_again_and_again_is_drawn_less_and_less() -> None:
    state = SkpoState(SkpoSettings(), 64)
    batches = PrioritisedBatches(["good", "bad"], 1, 0.05, state.prompts, lambda: state.rng, lambda: state.failures)

    def share_of_bad() -> float:
        drawn = [position for _ in range(200) for batch in batches for position in batch]
        return sum(drawn) / len(drawn)

    assert share_of_bad() == pytest.approx(1 / 2, abs=0.1)
    for _ in range(2):
        state.note_outcome("bad", trained=False)
    assert share_of_bad() == pytest.approx(1 / 5, abs=0.1), "a weight of 1/4 beside 1"
    for _ in range(10_000):
        state.note_outcome("bad", trained=False)
    assert 0 <= share_of_bad() < 0.02
    state.note_outcome("bad", trained=True)
    assert state.failures == {}


# ---------------------------------------------------------------- draws


@given(st.lists(st.floats(0.05, 0.55), min_size=1, max_size=12), st.integers(0, 2**32), st.data())
def test_no_prompt_is_twice_in_a_batch(weights: list[float], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(weights)))
    drawn = draw_prompts(np.array(weights), count, np.random.default_rng(seed))
    assert len(drawn) == len(set(drawn)) == count
    assert all(type(index) is int and 0 <= index < len(weights) for index in drawn)


def sequence_probability(weights: Sequence[float], sequence: Sequence[int]) -> float:
    """Of drawing these positions one after the other, each in proportion to the weights that are left."""
    probability, left = 1.0, sum(weights)
    for index in sequence:
        probability *= weights[index] / left
        left -= weights[index]
    return probability


def test_frequencies_are_those_of_drawing_one_after_the_other() -> None:
    weights, draws = [0.05, 0.25, 0.55, 0.4], 20_000
    rng = np.random.default_rng(0)
    counted = Counter(tuple(sorted(draw_prompts(np.array(weights), 2, rng))) for _ in range(draws))
    expected: Counter[tuple[int, ...]] = Counter()
    for sequence in itertools.permutations(range(4), 2):
        expected[tuple(sorted(sequence))] += sequence_probability(weights, sequence)  # type: ignore[assignment]
    assert sum(expected.values()) == pytest.approx(1)
    chi_square = sum((counted[pair] - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    assert chi_square < 20.5, "0.999 quantile with 5 degrees of freedom"


def test_without_a_spread_all_prompts_are_equally_likely() -> None:
    rng, counted = np.random.default_rng(0), Counter[int]()
    for _ in range(5000):
        counted.update(draw_prompts(prompt_weights(np.zeros(5), 0.05), 2, rng))
    assert all(abs(counted[index] - 2000) < 175 for index in range(5))  # five standard deviations


# ---------------------------------------------------------------- batches in a data loader

IDS = [f"p{number}" for number in range(11)]
BATCH = 3


class Run:
    """A made-up run: state, sampler and loader, wired as the trainer does it; ``step`` returns a batch's prompts."""

    def __init__(self, seed: int = 3, epsilon: float = 0.05) -> None:
        self.state = SkpoState(SkpoSettings(seed=seed), 64)
        self.batches = PrioritisedBatches(IDS, BATCH, epsilon, self.state.prompts, lambda: self.state.rng)
        self.loader = StatefulDataLoader(IDS, batch_sampler=self.batches, num_workers=0, collate_fn=list)
        self.iterator: Any = None

    def fetch(self) -> list[str]:
        """As verl's ``_fetch_one_gen_batch`` does."""
        try:
            if self.iterator is None:
                self.iterator = iter(self.loader)
            return next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.loader)
            return next(self.iterator)

    def step(self, number: int) -> list[tuple[str, int]]:
        batch = self.fetch()
        said = [(key, self.state.next_visit(key, number).seed) for key in batch]
        for key in batch:
            self.state.observe(key, 1.0 if int(key[1:]) % 2 else 0.0, 10 + number)
        self.state.clock.advance(0.01)
        return said

    def save(self, folder: Path) -> None:
        self.state.save(folder)
        torch.save(self.loader.state_dict(), folder / "data.pt")

    def load(self, folder: Path) -> None:
        """In the order of the trainer: verl's part with the loader first, then ours."""
        self.loader.load_state_dict(torch.load(folder / "data.pt", weights_only=False))
        self.state.load(folder)


def test_an_epoch_has_as_many_whole_batches_as_the_data_set() -> None:
    run = Run()
    assert len(run.batches) == len(run.loader) == 3
    assert [len(batch) for batch in run.loader] == [BATCH] * 3
    assert [len(batch) for batch in run.loader] == [BATCH] * 3, "and so has the next one"


def test_a_batch_is_drawn_when_it_is_asked_for() -> None:
    """The second batch knows what the first one taught; nothing is drawn ahead."""
    run = Run(epsilon=1e-9)
    for key in IDS:
        run.state.observe(key, 1.0, 10)
    first = run.fetch()
    after_first = run.state.rng.bit_generator.state
    for key in first:  # no longer solved always
        run.state.observe(key, 0.0, 10)
    assert run.state.rng.bit_generator.state == after_first
    assert sorted(run.fetch()) == sorted(first)


def slow_draw(state: SkpoState, ids: list[str], count: int, rng: np.random.Generator) -> list[int]:
    """Look every prompt up, as the sampler did before it kept rows."""
    values = np.array([state.prompts.value(key) for key in ids]).clip(0, 1)
    weights = np.sqrt(values * (1 - values)) + 0.05
    weights *= [0.5 ** min(state.failures.get(key, 0), 20) for key in ids]
    return rng.choice(len(ids), count, replace=False, p=weights / weights.sum()).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_every_draw_is_that_of_looking_all_prompts_up(tmp_path: Path, seed: int) -> None:
    """Prompts are new, trained, dropped and trained later; epochs end, and the run is resumed in the middle of one."""
    ids, chance = [f"p{number}" for number in range(23)], np.random.default_rng(seed)

    def sampler(state: SkpoState, drawn: int = 0) -> PrioritisedBatches:
        made = PrioritisedBatches(ids, 4, 0.05, state.prompts, lambda: state.rng, lambda: state.failures)
        made.load_state_dict({"drawn": drawn})
        return made

    state = SkpoState(SkpoSettings(seed=seed), 64)
    state.observe("of another data set", 1.0, 10)
    batches = sampler(state)
    iterator = iter(batches)
    expected = np.random.default_rng(seed)
    for step in range(60):
        drawn = next(iterator, None)
        if drawn is None:
            iterator = iter(batches)
            drawn = next(iterator)
        assert drawn == slow_draw(state, ids, 4, expected), step
        for position in drawn:
            trained = bool(chance.random() < 0.6)
            if trained:
                state.observe(ids[position], float(chance.uniform(-1, 1)), 10)
            state.note_outcome(ids[position], trained)
        if step == 32:
            state.save(tmp_path)
            state = SkpoState(SkpoSettings(), 64)
            state.load(tmp_path)
            batches = sampler(state, batches.drawn)
            iterator = iter(batches)
    assert state.failures and 0 < len(state.prompts) <= len(ids) + 1


def test_batches_depend_on_the_seed() -> None:
    first, same, other = ([run.step(n) for n in range(1, 8)] for run in (Run(3), Run(3), Run(4)))
    assert first == same != other


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 6, 7])
def test_a_resumed_loader_goes_on_with_the_same_batches(tmp_path: Path, stop: int) -> None:
    """At the first batch, inside an epoch, and where one ends (3 and 6)."""
    steps, whole, stopped = 11, Run(), Run()
    expected = [whole.step(number) for number in range(1, steps + 1)]
    assert [stopped.step(number) for number in range(1, stop + 1)] == expected[:stop]
    stopped.save(tmp_path)

    resumed = Run(seed=99)
    resumed.load(tmp_path)
    assert [resumed.step(number) for number in range(stop + 1, steps + 1)] == expected[stop:]
    assert resumed.state.rng.bit_generator.state == whole.state.rng.bit_generator.state


def test_saving_changes_no_batch(tmp_path: Path) -> None:
    saving, plain = Run(), Run()
    for number in range(1, 8):
        saving.save(tmp_path)
        assert saving.step(number) == plain.step(number)


def test_the_sampler_keeps_how_far_the_epoch_is() -> None:
    run = Run()
    assert run.batches.state_dict() == {"drawn": 0}
    run.fetch()
    run.fetch()
    assert run.batches.state_dict() == {"drawn": 2}
    other = Run()
    other.batches.load_state_dict({"drawn": 2})
    assert len(list(other.batches)) == 1
    assert len(list(other.batches)) == 3
