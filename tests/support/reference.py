"""Slow, obvious float64 references of docs/method.md, sections 1 to 9 and 17: plain loops, no formula of recipe.skpo.

Importing this module also sets how the property tests run: the same examples every time, and no deadline per example,
because a busy machine is no fault of the code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

Gradient = list[float]


@dataclass(frozen=True)
class Row:
    """One trained row: a segment under q, or a response under [s, q]."""

    log_prob: list[float]
    old_log_prob: list[float]
    mask: list[int]
    advantage: float


@dataclass(frozen=True)
class Prompt:
    """What one prompt gives to the objective; ``responses`` are those that did not fail."""

    segment: Row
    responses: list[Row]


def reference_split_positions(mean_length: float, low: float, high: float) -> list[int]:
    """Every integer >= 1 inside [low * L, high * L], docs/method.md section 1."""
    positions, position = [], 1
    while position <= high * mean_length:
        if position >= low * mean_length:
            positions.append(position)
        position += 1
    return positions


def reference_selection(deviations: Sequence[float]) -> int:
    """Index of the candidate closest to the median, the lowest on a tie, docs/method.md section 3."""
    ordered = sorted(deviations)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    best = 0
    for index, deviation in enumerate(deviations):
        if abs(deviation - middle) < abs(deviations[best] - middle):
            best = index
    return best


def reference_segment(
    token_ids: Sequence[int], logprobs: Sequence[float], split_position: int, finished: bool
) -> tuple[list[int], float]:
    """Kept tokens of a candidate and their deviation d, docs/method.md sections 2 and 3."""
    if finished and len(token_ids) <= split_position:
        length = len(token_ids) // 2
    else:
        length = split_position
    if length < 1:
        length = 1
    kept, nats = [], 0.0
    for token, logprob in list(zip(token_ids, logprobs, strict=True))[:length]:
        kept.append(token)
        nats -= logprob
    return kept, nats / len(kept)


def reference_skip_prompt(segment: Sequence[int], problem: Sequence[int], bos: int | None) -> list[int]:
    """[s, q] with the BOS of q, if it has one, in front, docs/method.md section 4."""
    tokens = []
    if bos is not None and problem[0] == bos:
        tokens.append(bos)
        problem = problem[1:]
    for token in segment:
        tokens.append(token)
    for token in problem:
        tokens.append(token)
    return tokens


def reference_extreme(deviations: Sequence[float], step: int) -> int:
    """``selection=extreme``: the first smallest deviation in odd steps, the first largest in even ones."""
    best = 0
    for index, deviation in enumerate(deviations):
        if (step % 2 == 1 and deviation < deviations[best]) or (step % 2 == 0 and deviation > deviations[best]):
            best = index
    return best


def reference_weight(value: float, epsilon: float) -> float:
    """Weight of a prompt in prioritised sampling, docs/method.md section 13."""
    return (value * (1 - value)) ** 0.5 + epsilon


def reference_tracker(
    visits: Sequence[tuple[float, float]], initial_value: float, rho_min: float, rho_max: float, half_life: float
) -> list[tuple[float, float]]:
    """(V, N) of one prompt after each visit (observation, drift), docs/method.md section 6."""
    value, count = initial_value, 0.0
    trajectory = []
    for observation, drift in visits:
        rho = 2 ** (-drift / half_life)
        if rho < rho_min:
            rho = rho_min
        if rho > rho_max:
            rho = rho_max
        eta = 1 / (rho * count + 1)
        value = (1 - eta) * value + eta * observation
        count = rho * count + 1
        trajectory.append((value, count))
    return trajectory


def reference_drift(step_kls: Sequence[float], visited_after: int, unit: str) -> float:
    """Drift since a visit after the first ``visited_after`` of these steps, docs/method.md section 6."""
    since = 0.0
    for kl in step_kls[visited_after:]:
        since += kl
    if unit == "nats":
        return since
    mean = math.fsum(step_kls) / len(step_kls) if step_kls else 0.0
    if mean == 0:
        return float(len(step_kls) - visited_after)
    return since / mean


class ReferenceRun:
    """Baselines, tracked lengths and drifts of a run, computed again from the whole history at every request.

    Args:
        initial_length: of a prompt never visited, in tokens.
        rho_min, rho_max, half_life: constants of the trackers.
        unit: of the drift.
    """

    def __init__(
        self, initial_length: float, rho_min: float, rho_max: float, half_life: float, unit: str = "kl_steps"
    ) -> None:
        self.initial_length, self.constants, self.unit = initial_length, (rho_min, rho_max, half_life), unit
        self.step_kls: list[float] = []
        # Per prompt and visit: reward, mean length, drift since the visit before, steps that were over.
        self.visits: dict[str, list[tuple[float, float, float, int]]] = {}

    def drift(self, prompt: str) -> float:
        """D since the last visit; 0 where there was none."""
        visits = self.visits.get(prompt, [])
        return reference_drift(self.step_kls, visits[-1][3], self.unit) if visits else 0.0

    def visit(self, prompt: str, reward: float, mean_length: float, drift: float | None = None) -> float:
        """Note a visit; returns the drift that it is weighed with, which is ``drift`` where it was measured."""
        used = self.drift(prompt) if drift is None else drift
        self.visits.setdefault(prompt, []).append((reward, mean_length, used, len(self.step_kls)))
        return used

    def end_step(self, kl: float) -> None:
        """Note by how much the policy moved in a step."""
        self.step_kls.append(kl if kl > 0 else 0.0)

    def baseline(self, prompt: str) -> float:
        """Mean of past rewards in [-1, 1] as the tracker weighs them; 0 before the first."""
        visits = [((reward + 1) / 2, drift) for reward, _, drift, _ in self.visits.get(prompt, [])]
        value = reference_tracker(visits, 0.5, *self.constants)[-1][0] if visits else 0.5
        return 2 * value - 1

    def count(self, prompt: str) -> float:
        """Effective number of observations."""
        visits = [(0.0, drift) for _, _, drift, _ in self.visits.get(prompt, [])]
        return reference_tracker(visits, 0.0, *self.constants)[-1][1] if visits else 0.0

    def length(self, prompt: str) -> float:
        """L_q."""
        visits = [(length, drift) for _, length, drift, _ in self.visits.get(prompt, [])]
        return reference_tracker(visits, 0.0, *self.constants)[-1][0] if visits else self.initial_length


def reference_single_stream(
    rewards: Sequence[float], baselines: Sequence[float], valid: Sequence[bool], epsilon: float = 1e-8
) -> list[float]:
    """A~ of docs/method.md section 7, population standard deviation."""
    raw = [reward - baseline for reward, baseline, ok in zip(rewards, baselines, valid, strict=True) if ok]
    if not raw:
        return [0.0] * len(rewards)
    mean = math.fsum(raw) / len(raw)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in raw) / len(raw))
    result = []
    for reward, baseline, ok in zip(rewards, baselines, valid, strict=True):
        result.append((reward - baseline - mean) / (std + epsilon) if ok else 0.0)
    return result


def reference_group_relative(rewards: Sequence[float], groups: Sequence[int], valid: Sequence[bool]) -> list[float]:
    """A_i of docs/method.md section 8, population standard deviation."""
    result = []
    for reward, group, ok in zip(rewards, groups, valid, strict=True):
        siblings = [
            other
            for other, other_group, other_ok in zip(rewards, groups, valid, strict=True)
            if other_group == group and other_ok
        ]
        if not ok or all(other == siblings[0] for other in siblings):
            result.append(0.0)
            continue
        mean = math.fsum(siblings) / len(siblings)
        std = math.sqrt(math.fsum((other - mean) ** 2 for other in siblings) / len(siblings))
        result.append((reward - mean) / std)
    return result


def reference_slope(logits: Sequence[float], token: int) -> float:
    """T of a token: how its state's entropy changes per unit of advantage and step, docs/method.md section 17."""
    total = sum(math.exp(logit) for logit in logits)
    probs = [math.exp(logit) / total for logit in logits]
    entropy = -sum(prob * math.log(prob) for prob in probs)
    own = [prob * (math.log(prob) + entropy) for prob in probs]
    return sum(prob * value for prob, value in zip(probs, own, strict=True)) - own[token]


