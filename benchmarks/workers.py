"""The recipe's real rollout workers without Ray, so that the code of a training run is measured.

A worker is built by its own constructor from a composed config.  Instead of process borders, TransferQueue's puts are
counted, the reward worker answers from this process, and the client in front of the server notes each request.
"""

import asyncio
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from omegaconf import DictConfig, OmegaConf
from verl.workers.rollout.replica import TokenOutput

from benchmarks.comparison import GRPO, TWO_BATCH
from recipe.skpo.method.rows import Visit, visit_columns
from recipe.skpo.rollout.two_phases import Candidate, SkpoAgentLoopWorker
from recipe.skpo.rollout.worker import RolloutWorker

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """One line of the comparison.

    Attributes:
        name: as printed.
        method: ``grpo`` (G independent responses), ``skpo``, ``two-batch`` (SKPO as two global batches of verl's stock
            kind: a barrier between them, every request routed on its own, first come, first served), ``barrier`` (the
            barrier alone) or ``arrival`` (SKPO without priorities).
        candidates: upstream candidates per prompt; of no effect for GRPO.
    """

    name: str
    method: str
    candidates: int

    @property
    def config_method(self) -> str:
        """The recipe's config group that it runs with."""
        return "grpo" if self.method == "grpo" else "skpo"


def variants(group_size: int) -> list[Variant]:
    """List the compared variants."""
    counts = sorted({group_size, min(3, group_size), 1}, reverse=True)
    return [
        Variant(GRPO, "grpo", group_size),
        *(Variant(f"SKPO, candidates={count}", "skpo", count) for count in counts),
        Variant("SKPO in order of arrival", "arrival", group_size),
        Variant("SKPO with a barrier", "barrier", group_size),
        Variant(TWO_BATCH, "two-batch", group_size),
    ]


@dataclass(frozen=True)
class Prompt:
    """One training prompt with the trainer's decisions before its rollout."""

    id: str
    messages: list[dict[str, str]]
    ground_truth: str
    data_source: str
    visit: Visit


@dataclass(frozen=True)
class Call:
    """One request as the worker saw it; times in seconds of the event loop's clock, counts in tokens."""

    phase: str
    start: float
    end: float
    generated: int
    prefilled: int
    cached: int


class RecordingClient:
    """verl's LLM client, with a note of every request.

    The routing id shows the phase: ``...-up`` and ``...-down`` are the recipe's, verl's own loop has random ones.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, request_id: str, *, prompt_ids: list[int], **kwargs: Any) -> TokenOutput:
        """As verl's client."""
        clock = asyncio.get_running_loop().time
        start = clock()
        phase = {"up": "upstream", "down": "downstream"}.get(request_id.rpartition("-")[2], "responses")
        output = await self._client.generate(request_id=request_id, prompt_ids=prompt_ids, **kwargs)
        cached = int(output.extra_fields.get("num_cached_tokens") or 0)
        self.calls.append(Call(phase, start, clock(), len(output.token_ids), len(prompt_ids), cached))
        return output


class BarrierWorker(SkpoAgentLoopWorker):
    """SKPO with a barrier: no prompt continues before every prompt has its segment."""

    barrier: asyncio.Barrier

    async def _sample_candidates(self, *args: Any, **kwargs: Any) -> list[Candidate]:
        candidates = await super()._sample_candidates(*args, **kwargs)
        await self.barrier.wait()
        return candidates


class ArrivalWorker(SkpoAgentLoopWorker):
    """SKPO whose requests are served in order of arrival."""

    async def _generate(self, route: str, index: int, prompt_ids: list[int], params: dict, *rest: Any) -> TokenOutput:
        return await super()._generate(route, index, prompt_ids, dict(params, priority=0), *rest)


class TwoBatchWorker(BarrierWorker, ArrivalWorker):
    """SKPO as two global batches of verl's stock kind: siblings have routing ids of their own and are scattered."""

    async def _generate(self, route: str, index: int, *rest: Any) -> TokenOutput:
        # Requests are counted by the phase, the last part.
        uid, _, phase = route.rpartition("-")
        return await super()._generate(f"{uid}-{index}-{phase}", index, *rest)


