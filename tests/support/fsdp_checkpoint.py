"""Write a checkpoint of a tiny random model as verl's trainer does: FSDP2 over two ranks on gloo, no accelerator.

    python -m tests.support.fsdp_checkpoint <model folder> <actor folder> <reference folder>

The reference is the same model before it was sharded, in float32.
"""

import os
import sys
from pathlib import Path

from recipe.skpo import cpu

RANKS = 2


def write(model_folder: str, actor: str, reference: str) -> None:
    """Shard a model, as random as its seed, and save it with verl's checkpoint manager; one fork per rank."""
    cpu.apply_environment(cpu.environment(1, 1))
    import torch
    from torch.distributed import FileStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    # What was imported is shared; nothing has been computed before the fork.
    child = os.fork()
    rank = int(child == 0)
    store = FileStore(str(Path(reference).with_suffix(".store")), RANKS)
    init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder), dtype=torch.float32)
    if rank == 0:
        model.save_pretrained(reference)
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",)))
    manager = FSDPCheckpointManager(
        model=sharded,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        checkpoint_config={"save_contents": ["model"], "load_contents": ["model"]},
    )
    manager.save_checkpoint(actor, global_step=3)
    destroy_process_group()
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    write(*sys.argv[1:4])
