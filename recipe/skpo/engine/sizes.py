"""Sizes that the packed engine and the start-up estimate of its memory share; importable without torch."""

BLOCK = 128
"""Tokens of a FlexAttention block; sequences for it are padded to a multiple."""
LOGIT_CHUNK = 2048
"""Tokens whose logits exist at the same time."""
SLOPE_CHUNK = 256
"""Tokens whose entropy slopes are computed at a time: four tensors over the vocabulary."""
LOGIT_BYTES = 20
"""Peak bytes per token of a chunk and vocabulary entry, forward and backward, measured on a CPU."""
