"""The vocabulary of a stored row, and a batch of rows decoded once.

A prompt's rollout becomes G + 1 rows of TransferQueue: its upstream segment under q and its G downstream responses
under [s, q] (paper section 3).  Rollout workers write them, the trainer reads them.  This module is the only place
that knows their format: keys, fields, and the records that travel with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

UPSTREAM, DOWNSTREAM = 0, 1
"""Values of ``PHASE_FIELD``."""

SPLIT_FIELD, SEED_FIELD, STEP_FIELD = "skpo_split_position", "skpo_seed", "skpo_step"
LENGTH_FIELD = "skpo_expected_length"
"""Fields that the trainer adds to every training prompt, see ``Visit``."""

PHASE_FIELD = "skpo_phase"
"""Field of a stored row: the phase it belongs to.  Rows of the baselines have none."""

WEIGHT_FIELD = "skpo_loss_weight"
"""Field that ``Rows.write_back`` adds for the loss: factor of each of the row's tokens, float32 (rows,)."""

RECORD = "skpo"
"""Key of a row's ``extra_fields`` under which its ``TokenCounts`` or ``RolloutRecord`` is stored."""

REWARD_TAG, TRAINED_TAG = "reward", "trained_len"
"""Tags of the rows of a method with phases: the row's reward, and how many tokens at its end are trained.

The trainer reads them instead of two columns with a value per token, ``rm_scores`` and ``response_mask``.
"""

OUTCOME_FIELDS = ("response_mask", "rm_scores")
"""What the trainer reads of rows that verl's own agent loop stored, which may hold tokens of tools anywhere."""

SLOPE_FIELD = "skpo_entropy_slope"
"""Output of the actor: T of each token (``polarity.entropy_slopes``), float32."""

WANT_SLOPES = "skpo_want_slopes"
"""Flag of a batch by which the trainer requests ``SLOPE_FIELD``."""

TOKEN_FIELDS = (
    *("response_mask", "rm_scores", "responses", "rollout_log_probs", "old_log_probs", "advantages"),
    *("entropy", SLOPE_FIELD),
)
"""Fields with one value per response token."""


@dataclass(frozen=True, order=True)
class RowKey:
    """The name of a stored row, ``<uid>_<session>_<index>``; keys sort by visit, then by session.

    Attributes:
        uid: the prompt's visit, or verl's name for padding.
        session: 0 for an upstream segment, from 1 for its responses.
        index: the output of an agent loop that has several; 0 here.
    """

    uid: str
    session: int
    index: int

    def __str__(self) -> str:
        return f"{self.uid}_{self.session}_{self.index}"

    @classmethod
    def parse(cls, key: str) -> "RowKey":
        """Split a key of TransferQueue."""
        uid, session, index = key.rsplit("_", 2)
        return cls(uid, int(session), int(index))


@dataclass(frozen=True)
class Visit:
    """What the trainer decides for one prompt before it is rolled out.

    Attributes:
        ordinal: running number of the visit, from 0, over the whole run.
        split_position: t_q in tokens.
        seed: seed of the prompt's sampled requests.
        expected_length: L_q, the prompt's tracked mean response length in tokens.
        step: training step, from 1.
    """

    ordinal: int
    split_position: int
    seed: int
    expected_length: float
    step: int

    @property
    def uid(self) -> str:
        """Name of the visit; sorts by ordinal and has no ``_``, at which row keys are split."""
        return f"v{self.ordinal:010d}"


def visit_columns(visits: Sequence[Visit]) -> dict[str, torch.Tensor]:
    """Return the fields that tell the rollout workers of these visits, int64 (prompts,) each."""
    return {
        SPLIT_FIELD: torch.tensor([visit.split_position for visit in visits]),
        SEED_FIELD: torch.tensor([visit.seed for visit in visits]),
        LENGTH_FIELD: torch.tensor([round(visit.expected_length) for visit in visits]),
        STEP_FIELD: torch.tensor([visit.step for visit in visits]),
    }


# ---------------------------------------------------------------- records


