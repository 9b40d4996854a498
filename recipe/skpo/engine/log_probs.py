"""Log-probs and entropies of response tokens without the logits of a whole micro-batch in memory."""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch.utils.checkpoint import checkpoint

from recipe.skpo.engine.sizes import LOGIT_CHUNK


def log_probs(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    chunk: int = LOGIT_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-prob and entropy of each token, in nats; the backward computes logits again, chunk by chunk.

    Args:
        head: hidden states to logits.
        hidden: (tokens, hidden size), at the positions that predict ``labels``.
        labels: int64 (tokens,).
        temperature: divides the logits; a number or (tokens,).
        chunk: tokens whose logits exist at a time.

    Returns:
        Two float32 tensors (tokens,).
    """
    scale = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device).clamp(min=1e-8)
    scale = scale.expand(len(labels)).unsqueeze(-1)

    def of_chunk(hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(hidden).float() / scale
        lse = logits.logsumexp(-1)
        entropy = lse - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse, entropy

    chunks = zip(hidden.split(chunk), labels.split(chunk), scale.split(chunk), strict=True)
    # There is nothing random in a chunk.
    parts = [checkpoint(of_chunk, *tensors, use_reentrant=False, preserve_rng_state=False) for tensors in chunks]
    values, entropies = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(entropies)


def in_rows(values: torch.Tensor, micro_batch: TensorDict) -> torch.Tensor:
    """Place values of response tokens in verl's layout, one position before each token.

    Args:
        values: (response tokens,), row by row.
        micro_batch: has ``input_ids`` and ``responses``, nested (rows, tokens).

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
