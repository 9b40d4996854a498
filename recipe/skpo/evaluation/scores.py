"""Score an evaluation by how many of a problem's k responses are right: avg@k, pass@j, intervals, tables.

avg@k is the mean over problems of the share of right responses.  pass@j is the unbiased estimate of the probability
that one of j responses is right, from k >= j of them (Chen et al., arXiv 2107.03374, eq. 1).  The interval of avg@k is
a percentile bootstrap over problems: it says how much the number depends on which problems the benchmark happens to
have.  Nothing here needs a model; shares are in [0, 1], percent only in the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from recipe.skpo.output.console import markdown_table
from reward_fns.code_judge import VERDICTS


@dataclass(frozen=True)
class Answered:
    """One problem and its k responses; the sequences are as long as each other.

    Attributes:
        id, question, ground_truth: of the problem.
        responses: texts.
        preds: the extracted answers, "" if there is none; of programs the verdicts (`reward_fns.code_judge`).
        right: whether the response is right.
        well_formed: whether an answer was found, or None if the reward does not say.
        lengths: in tokens, an end-of-sequence token included.
        cut: whether the response ran into the limit.
    """

    id: str
    question: str
    ground_truth: str
    responses: tuple[str, ...]
    preds: tuple[str, ...]
    right: tuple[bool, ...]
    well_formed: tuple[bool | None, ...]
    lengths: tuple[int, ...]
    cut: tuple[bool, ...]


@dataclass(frozen=True)
class Score:
    """One benchmark's line.

    Attributes:
        benchmark: name.
        problems: how many.
        k: responses per problem.
        avg: avg@k.
        low, high: 95% interval of ``avg``.
        pass_at: j to pass@j, for the powers of two below k and for k.
        length: mean over responses, in tokens.
        cut: share of responses that ran into the limit.
        well_formed: share of responses with an answer, None if the reward does not say.
        verdicts: verdict to share of responses, of a benchmark of programs; None of others.
    """

    benchmark: str
    problems: int
    k: int
    avg: float
    low: float
    high: float
    pass_at: dict[int, float]
    length: float
    cut: float
    well_formed: float | None
    verdicts: dict[str, float] | None = None


def pass_probability(k: int, j: int) -> np.ndarray:
    """Compute the unbiased pass@j of a problem with k responses by how many of them are right.

    Returns:
        (k + 1,) float64; entry c is 1 - C(k - c, j) / C(k, j).
    """
    return np.array([1 - comb(k - right, j) / comb(k, j) for right in range(k + 1)])


def bootstrap_interval(right: np.ndarray, k: int, *, seed: int, resamples: int) -> tuple[float, float]:
    """Bootstrap the 95% interval of avg@k over problems, by percentiles.

    A resample of problems is, for avg@k, how often each count of right responses is drawn, which is multinomial: that
    is drawn at once for all resamples, and its size does not grow with the benchmark's.

    Args:
        right: right responses per problem; (problems,) integers in [0, k].
        k: responses per problem.
        seed: of the draws.
        resamples: how many.
    """
    histogram = np.bincount(right, minlength=k + 1)
    drawn = np.random.default_rng(seed).multinomial(len(right), histogram / len(right), size=resamples)
    means = drawn @ np.arange(k + 1) / (len(right) * k)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def powers_of_two(k: int) -> list[int]:
    """Return 1, 2, 4, ... below k, and k."""
    return [2**exponent for exponent in range((k - 1).bit_length())] + [k]


def score(benchmark: str, answered: Sequence[Answered], *, seed: int, resamples: int) -> Score:
    """Compute a benchmark's line from its problems, which have the same number of responses each."""
    (k,) = {len(problem.right) for problem in answered}
    right = np.array([sum(problem.right) for problem in answered])
    low, high = bootstrap_interval(right, k, seed=seed, resamples=resamples)
    formed = [value for problem in answered for value in problem.well_formed]
    preds = [value for problem in answered for value in problem.preds]
    return Score(
        benchmark=benchmark,
        problems=len(answered),
        k=k,
        avg=float(np.mean(right / k)),
        low=low,
        high=high,
        pass_at={j: float(np.mean(pass_probability(k, j)[right])) for j in powers_of_two(k)},
        length=float(np.mean([problem.lengths for problem in answered])),
        cut=float(np.mean([problem.cut for problem in answered])),
        well_formed=None if None in formed else float(np.mean([bool(value) for value in formed])),
        verdicts={name: preds.count(name) / len(preds) for name in VERDICTS} if set(preds) <= set(VERDICTS) else None,
    )


def markdown(scores: Sequence[Score]) -> str:
    """Format the table, in percent and tokens, one with pass@j of several responses, and one of programs' verdicts."""
    header = ["benchmark", "problems", "k", "avg@k", "95% interval", "pass@k", "tokens", "cut off", "well-formed"]
    rows = [
        [
            _cell(item.benchmark),
            str(item.problems),
            str(item.k),
            _percent(item.avg),
            f"{_percent(item.low)} to {_percent(item.high)}",
            _percent(item.pass_at[item.k]),
            f"{item.length:.1f}",
            _percent(item.cut),
            _percent(item.well_formed),
        ]
        for item in scores
    ]
    if len(scores) > 1:
        mean = float(np.mean([item.avg for item in scores]))
        rows.append(["mean of benchmarks", "", "", _percent(mean), "", "", "", "", ""])
    tables = [markdown_table(header, rows, numbers=True)]
    tries = sorted({j for item in scores for j in item.pass_at})
    if tries != [1]:
        lines = [[_cell(item.benchmark), *(_percent(item.pass_at.get(j)) for j in tries)] for item in scores]
        tables.append(markdown_table(["benchmark", *(f"pass@{j}" for j in tries)], lines, numbers=True))
    judged = [[_cell(item.benchmark), *map(_percent, item.verdicts.values())] for item in scores if item.verdicts]
    if judged:
        tables.append(markdown_table(["benchmark", *VERDICTS], judged, numbers=True))
    return "\n\n".join(tables) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