@dataclass(frozen=True)
class TokenCounts:
    """What the requests behind a row cost, in tokens.

    Attributes:
        generated: sampled tokens, discarded ones included.
        prefilled: prompt tokens.
        cached: prompt tokens that came from the server's prefix cache.
    """

    generated: int
    prefilled: int
    cached: int


@dataclass(frozen=True, eq=False)
class CandidateRecord:
    """One upstream candidate.

    Attributes:
        token_ids: all that it wrote, int32 (tokens,): a tuple of Python's numbers takes ten times the memory.
        kept: tokens before the cut, which become the segment if it is chosen.
        deviation: d(s), mean of -log pi over the kept tokens, in nats per token.
        ended_early: whether it ended by itself, at t_q at the latest.
        at_boundary: whether it was cut at a boundary; None if none was looked for.
    """

    token_ids: np.ndarray
    kept: int
    deviation: float
    ended_early: bool
    at_boundary: bool | None = None


@dataclass(frozen=True)
class RolloutRecord(TokenCounts):
    """One prompt's rollout, stored with its upstream row.

    Attributes:
        split_position: t_q in tokens.
        candidates: the upstream candidates that did not fail, in order.
        chosen: index of the candidate that became the segment.
        seconds: duration of the upstream phase.
        downstream_seconds: duration of the downstream phase.
        copied_share: share of the responses whose first tokens are those of the segment.
    """

    split_position: int
    candidates: tuple[CandidateRecord, ...]
    chosen: int
    seconds: float
    downstream_seconds: float
    copied_share: float

    @property
    def deviation(self) -> float:
        """The chosen candidate's deviation."""
        return self.candidates[self.chosen].deviation

    @property
    def early_share(self) -> float:
        """Share of the candidates that ended early."""
        return sum(candidate.ended_early for candidate in self.candidates) / len(self.candidates)

    @property
    def boundary_share(self) -> float | None:
        """Share of the candidates that were cut at a boundary; None if none was looked for."""
        cuts = [candidate.at_boundary for candidate in self.candidates if candidate.at_boundary is not None]
        return sum(cuts) / len(cuts) if cuts else None


def read_record(stored: Mapping[str, Any] | None) -> TokenCounts | None:
    """Rebuild a record; verl dumps a row with pydantic, which turns dataclasses into dictionaries."""
    if stored is None or "candidates" not in stored:
        return None if stored is None else TokenCounts(**stored)
    candidates = tuple(CandidateRecord(**candidate) for candidate in stored["candidates"])
    return RolloutRecord(**{**stored, "candidates": candidates})


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Ragged:
    """Rows of different length, one after another.

    Attributes:
        values: all values, (tokens,).
        sizes: values of each row, int64 (rows,).
    """

    values: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def of(cls, column: Any) -> "Ragged":
        """Decode a column: a nested tensor or a list of 1-D tensors.

        Indexing a nested tensor unbinds it every time, which is quadratic over all rows.
        """
        jagged = getattr(column, "layout", None) == torch.jagged
        if jagged and column.lengths() is None:
            return cls(column.values(), column.offsets().diff())
        rows = column.unbind() if isinstance(column, torch.Tensor) else column
        return cls(torch.cat(list(rows)), torch.tensor([len(row) for row in rows]))

    @classmethod
    def ends(cls, sizes: torch.Tensor, marked: torch.Tensor) -> "Ragged":
        """Make masks: int8, 1 on the last ``marked`` of each row's ``sizes`` values, both int64 (rows,)."""
        counts = torch.stack([sizes - marked, marked], dim=1).flatten()
        zeros_and_ones = np.tile(np.array([0, 1], dtype=np.int8), len(sizes))
        return cls(torch.from_numpy(np.repeat(zeros_and_ones, counts.numpy())), sizes)

    def split(self) -> tuple[torch.Tensor, ...]:
        """Return each row, as a view."""
        return self.values.split(self.sizes.tolist())

    def sums(self) -> torch.Tensor:
        """Return the sum of each row, (rows,), in the dtype of the values; no row may be empty."""
        starts = (self.sizes.cumsum(0) - self.sizes).numpy()
        return torch.from_numpy(np.add.reduceat(self.values.numpy(), starts))

    def nested(self) -> torch.Tensor:
        """Return the rows in verl's layout, a jagged nested tensor."""
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.sizes.cumsum(0)])
        return torch.nested.nested_tensor_from_jagged(self.values, offsets)


