"""Random batches on both sides of the golden tests: rows of the reference, and the same rows as verl hands them on.

The "model" is one flat parameter that holds every log-prob of every row, so that its gradient is the loss's gradient
token by token.  The order of rows, updates and loss weights are those of the trainer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from recipe.skpo.method.loss_weights import loss_weights
from recipe.skpo.method.rows import DOWNSTREAM, PHASE_FIELD, UPSTREAM, WEIGHT_FIELD
from recipe.skpo.trainer.order import minibatch_of_rows, minibatch_order
from tests.support.reference import FlatRow, Gradient, Row, random_batch, reference_batch_objective
from tests.support.rows import make_rows

CLIPS = (0.2, 0.28)
WEIGHTS = (0.7, 0.3)


@dataclass(frozen=True)
class Case:
    """A batch in the order in which verl trains it.

    Attributes:
        rows: as the reference sees them.
        prompt_lengths: tokens before the response, per row.
        update: number of the update, per row, as the reference counts them: by prompt.
        weights: loss weights, float32 (rows,).
        rows_per_update: over all ranks.
        ranks: data-parallel size.
        aggregation: of the downstream tokens.
    """

    rows: list[FlatRow]
    prompt_lengths: list[int]
    update: list[int]
    weights: torch.Tensor
    rows_per_update: int
    ranks: int
    aggregation: str

    def reference(self) -> tuple[dict[int, float], list[Gradient]]:
        """Objective per update and its gradient per row, by plain loops."""
        return reference_batch_objective(self.rows, self.update, WEIGHTS, CLIPS, self.aggregation)

    def share(self, rank: int) -> list[list[int]]:
        """Rows of a rank per update: verl gives it a contiguous chunk and trains that in equal contiguous parts."""
        per_rank, part = len(self.rows) // self.ranks, self.rows_per_update // self.ranks
        chunk = range(rank * per_rank, (rank + 1) * per_rank)
        return [list(chunk[start : start + part]) for start in range(0, per_rank, part)]


def _lose_responses(rows: list[FlatRow], prompt: int) -> list[FlatRow]:
    """All responses of a prompt are lost, so its segment has nothing to learn from either."""
    return [
        row
        if row.prompt != prompt
        else replace(row, valid=False, row=row.row if row.upstream else Row([-1.0], [-2.0], [0], row.row.advantage))
        for row in rows
    ]


def _after_a_beginning(rng: np.random.Generator, flat: FlatRow) -> FlatRow:
    """A response that begins with tokens that are not trained, as in ``skip=continual``."""
    extra = int(rng.integers(1, 4))
    row = flat.row
    before = (-rng.exponential(1.0, extra)).tolist()
    beginning = Row(before + row.log_prob, before + row.old_log_prob, [0] * extra + row.mask, row.advantage)
    return replace(flat, row=beginning)


def make_case(seed: int, ranks: int, aggregation: str = "group_token_mean") -> Case:
    """A random batch: G, updates, lengths, padding, missing siblings, lost groups, untrained beginnings."""
    rng = np.random.default_rng(seed)
    group, per_update, updates = int(rng.integers(1, 6)), 2 * int(rng.integers(1, 3)), int(rng.integers(1, 4))
    total = per_update * updates
    padding_prompts = int(rng.integers(0, per_update)) if rng.random() < 0.5 else 0
    rows = random_batch(rng, updates, per_update, group, padding_prompts)
    if rng.random() < 0.3:
        rows = _lose_responses(rows, int(rng.integers(total - padding_prompts)))
    if rng.random() < 0.3:
        rows = [_after_a_beginning(rng, row) if not row.upstream and row.valid else row for row in rows]

    def partition(lengths: list[int], parts: int) -> list[list[int]]:
        # Any partition into equal parts has to do; verl's own is used in the tests through the actor.
        return rng.permutation(len(lengths)).reshape(parts, -1).tolist()

    size = (group + 1) * per_update
    lengths = [len(row.row.mask) for row in rows]
    order = minibatch_order([row.prompt for row in rows], lengths, size, ranks, partition)
    rows = [rows[index] for index in order]
    batch = make_rows(
        upstream=[row.upstream for row in rows],
        prompts=[row.prompt for row in rows],
        lengths=[sum(row.row.mask) for row in rows],
        padding=[row.prompt >= total - padding_prompts for row in rows],
    )
    weights = loss_weights(batch, minibatch_of_rows(len(rows), size, ranks), *WEIGHTS, aggregation)
    update = [row.prompt // per_update for row in rows]
    return Case(rows, rng.integers(1, 6, len(rows)).tolist(), update, weights, size, ranks, aggregation)


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    """verl's layout of rows of different length."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def actor_config(loss_mode: str = "skpo", **changes: Any) -> Any:
    """Return the actor's config as verl's worker builds it."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    clips = dict(zip(("clip_ratio_low", "clip_ratio_high"), CLIPS, strict=True))
    policy_loss = PolicyLossConfig(loss_mode=loss_mode)
    return FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy_loss, **(clips | changes)
    )


class FlatPolicy:
    """Every log-prob of a batch in one parameter, read through what verl's engine gives to the loss.

    Attributes:
        config: verl's, of the actor.
        columns: per-token columns that the rows have besides their own, (row: values).
        entropy: per row, the entropy of each position as a function of its log-probs; None for no entropies.
    """

    NOISE = -9.0

    def __init__(self, case: Case, dtype: torch.dtype, config: Any = None) -> None:
        self.case, self.dtype = case, dtype
        self.config = config or actor_config()
        self.columns: dict[str, list[list[float]]] = {}
        self.entropy: Callable[[torch.Tensor], torch.Tensor] | None = None
        # The model's output at position j scores token j + 1: a response starts one before its first token.
        outputs = [
            [self.NOISE] * (prompt - 1) + row.row.log_prob + [self.NOISE]
            for row, prompt in zip(case.rows, case.prompt_lengths, strict=True)
        ]
        self.ends = np.cumsum([len(output) for output in outputs]).tolist()
        self.starts = [0, *self.ends[:-1]]
        self.parameter = torch.tensor([value for output in outputs for value in output], dtype=dtype)
        self.parameter.requires_grad_()

    def data(self, rows: list[int], dp_size: int) -> TensorDict:
        """These rows as verl's engine gives a mini-batch to its micro-batches; ``row`` is their number."""
        from verl.utils import tensordict_utils

        case, ids = self.case, [self.case.rows[index].row for index in rows]
        prompts = [torch.ones(case.prompt_lengths[index], dtype=torch.long) for index in rows]
        responses = [torch.ones(len(row.mask), dtype=torch.long) for row in ids]
        data = TensorDict(
            {
                "row": torch.tensor(rows),
                "prompts": nested(prompts),
                "responses": nested(responses),
                "input_ids": nested([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
                "response_mask": nested([torch.tensor(row.mask) for row in ids]),
                "old_log_probs": self._nested([row.old_log_prob for row in ids]),
                "advantages": self._nested([[row.advantage * trained for trained in row.mask] for row in ids]),
                PHASE_FIELD: torch.tensor([UPSTREAM if case.rows[i].upstream else DOWNSTREAM for i in rows]),
                WEIGHT_FIELD: case.weights[rows],
            }
            | {name: self._nested([values[index] for index in rows]) for name, values in self.columns.items()},
            batch_size=len(rows),
        )
        tensordict_utils.assign_non_tensor(
            data,
            dp_size=dp_size,
            batch_num_tokens=sum(sum(row.row.mask) for row in case.rows),
            global_batch_size=case.rows_per_update,
        )
        return data

    def _nested(self, rows: list[list[float]]) -> torch.Tensor:
        return nested([torch.tensor(row, dtype=self.dtype) for row in rows])

    def loss_and_metrics(self, micro_batch: TensorDict) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the loss of a micro-batch of ``data``, and verl's metrics."""
        from verl.workers.utils.losses import ppo_loss

        from recipe.skpo.trainer.objective import skpo_loss

        outputs = [self.parameter[self.starts[index] : self.ends[index]] for index in micro_batch["row"].tolist()]
        model_output = {"log_probs": nested(outputs)}
        if self.entropy is not None:
            model_output["entropy"] = nested([self.entropy(output) for output in outputs])
        loss = skpo_loss if self.config.policy_loss.loss_mode == "skpo" else ppo_loss
        return loss(self.config, model_output, micro_batch)

    def loss(self, micro_batch: TensorDict) -> torch.Tensor:
        """Return the loss of a micro-batch of ``data``."""
        return self.loss_and_metrics(micro_batch)[0]

    def row_gradients(self, gradient: torch.Tensor) -> Iterator[Gradient]:
        """Per row, the part at the positions that score its response; asserts that no other position has any."""
        for row, prompt, start, end in zip(
            self.case.rows, self.case.prompt_lengths, self.starts, self.ends, strict=True
        ):
            first = start + prompt - 1
            last = first + len(row.row.mask)
            assert not gradient[start:first].any() and not gradient[last:end].any()
            yield gradient[first:last].tolist()


def relative_error(actual: Iterator[Gradient], expected: list[Gradient]) -> float:
    """Largest difference, relative to each expected entry; entries that must be 0 count as they are."""
    worst = 0.0
    for row, reference in zip(actual, expected, strict=True):
        for found, slope in zip(row, reference, strict=True):
            wanted = -slope  # a loss is a negated objective
            worst = max(worst, abs(found - wanted) / abs(wanted) if wanted else abs(found))
    return worst


def gradient_of_updates(
    policy: FlatPolicy, ranks: list[int], split: Callable[[TensorDict], list[TensorDict]]
) -> Iterator[tuple[int, float, torch.Tensor]]:
    """Number, loss and gradient per update, summed over the micro-batches of these ranks."""
    case = policy.case
    for number, parts in enumerate(zip(*(case.share(rank) for rank in ranks), strict=True)):
        policy.parameter.grad = None
        total = 0.0
        for rows in parts:
            for micro_batch in split(policy.data(rows, case.ranks)):
                loss = policy.loss(micro_batch)
                loss.backward()
                total += float(loss.detach())
        assert policy.parameter.grad is not None
        yield number, total, policy.parameter.grad.clone()