def reference_reweighted(tokens: Sequence[tuple[float, float]], phase: float, strength: float) -> list[float]:
    """A' of the (A, T) of a whole step, docs/method.md section 17."""
    weighted = []
    for advantage, slope in tokens:
        if advantage * slope > 0:
            weighted.append(advantage * (1 + strength * phase))
        elif advantage * slope < 0:
            weighted.append(advantage * (1 - strength * phase))
        else:
            weighted.append(advantage)
    before, after = sum(abs(advantage) for advantage, _ in tokens), sum(map(abs, weighted))
    return [value * before / after for value in weighted] if after else weighted


def reference_upstream_objective(row: Row, clip_low: float, clip_high: float) -> tuple[float, Gradient]:
    """Eq. 6 of one segment, to maximise, and its derivative by every log-prob."""
    tokens = sum(row.mask)
    value, gradient = 0.0, []
    for log_prob, old, trained in zip(row.log_prob, row.old_log_prob, row.mask, strict=True):
        if not trained:
            gradient.append(0.0)
            continue
        ratio = math.exp(log_prob - old)
        free = ratio * row.advantage
        held = min(max(ratio, 1 - clip_low), 1 + clip_high) * row.advantage
        if free <= held:
            value += free / tokens
            gradient.append(free / tokens)  # d ratio / d log_prob = ratio
        else:
            value += held / tokens
            gradient.append(0.0)
    return value, gradient