@dataclass(frozen=True)
class Rows:
    """A batch of stored rows, decoded.

    Attributes:
        phase: ``UPSTREAM`` or ``DOWNSTREAM``, int64 (rows,).
        prompts: number of the row's prompt in the batch, int64 (rows,).  The downstream rows of a prompt are one group.
        lengths: trained tokens, int64 (rows,); 0 for a sibling that failed.
        rewards: R_I on upstream rows, R_II on downstream rows, float32 (rows,).
        padding: bool (rows,).
        prompt_ids: id of the row's prompt in the data set.
        records: what the rollout noted; None for a sibling that failed.
        tokens: per-token columns by field, of those in ``TOKEN_FIELDS`` that were read, and ``response_mask``.
    """

    phase: torch.Tensor
    prompts: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor
    padding: torch.Tensor
    prompt_ids: Sequence[str] = ()
    records: Sequence[TokenCounts | None] = ()
    tokens: Mapping[str, Ragged] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.phase)

    @classmethod
    def read(cls, columns: Any, keys: Sequence[str], tags: Sequence[Mapping[str, Any]]) -> "Rows":
        """Decode stored rows.

        Args:
            columns: TensorDict of ``id``, ``extra_fields``, any of ``TOKEN_FIELDS`` and, where the method has phases,
                ``PHASE_FIELD``, otherwise ``OUTCOME_FIELDS``.
            keys: the rows' keys.
            tags: the rows' tags.
        """
        tokens = {name: Ragged.of(columns[name]) for name in TOKEN_FIELDS if name in columns.keys()}  # noqa: SIM118
        uids = [RowKey.parse(key).uid for key in keys]
        number = {uid: index for index, uid in enumerate(dict.fromkeys(uids))}
        extras = columns.get("extra_fields").tolist()
        phases = columns.get(PHASE_FIELD, None)
        padding = torch.tensor([bool(tag.get("is_padding", False)) for tag in tags])
        records: list[TokenCounts | None]
        if phases is None:
            # Rows that verl's own agent loop stored.
            lengths, rewards = (tokens[name].sums() for name in OUTCOME_FIELDS)
            phase = torch.full((len(keys),), DOWNSTREAM)
            records = [
                TokenCounts(int(tag["response_len"]), int(tag["prompt_len"]), int(extra.get("num_cached_tokens") or 0))
                for tag, extra in zip(tags, extras, strict=True)
            ]
        else:
            phase, records = phases.reshape(-1), [read_record(extra.get(RECORD)) for extra in extras]
            # Padding has the tags of the row that it was made from.
            lengths = torch.tensor([tag[TRAINED_TAG] for tag in tags]).masked_fill(padding, 0)
            rewards = torch.tensor([tag[REWARD_TAG] for tag in tags], dtype=torch.float32).masked_fill(padding, 0.0)
            tokens["response_mask"] = Ragged.ends(torch.tensor([tag["response_len"] for tag in tags]), lengths)
        return cls(
            phase=phase,
            prompts=torch.tensor([number[uid] for uid in uids]),
            lengths=lengths,
            rewards=rewards,
            padding=padding,
            prompt_ids=[str(prompt_id) for prompt_id in columns.get("id").tolist()],
            records=records,
            tokens=tokens,
        )

    @cached_property
    def valid_mask(self) -> torch.Tensor:
        """Rows that count in statistics, trackers and objectives, bool (rows,).

        They are not padding, have trained tokens and, if upstream, a sibling that counts: a prompt whose responses were
        all lost has no mean reward or length to learn from.
        """
        trained = ~self.padding & (self.lengths > 0)
        downstream = self.phase != UPSTREAM
        return trained & (downstream | torch.isin(self.prompts, self.prompts[trained & downstream]))

    @cached_property
    def segments(self) -> list[int]:
        """Valid upstream rows, in order."""
        return (self.valid_mask & (self.phase == UPSTREAM)).nonzero().flatten().tolist()

    @cached_property
    def responses(self) -> torch.Tensor:
        """Valid downstream rows, bool (rows,)."""
        return self.valid_mask & (self.phase == DOWNSTREAM)

    def siblings(self, row: int) -> list[int]:
        """Return the valid responses of this row's prompt, in order."""
        return (self.responses & (self.prompts == self.prompts[row])).nonzero().flatten().tolist()

    def mean_response_lengths(self) -> torch.Tensor:
        """Return the mean length of the prompt's responses per row, float64 (rows,), in tokens.

        A response counts whole, including an untrained segment that it may begin with (``skip=continual``).
        """
        written = torch.bincount(self.prompts, self.tokens["response_mask"].sizes * self.responses)
        return (written / torch.bincount(self.prompts, self.responses.to(torch.float64)))[self.prompts]

    def mean_rewards(self) -> torch.Tensor:
        """Return the mean reward of the prompt's valid responses per row, float64 (rows,); NaN without one."""
        counted = self.responses.to(torch.float64)
        total = torch.bincount(self.prompts, self.rewards.to(torch.float64) * counted)
        return (total / torch.bincount(self.prompts, counted))[self.prompts]

    def reward_noise(self) -> torch.Tensor:
        """Return the estimated variance of the mean reward of each row's prompt given its segment, float64 (rows,).

        It is that of the prompt's valid responses divided by their number; NaN if there are fewer than two.
        """
        rewards, counted = self.rewards.to(torch.float64), self.responses.to(torch.float64)
        count = torch.bincount(self.prompts, counted)
        squares = torch.bincount(self.prompts, (rewards - self.mean_rewards()) ** 2 * counted)
        return torch.where(count > 1, squares / (count - 1) / count, torch.nan)[self.prompts]

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Give each trained token the value of its row: (rows,) to a jagged nested tensor, 0 where not trained."""
        mask = self.tokens["response_mask"]
        spread = torch.from_numpy(np.repeat(values.numpy(), mask.sizes.numpy()))
        return Ragged(spread.masked_fill_(mask.values == 0, 0.0), mask.sizes).nested()

    def write_back(self, advantages: torch.Tensor, loss_weights: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the columns to store with the rows.

        Args:
            advantages: float (rows,); every trained token of a row gets its row's.
            loss_weights: float32 (rows,), for SKPO's policy loss; None for a method that trains with one of verl's.
        """
        per_token = self.per_token(advantages)
        columns = {"advantages": per_token, "returns": per_token}
        return columns if loss_weights is None else columns | {WEIGHT_FIELD: loss_weights}


# ---------------------------------------------------------------- one prompt as people read it


@dataclass(frozen=True)
class Transcript:
    """What was read and written in one prompt's downstream phase.

    Attributes:
        problem: content of the prompt's last message.
        ground_truth: the data set's answer.
        skip_prompt: tokens of [s, q].
        responses: tokens of each response.
        answers: the answer that the reward function found in each response; None if it does not report one.
    """

    problem: str
    ground_truth: str
    skip_prompt: list[int]
    responses: list[list[int]]
    answers: list[str | None]

    FIELDS = ("prompts", "responses", "raw_prompt", "reward_model", "extra_fields")

    @classmethod
    def read(cls, columns: Any) -> "Transcript":
        """Decode ``FIELDS`` of a prompt's responses."""
        found = [(extra.get("reward_extra_info") or {}).get("pred") for extra in columns.get("extra_fields").tolist()]
        return cls(
            problem=columns.get("raw_prompt").tolist()[0][-1]["content"],
            ground_truth=str(columns.get("reward_model").tolist()[0]["ground_truth"]),
            skip_prompt=columns["prompts"].unbind()[0].tolist(),
            responses=[response.tolist() for response in columns["responses"].unbind()],
            answers=[None if answer is None else str(answer) for answer in found],
        )
