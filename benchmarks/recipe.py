"""The recipe's own Python against its limits, and where its time goes.

Measured apart from everything that is called: TransferQueue, tokenizer, reward function and model take no part.
Medians of processor time on one thread, at the paper's shape: 128 prompts, G = 8, responses of 3,072 tokens, candidates
of 512.  ``python -m cProfile -s tottime -m benchmarks recipe`` shows where the time goes.
"""

import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.report import parser_of, table, write_json

PROMPTS, GROUP, RESPONSE_TOKENS, SEGMENT_TOKENS, PROBLEM_TOKENS = 128, 8, 3072, 512, 200
DAPO_PROMPTS, MILLION = 17_398, 1_000_000


@dataclass(frozen=True)
class Measured:
    """One quantity, its unit and the limit that it must stay under; None if it is only reported."""

    name: str
    value: float
    unit: str
    limit: float | None = None


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Measure the median processor time of a call, after one that is not counted.

    Not wall time, so that other work on the machine does not count; with one thread, as here, they are otherwise equal.
    """
    call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


# ---------------------------------------------------------------- per prompt, in a rollout worker


def prompt_parts(
    group: int = GROUP, tokens: int = RESPONSE_TOKENS, segment: int = SEGMENT_TOKENS
) -> dict[str, Callable[[], Any]]:
    """Return the recipe's work for one prompt on top of verl, by name; its inputs are made beforehand."""
    from verl.workers.rollout.replica import TokenOutput

    from recipe.skpo.method.segments import cut_segment, select_segment, skip_prompt
    from recipe.skpo.rollout.two_phases import Candidate, SkpoAgentLoopWorker
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    rng = np.random.default_rng(1)
    problem = rng.integers(0, 30_000, PROBLEM_TOKENS).tolist()

    def answer(tokens: int) -> TokenOutput:
        return TokenOutput(
            token_ids=rng.integers(0, 30_000, tokens).tolist(),
            log_probs=(-rng.exponential(size=tokens)).tolist(),
            extra_fields={"num_cached_tokens": 0},
        )

    outputs, answers = ([answer(n) for _ in range(group)] for n in (segment, tokens))

    def cut(output: TokenOutput) -> Candidate:
        kept = cut_segment(output.token_ids, output.log_probs or [], segment, False)
        return Candidate(kept, False, output)

    candidates = [cut(output) for output in outputs]
    # The rows need nothing of a worker's own.
    worker: Any = object.__new__(SkpoAgentLoopWorker)
    worker.settings = SkpoSettings()
    skip = skip_prompt(candidates[0].segment.token_ids, problem)
    state = SkpoState(SkpoSettings(), tokens)

    def select() -> int:
        return select_segment([candidate.segment.deviation for candidate in map(cut, outputs)])

    def rows() -> list[Any]:
        siblings = [worker._row(skip, answer.token_ids, answer.log_probs, {}) for answer in answers]
        return [*siblings, worker._segment_row(problem, candidates, 0, segment, (0.0, 0.0), 0, 0.0)]

    def trackers() -> None:
        state.next_visit("a", 1)
        state.baseline("a")
        state.observe("a", 0.25, 1000.0)

    return {
        "selection": select,
        "prompt building": lambda: skip_prompt(candidates[0].segment.token_ids, problem),
        "rows": rows,
        "trackers": trackers,
    }


# ---------------------------------------------------------------- per step, in the trainer


