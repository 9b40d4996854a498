"""The numbers of an evaluation, against brute force."""

from itertools import combinations, product

import numpy as np
import pytest

from recipe.skpo.evaluation.scores import (
    Answered,
    bootstrap_interval,
    markdown,
    pass_probability,
    powers_of_two,
    score,
)


def problem(*right: bool, length: int = 5, cut: bool = False, formed: bool | None = True) -> Answered:
    k = len(right)
    return Answered(
        "id", "q", "1", ("r",) * k, ("1",) * k, right, (formed,) * k, tuple(range(length, length + k)), (cut,) * k
    )


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_pass_probability_is_the_share_of_subsets_with_a_right_one(k: int) -> None:
    for j in range(1, k + 1):
        for right in range(k + 1):
            subsets = list(combinations([1] * right + [0] * (k - right), j))
            assert pass_probability(k, j)[right] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_powers_of_two_end_with_k() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(3) == [1, 2, 3]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(32) == [1, 2, 4, 8, 16, 32]


def test_interval_is_that_of_all_resamples_of_problems() -> None:
    """Four problems have 4^4 resamples: their percentiles are known exactly."""
    right, k = np.array([0, 1, 3, 3]), 3
    means = [np.mean([right[index] for index in picked]) / k for picked in product(range(4), repeat=4)]
    exact = np.percentile(means, [2.5, 97.5])
    assert bootstrap_interval(right, k, seed=1, resamples=200_000) == pytest.approx(exact, abs=1 / 12 + 1e-9)
    drawn = [bootstrap_interval(right, k, seed=seed, resamples=1) for seed in range(4000)]
    assert np.mean([low for low, _ in drawn]) == pytest.approx(np.mean(means), abs=0.02)
    assert np.std([low for low, _ in drawn]) == pytest.approx(np.std(means), abs=0.01)


def test_interval_of_many_problems_is_the_normal_one() -> None:
    right = np.random.default_rng(0).binomial(3, 0.4, size=2000)
    low, high = bootstrap_interval(right, 3, seed=1, resamples=10_000)
    mean, error = right.mean() / 3, right.std() / 3 / np.sqrt(len(right))
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)


def test_interval_depends_on_the_seed_alone() -> None:
    right = np.array([0, 1, 2, 2, 1, 0, 2])
    first = bootstrap_interval(right, 2, seed=1, resamples=37)
    assert first == bootstrap_interval(right[::-1].copy(), 2, seed=1, resamples=37)
    assert first != bootstrap_interval(right, 2, seed=2, resamples=37)


def test_score_of_three_problems() -> None:
    line = score(
        "b",
        [problem(True, True), problem(True, False, cut=True), problem(False, False, formed=False)],
        seed=1,
        resamples=100,
    )
    assert (line.problems, line.k) == (3, 2)
    assert line.avg == 0.5
    assert line.pass_at == {1: 0.5, 2: pytest.approx(2 / 3)}
    assert (line.length, line.cut, line.well_formed) == (5.5, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert 0 <= line.low < 0.5 < line.high <= 1


def test_avg_of_one_response_is_the_trainers_mean_to_the_last_digit() -> None:
    right = [bool(value) for value in np.random.default_rng(3).integers(0, 2, size=131)]
    line = score("b", [problem(value) for value in right], seed=1, resamples=10)
    assert line.avg == float(np.mean([1.0 if value else 0.0 for value in right]))
    assert line.avg == line.pass_at[1]


def test_well_formed_is_empty_where_the_reward_does_not_say() -> None:
    line = score("b", [problem(True), problem(True, formed=None)], seed=1, resamples=10)
    assert line.well_formed is None
    assert markdown([line]).splitlines()[2].endswith("|  |")


def test_unequal_numbers_of_responses_are_refused() -> None:
    with pytest.raises(ValueError):
        score("b", [problem(True), problem(True, False)], seed=1, resamples=10)


def test_table() -> None:
    one = score("a|b", [problem(True), problem(False)], seed=1, resamples=1000)
    two = score("c", [problem(True, True, False), problem(True, False, False)], seed=1, resamples=1000)
    assert markdown([one]).splitlines() == [
        "| benchmark | problems | k | avg@k | 95% interval | pass@k | tokens | cut off | well-formed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        r"| a\|b | 2 | 1 | 50.00 | 0.00 to 100.00 | 50.00 | 5.0 | 0.00 | 100.00 |",
    ]
    lines = markdown([one, two]).splitlines()
    assert lines[3] == "| c | 2 | 3 | 50.00 | 33.33 to 66.67 | 100.00 | 6.0 | 0.00 | 100.00 |"
    assert lines[4] == "| mean of benchmarks |  |  | 50.00 |  |  |  |  |  |"
    assert lines[5] == ""
    assert lines[6] == "| benchmark | pass@1 | pass@2 | pass@3 |"
    assert lines[8:] == [r"| a\|b | 50.00 |  |  |", "| c | 50.00 | 83.33 | 100.00 |"]
