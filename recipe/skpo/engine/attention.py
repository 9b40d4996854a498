"""Attention over a ``PackedSequence``, by PyTorch's variable-length kernels or FlexAttention.

Two kernel calls compute the attention of a tree: every piece causally within itself, then all responses over their
shared prompt. Both are softmaxes over disjoint keys and are merged by their log-sum-exp. Importing the module registers
both attentions with transformers. The sequence reaches them as the model's keyword argument ``packed``, which survives
gradient checkpointing. docs/performance.md lists the models and devices they serve.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the kernels below
from torch.nn.attention.flex_attention import flex_attention
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from recipe.skpo.engine.packing import Documents, PackedSequence

# No "flash", "sdpa" or "flex_attention" in the names: transformers would prepare masks or kernels for them.
VARLEN, BLOCKS = "skpo_varlen", "skpo_blocks"

_compiled_flex = torch.compile(flex_attention, fullgraph=True, dynamic=True)


class MergedAttention(torch.autograd.Function):
    """Causal attention within pieces, merged with attention of the branches over their prefixes.

    With out and lse of both calls, the merged lse is log(exp(lse_1) + exp(lse_2)) and the merged out their average
    weighted by exp(lse). Each call's backward receives the MERGED out and lse, which is exact: a probability is
    exp(score - lse), and the softmax's row term is sum(grad * out) over all keys. Merging under autograd would give
    wrong gradients without an error, because the kernel's backward drops the gradient of its lse.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequence, scale: float
    ) -> torch.Tensor:
        """Compute (positions, heads, dim) from q of that shape and k, v of (positions, KV heads, dim)."""
        start, prefix = packed.branches_from, slice(0, packed.prefix_tokens)
        out, lse = _forward(q, k, v, packed.pieces, packed.pieces, True, scale)
        if packed.prefix_tokens:
            other, other_lse = _forward(q[start:], k[prefix], v[prefix], packed.branches, packed.prefixes, False, scale)
            share = (other_lse - lse[:, start:]).sigmoid().T.unsqueeze(-1)
            out[start:] = torch.lerp(out[start:].float(), other.float(), share).to(out.dtype)
            lse[:, start:] = torch.logaddexp(lse[:, start:], other_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Return the gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        packed, scale = ctx.packed, ctx.scale
        start, prefix = packed.branches_from, slice(0, packed.prefix_tokens)
        dq, dk, dv = _backward(grad, q, k, v, out, lse, packed.pieces, packed.pieces, True, scale)
        if packed.prefix_tokens:
            more = _backward(
                grad[start:],
                q[start:],
                k[prefix],
                v[prefix],
                out[start:],
                lse[:, start:],
                packed.branches,
                packed.prefixes,
                False,
                scale,
            )
            for total, part in zip((dq[start:], dk[prefix], dv[prefix]), more, strict=True):
                total += part
        return dq, dk, dv, None, None


# ---------------------------------------------------------------- the two kernel calls
# torch.ops.torch_attn._varlen_attn and its backward are private to torch; a test pins their schemas.  Everywhere but on
# CUDA the same mathematics is computed document by document, which is what the tests run.


def _has_kernels(q: torch.Tensor) -> bool:
    return q.is_cuda


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (tokens, heads, dim) and log-sum-exp, float32 (heads, tokens).

    Document i of q attends to document i of k.
    """
    if _has_kernels(q):
        sizes = (queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest)
        window = [-1, 0] if causal else [-1, -1]
        return torch.ops.torch_attn._varlen_attn(q, k, v, *sizes, causal, scale, window)[:2]
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for of_q, of_k, scores in _scores(q, k, queries, keys, causal, scale):
        values = _per_head(v[of_k], q.shape[1])
        out[of_q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
        lse[:, of_q] = scores.logsumexp(-1)
    return out, lse


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    queries: Documents,
    keys: Documents,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v; out and lse may be those of a softmax over more keys than k."""
    if _has_kernels(q):
        # A slice of lse is not contiguous, and the gradient may be a view of any layout.
        tensors = [x.contiguous() for x in (grad, q, k, v, out, lse)]
        sizes = (queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest)
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        window = [-1, 0] if causal else [-1, -1]
        return torch.ops.torch_attn._varlen_attn_backward(*tensors, *sizes, causal, rng_state, scale, window)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    row_term = (grad.float() * out.float()).sum(-1).T.unsqueeze(-1)
    for of_q, of_k, scores in _scores(q, k, queries, keys, causal, scale):
        probabilities = (scores - lse[:, of_q].unsqueeze(-1)).exp()
        upstream = grad[of_q].float()
        of_values = torch.einsum("qhd,khd->hqk", upstream, _per_head(v[of_k], q.shape[1]))
        of_scores = probabilities * (of_values - row_term[:, of_q]) * scale
        dq[of_q] = torch.einsum("hqk,khd->qhd", of_scores, _per_head(k[of_k], q.shape[1])).to(q.dtype)
        dk[of_k] = _per_kv_head(torch.einsum("hqk,qhd->khd", of_scores, q[of_q].float()), k)
        dv[of_k] = _per_kv_head(torch.einsum("hqk,qhd->khd", probabilities, upstream), v)
    return dq, dk, dv


def _scores(
    q: torch.Tensor, k: torch.Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield per document its queries, its keys, and float32 scores (heads, queries, keys)."""
    bounds = [list(pairwise(x)) for x in (queries.cu_seqlens.tolist(), keys.cu_seqlens.tolist())]
    for of_q, of_k in zip(*([slice(*pair) for pair in pairs] for pairs in bounds), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[of_q].float(), _per_head(k[of_k], q.shape[1])) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        yield of_q, of_k, scores


def _per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat (tokens, KV heads, dim) for the query heads of each group, in float32."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def _per_kv_head(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the gradient of ``_per_head``."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)


# ---------------------------------------------------------------- what transformers calls


def _one_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> list[torch.Tensor]:
    """Return queries, keys and values as (positions, heads, dim), in one dtype.

    Raises:
        ValueError: the model requests something that the kernels would ignore.
    """
    unknown = [name for name in ("sliding_window", "softcap", "s_aux") if options.get(name) is not None]
    unknown += ["dropout"] if options.get("dropout") else []
    if unknown or query.shape[0] != 1:
        raise ValueError(
            f"packed attention cannot serve this model ({', '.join(unknown) or 'more than one sequence'}); "
            f"set packed_attention=none"
        )
    # Under autocast rotary embeddings may leave queries and keys in float32 beside values in bfloat16.
    return [x.to(value.dtype).transpose(1, 2)[0] for x in (query, key, value)]


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    packed: PackedSequence,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute a layer by variable-length kernels; (1, heads, positions, dim) -> (1, positions, heads, dim)."""
    q, k, v = _one_sequence(query, key, value, options)
    return MergedAttention.apply(q, k, v, packed, scaling)[None], None


def block_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    packed: PackedSequence,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the same by FlexAttention, which takes float32 and any head dimension but has no backward on a CPU."""
    q, k, v = (x.transpose(0, 1)[None] for x in _one_sequence(query, key, value, options))
    function = _compiled_flex if q.is_cuda else flex_attention
    out = function(q, k, v, block_mask=packed.block_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Refuse a padding mask: without a mask function of its own, an attention would drop it without an error."""
    if attention_mask is not None:
        raise ValueError("packed attention takes no padding mask: rows are packed, not padded")


for _name, _attention in ((VARLEN, varlen_attention), (BLOCKS, block_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _no_mask)


# ---------------------------------------------------------------- which models

SERVED = frozenset({"llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe"})
"""Model types whose log-probs and gradients are tested against padded rows."""


def reason_against(config: Any) -> str | None:
    """Return why a model cannot be served, None if it can; ``config`` is transformers'."""
    if config.model_type not in SERVED:
        return f"model type {config.model_type} is not tested with packed attention"
    other = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if other:
        return f"it has layers of type {', '.join(other)}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"it attends to a window of {window} tokens"
    if getattr(config, "attention_dropout", 0):
        return f"attention_dropout is {config.attention_dropout}"
    return None


def kernel_reason(config: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why the variable-length kernels cannot compute a model that is served, None if they can."""
    if device.type != "cuda":
        return None
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if dtype not in (torch.bfloat16, torch.float16):
        return f"they compute in bfloat16 or float16, not {dtype}"
    if dim % 8 or dim > 256:
        return f"a head dimension of {dim} is not a multiple of 8 up to 256"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None
