"""examples/skpo_minimal.py computes what recipe/skpo/method computes."""

import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.skpo.method import advantage, curriculum, loss, segments
from recipe.skpo.method.loss_weights import loss_weights
from recipe.skpo.method.tracker import PromptTable
from tests.conftest import REPOSITORY
from tests.support.rows import make_rows

sys.path.insert(0, str(REPOSITORY / "examples"))
import skpo_minimal as minimal

sys.path.pop(0)

seeds = st.integers(0, 2**32)
close = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the essay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@given(seed=seeds)
def test_candidates_become_the_same_segment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    split, ends = int(rng.integers(1, 6)), minimal.END
    deviations, expected = [], []
    for _ in range(int(rng.integers(1, 9))):
        size = int(rng.integers(1, split + 1))
        finished = size < split or rng.random() < 0.3
        tokens = [*rng.integers(1, 11, size - 1).tolist(), ends if finished else 1]
        # Few values, so that ties occur.
        log_probs = (-rng.integers(0, 3, size) / 2).tolist()
        segment = segments.cut_segment(tokens, log_probs, split, finished)
        kept, deviation = minimal.cut(tokens, log_probs, split)
        assert (tuple(kept), deviation) == (segment.token_ids, pytest.approx(segment.deviation, abs=1e-6))
        assert minimal.skip_prompt(kept, [1, 2]) == segments.skip_prompt(segment.token_ids, [1, 2])
        deviations.append(deviation)
        expected.append(segment.deviation)
    assert minimal.select(deviations) == segments.select_segment(expected)


@pytest.mark.parametrize("length", [0.5, 1.0, 3.0, 6.0, 7.9, 12.0, 30.3])
def test_split_positions_have_the_same_bounds(length: float) -> None:
    random.seed(1)
    drawn = {minimal.split_position(length) for _ in range(300)}
    first, last = segments.split_bounds(length)
    assert drawn == set(range(first, last + 1))


@given(seed=seeds)
def test_prompts_are_remembered_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = minimal.PromptTable(5, 12.0), PromptTable(12.0)
    for _ in range(20):
        for prompt in rng.permutation(5)[:3].tolist():
            assert ours.baseline(prompt) == pytest.approx(2 * theirs.value(str(prompt)) - 1, abs=1e-6)
            reward, length = float(rng.uniform(-1, 1)), float(rng.uniform(1, 12))
            ours.visit(prompt, reward, length)
            theirs.visit(str(prompt), (reward + 1) / 2, length)
            assert ours.lengths[prompt] == pytest.approx(theirs.length(str(prompt)), abs=1e-6)
        kl = float(rng.exponential(0.01))
        ours.steps, ours.total_kl = ours.steps + 1, ours.total_kl + kl
        theirs.clock.advance(kl)


