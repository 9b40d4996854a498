"""The order in which verl trains the rows of a batch.

A data-parallel rank trains a contiguous chunk of the batch, in equal contiguous parts, one per update.  Rows are
ordered such that an update sees whole prompts, because both objectives are means over the prompts of an update and
eq. 5 normalises by the tokens of a whole group.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch


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