def reference_downstream_objective(
    responses: Sequence[Row], clip_low: float, clip_high: float
) -> tuple[float, list[Gradient]]:
    """Eq. 5 of one prompt, to maximise, and its derivative by every log-prob; the clipped ratio is a constant."""
    tokens = sum(sum(row.mask) for row in responses)
    value, gradients = 0.0, []
    for row in responses:
        gradient = []
        for log_prob, old, trained in zip(row.log_prob, row.old_log_prob, row.mask, strict=True):
            if not trained:
                gradient.append(0.0)
                continue
            weight = min(max(math.exp(log_prob - old), 1 - clip_low), 1 + clip_high)
            value += weight * row.advantage * log_prob / tokens
            gradient.append(weight * row.advantage / tokens)
        gradients.append(gradient)
    return value, gradients


def reference_update_objective(
    prompts: Sequence[Prompt], weight_up: float, weight_down: float, clip_low: float, clip_high: float
) -> tuple[float, list[tuple[Gradient, list[Gradient]]]]:
    """Equations 5 and 6 over one update: the value to maximise; per prompt, gradients of segment and responses."""
    value, gradients = 0.0, []
    for prompt in prompts:
        up, up_gradient = reference_upstream_objective(prompt.segment, clip_low, clip_high)
        down, down_gradients = reference_downstream_objective(prompt.responses, clip_low, clip_high)
        value += (weight_up * up + weight_down * down) / len(prompts)
        gradients.append(
            (
                [weight_up * slope / len(prompts) for slope in up_gradient],
                [[weight_down * slope / len(prompts) for slope in gradient] for gradient in down_gradients],
            )
        )
    return value, gradients


def reference_token_mean_objective(
    prompts: Sequence[Prompt], weight_up: float, weight_down: float, clip_low: float, clip_high: float
) -> tuple[float, list[tuple[Gradient, list[Gradient]]]]:
    """As ``reference_update_objective``, with one mean over all downstream tokens of the update."""
    everything = 0
    for prompt in prompts:
        for row in prompt.responses:
            everything += sum(row.mask)
    value, gradients = 0.0, []
    for prompt in prompts:
        up, up_gradient = reference_upstream_objective(prompt.segment, clip_low, clip_high)
        down, down_gradients = reference_downstream_objective(prompt.responses, clip_low, clip_high)
        # Undo the mean over the group's tokens, then divide by all of them.
        share = sum(sum(row.mask) for row in prompt.responses) / everything
        value += weight_up * up / len(prompts) + weight_down * down * share
        gradients.append(
            (
                [weight_up * slope / len(prompts) for slope in up_gradient],
                [[weight_down * slope * share for slope in gradient] for gradient in down_gradients],
            )
        )
    return value, gradients