def stored_rows(
    prompts: int, group: int = GROUP, tokens: int = RESPONSE_TOKENS, segment: int | None = SEGMENT_TOKENS
) -> tuple[Any, Any]:
    """Make a batch as TransferQueue hands it over: its columns, its keys and tags.

    Each prompt has its own record of candidates of real length, as a rollout worker makes it.

    Args:
        prompts: number of them.
        group: responses of each.
        tokens: of each response.
        segment: tokens of a segment and of each candidate; None makes responses alone, as verl's own agent stores them.
    """
    import torch
    from tensordict import NonTensorData, NonTensorStack, TensorDict
    from transfer_queue import KVBatchMeta

    from recipe.skpo.method.rows import (
        DOWNSTREAM,
        PHASE_FIELD,
        RECORD,
        REWARD_TAG,
        TRAINED_TAG,
        UPSTREAM,
        TokenCounts,
    )

    generator = torch.Generator().manual_seed(1)
    phases = [DOWNSTREAM] * group if segment is None else [UPSTREAM, *[DOWNSTREAM] * group]
    sizes = [tokens if phase == DOWNSTREAM or segment is None else segment for phase in phases] * prompts
    uids = [f"v{number:010d}" for number in range(prompts) for _ in phases]
    keys = [f"{uid}_{row % len(phases)}_0" for row, uid in enumerate(uids)]
    rewards = (torch.randint(2, (len(sizes),), generator=generator) * 2.0 - 1).tolist()
    extras: list[Any] = [{"num_cached_tokens": 600, RECORD: asdict(TokenCounts(tokens, 700, 600))}] * group * prompts
    if segment is not None:
        *_, upstream = prompt_parts(group, 1, segment)["rows"]()
        stored = pickle.dumps({RECORD: asdict(upstream.extra_fields[RECORD])})
        own = [pickle.loads(stored) for _ in range(prompts)]  # noqa: S301  made one line above
        extras = [extra for record in own for extra in [record, *extras[:group]]]

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def scores(size: int, reward: float) -> torch.Tensor:
        row = torch.zeros(size)
        row[-1] = reward
        return row

    def stack(values: list[Any]) -> NonTensorStack:
        return NonTensorStack.from_list([NonTensorData(value) for value in values])

    fields = {
        "id": stack([f"{int(uid[1:]):016x}" for uid in uids]),
        "uid": stack(uids),
        "responses": nested([torch.ones(size, dtype=torch.int64) for size in sizes]),
        "response_mask": nested([torch.ones(size, dtype=torch.int64) for size in sizes]),
        "rm_scores": nested(list(map(scores, sizes, rewards))),
        "rollout_log_probs": nested([torch.full((size,), -0.5) for size in sizes]),
        "old_log_probs": nested([torch.full((size,), -0.5) for size in sizes]),
        "extra_fields": stack(extras),
    }
    if segment is not None:
        fields[PHASE_FIELD] = torch.tensor(phases * prompts)
    tags = [
        {"seq_len": 700 + size, "prompt_len": 700, "response_len": size, TRAINED_TAG: size, REWARD_TAG: reward}
        for size, reward in zip(sizes, rewards, strict=True)
    ]
    data = TensorDict(fields, batch_size=len(keys))
    return data, KVBatchMeta(partition_id="train", keys=keys, tags=tags)


