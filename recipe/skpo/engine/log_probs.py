"""Log-probs, entropies and entropy slopes of tokens without more logits of a whole micro-batch in memory."""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch.utils.checkpoint import checkpoint

from recipe.skpo.engine.sizes import LOGIT_CHUNK, SLOPE_CHUNK
from recipe.skpo.method.polarity import entropy_slopes


def log_probs(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    chunk: int = LOGIT_CHUNK,
    with_slopes: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Compute log-prob and entropy of each token, in nats; the backward computes logits again, chunk by chunk.

    Args:
        head: hidden states to logits.
        hidden: (tokens, hidden size), at the positions that predict ``labels``.
        labels: int64 (tokens,).
        temperature: divides the logits; a number or (tokens,).
        chunk: tokens whose logits exist at a time.
        with_slopes: also compute the entropy slopes, which have no gradient.

    Returns:
        Two or three float32 tensors (tokens,).
    """
    scale = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device).clamp(min=1e-8)
    scale = scale.expand(len(labels)).unsqueeze(-1)

    def of_chunk(hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = head(hidden).float() / scale
        lse = logits.logsumexp(-1)
        entropy = lse - (logits.softmax(-1) * logits).sum(-1)
        found = (logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse, entropy)
        return (*found, slopes(logits, labels)) if with_slopes else found

    chunks = zip(hidden.split(chunk), labels.split(chunk), scale.split(chunk), strict=True)
    # There is nothing random in a chunk.
    parts = [checkpoint(of_chunk, *tensors, use_reentrant=False, preserve_rng_state=False) for tensors in chunks]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


@torch.no_grad()
def slopes(logits: torch.Tensor, labels: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Compute the entropy slope of each token (``method.polarity.entropy_slopes``), few tokens at a time.

    Args:
        logits: (tokens, vocabulary), in any precision.
        labels: int64 (tokens,).
        temperature: divides the logits; a number or (tokens,).

    Returns:
        float32 (tokens,).
    """
    scale = torch.as_tensor(temperature, dtype=torch.float32, device=labels.device).clamp(min=1e-8)
    chunks = zip(
        logits.split(SLOPE_CHUNK),
        labels.split(SLOPE_CHUNK),
        scale.expand(len(labels)).unsqueeze(-1).split(SLOPE_CHUNK),
        strict=True,
    )
    return torch.cat([entropy_slopes((part.float() / by).log_softmax(-1), tokens) for part, tokens, by in chunks])


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
