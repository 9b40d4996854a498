"""Equations 5 and 6 against plain loops with hand-written derivatives, and what verl calls."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from recipe.skpo.method.loss import downstream_loss, skpo_loss, upstream_loss
from recipe.skpo.method.rows import DOWNSTREAM, UPSTREAM
from recipe.skpo.method.tracker import DriftClock
from recipe.skpo.output.metrics import update_metrics
from tests.support.reference import (
    FlatRow,
    Gradient,
    Row,
    prompts_of,
    random_batch,
    random_row,
    reference_batch_objective,
    reference_downstream_objective,
    reference_upstream_objective,
)

LOW, HIGH = 0.2, 0.28
seeds = st.integers(0, 2**32)
PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-4)]
every_precision = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)


def padded(rows: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=dtype)


def arguments(rows: list[Row], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Log-probs (a leaf that collects its gradient), old log-probs, advantages and mask."""
    return (
        padded([row.log_prob for row in rows], dtype).requires_grad_(),
        padded([row.old_log_prob for row in rows], dtype),
        torch.tensor([row.advantage for row in rows], dtype=dtype),
        padded([[float(value) for value in row.mask] for row in rows], dtype),
    )


def random_rows(seed: int) -> list[Row]:
    """Rows of random length; in some, the mask leaves tokens out."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(rng.integers(1, 6)):
        row = random_row(rng, int(rng.integers(1, 12)))
        mask = [1, *(rng.random(len(row.mask) - 1) < 0.8).astype(int).tolist()]
        rows.append(Row(row.log_prob, row.old_log_prob, mask, row.advantage))
    return rows


def assert_gradients(actual: torch.Tensor, expected: list[Gradient], tolerance: float) -> None:
    """Of the negated objective, token by token, and nothing on the padding."""
    wanted = -padded(expected, torch.float64)
    torch.testing.assert_close(actual.to(torch.float64), wanted, rtol=tolerance, atol=tolerance * 1e-2)


def one_token(loss: Any, ratio: float, advantage: float) -> tuple[float, float]:
    """Loss of a row of one token with this ratio, and its gradient by the log-prob."""
    log_prob = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    value = loss(log_prob, old, torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 1), LOW, HIGH)
    value.sum().backward()
    return float(value.detach()), float(log_prob.grad)  # type: ignore[arg-type]


# ---------------------------------------------------------------- upstream, eq. 6


@every_precision
@given(seed=seeds)
def test_upstream_loss_and_its_gradient_follow_the_reference(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rows = random_rows(seed)
    leaf, *others = arguments(rows, dtype)
    loss = upstream_loss(leaf, *others, LOW, HIGH)
    loss.sum().backward()
    expected = [reference_upstream_objective(row, LOW, HIGH) for row in rows]
    assert loss.dtype == dtype and loss.shape == (len(rows),)
    assert loss.tolist() == pytest.approx([-value for value, _ in expected], rel=tolerance, abs=tolerance * 1e-2)
    assert_gradients(leaf.grad, [gradient for _, gradient in expected], tolerance)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),  # inside the range, the upper bound is the wider one
        (1.5, 2.0, -2.56, 0.0),  # good and already likelier: held at 1 + e_high
        (0.5, 2.0, -1.0, -1.0),  # good but less likely: free to come back
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: held at 1 - e_low
        (0.75, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),  # bad but likelier: free to come back
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_upstream_surrogate_is_clipped_on_the_pessimistic_side(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    assert one_token(upstream_loss, ratio, advantage) == pytest.approx((loss, gradient), rel=1e-9)


def test_upstream_loss_is_the_mean_over_the_tokens_of_its_row() -> None:
    short, long = Row([-1.0], [-1.0], [1], 1.0), Row([-1.0] * 8, [-1.0] * 8, [1] * 8, 1.0)
    leaf, *others = arguments([short, long], torch.float64)
    assert upstream_loss(leaf, *others, LOW, HIGH).tolist() == [-1.0, -1.0]


# ---------------------------------------------------------------- downstream, eq. 5


@every_precision
@given(seed=seeds)
def test_downstream_loss_and_its_gradient_follow_the_reference(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rows = random_rows(seed)
    leaf, *others = arguments(rows, dtype)
    tokens = sum(sum(row.mask) for row in rows)
    loss = downstream_loss(leaf, *others, LOW, HIGH) / tokens
    loss.sum().backward()
    expected, gradients = reference_downstream_objective(rows, LOW, HIGH)
    assert loss.dtype == dtype and loss.shape == (len(rows),)
    scale = sum(abs(row.advantage) * 1.28 * abs(sum(row.log_prob)) for row in rows) / tokens
    assert float(loss.detach().sum()) == pytest.approx(-expected, rel=tolerance, abs=tolerance * scale)
    assert_gradients(leaf.grad, gradients, tolerance)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.8), (0.9, 0.9), (1.0, 1.0), (1.25, 1.25), (1.5, 1.28)])
def test_downstream_gradient_is_the_clipped_ratio_also_where_it_clips(
    ratio: float, weight: float, advantage: float
) -> None:
    loss, gradient = one_token(downstream_loss, ratio, advantage)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-9)
    assert loss == pytest.approx(-weight * advantage * (math.log(ratio) - 1.0), rel=1e-9)


def test_downstream_loss_is_the_sum_over_the_tokens_of_its_row() -> None:
    short, long = Row([-0.5], [-0.5], [1], 1.0), Row([-0.5] * 8, [-0.5] * 8, [1] * 8, 1.0)
    leaf, *others = arguments([short, long], torch.float64)
    assert downstream_loss(leaf, *others, LOW, HIGH).tolist() == [0.5, 4.0]


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("loss", [upstream_loss, downstream_loss])
def test_an_empty_mask_gives_no_loss_and_no_gradient(loss: Any) -> None:
    leaf, *others = arguments([Row([-1.0, -2.0], [-1.5, -1.0], [0, 0], 3.0)], torch.float64)
    value = loss(leaf, *others, LOW, HIGH)
    value.sum().backward()
    assert value.tolist() == [0.0] and leaf.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("loss", [upstream_loss, downstream_loss])
@given(seed=seeds)
def test_tokens_outside_the_mask_change_nothing(loss: Any, seed: int) -> None:
    rows = random_rows(seed)
    results = []
    for noise in (0.0, -7.0):
        leaf, old, advantage, mask = arguments(rows, torch.float64)
        moved = leaf.detach() + noise * (1 - mask)
        moved.requires_grad_()
        value = loss(moved, old - 2 * noise * (1 - mask), advantage, mask, LOW, HIGH)
        value.sum().backward()
        results.append((value.detach(), moved.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [upstream_loss, downstream_loss])
@pytest.mark.parametrize("move", [500.0, -500.0])
def test_a_ratio_beyond_all_bounds_stays_finite(loss: Any, move: float) -> None:
    leaf, *others = arguments([Row([-600.0 + move, -1.0], [-600.0, -1.0], [1, 1], -1.0)], torch.float32)
    value = loss(leaf, *others, LOW, HIGH)
    value.sum().backward()
    assert bool(value.isfinite().all()) and bool(leaf.grad.isfinite().all())


# ---------------------------------------------------------------- what verl calls


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class MicroBatches:
    """The rows of a batch as verl's engine hands them to the loss, with the gradients it collects."""

    def __init__(self, rows: list[FlatRow], scales: list[float], seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.rows, self.scales, self.dtype = rows, scales, dtype
        self.prompt_lengths = np.random.default_rng(seed).integers(1, 6, len(rows)).tolist()
        # The model's output at position j scores token j + 1, so a response starts one before its first token.
        self.outputs = []
        for row, prompt in zip(rows, self.prompt_lengths, strict=True):
            noise = [9.0] * (prompt - 1)
            values = torch.tensor([*noise, *row.row.log_prob, 9.0], dtype=dtype)
            self.outputs.append(values.requires_grad_())

    def loss(self, chosen: list[int], dp_size: int) -> tuple[torch.Tensor, dict[str, Any]]:
        from verl.utils import tensordict_utils

        rows = [self.rows[index].row for index in chosen]
        prompts = [torch.ones(self.prompt_lengths[index], dtype=torch.long) for index in chosen]
        data = TensorDict(
            {
                "prompts": nested(prompts),
                "responses": nested([torch.ones(len(row.mask), dtype=torch.long) for row in rows]),
                "response_mask": nested([torch.tensor(row.mask) for row in rows]),
                "old_log_probs": nested([torch.tensor(row.old_log_prob, dtype=self.dtype) for row in rows]),
                "skpo_phase": torch.tensor([UPSTREAM if self.rows[i].upstream else DOWNSTREAM for i in chosen]),
                "skpo_advantage": torch.tensor([row.advantage for row in rows], dtype=self.dtype),
                "skpo_row_scale": torch.tensor([self.scales[index] for index in chosen], dtype=self.dtype),
            },
            batch_size=len(chosen),
        )
        tensordict_utils.assign_non_tensor(data, dp_size=dp_size)
        output = {"log_probs": nested([self.outputs[index] for index in chosen])}
        return skpo_loss(output, data, clip_low=LOW, clip_high=HIGH)

    def gradients(self) -> list[torch.Tensor]:
        """Per row, at the positions that score its response; asserts that no other position has any."""
        found = []
        for row, prompt, output in zip(self.rows, self.prompt_lengths, self.outputs, strict=True):
            assert output.grad is not None
            end = prompt - 1 + len(row.row.mask)
            assert not output.grad[: prompt - 1].any() and not output.grad[end:].any()
            found.append(output.grad[prompt - 1 : end])
        return found


def reference_scales(rows: list[FlatRow], weight_up: float, weight_down: float) -> list[float]:
    """Share of the objective per row where the whole batch is one update."""
    scales = [0.0] * len(rows)
    prompts = prompts_of(rows)
    for prompt, segment, responses in prompts:
        scales[segment] = weight_up / len(prompts)
        tokens = sum(sum(response.mask) for response in prompt.responses)
        for index in responses:
            scales[index] = weight_down / len(prompts) / tokens
    return scales


def split(rng: np.random.Generator, indices: list[int]) -> list[list[int]]:
    """Micro-batches of random sizes, in order."""
    parts, start = [], 0
    while start < len(indices):
        size = int(rng.integers(1, len(indices) + 1))
        parts.append(indices[start : start + size])
        start += size
    return parts


@every_precision
@settings(max_examples=25)
@given(seed=seeds)
def test_sum_of_micro_batch_losses_is_the_objective(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_batch(rng, 1, int(rng.integers(1, 4)), group_size=3)
    batch = MicroBatches(rows, reference_scales(rows, 0.7, 0.3), seed, dtype)
    total = 0.0
    for chosen in split(rng, rng.permutation(len(rows)).tolist()):
        loss, _ = batch.loss(chosen, dp_size=1)
        loss.backward()
        total += float(loss.detach())
    values, gradients = reference_batch_objective(rows, [0] * len(rows), (0.7, 0.3), (LOW, HIGH))
    assert total == pytest.approx(-values[0], rel=tolerance, abs=10 * tolerance)
    for actual, expected in zip(batch.gradients(), gradients, strict=True):
        assert actual.tolist() == pytest.approx([-slope for slope in expected], rel=tolerance, abs=tolerance * 1e-2)


@settings(max_examples=10)
@given(seeds)
def test_gradients_averaged_over_two_ranks_are_those_of_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_batch(rng, 1, 2, group_size=3)
    scales = reference_scales(rows, 0.5, 0.5)
    one, two = MicroBatches(rows, scales, seed), MicroBatches(rows, scales, seed)
    single = one.loss(list(range(len(rows))), dp_size=1)[0]
    single.backward()
    ranks = [two.loss(list(range(start, len(rows), 2)), dp_size=2)[0] for start in (0, 1)]
    (torch.stack(ranks).sum() / 2).backward()
    assert float(torch.stack(ranks).detach().mean()) == pytest.approx(float(single.detach()), rel=1e-9, abs=1e-12)
    for actual, expected in zip(two.gradients(), one.gradients(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)


@settings(max_examples=15)
@given(seed=seeds, ranks=st.sampled_from([1, 2]))
def test_reported_shares_are_those_of_the_batch_however_it_is_split(seed: int, ranks: int) -> None:
    from verl.utils.metric import Metric

    rng = np.random.default_rng(seed)
    rows = random_batch(rng, 1, 2, group_size=3)
    batch = MicroBatches(rows, reference_scales(rows, 0.7, 0.3), seed)
    indices = rng.permutation(len(rows)).tolist()
    per_rank = []
    for rank in range(ranks):
        own = indices[rank::ranks]
        middle = int(rng.integers(1, len(own)))
        reports = [batch.loss(part, dp_size=ranks)[1] for part in (own[:middle], own[middle:])]
        for name, metric in reports[0].items():
            metric.append(reports[1][name])
        per_rank.append(reports[0])
    sums = {name: float(Metric.aggregate_dp([report[name] for report in per_rank])) for name in per_rank[0]}
    shares, step_kl = update_metrics(sums)

    values, _ = reference_batch_objective(rows, [0] * len(rows), (0.7, 0.3), (LOW, HIGH))
    assert shares["skpo/loss"] == pytest.approx(-values[0], rel=1e-5, abs=1e-6)
    assert shares["skpo/upstream/loss"] + shares["skpo/downstream/loss"] == pytest.approx(shares["skpo/loss"], abs=1e-6)
    all_kl, all_tokens = 0.0, 0
    for name, upstream in (("upstream", True), ("downstream", False)):
        low = high = tokens = 0
        kl = 0.0
        for row in (flat.row for flat in rows if flat.upstream == upstream):
            for new, old, trained in zip(row.log_prob, row.old_log_prob, row.mask, strict=True):
                if trained:
                    ratio = math.exp(new - old)
                    tokens, kl = tokens + 1, kl + ratio - 1 - (new - old)
                    low, high = low + (ratio < 1 - LOW), high + (ratio > 1 + HIGH)
        assert shares[f"skpo/{name}/ratio_clipped_low_share"] == pytest.approx(low / tokens, rel=1e-5)
        assert shares[f"skpo/{name}/ratio_clipped_high_share"] == pytest.approx(high / tokens, rel=1e-5)
        assert shares[f"skpo/{name}/kl"] == pytest.approx(kl / tokens, rel=1e-5)
        all_kl, all_tokens = all_kl + kl, all_tokens + tokens
    assert step_kl == pytest.approx(all_kl / all_tokens, rel=1e-5)


def test_upstream_loss_share_holds_upstream_rows_only() -> None:
    rows = [
        FlatRow(Row([-1.0], [-1.0], [1], 2.0), True, 0, True),
        FlatRow(Row([-3.0], [-3.0], [1], 1.0), False, 0, True),
    ]
    loss, metrics = MicroBatches(rows, [0.5, 0.25], seed=0).loss([0, 1], dp_size=1)
    # upstream -(1 * 2) * 0.5, downstream -(1 * 1 * -3) * 0.25
    assert float(loss.detach()) == pytest.approx(-0.25)
    assert metrics["skpo/upstream/loss_sum"].aggregate() == pytest.approx(-1.0)
    assert metrics["skpo/downstream/loss_sum"].aggregate() == pytest.approx(0.75)


def test_one_token_far_out_does_not_blind_the_drift_clock() -> None:
    rows = [FlatRow(Row([-0.5] * 100, [-0.5] * 99 + [-50.5], [1] * 100, 1.0), False, 0, True)]
    outlier = MicroBatches(rows, [0.25], seed=0).loss([0], dp_size=1)[1]
    clock, ordinary = DriftClock(), 0.05
    clock.advance(outlier["skpo/downstream/kl_sum"].aggregate() / 100)
    then = clock.steps, clock.total_kl
    for _ in range(20):
        clock.advance(ordinary)
    assert 15 < clock.since(*then) <= 20.5, "twenty ordinary steps"


def test_a_micro_batch_without_a_segment_works() -> None:
    rows = [FlatRow(Row([-3.0], [-3.0], [1], 1.0), False, 0, True)]
    loss, metrics = MicroBatches(rows, [0.25], seed=0).loss([0], dp_size=1)
    assert float(loss.detach()) == pytest.approx(0.75)
    assert metrics["skpo/upstream/tokens_sum"].aggregate() == 0.0