WORKERS: dict[str, type[RolloutWorker]] = {
    "grpo": RolloutWorker,
    "skpo": SkpoAgentLoopWorker,
    "two-batch": TwoBatchWorker,
    "barrier": BarrierWorker,
    "arrival": ArrivalWorker,
}


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one phase of one rollout; ``cached`` tokens are part of ``prefilled`` ones.

    ``seconds`` are from its first request to its last answer; phases of different prompts overlap.
    """

    seconds: float
    requests: int
    generated: int
    prefilled: int
    cached: int


@dataclass(frozen=True)
class RolloutCost:
    """One rollout of a batch: seconds until the last row is stored, and the cost of each phase."""

    seconds: float
    phases: dict[str, PhaseCost]


def phase_costs(calls: Iterable[Call]) -> dict[str, PhaseCost]:
    """Sum per phase, in the order in which the phases began."""
    grouped: dict[str, list[Call]] = {}
    for call in sorted(calls, key=lambda call: call.start):
        grouped.setdefault(call.phase, []).append(call)
    return {
        phase: PhaseCost(
            seconds=max(call.end for call in phase_calls) - min(call.start for call in phase_calls),
            requests=len(phase_calls),
            generated=sum(call.generated for call in phase_calls),
            prefilled=sum(call.prefilled for call in phase_calls),
            cached=sum(call.cached for call in phase_calls),
        )
        for phase, phase_calls in grouped.items()
    }


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the recipe's config under Hydra overrides, resolved, outside of a Hydra run."""
    from hydra import compose, initialize_config_dir

    import recipe.skpo.main  # noqa: F401  registers the resolvers

    # These three ask for Hydra's own node, which only a Hydra run has.
    needed = ["output_dir=outputs/benchmarks", "trainer.experiment_name=benchmark"]
    with initialize_config_dir(str(REPOSITORY / "recipe/skpo/config"), version_base=None):
        config = compose("skpo_trainer", overrides=[*needed, *overrides])
    OmegaConf.resolve(config)
    return config


class _Queue:
    """TransferQueue as far as a rollout worker uses it: rows are counted, the prompts' status is kept."""

    def __init__(self) -> None:
        self.rows = 0
        self.status: dict[str, str] = {}

    async def put(self, key: str, partition_id: str, tag: dict[str, str], **rest: Any) -> None:
        self.status[key] = tag["status"]

    async def put_batch(self, keys: Sequence[str], partition_id: str, **rest: Any) -> None:
        self.rows += len(keys)


@contextmanager
def counted_queue() -> Iterator[_Queue]:
    """Replace TransferQueue by a counter."""
    queue = _Queue()
    with (
        patch("transfer_queue.init", lambda *args, **kwargs: None),
        patch("transfer_queue.async_kv_put", queue.put),
        patch("transfer_queue.async_kv_batch_put", queue.put_batch),
    ):
        yield queue


async def roll_out(
    variant: Variant, config: DictConfig, client: Any, reward: Any, prompts: Sequence[Prompt]
) -> RolloutCost:
    """Roll out a batch by the variant's worker, with the config composed for it.

    ``client`` has the signature of verl's LLM client; ``reward.compute_score.remote(data)`` is awaited.

    Raises:
        RuntimeError: a prompt failed; times of a partial rollout mean nothing.
    """
    clock = asyncio.get_running_loop().time
    recording = RecordingClient(client)
    with counted_queue() as queue:
        with redirect_stdout(io.StringIO()):  # verl prints which dataset class it has found
            worker: Any = WORKERS[variant.method](config, recording, reward_loop_worker_handles=[reward])
        if isinstance(worker, BarrierWorker):
            worker.barrier = asyncio.Barrier(len(prompts))
        start = clock()
        await worker.generate_sequences(_batch(prompts))
        await asyncio.gather(*worker.background_tasks)
        seconds = clock() - start
    rows = len(prompts) * config.actor_rollout_ref.rollout.n
    if set(queue.status.values()) != {"finished"} or queue.rows != rows:
        raise RuntimeError(f"{variant.name}: {queue.rows} rows of {rows} were stored; see the log above")
    return RolloutCost(seconds, phase_costs(recording.calls))


def _batch(prompts: Sequence[Prompt]) -> Any:
    """Pack the batch as the trainer passes it to verl's rollout manager."""
    from verl.utils import tensordict_utils as tu

    def objects(values: list[Any]) -> np.ndarray:
        column = np.empty(len(values), dtype=object)
        column[:] = values
        return column

    columns: dict[str, Any] = {
        "id": objects([prompt.id for prompt in prompts]),
        "uid": objects([f"v{number:010d}" for number in range(len(prompts))]),
        "data_source": objects([prompt.data_source for prompt in prompts]),
        "raw_prompt": objects([prompt.messages for prompt in prompts]),
        "reward_model": objects([{"style": "rule", "ground_truth": prompt.ground_truth} for prompt in prompts]),
        "extra_info": objects([{"split": "train", "index": 0, "question": ""} for _ in prompts]),
        "index": objects([0] * len(prompts)),
        **visit_columns([prompt.visit for prompt in prompts]),
    }
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    return batch


def quiet() -> None:
    """Log only errors: verl logs every new worker, and there are many here."""
    logging.disable(logging.WARNING)