def test_prompts_are_drawn_by_the_same_weights(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(torch, "multinomial", lambda weights, count: drawn.append(weights) or torch.arange(count))
    table = minimal.PromptTable(4, 12.0)
    table.values = [0.0, 0.3, 0.5, 1.0]
    table.draw(2)
    torch.testing.assert_close(
        drawn[0].double(), torch.tensor(curriculum.prompt_weights(np.array(table.values), 0.05)), **close
    )


@given(seed=seeds)
def test_an_update_has_the_same_advantages_weights_loss_and_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts, group, width = int(rng.integers(1, 5)), int(rng.integers(2, 9)), 6
    rows = prompts * (group + 1)
    lengths = torch.tensor(rng.integers(1, width + 1, (prompts, group + 1)))
    mask = (torch.arange(width) < lengths.unsqueeze(-1)).double()
    old = torch.tensor(-rng.exponential(1.5, (prompts, group + 1, width)))
    log_prob = old + torch.tensor(rng.normal(0, 0.35, old.shape))
    rewards = torch.tensor(rng.choice([-1.0, 1.0], (prompts, group)))
    baselines = torch.tensor(rng.uniform(-1, 1, prompts))

    found = torch.cat(
        [
            minimal.upstream_advantage(rewards.mean(-1), baselines).unsqueeze(-1),
            minimal.downstream_advantage(rewards),
        ],
        1,
    )
    upstream = torch.tensor([True] + [False] * group).repeat(prompts)
    numbers = torch.arange(prompts).repeat_interleave(group + 1)
    all_rewards = torch.cat([rewards.mean(-1, keepdim=True), rewards], 1).flatten()
    expected = advantage.skpo_advantage(
        all_rewards, baselines[numbers], (~upstream).long(), numbers, torch.ones(rows, dtype=torch.bool)
    )
    torch.testing.assert_close(found.flatten(), expected, **close)

    stored = make_rows(upstream.tolist(), numbers.tolist(), lengths.flatten().tolist(), all_rewards.tolist())
    weights = loss_weights(stored, torch.zeros(rows, dtype=torch.int64), minimal.WEIGHT_UP, minimal.WEIGHT_DOWN)
    torch.testing.assert_close(minimal.loss_weights(mask.sum(-1)).flatten(), weights.double(), **close)

    mine, theirs = log_prob.clone().requires_grad_(), log_prob.flatten(0, 1).requires_grad_()
    whole = minimal.skpo_loss(mine, old, mask, found)
    clips = (minimal.CLIP_LOW, minimal.CLIP_HIGH)
    per_token = loss.token_losses(theirs, old.flatten(0, 1), expected.unsqueeze(-1), upstream, *clips)
    summed = (per_token * mask.flatten(0, 1) * weights.unsqueeze(-1)).sum()
    torch.testing.assert_close(whole, summed, **close)
    torch.testing.assert_close(
        torch.autograd.grad(whole, mine)[0].flatten(0, 1), torch.autograd.grad(summed, theirs)[0], **close
    )


def test_log_probs_of_sampling_and_of_training_agree_whatever_the_padding() -> None:
    torch.manual_seed(1)
    policy = minimal.Policy()
    prompts = [minimal.encode(text) for text in ("1+2=", "4,81+2+3+4+1=", "12+")]
    groups = minimal.sample(policy, prompts, minimal.BUDGET, copies=2)
    tokens = [sampled for group in groups for sampled, _ in group]
    with torch.no_grad():
        log_prob, mask = minimal.response_log_probs(policy, [p for p in prompts for _ in range(2)], tokens)
    for row, (_, sampled) in enumerate(pair for group in groups for pair in group):
        assert log_prob[row][mask[row] > 0].tolist() == pytest.approx(sampled, abs=1e-4)


def test_a_step_trains_the_policy_and_the_table(monkeypatch) -> None:
    monkeypatch.setattr(minimal, "reward", lambda response, problem: 1.0 if response[0] % 2 else -1.0)
    random.seed(1)
    torch.manual_seed(1)
    policy, table = minimal.Policy(), minimal.PromptTable(40, minimal.BUDGET)
    before = [value.clone() for value in policy.parameters()]
    problems = [(1, 1, 1, 1, 1 + index % 4) for index in range(40)]
    minimal.skpo_step(policy, torch.optim.AdamW(policy.parameters(), lr=3e-4), problems, table)
    assert sum(count == 1 for count in table.counts) == minimal.PROMPTS_PER_STEP
    assert table.steps == 1 and table.total_kl > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))


def test_only_the_right_sum_is_rewarded() -> None:
    problem = (3, 1, 4, 2, 2)
    solution = minimal.worked_solution(problem)
    assert solution == minimal.encode("4,8,10,12.") and minimal.question(problem) == minimal.encode("3+1+4+2+2=")
    rewards = [minimal.reward(minimal.encode(text), problem) for text in ("12.", "12", "4,12.", "4,8,10,13.", "112.")]
    assert (minimal.reward(solution, problem), rewards) == (1.0, [1.0, -1.0, 1.0, -1.0, -1.0])
    assert max(len(minimal.worked_solution((digit,) * 5)) for digit in range(1, 5)) < minimal.BUDGET


def test_the_same_seed_prints_the_same_lines(monkeypatch, capsys) -> None:
    warm_up = minimal.warm_up
    monkeypatch.setattr(minimal, "warm_up", lambda policy, problems: warm_up(policy, problems, steps=2))
    monkeypatch.setattr(minimal, "PROMPTS_PER_STEP", 4)
    monkeypatch.setattr(minimal, "PROMPTS_PER_UPDATE", 2)
    printed = []
    for seed in "1", "1", "2":
        monkeypatch.setattr(sys, "argv", ["skpo_minimal.py", "--steps", "5", "--seed", seed])
        minimal.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert [line.split("held-out")[0].split() for line in printed[0].splitlines()] == [["warm-up"], ["step", "5"]]
