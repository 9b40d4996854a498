"""Rows that begin with the same prompt, packed so that the prompt is computed once.

The G responses to one [s, q] (or, for GRPO, to one q) are laid out as one tree, prompt first, then every response;
trees are packed side by side into sequences of equal length.  A token attends to earlier tokens of its own branch and
to the prompt of its tree, and positions restart behind the prompt, so every log-prob is that of the separate row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_PADDING = -1


@dataclass(frozen=True)
class PackedRows:
    """Model inputs of some rows, and where in the model's output each response token is predicted.

    Attributes:
        input_ids, position_ids: int64 (sequences, length).
        attention_mask: bool (sequences, 1, length, length), True where the query (third axis) sees the key (fourth).
        predictors: int64 (response tokens,): position in the flattened (sequences * length) output that predicts each
            response token, in order of rows and, within a row, of tokens.
        labels: int64 (response tokens,): these tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    predictors: torch.Tensor
    labels: torch.Tensor


def pack_rows(prompts: Sequence[torch.Tensor], responses: Sequence[torch.Tensor], pad_token_id: int = 0) -> PackedRows:
    """Pack rows by shared prompt.

    Args:
        prompts, responses: per row, int64 token ids (tokens,), both with at least one token.
        pad_token_id: fills what is left of a sequence; it is attended to by nothing else.
    """
    trees: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        trees.setdefault(prompt.cpu().numpy().tobytes(), []).append(row)
    members = list(trees.values())
    lengths = [len(prompts[rows[0]]) + sum(len(responses[row]) for row in rows) for rows in members]
    length = max(lengths)
    starts, sequences = _first_fit(lengths, length)

    device = prompts[0].device
    input_ids = torch.full((sequences, length), pad_token_id, dtype=torch.int64, device=device)
    position_ids = torch.zeros_like(input_ids)
    tree = torch.full_like(input_ids, _PADDING)
    branch = torch.zeros_like(input_ids)
    predictors: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for number, (rows, (sequence, start)) in enumerate(zip(members, starts, strict=True)):
        prompt = prompts[rows[0]]
        end = start + len(prompt)
        input_ids[sequence, start:end] = prompt
        position_ids[sequence, start:end] = torch.arange(len(prompt), device=device)
        tree[sequence, start : start + lengths[number]] = number
        last_of_prompt = end - 1
        for index, row in enumerate(rows):
            begin, end = end, end + len(responses[row])
            input_ids[sequence, begin:end] = responses[row]
            position_ids[sequence, begin:end] = torch.arange(len(prompt), len(prompt) + end - begin, device=device)
            branch[sequence, begin:end] = index + 1
            # The prompt's last token predicts the first one of every response.
            own = torch.arange(begin - 1, end - 1, device=device)
            own[0] = last_of_prompt
            predictors[row] = sequence * length + own

    same_tree = tree.unsqueeze(2) == tree.unsqueeze(1)
    same_branch = (branch.unsqueeze(2) == branch.unsqueeze(1)) | (branch.unsqueeze(1) == 0)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return PackedRows(
        input_ids,
        position_ids,
        (same_tree & same_branch & causal).unsqueeze(1),
        torch.cat(predictors),
        torch.cat(list(responses)),
    )


def _first_fit(lengths: Sequence[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """Sequence and offset of each part, the longest parts placed first, and the number of sequences."""
    used: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        sequence = next((number for number, taken in enumerate(used) if taken + lengths[index] <= capacity), len(used))
        if sequence == len(used):
            used.append(0)
        places[index] = (sequence, used[sequence])
        used[sequence] += lengths[index]
    return places, len(used)
