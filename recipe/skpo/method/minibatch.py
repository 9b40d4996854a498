"""Which rows share an update, and what share of the objective each row carries.

docs/method.md, section 9: both objectives are means over the prompts of a mini-batch, and equation 5 normalises by the
tokens of a whole group.  verl splits rows into mini-batches by position: a data-parallel rank trains a contiguous chunk
of the batch, in equal contiguous parts, one per update.  So rows are ordered such that an update sees whole prompts,
and every row gets a factor that does not depend on the micro-batch it lands in.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from recipe.skpo.method.loss import UPSTREAM


def slots(prompts: Sequence[str], padding: Sequence[bool], rows_per_prompt: int, prompts_per_update: int) -> list[int]:
    """Per row, the place of its prompt in the order of training; the prompts are dealt evenly over the updates.

    Where prompts were dropped, the last update would otherwise train the few that are left over at full weight.

    Args:
        prompts: per row, the name of its prompt; prompts are trained in the order of their names.
        padding: per row, whether it is padding, which fills up every update.
        rows_per_prompt: rows of every prompt; a batch with incomplete prompts keeps the order of names, padding last.
        prompts_per_update: prompts of a full update.
    """
    counts = Counter(name for name, filler in zip(prompts, padding, strict=True) if not filler)
    if set(counts.values()) != {rows_per_prompt} or len(prompts) % (rows_per_prompt * prompts_per_update):
        rank = {key: place for place, key in enumerate(sorted(set(zip(padding, prompts, strict=True))))}
        return [rank[key] for key in zip(padding, prompts, strict=True)]
    updates = len(prompts) // (rows_per_prompt * prompts_per_update)
    share, rest = divmod(len(counts), updates)
    starts = [update * prompts_per_update for update in range(updates)]
    taken = [place for update, start in enumerate(starts) for place in range(start, start + share + (update < rest))]
    free = iter(sorted(set(range(updates * prompts_per_update)) - set(taken)) * rows_per_prompt)
    place_of = dict(zip(sorted(counts), taken, strict=True))
    return [next(free) if filler else place_of[name] for name, filler in zip(prompts, padding, strict=True)]


def minibatch_order(
    prompts: Sequence[int],
    lengths: Sequence[int],
    rows_per_minibatch: int,
    ranks: int,
    partition: Callable[[list[int], int], list[list[int]]],
    whole: bool = False,
) -> list[int]:
    """Row order in which every update takes whole prompts and its ranks get rows of similar total length.

    Args:
        prompts: per row, the place of its prompt, see ``slots``; prompts go in ascending order.
            Prompts stay whole because each has G + 1 rows, of which ``rows_per_minibatch`` is a multiple.
        lengths: per row, tokens.
        rows_per_minibatch: over all ranks; divides the number of rows and is a multiple of ``ranks``.
        ranks: data-parallel size.
        partition: ``(lengths, ranks) -> indices per rank``, all parts of equal size.
        whole: keep the rows of a prompt on one rank, side by side; only if ``prompts_fit_ranks``.

    Returns:
        A permutation of the rows: rank by rank, within a rank mini-batch by mini-batch.

    Raises:
        ValueError: the rows cannot be split evenly.
    """
    if len(prompts) % rows_per_minibatch or rows_per_minibatch % ranks:
        raise ValueError(
            f"{len(prompts)} rows do not split into mini-batches of {rows_per_minibatch} rows on {ranks} ranks"
        )
    by_prompt = sorted(range(len(prompts)), key=lambda row: prompts[row])
    unit = len(prompts) // len(set(prompts)) if whole else 1
    chunks: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(by_prompt), rows_per_minibatch):
        rows = by_prompt[start : start + rows_per_minibatch]
        units = [rows[at : at + unit] for at in range(0, len(rows), unit)]
        weights = [sum(lengths[row] for row in members) for members in units]
        parts = partition(weights, ranks) if ranks > 1 else [list(range(len(units)))]
        for chunk, part in zip(chunks, parts, strict=True):
            chunk.extend(row for index in sorted(part) for row in units[index])
    return [row for chunk in chunks for row in chunk]


def prompts_fit_ranks(prompts: Sequence[int], rows_per_minibatch: int, ranks: int) -> bool:
    """Whether every prompt has as many rows and every rank can take as many whole prompts of each update."""
    sizes = set(Counter(prompts).values())
    return len(sizes) == 1 and rows_per_minibatch % (sizes.pop() * ranks) == 0


def minibatch_of_rows(rows: int, rows_per_minibatch: int, ranks: int) -> torch.Tensor:
    """Per row of a batch in ``minibatch_order``, the number of the update that trains it; int64 (rows,)."""
    position_in_rank = torch.arange(rows) % (rows // ranks)
    return position_in_rank // (rows_per_minibatch // ranks)


def counted_rows(
    phase: torch.Tensor, prompts: torch.Tensor, padding: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Rows that count in statistics, trackers and objectives.

    Args:
        phase, prompts: per row, as in ``row_scales``.
        padding: bool (rows,).  Padding rows are copies of a real one, role included, so only this tells them apart.
        lengths: trained tokens of the row, (rows,); 0 for a sibling that failed.

    Returns:
        bool (rows,): no padding, with trained tokens and, for a segment, with a sibling that counts (a prompt whose
        responses were all lost while they were stored has no mean reward or length to learn from).
    """
    trained = ~padding & (lengths > 0)
    downstream = phase != UPSTREAM
    return trained & (downstream | torch.isin(prompts, prompts[trained & downstream]))


def row_scales(
    phase: torch.Tensor,
    prompts: torch.Tensor,
    minibatch: torch.Tensor,
    lengths: torch.Tensor,
    valid: torch.Tensor,
    weight_up: float,
    weight_down: float,
    aggregation: str = "group_token_mean",
) -> torch.Tensor:
    """The per-row factor that turns row losses into the objective of the paper, equations 5 and 6.

    Args:
        phase: UPSTREAM or DOWNSTREAM, (rows,).
        prompts: number of the row's prompt, int64 (rows,).
        minibatch: number of the row's update, int64 (rows,).
        lengths: trained tokens of the row, (rows,).
        valid: bool (rows,); False for padding and for siblings that failed.
        weight_up, weight_down: weights of the objectives.
        aggregation: of the downstream tokens: ``group_token_mean`` (eq. 5) or ``token_mean`` over the whole update.

    Returns:
        float32 (rows,), 0 where not valid.  With P the valid prompts of the row's update: ``weight_up / P`` upstream;
        downstream ``weight_down / (P * sum_i |o_i|)`` over the prompt's siblings or, for ``token_mean``,
        ``weight_down / sum |o|`` over all responses of the update.
    """
    upstream = phase == UPSTREAM
    # A prompt's rows share its update; its prompt count is taken once per prompt, at any of its valid rows.
    pairs = torch.unique(torch.stack([minibatch[valid], prompts[valid]]), dim=1)
    prompts_per_update = torch.bincount(pairs[0], minlength=int(minibatch.max()) + 1).clamp(min=1)
    share = 1.0 / prompts_per_update[minibatch].to(torch.float64)
    pooled = aggregation == "token_mean"
    _, pool = torch.unique(minibatch if pooled else prompts, return_inverse=True)
    pool_tokens = torch.zeros(int(pool.max()) + 1, dtype=torch.float64).index_add(
        0, pool, (lengths * (valid & ~upstream)).to(torch.float64)
    )
    downstream = weight_down * (torch.ones_like(share) if pooled else share) / pool_tokens[pool].clamp(min=1)
    scale = torch.where(upstream, weight_up * share, downstream)
    return (scale * valid).to(torch.float32)
