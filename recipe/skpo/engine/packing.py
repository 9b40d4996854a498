"""Rows of a micro-batch as one sequence without padding, in which a shared prompt appears once.

The order is [shared prompts | rows that share nothing | padding | responses to shared prompts], so that attention needs
two calls over slices: every piece within itself, then every response over its prompt (``attention``). Positions restart
after a shared prompt, so every log-prob is that of the separate row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from recipe.skpo.engine.sizes import BLOCK


@dataclass(frozen=True)
class Documents:
    """Consecutive documents of a packed sequence, in the form of variable-length attention.

    Attributes:
        cu_seqlens: int32 (documents + 1,), on the device of the tokens: start of each document, and the end.
        longest: tokens of the longest document; a Python int, so that no layer waits for the device.
    """

    cu_seqlens: torch.Tensor
    longest: int


class PackedSequence:
    """Model inputs of some rows and the layout that attention and log-probs need.

    A plain class, not a dataclass or tuple: it is passed to the model as one keyword argument, FSDP rebuilds the others
    and casts the tensors in them.

    Args:
        prompts, responses: per row, int64 token ids (tokens,) on the CPU, each with at least one token.
        share: lay a prompt that several rows begin with out once.
        multiple: pad the sequence to a multiple of this many tokens; the padding is a document of its own.
        device: of the tensors below.

    Attributes:
        input_ids, position_ids: int64 (1, positions).
        predictors: int64 (response tokens,): position that predicts each response token, in order of rows and, within a
            row, of tokens.
        labels: int64 (response tokens,): these tokens.
        pieces: every piece of the sequence (prompt, row, padding, response) as a document.
        branches, prefixes: the responses of each tree together as one document, and the prompt of each tree.
        prefix_tokens: the shared prompts are ``[0, prefix_tokens)``.
        branches_from: the responses to them are ``[branches_from, positions)``.
        temperature: divides the logits; a number or float32 (response tokens,).
        with_slopes: whether entropy slopes are to be computed.
    """

    def __init__(
        self,
        prompts: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        *,
        share: bool = True,
        multiple: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        trees, singles = _group(prompts) if share else ([], list(range(len(prompts))))
        pieces: list[_Piece] = [
            _Piece(prompts[rows[0]], first_position=0, tree=tree, branch=0) for tree, rows in enumerate(trees)
        ]
        ends = np.cumsum([len(piece.tokens) for piece in pieces], dtype=np.int64)
        at = int(ends[-1]) if trees else 0
        self.prefix_tokens = at
        predictors: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        for row in singles:
            tokens = torch.cat([prompts[row], responses[row]])
            first = at + len(prompts[row]) - 1
            predictors[row] = torch.arange(first, first + len(responses[row]))
            pieces.append(_Piece(tokens, first_position=0, tree=len(prompts) + row, branch=0))
            at += len(tokens)
        padding = -(at + sum(len(responses[row]) for rows in trees for row in rows)) % multiple
        if padding:
            pieces.append(_Piece(torch.zeros(padding, dtype=torch.int64), first_position=0, tree=-1, branch=0))
        self.branches_from = at = at + padding
        for tree, rows in enumerate(trees):
            for branch, row in enumerate(rows, 1):
                predictors[row] = torch.arange(at - 1, at - 1 + len(responses[row]))
                # The last token of the prompt predicts the first one of every response.
                predictors[row][0] = int(ends[tree]) - 1
                pieces.append(_Piece(responses[row], first_position=len(prompts[row]), tree=tree, branch=branch))
                at += len(responses[row])
        self.positions = at
        self._pieces = pieces
        self.input_ids = torch.cat([piece.tokens for piece in pieces])[None].to(device)
        self.position_ids = torch.cat(
            [torch.arange(piece.first_position, piece.first_position + len(piece.tokens)) for piece in pieces]
        )[None].to(device)
        self.predictors = torch.cat(predictors).to(device)
        self.labels = torch.cat(list(responses)).to(device)
        self.pieces = _documents([len(piece.tokens) for piece in pieces], device)
        self.branches = _documents([sum(len(responses[row]) for row in rows) for rows in trees], device)
        self.prefixes = _documents([len(prompts[rows[0]]) for rows in trees], device)
        self.temperature: float | torch.Tensor = 1.0
        self.with_slopes = False

    @cached_property
    def block_mask(self):  # type: ignore[no-untyped-def]  # a type of torch's that is imported late
        """Visibility for FlexAttention; ``positions`` must be a multiple of ``BLOCK``.

        Built from the pieces, because ``create_block_mask`` would evaluate all pairs of tokens.
        """
        from torch.nn.attention.flex_attention import BlockMask

        blocks = self.positions // BLOCK
        needed = np.zeros((blocks, blocks), dtype=bool)
        starts: dict[int, tuple[int, int]] = {}
        at = 0
        for piece in self._pieces:
            end = at + len(piece.tokens)
            if piece.branch == 0:
                starts[piece.tree] = (at, end)
            for query in range(at // BLOCK, (end - 1) // BLOCK + 1):
                needed[query, at // BLOCK : query + 1] = True
                if piece.branch:
                    prefix = starts[piece.tree]
                    needed[query, prefix[0] // BLOCK : (prefix[1] - 1) // BLOCK + 1] = True
            at = end
        device = self.input_ids.device
        lengths = torch.tensor([len(piece.tokens) for piece in self._pieces])
        tree, branch = (
            torch.tensor([getattr(piece, name) for piece in self._pieces]).repeat_interleave(lengths).to(device)
            for name in ("tree", "branch")
        )

        def visible(batch, head, query, key):  # type: ignore[no-untyped-def]
            same = (tree[query] == tree[key]) & ((branch[key] == 0) | (branch[query] == branch[key]))
            return (query >= key) & same

        return BlockMask.from_kv_blocks(
            torch.from_numpy(needed.sum(1, dtype=np.int32)).to(device)[None, None],
            torch.from_numpy(np.argsort(~needed, axis=1, kind="stable").astype(np.int32)).to(device)[None, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=visible,
        )


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens that attend to each other; ``branch`` 0 is seen by all branches of its ``tree``."""

    tokens: torch.Tensor
    first_position: int
    tree: int
    branch: int


def _group(prompts: Sequence[torch.Tensor]) -> tuple[list[list[int]], list[int]]:
    """Return the groups of two or more rows with the same prompt, and the rows whose prompt no other row has."""
    groups: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt.numpy().tobytes(), []).append(row)
    trees = [rows for rows in groups.values() if len(rows) > 1]
    return trees, [rows[0] for rows in groups.values() if len(rows) == 1]


def _documents(lengths: Sequence[int], device: torch.device | str) -> Documents:
    starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return Documents(starts.to(device, torch.int32), max(lengths, default=0))
