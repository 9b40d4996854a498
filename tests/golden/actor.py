"""One rank of ``test_golden_actor``: ``python -m tests.golden.actor FOLDER RANK RANKS``.

Builds verl's actor as the recipe's config says, without Ray, lets it make the updates of FOLDER/rows.pt and writes
parameters and gradients as they were before each optimizer step to FOLDER/updates.pt.  Before them it computes old
log-probs with entropy slopes; those of this rank's rows go to FOLDER/slopes-RANK.pt, unless the engine has none.
"""

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from recipe.skpo import cpu

cpu.apply_environment(cpu.environment(num_threads=1, kv_cache_gib=1))

importlib.import_module(cpu.VERL_PLUGIN_MODULE)  # the platform has to be at work before verl asks for it

import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402

from recipe.skpo.method.rows import PHASE_FIELD, SLOPE_FIELD, WANT_SLOPES, WEIGHT_FIELD  # noqa: E402
from recipe.skpo.trainer.objective import skpo_loss  # noqa: E402
from tests.golden.batches import nested  # noqa: E402

Tensors = dict[str, torch.Tensor]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy without sharding; on every rank at the same time."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def stored(rows: list[dict[str, Any]]) -> TensorDict:
    """The rows as the trainer has stored them when it calls the actor."""
    per_token = ("old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights")
    return TensorDict(
        {
            "prompts": nested([row["prompt"] for row in rows]),
            "responses": nested([row["response"] for row in rows]),
            "input_ids": nested([torch.cat([row["prompt"], row["response"]]) for row in rows]),
            "position_ids": nested([torch.arange(len(row["prompt"]) + len(row["response"])) for row in rows]),
            "response_mask": nested([row["mask"] for row in rows]),
            "loss_mask": nested([row["mask"] for row in rows]),
            PHASE_FIELD: torch.stack([row["phase"] for row in rows]),
            WEIGHT_FIELD: torch.stack([row["weight"] for row in rows]),
            **{name: nested([row[name] for row in rows]) for name in per_token if name in rows[0]},
        },
        batch_size=len(rows),
    )


def main(folder: Path, rank: int, ranks: int) -> None:
    """Build, update once per variant from the same weights, write."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # read by the worker, used by nobody: the group meets in a file
        "DIST_INIT_METHOD": f"file://{folder / 'rendezvous'}",
    }
    torch.set_num_threads(1)
    config = OmegaConf.load(folder / "config.yaml")
    job = torch.load(folder / "rows.pt", weights_only=False)
    os.environ["VERL_ENGINE_DEVICE"] = job["device"]
    worker = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
    worker.init_model()
    engine: Any = worker.actor.engine  # type: ignore[union-attr]
    step = engine.optimizer_step
    records: list[tuple[Tensors, Tensors]] = []

    def recorded_step() -> float:
        parameters = dict(engine.module.named_parameters())
        weights = {name: whole(parameter) for name, parameter in parameters.items()}
        gradients = {name: whole(parameter.grad) for name, parameter in parameters.items()}
        records.append((weights, gradients))
        return step()

    engine.optimizer_step = recorded_step
    start = {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}
    per_rank = len(job["rows"]) // ranks
    own = job["rows"][rank * per_rank : (rank + 1) * per_rank]
    data = stored(own)
    temperature = config.actor_rollout_ref.rollout.temperature
    options = {"calculate_entropy": True, "compute_loss": False, "temperature": temperature, WANT_SLOPES: True}
    tensordict_utils.assign_non_tensor(data, **options, **next(iter(job["variants"].values()))["batching"])
    output = worker.compute_log_prob(data)
    if SLOPE_FIELD in output:
        torch.save(list(output[SLOPE_FIELD].unbind()), folder / f"slopes-{rank}.pt")
    updates = {}
    for name, options in job["variants"].items():
        engine.module.load_state_dict(start)
        actor = OmegaConf.merge(config.actor_rollout_ref.actor, options.get("actor", {}))
        worker.set_loss_fn(partial(skpo_loss, config=omega_conf_to_dataclass(actor)))
        data = stored(own)
        tensordict_utils.assign_non_tensor(
            data,
            mini_batch_size=job["rows_per_update"],
            global_batch_size=job["rows_per_update"],
            epochs=actor.ppo_epochs,
            seed=actor.data_loader_seed,
            dataloader_kwargs={"shuffle": actor.shuffle},
            temperature=config.actor_rollout_ref.rollout.temperature,
            calculate_entropy=actor.entropy_coeff != 0,
            **options["batching"],
        )
        worker.update_actor(data)
        updates[name] = list(records)
        records.clear()
    if rank == 0:
        torch.save(updates, folder / "updates.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
