"""Values of response tokens in the layout in which verl's engines return them."""

import torch
from tensordict import TensorDict


def in_rows(values: torch.Tensor, micro_batch: TensorDict) -> torch.Tensor:
    """Values of response tokens in verl's layout, which has each one a position before its token.

    Args:
        values: (response tokens,), row by row.

    Returns:
        Nested (rows, prompt + response), 0 elsewhere.
    """
    offsets = micro_batch["input_ids"].offsets()
    lengths = micro_batch["responses"].offsets().diff()
    # Row by row: the last ``length`` positions but one to the left.
    first = offsets[1:] - lengths - 1
    ends = lengths.cumsum(0)
    within = torch.arange(int(ends[-1]), device=values.device) - (ends - lengths).repeat_interleave(lengths)
    places = first.repeat_interleave(lengths) + within
    full = torch.zeros(int(offsets[-1]), dtype=values.dtype, device=values.device)
    return torch.nested.nested_tensor_from_jagged(full.index_put((places,), values), offsets)
