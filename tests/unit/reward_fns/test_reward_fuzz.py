"""10,000 outputs that nobody would want to score: every one gets -1 or +1 in time, and nothing grows.

python -m pytest -m fuzz -s tests/unit/reward_fns/test_reward_fuzz.py
"""

import resource
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from reward_fns import compute_score, judge
from tests.support.hostile import HOSTILE_ANSWERS, HOSTILE_OUTPUTS, outputs

TRUTHS = {
    "skpo/arithmetic": ["7"],
    "openai/gsm8k": ["7", "-1,234.5"],
    "TIGER-Lab/MMLU-Pro": ["C"],
    "HuggingFaceH4/MATH-500": [
        *("7", "\\frac{1}{2}", "x^2+1", "(3, \\frac{\\pi}{2})", "\\{1, 2\\}", "(-\\infty, 3]", "\\text{even}"),
    ],
    "aime2024": ["204"],
}
CASES = [(source, truth) for source, truths in TRUTHS.items() for truth in truths]
SLOWEST_S = 2.0
LOADED_S = 4.0
"""For the fast tests, which may share their machine: a stopped comparison takes 1.2 s and the scheduler's time."""
FUZZED = 10_000


def checked(source: str, text: str, truth: str, slowest: float = LOADED_S) -> float:
    """Score one output, check what comes back, return the seconds it took."""
    started = time.monotonic()
    result = compute_score(source, text, truth)
    seconds = time.monotonic() - started
    assert result["score"] in (-1.0, 1.0)
    assert result["score"] == 2 * result["acc"] - 1 and result["acc"] <= result["well_formed"]
    assert isinstance(result["pred"], str)
    assert seconds < slowest, (source, text[:100], truth, seconds)
    return seconds


@pytest.fixture(scope="module", autouse=True)
def warm_worker() -> None:
    """The first comparison of a process starts the worker, which is not what is timed here."""
    assert judge.equal("x + 1", "1 + x")


@settings(max_examples=60, deadline=None)
@given(outputs, st.sampled_from(CASES))
def test_any_output_is_scored_in_time(text: str, case: tuple[str, str]) -> None:
    checked(case[0], text, case[1])


@pytest.mark.parametrize("source", TRUTHS)
def test_megabytes_and_broken_text_are_scored_in_time(source: str) -> None:
    for text in HOSTILE_OUTPUTS[: len(HOSTILE_OUTPUTS) - 3 * len(HOSTILE_ANSWERS)]:
        checked(source, text, TRUTHS[source][0])


@pytest.mark.fuzz
@pytest.mark.timeout(900)
def test_ten_thousand_outputs_take_less_than_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seconds: list[float] = []

    @settings(
        max_examples=FUZZED - 3 * len(HOSTILE_OUTPUTS),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(outputs, st.sampled_from(CASES))
    def fuzz(text: str, case: tuple[str, str]) -> None:
        seconds.append(checked(case[0], text, case[1], SLOWEST_S))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    for number, text in enumerate(HOSTILE_OUTPUTS):
        for source, truth in (CASES[(number + shift) % len(CASES)] for shift in (0, 3, 7)):
            seconds.append(checked(source, text, truth, SLOWEST_S))
    fuzz()
    total = time.monotonic() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pid = judge.worker_pid()
    assert pid is not None
    workers = [psutil.Process(pid), *psutil.Process(pid).children()]
    largest = max(worker.memory_info().rss for worker in workers) / 2**20
    seconds.sort()
    print(
        f"\n{len(seconds)} outputs in {total:.0f} s; slowest {seconds[-1]:.2f} s, 99.9% below "
        f"{seconds[int(0.999 * len(seconds))]:.2f} s, median {1000 * seconds[len(seconds) // 2]:.2f} ms, "
        f"{sum(second > judge.SECONDS for second in seconds)} stopped; this process grew by {grown:.0f} MiB, "
        f"largest worker {largest:.0f} MiB"
    )
    assert len(seconds) >= FUZZED
    assert total < 300
    assert grown < 200 and largest < judge.MEMORY / 2**20
    assert not list(tmp_path.iterdir()), "an answer was executed"
