"""The recipe's own Python against its limits, and where its time goes.

Measured apart from everything that is called: TransferQueue, tokenizer, reward function and model take no part.
Medians of processor time on one thread, at the paper's shape: 128 prompts, G = 8, responses of 3,072 tokens, candidates
of 512.  ``python -m cProfile -s tottime -m benchmarks recipe`` shows where the time goes.
"""

import json
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


def prompt_parts() -> dict[str, Callable[[], Any]]:
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

    outputs, answers = ([answer(n) for _ in range(GROUP)] for n in (SEGMENT_TOKENS, RESPONSE_TOKENS))

    def cut(output: TokenOutput) -> Candidate:
        segment = cut_segment(output.token_ids, output.log_probs or [], SEGMENT_TOKENS, False)
        return Candidate(segment, False, output)

    candidates = [cut(output) for output in outputs]
    # The rows need nothing of a worker's own.
    worker: Any = object.__new__(SkpoAgentLoopWorker)
    worker.settings = SkpoSettings()
    skip = skip_prompt(candidates[0].segment.token_ids, problem)
    state = SkpoState(SkpoSettings(), RESPONSE_TOKENS)

    def select() -> int:
        return select_segment([candidate.segment.deviation for candidate in map(cut, outputs)])

    def rows() -> list[Any]:
        siblings = [worker._row(skip, answer.token_ids, answer.log_probs, {}) for answer in answers]
        return [*siblings, worker._segment_row(problem, candidates, 0, SEGMENT_TOKENS, (0.0, 0.0), 0)]

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


def training_step(prompts: int = PROMPTS) -> Callable[[], dict[str, float]]:
    """Return a call that computes the trainer's advantages, trackers, loss weights and metrics of one batch.

    It is ``SkpoTrainer._compute_advantage`` itself; TransferQueue hands over what is in memory already.  A call returns
    the step's metrics.
    """
    import torch
    from omegaconf import OmegaConf
    from tensordict import NonTensorData, NonTensorStack, TensorDict
    from transfer_queue import KVBatchMeta

    from recipe.skpo.method.rows import (
        DOWNSTREAM,
        PHASE_FIELD,
        RECORD,
        UPSTREAM,
        CandidateRecord,
        RolloutRecord,
        TokenCounts,
    )
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.skpo import SkpoTrainer
    from recipe.skpo.trainer.state import SkpoState

    generator = torch.Generator().manual_seed(1)
    sizes = [SEGMENT_TOKENS, *[RESPONSE_TOKENS] * GROUP] * prompts
    uids = [f"v{number:010d}" for number in range(prompts) for _ in range(GROUP + 1)]
    keys = [f"{uid}_{row % (GROUP + 1)}_0" for row, uid in enumerate(uids)]
    siblings = asdict(TokenCounts(generated=RESPONSE_TOKENS, prefilled=700, cached=600))
    record = RolloutRecord(
        generated=GROUP * SEGMENT_TOKENS,
        prefilled=GROUP * PROBLEM_TOKENS,
        cached=0,
        split_position=SEGMENT_TOKENS,
        candidates=(CandidateRecord(np.zeros(SEGMENT_TOKENS, np.int32), SEGMENT_TOKENS, 0.5, False),) * GROUP,
        chosen=0,
        seconds=1.0,
        downstream_seconds=1.0,
    )

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def scores(tokens: int) -> torch.Tensor:
        row = torch.zeros(tokens)
        row[-1] = float(torch.randint(2, (1,), generator=generator)) * 2 - 1
        return row

    def stack(values: list[Any]) -> NonTensorStack:
        return NonTensorStack.from_list([NonTensorData(value) for value in values])

    fields = {
        "id": stack([f"{int(uid[1:]):016x}" for uid in uids]),
        "uid": stack(uids),
        PHASE_FIELD: torch.tensor([UPSTREAM, *[DOWNSTREAM] * GROUP] * prompts),
        "responses": nested([torch.ones(tokens, dtype=torch.int64) for tokens in sizes]),
        "response_mask": nested([torch.ones(tokens, dtype=torch.int64) for tokens in sizes]),
        "rm_scores": nested([scores(tokens) for tokens in sizes]),
        "rollout_log_probs": nested([torch.full((tokens,), -0.5) for tokens in sizes]),
        "old_log_probs": nested([torch.full((tokens,), -0.5) for tokens in sizes]),
        "extra_fields": stack([{RECORD: asdict(record)}, *[{RECORD: siblings}] * GROUP] * prompts),
    }
    data = TensorDict(fields, batch_size=len(keys))
    trainer: Any = object.__new__(SkpoTrainer)
    trainer.settings = SkpoSettings(trees_per_step=0)
    trainer.state = SkpoState(trainer.settings, RESPONSE_TOKENS)
    trainer.output_dir = Path(tempfile.mkdtemp())
    trainer.global_steps, trainer.resumed_at = 1, 0
    trainer.trees = SimpleNamespace(write=lambda step, trees: None)
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0]})
    actor = {"actor": {"ppo_mini_batch_size": 32}, "rollout": {"n": GROUP + 1, "calculate_log_probs": True}}
    algorithm = {"adv_estimator": "skpo", "rollout_correction": {"rollout_is": None}}
    trainer.config = OmegaConf.create(
        {"actor_rollout_ref": actor, "algorithm": algorithm, "data": {"train_batch_size": prompts}}
    )
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=[{"seq_len": 700 + tokens} for tokens in sizes])

    def step() -> dict[str, float]:
        metrics: dict[str, float] = {}
        taken = patch("transfer_queue.kv_batch_get", lambda **_: data)
        with taken, patch("transfer_queue.kv_batch_put", lambda **_: batch):
            trainer._compute_advantage(batch, metrics)
        return metrics

    return step


# ---------------------------------------------------------------- a million prompts


def prompt_key(number: int) -> str:
    """Make an id as data preparation does: 16 hex digits."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def visited_state(count: int) -> Any:
    """Make a run's state after one visit of every prompt."""
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    state = SkpoState(SkpoSettings(), RESPONSE_TOKENS)
    for number in range(count):
        state.observe(prompt_key(number), 0.5, 900.0)
    return state


def _highest_memory() -> int:
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
        peak = _highest_memory() - before
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


def draw_seconds(prompts: int, repeats: int) -> float:
    """Measure the median time of drawing one batch of 128 by priority from ``prompts`` ids, all visited."""
    from recipe.skpo.method.curriculum import PrioritisedBatches

    state = visited_state(prompts)
    ids = [*map(prompt_key, range(prompts))]
    batches = PrioritisedBatches(ids, PROMPTS, 0.05, state.prompts, lambda: state.rng)
    drawn = iter(batches)
    return median_seconds(lambda: next(drawn), repeats)


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
        Measured(f"draw of a batch from {DAPO_PROMPTS:,} prompts", draw_seconds(DAPO_PROMPTS, repeats) * 1e3, "ms"),
        Measured(f"draw of a batch from {MILLION:,} prompts", draw_seconds(MILLION, 3) * 1e3, "ms"),
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