@dataclass(frozen=True)
class FlatRow:
    """A row as the trainer sees it."""

    row: Row
    upstream: bool
    prompt: int
    valid: bool


def random_row(rng: np.random.Generator, tokens: int, clip_low: float = 0.2, clip_high: float = 0.28) -> Row:
    """Log-probs whose ratios lie on both sides of both clip bounds, and not within 1e-3 of one (a kink)."""
    old, new = [], []
    while len(new) < tokens:
        before, move = -rng.exponential(1.5), rng.normal(0, 0.35)
        if all(abs(math.exp(move) - bound) > 1e-3 for bound in (1 - clip_low, 1 + clip_high)):
            old.append(float(before))
            new.append(float(before + move))
    return Row(new, old, [1] * tokens, float(rng.normal()))


def random_batch(
    rng: np.random.Generator, updates: int, prompts_per_update: int, group_size: int, padding_prompts: int = 0
) -> list[FlatRow]:
    """A shuffled batch of whole prompts: random lengths, some siblings missing, padding that copies real rows.

    Real prompts are numbered from 0; padding has the numbers after them, as the trainer sorts it last.
    """
    total = updates * prompts_per_update
    rows: list[FlatRow] = []
    for prompt in range(total - padding_prompts):
        rows.append(FlatRow(random_row(rng, int(rng.integers(1, 7))), True, prompt, True))
        missing = rng.random(group_size) < 0.25
        missing[rng.integers(group_size)] = False  # a prompt without any sibling is dropped before
        for failed in missing:
            if failed:
                rows.append(FlatRow(Row([-1.0], [-2.0], [0], float(rng.normal())), False, prompt, False))
            else:
                rows.append(FlatRow(random_row(rng, int(rng.integers(1, 10))), False, prompt, True))
    for index in range(padding_prompts * (group_size + 1)):
        copied = rows[int(rng.integers(len(rows)))]
        number = total - padding_prompts + index // (group_size + 1)
        rows.append(FlatRow(copied.row, copied.upstream, number, False))
    return [rows[int(index)] for index in rng.permutation(len(rows))]


def prompts_of(rows: Sequence[FlatRow]) -> list[tuple[Prompt, int, list[int]]]:
    """Per real prompt: what it gives to the objective, and the indices of its segment and of its responses."""
    result = []
    for number in sorted({row.prompt for row in rows if row.valid}):
        (segment,) = (i for i, row in enumerate(rows) if row.prompt == number and row.valid and row.upstream)
        responses = [i for i, row in enumerate(rows) if row.prompt == number and row.valid and not row.upstream]
        result.append((Prompt(rows[segment].row, [rows[i].row for i in responses]), segment, responses))
    return result


def reference_batch_objective(
    rows: Sequence[FlatRow],
    update_of_row: Sequence[int],
    weights: tuple[float, float],
    clips: tuple[float, float],
    aggregation: str = "group_token_mean",
) -> tuple[dict[int, float], list[Gradient]]:
    """Equations 5 and 6 over a batch: value per update that has a real prompt, and the gradient of every row."""
    objective = {
        "group_token_mean": reference_update_objective,
        "token_mean": reference_token_mean_objective,
    }[aggregation]
    gradients: list[Gradient] = [[0.0] * len(row.row.log_prob) for row in rows]
    values = {}
    for update in sorted(set(update_of_row)):
        members = [item for item in prompts_of(rows) if update_of_row[item[1]] == update]
        if not members:
            continue
        values[update], parts = objective([prompt for prompt, _, _ in members], *weights, *clips)
        for (_, segment, responses), (segment_gradient, response_gradients) in zip(members, parts, strict=True):
            gradients[segment] = segment_gradient
            for index, gradient in zip(responses, response_gradients, strict=True):
                gradients[index] = gradient
    return values, gradients
