"""Decoded rows and stored rows for tests."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from recipe.skpo.method.rows import (
    DOWNSTREAM,
    PHASE_FIELD,
    RECORD,
    REWARD_TAG,
    TRAINED_TAG,
    UPSTREAM,
    CandidateRecord,
    Ragged,
    RolloutRecord,
    Rows,
    TokenCounts,
)


def make_rows(
    upstream: Sequence[bool],
    prompts: Sequence[int],
    lengths: Sequence[int],
    rewards: Sequence[float] | None = None,
    padding: Sequence[bool] | None = None,
    records: Sequence[TokenCounts | None] = (),
    prompt_ids: Sequence[str] = (),
    openings: Sequence[int] | None = None,
) -> Rows:
    """A decoded batch; ``openings``: untrained tokens that a response begins with."""
    trained = torch.tensor(lengths)
    sizes = trained + torch.tensor(openings or [0] * len(lengths))
    masks = [torch.arange(size) >= size - length for size, length in zip(sizes, lengths, strict=True)]
    return Rows(
        phase=torch.tensor([UPSTREAM if up else DOWNSTREAM for up in upstream]),
        prompts=torch.tensor(prompts),
        lengths=trained,
        rewards=torch.tensor(rewards or [0.0] * len(lengths)),
        padding=torch.tensor(padding or [False] * len(lengths)),
        prompt_ids=prompt_ids,
        records=records,
        tokens={"response_mask": Ragged(torch.cat(masks).to(torch.int64), sizes)},
    )


def make_record(**changes: Any) -> RolloutRecord:
    """The record of a prompt with two candidates, of which one ended early."""
    candidates = (CandidateRecord(np.array([5, 6]), 2, 0.5, False), CandidateRecord(np.array([7, 8]), 1, 0.75, True))
    fields = {"generated": 40, "prefilled": 100, "cached": 75, "split_position": 10, "candidates": candidates}
    fields |= {"chosen": 0, "seconds": 2.0, "downstream_seconds": 6.0, "copied_share": 0.5}
    return RolloutRecord(**fields | changes)


def stored_row(
    uid: str,
    session: int,
    reward: float,
    responses: Sequence[int],
    phase: int | None = DOWNSTREAM,
    prompts: Sequence[int] = (7, 8),
    opening: int = 0,
    old_log_probs: Sequence[float] | None = None,
    **changes: Any,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Key, fields and tag of a row as the rollout stores it and verl's log-prob step completes it.

    Args:
        uid, session: name of the row.
        reward: of the row.
        responses: tokens; the first ``opening`` are not trained.
        phase: of the row; None for a row of a baseline.
        prompts: tokens before the response.
        opening: untrained tokens at the start.
        old_log_probs: of the tokens; -token / 100 if None.
        **changes: other fields, by name.
    """
    ids, before = torch.tensor(responses), torch.tensor(prompts)
    mask = torch.ones(len(ids), dtype=torch.int64)
    mask[:opening] = 0
    scores = torch.zeros(len(ids))
    scores[-1] = reward
    counts = {"generated": len(ids) - opening, "prefilled": len(before), "cached": 1}
    record = make_record(**counts) if phase == UPSTREAM else TokenCounts(**counts)
    fields = {
        "id": f"id-{uid}",
        "uid": uid,
        "prompts": before,
        "responses": ids,
        "input_ids": torch.cat([before, ids]),
        "position_ids": torch.arange(len(before) + len(ids)),
        "response_mask": mask,
        "loss_mask": mask,
        "rm_scores": scores,
        "rollout_log_probs": -ids.float() / 90,
        "old_log_probs": -ids.float() / 100 if old_log_probs is None else torch.tensor(old_log_probs),
        "extra_fields": {RECORD: asdict(record), "num_cached_tokens": 1},
        "raw_prompt": [{"role": "user", "content": f"question of {uid}"}],
        "reward_model": {"ground_truth": "5"},
        "multi_modal_inputs": {},
        "num_turns": 2,
        **({} if phase is None else {PHASE_FIELD: torch.tensor(phase)}),
        **changes,
    }
    tag = {"prompt_len": len(before), "response_len": len(ids), "seq_len": len(before) + len(ids)}
    if phase is not None:
        tag |= {REWARD_TAG: float(reward), TRAINED_TAG: len(ids) - opening}
    return f"{uid}_{session}_0", fields, {"status": "success", **tag}
