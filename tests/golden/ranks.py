"""One data-parallel rank of ``test_golden_batch``: ``python -m tests.golden.ranks FOLDER RANK RANKS SEED...``.

Trains its share of every batch through verl's own micro-batching and averages gradients over gloo, as FSDP does.
Writes what it got to FOLDER/rank<RANK>.pt.
"""

import importlib
import sys
from datetime import timedelta
from pathlib import Path

from recipe.skpo import cpu

cpu.apply_environment(cpu.environment(num_threads=1, kv_cache_gib=1))

importlib.import_module(cpu.VERL_PLUGIN_MODULE)  # the platform has to be at work before verl asks for it

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.engine.utils import prepare_micro_batches  # noqa: E402

from tests.golden.batches import FlatPolicy, gradient_of_updates, make_case  # noqa: E402


def micro_batches(data: TensorDict) -> list[TensorDict]:
    """verl's dynamic batching; ranks agree on the number of micro-batches over gloo."""
    tensordict_utils.assign_non_tensor(data, use_dynamic_bsz=True, max_token_len_per_gpu=32)
    return prepare_micro_batches(data, dp_group=dist.group.WORLD, same_micro_num_in_dp=True)[0]


def main(folder: Path, rank: int, ranks: int, seeds: list[int]) -> None:
    """Join the others, train, write."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    results = []
    for seed in seeds:
        for dtype in (torch.float64, torch.float32):
            policy = FlatPolicy(make_case(seed, ranks), dtype)
            for update, loss, gradient in gradient_of_updates(policy, [rank], micro_batches):
                average = torch.tensor(loss, dtype=torch.float64)
                for value in (gradient, average):
                    dist.all_reduce(value)
                    value /= ranks
                results.append((seed, dtype, update, float(average), gradient))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(seed) for seed in sys.argv[4:]])