def trainer_of(kind: type, prompts: int, rows_per_prompt: int, ranks: int = 1, tokens: int = RESPONSE_TOKENS) -> Any:
    """Make a trainer that has what a step's own Python reads, without model, servers and files."""
    from omegaconf import OmegaConf

    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    trainer: Any = object.__new__(kind)
    trainer.settings = SkpoSettings(trees_per_step=0)
    trainer.state = SkpoState(trainer.settings, tokens)
    trainer.output_dir = Path(tempfile.mkdtemp())
    trainer.global_steps, trainer.resumed_at, trainer.use_critic = 1, 0, False
    trainer.trees = SimpleNamespace(write=lambda step, trees: None)
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(ranks))})
    trainer.tokenizer = SimpleNamespace(eos_token_id=0)
    trainer.agent_loop_manager = SimpleNamespace(take_tokens=lambda: {"generated": 0}, take_failures=dict)
    update = max(prompts // 4, ranks)
    actor = {"actor": {"ppo_mini_batch_size": update}, "rollout": {"n": rows_per_prompt, "calculate_log_probs": True}}
    algorithm = {"adv_estimator": "skpo", "rollout_correction": {"rollout_is": None}}
    data = {"train_batch_size": prompts}
    trainer.config = OmegaConf.create(
        {"actor_rollout_ref": actor, "algorithm": algorithm, "data": data, "trainer": {"critic_warmup": 0}}
    )
    return trainer


def training_step(
    prompts: int = PROMPTS, group: int = GROUP, tokens: int = RESPONSE_TOKENS, segment: int | None = SEGMENT_TOKENS
) -> Callable[[], dict[str, float]]:
    """Return a call that computes the trainer's advantages, trackers, loss weights and metrics of one batch.

    It is ``_compute_advantage`` of SKPO's trainer itself, without a segment of SPO's; TransferQueue hands over what is
    in memory already.  A call returns the step's metrics.
    """
    from recipe.skpo.trainer.baselines import SpoTrainer
    from recipe.skpo.trainer.skpo import SkpoTrainer

    data, batch = stored_rows(prompts, group, tokens, segment)
    kind = SpoTrainer if segment is None else SkpoTrainer
    trainer = trainer_of(kind, prompts, len(batch) // prompts, tokens=tokens)

    def step() -> dict[str, float]:
        metrics: dict[str, float] = {}
        taken = patch("transfer_queue.kv_batch_get", lambda select_fields, **_: data.select(*select_fields))
        with taken, patch("transfer_queue.kv_batch_put", lambda **_: batch):
            trainer._compute_advantage(batch, metrics)
        return metrics

    return step


# ---------------------------------------------------------------- a million prompts


def prompt_key(number: int) -> str:
    """Make an id as data preparation does: 16 hex digits."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def visited_state(count: int) -> Any:
    """Make a run's state after one visit of every prompt, in random order as in a run."""
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    state = SkpoState(SkpoSettings(), RESPONSE_TOKENS)
    for number in np.random.default_rng(2).permutation(count).tolist():
        state.observe(prompt_key(number), 0.5, 900.0)
    return state


def highest_memory() -> int:
    """Read the highest resident memory of this process in bytes (``ru_maxrss`` would count the parent's)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def million(count: int = MILLION) -> dict[str, float]:
    """Measure trackers that know ``count`` prompts, in a process that did nothing else: see ``fresh_million``.

    Returns:
        ``memory_mb``: growth of resident memory by the state; ``peak_mb``: growth by the end of a save, at its
        highest; ``update_ms``: of 128 prompts, read and observed; ``save_s``; ``load_s``; ``file_mb``.
    """
    import psutil

    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    process = psutil.Process()
    visited_state(1000)
    before = process.memory_info().rss
    state = visited_state(count)
    memory = process.memory_info().rss - before
    rng = np.random.default_rng(1)

    def update() -> None:
        state.clock.advance(0.001)
        for number in rng.integers(count, size=PROMPTS).tolist():
            key = prompt_key(number)
            state.baseline(key)
            state.observe(key, 0.25, 800.0)

    update_seconds = median_seconds(update, 15)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        path = state.save(Path(folder))
        save_seconds = time.process_time() - start
        size = path.stat().st_size
        peak = highest_memory() - before
        loaded = SkpoState(SkpoSettings(), RESPONSE_TOKENS)
        start = time.process_time()
        loaded.load(Path(folder))
        load_seconds = time.process_time() - start
    return {
        "memory_mb": memory / 1e6,
        "peak_mb": peak / 1e6,
        "update_ms": update_seconds * 1e3,
        "save_s": save_seconds,
        "load_s": load_seconds,
        "file_mb": size / 1e6,
    }


def fresh_million(count: int = MILLION) -> dict[str, float]:
    """Run ``million`` in a process of its own, so that its memory is measured alone."""
    code = f"import json; from benchmarks.recipe import million; print(json.dumps(million({count})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace", check=True
    )
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def draws(prompts: int, batch: int = PROMPTS) -> Callable[[], list[int]]:
    """Return a call that draws a batch by priority from ``prompts`` ids, all visited."""
    from recipe.skpo.method.curriculum import PrioritisedBatches

    state = visited_state(prompts)
    ids = [*map(prompt_key, range(prompts))]
    drawn = iter(PrioritisedBatches(ids, batch, 0.05, state.prompts, lambda: state.rng))
    return lambda: next(drawn)


# ---------------------------------------------------------------- all of it


def measure(repeats: int) -> list[Measured]:
    """Measure every quantity."""
    import torch

    torch.set_num_threads(1)
    parts = {name: median_seconds(call, repeats) * 1e3 for name, call in prompt_parts().items()}
    step = median_seconds(training_step(), repeats) * 1e3
    table = fresh_million()
    return [
        *(Measured(f"per prompt: {name}", value, "ms") for name, value in parts.items()),
        Measured("per prompt: advantages and row shares", step / PROMPTS, "ms"),
        Measured("per prompt: all of it", sum(parts.values()) + step / PROMPTS, "ms", 1.0),
        Measured(f"step: advantages and trackers, {PROMPTS} prompts x {GROUP + 1} rows", step, "ms", 50.0),
        Measured("million prompts: memory", table["memory_mb"], "MB", 300.0),
        Measured("million prompts: highest memory while saving", table["peak_mb"], "MB"),
        Measured("million prompts: 128 updates", table["update_ms"], "ms", 5.0),
        Measured("million prompts: save", table["save_s"], "s", 3.0),
        Measured("million prompts: load", table["load_s"], "s"),
        Measured("million prompts: file", table["file_mb"], "MB"),
        Measured(
            f"draw of a batch from {DAPO_PROMPTS:,} prompts", median_seconds(draws(DAPO_PROMPTS), repeats) * 1e3, "ms"
        ),
        Measured(f"draw of a batch from {MILLION:,} prompts", median_seconds(draws(MILLION), 3) * 1e3, "ms"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if a limit is passed."""
    parser = parser_of("recipe", __doc__ or "")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
    found = measure(options.repeats)
    limits = ["" if item.limit is None else f"{item.limit:g} {item.unit}" for item in found]
    rows = [[item.name, f"{item.value:.3g} {item.unit}", limit] for item, limit in zip(found, limits, strict=True)]
    print(table(["what", "measured", "limit"], rows))
    write_json(options.out, {"values": [vars(item) for item in found]})
    return int(any(item.limit is not None and item.value > item.limit for item in found))
