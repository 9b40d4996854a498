"""How the cost of each part of a step, of a start and of the run folder grows, and its share of a step of 60 s.

A part is measured at four sizes: processor time, growth of the process at its highest, and the exponent, which is the
slope of log seconds over log size.  Computed from these is what it takes in the reference step: 1,024 prompts, G = 16,
responses of 8,192 tokens, 64 ranks, 64 rollout workers, a data set of 17,398 or of 2 million prompts.  TransferQueue is
real, on this machine; model, servers and network take no part.
"""

import ctypes
import math
import os
import pickle
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np

from benchmarks import recipe
from benchmarks.report import parser_of, table, write_json

PROMPTS, GROUP, TOKENS, RANKS, STEP_S, LARGE = 1024, 16, 8192, 64, 60.0, 2_000_000
LAST_STEP = 10_000
"""Step at which the run folder is looked at."""


@dataclass(frozen=True)
class Part:
    """A part whose cost is measured.

    Attributes:
        name: what it does.
        unit: of its size.
        sizes: four of them.
        make: prepares a size and returns the call that is measured.
        at: its size in the reference step, or the data set's.
        role: whose time it is: the trainer's in a step, a worker's, or that of the part above; or nobody's in a step.
        times: calls in a step, for a worker those of one.
    """

    name: str
    unit: str
    sizes: tuple[int, int, int, int]
    make: Callable[[int], Callable[[], Any]]
    at: int | Literal["data"]
    role: Literal["trainer", "worker", "within", "other method", "once"]
    times: float = 1.0


@dataclass(frozen=True)
class Growth:
    """What was measured of a part: seconds and bytes at each of its sizes."""

    sizes: Sequence[int]
    seconds: Sequence[float]
    bytes: Sequence[int]

    @property
    def exponent(self) -> float:
        """Slope of log seconds over log size, by least squares."""
        sizes, seconds = ([math.log(value) for value in values] for values in (self.sizes, self.seconds))
        return statistics.linear_regression(sizes, seconds).slope

    def at(self, size: int) -> float:
        """Compute the seconds of a size from the nearest one that was measured."""
        nearest = min(range(len(self.sizes)), key=lambda index: abs(math.log(self.sizes[index] / size)))
        return self.seconds[nearest] * float((size / self.sizes[nearest]) ** self.exponent)


def measured(part: Part, repeats: int) -> Growth:
    """Measure a part at its sizes."""
    seconds, grown = [], []
    for size in part.sizes:
        call = part.make(size)
        ctypes.CDLL(None).malloc_trim(0)
        # Makes the highest memory so far the present one.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = recipe.highest_memory()
        call()
        grown.append(recipe.highest_memory() - before)
        seconds.append(recipe.median_seconds(call, repeats))
    return Growth(part.sizes, seconds, grown)


# ---------------------------------------------------------------- the trainer's step


def _order(prompts: int) -> Callable[[], Any]:
    from transfer_queue import KVBatchMeta

    from recipe.skpo.trainer.skpo import SkpoTrainer

    rng = np.random.default_rng(1)
    keys = [f"v{prompt:010d}_{row}_0" for prompt in range(prompts) for row in range(GROUP + 1)]
    tags = [{"seq_len": 700 + int(tokens)} for tokens in rng.integers(64, TOKENS, len(keys))]
    arrived = rng.permutation(len(keys)).tolist()
    trainer = recipe.trainer_of(SkpoTrainer, prompts, GROUP + 1, RANKS)

    def call() -> None:
        batch = KVBatchMeta(partition_id="train", keys=list(keys), tags=list(tags))
        batch.reorder(arrived)
        trainer._balance_batch(batch, {})

    return call


def _records(prompts: int) -> Callable[[], Any]:
    from recipe.skpo.method.rows import RECORD

    *_, upstream = recipe.prompt_parts(GROUP, 1, TOKENS // 3)["rows"]()
    stored = pickle.dumps(asdict(upstream.extra_fields[RECORD]))
    return lambda: [pickle.loads(stored) for _ in range(prompts)]  # noqa: S301  made one line above


@cache
def _transfer_queue() -> Any:
    import ray
    import transfer_queue

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    transfer_queue.init()
    return transfer_queue


def _fetch(prompts: int) -> Callable[[], Any]:
    from recipe.skpo.method.rows import PHASE_FIELD, Rows
    from recipe.skpo.trainer.skpo import SkpoTrainer

    data, batch = recipe.stored_rows(prompts, GROUP, TOKENS, TOKENS // 3)
    where = {"keys": batch.keys, "partition_id": batch.partition_id}
    _transfer_queue().kv_batch_put(**where, fields=data, tags=batch.tags)
    trainer = recipe.trainer_of(SkpoTrainer, prompts, GROUP + 1, RANKS)

    def call() -> None:
        # Decoding them belongs to the advantage step.
        with patch.object(Rows, "read"):
            trainer._read(batch, PHASE_FIELD)

    return call


def _write(prompts: int) -> Callable[[], Any]:
    import torch
    from tensordict import TensorDict

    from recipe.skpo.method.rows import Rows

    data, batch = recipe.stored_rows(prompts, GROUP, TOKENS, TOKENS // 3)
    ones = torch.ones(len(batch.keys))
    columns = TensorDict(Rows.read(data, batch.keys, batch.tags).write_back(ones, ones), batch_size=len(ones))
    where = {"keys": batch.keys, "partition_id": batch.partition_id}
    return lambda: _transfer_queue().kv_batch_put(**where, fields=columns)


def _of_rows(name: Literal["rollout_metrics", "loss_weights"]) -> Callable[[int], Callable[[], Any]]:
    def make(prompts: int) -> Callable[[], Any]:
        import torch

        from recipe.skpo.method.loss_weights import loss_weights
        from recipe.skpo.method.rows import Rows
        from recipe.skpo.output.metrics import rollout_metrics

        data, batch = recipe.stored_rows(prompts, GROUP, 64, 64)
        rows = Rows.read(data, batch.keys, batch.tags)
        if name == "rollout_metrics":
            return lambda: rollout_metrics(rows, torch.ones(len(rows)))
        return lambda: loss_weights(rows, torch.arange(len(rows)) * 4 // len(rows), 1.0, 1.0)

    return make


def _trackers(prompts: int) -> Callable[[], Any]:
    state = recipe.visited_state(4096)
    keys = [recipe.prompt_key(number) for number in np.random.default_rng(1).permutation(4096)[:prompts].tolist()]
    return lambda: [(state.next_visit(key, 1), state.baseline(key), state.observe(key, 0.25, 800.0)) for key in keys]


def _tree_write(files: int) -> Callable[[], Any]:
    from recipe.skpo.output.trees import TreeStore

    folder = Path(tempfile.mkdtemp())
    _fill(folder, files)
    store = TreeStore(folder, 1e6, files)
    return lambda: store.write(files, [_tree(files)])


# ---------------------------------------------------------------- workers, other methods


def _prompt(tokens: int) -> Callable[[], Any]:
    parts = recipe.prompt_parts(GROUP, tokens, tokens // 3)
    return lambda: [call() for call in parts.values()]


def _rewards(tokens: int) -> Callable[[], Any]:
    from reward_fns import compute_score

    text = "so x = 5, " * (tokens * 4 // 10) + "\\boxed{12}"
    return lambda: [compute_score("math", text, "12") for _ in range(100)]


def _log_ratios(prompts: int) -> Callable[[], Any]:
    import torch

    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.baselines import SpoTrainer
    from recipe.skpo.trainer.state import SkpoState

    data, batch = recipe.stored_rows(prompts, 1, 1024, None)
    data["prompts"] = torch.nested.as_nested_tensor([torch.ones(200).long()] * prompts, layout=torch.jagged)
    trainer = recipe.trainer_of(SpoTrainer, prompts, 1)
    trainer.settings = SkpoSettings(tracker=replace(SkpoSettings().tracker, drift="logratio"))
    trainer.state = SkpoState(trainer.settings, 1024)
    trainer.actor_rollout_wg.compute_log_prob = lambda rows: None
    trainer.config.actor_rollout_ref.rollout.temperature = 1.0
    ids = data.get("id").tolist()
    for tokens, key in enumerate(ids, 1000):
        trainer.state.segments.put(key, torch.ones(tokens).long(), torch.full((tokens,), -0.5))
    rows: dict[str, Any] = {}

    def get(partition_id: str, **_: Any) -> Any:
        if partition_id == batch.partition_id:
            return data
        return {"log_probs": rows["fields"]["input_ids"].float(), "response_mask": rows["fields"]["response_mask"]}

    def call() -> Any:
        functions: Any = {
            "kv_batch_get": get,
            "kv_batch_put": lambda **given: rows.update(given),
            "kv_clear": lambda **_: 0,
        }
        with patch.multiple("transfer_queue", **functions):
            return trainer._log_ratios(batch, range(prompts), ids)

    return call


# ---------------------------------------------------------------- start, checkpoint, run folder


def _check(rows: int) -> Callable[[], Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_prep.schema import PARQUET_SCHEMA, check_parquet

    path = Path(tempfile.mkdtemp()) / "train.parquet"
    fixed = {"data_source": "math", "ability": "math", "reward_model": {"style": "rule", "ground_truth": "12"}}
    with pq.ParquetWriter(path, PARQUET_SCHEMA) as writer:
        for start in range(0, rows, 40_000):
            made = [
                fixed | {"id": recipe.prompt_key(number), "prompt": _chat(number)}
                for number in range(start, min(rows, start + 40_000))
            ]
            writer.write_table(pa.Table.from_pylist(made, PARQUET_SCHEMA))
    return lambda: check_parquet(path, role="train")


def _lengths(rows: int) -> Callable[[], Any]:
    from benchmarks.embedded import model_folder
    from recipe.skpo.task.model_files import load_tokenizer
    from recipe.skpo.task.prompt_lengths import count_tokens

    tokenizer = load_tokenizer(str(model_folder()))
    render = tokenizer.apply_chat_template

    def call() -> None:
        for start in range(0, rows, 1000):
            chats = map(_chat, range(start, start + 1000))
            count_tokens([render(chat, add_generation_prompt=True, tokenize=False) for chat in chats], tokenizer)

    return call


def _chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number}: {'why? ' * 40}"}]


def _save(prompts: int) -> Callable[[], Any]:
    state, folder = recipe.visited_state(prompts), Path(tempfile.mkdtemp())
    return lambda: state.save(folder)


def _page(steps: int) -> Callable[[], Any]:
    from recipe.skpo.output.metrics import MetricsFile
    from recipe.skpo.output.page import page
    from recipe.skpo.output.trees import FOLDER

    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(1)
    file = MetricsFile(folder / "metrics.jsonl", 0)
    for step in range(1, steps + 1):
        file.log({f"part/metric_{number}": value for number, value in enumerate(rng.random(150).tolist())}, step)
    _fill(folder / FOLDER, steps)
    return lambda: page(folder)


def _fill(folder: Path, files: int) -> None:
    """Fill a folder of trees with one step's file under many names."""
    from recipe.skpo.output.trees import TreeStore

    TreeStore(folder, 1e6, 0).write(1, [_tree(1)] * 4)
    for step in range(2, files + 1):
        os.link(folder / "step_000001.parquet", folder / f"step_{step:06d}.parquet")


def _tree(step: int) -> dict[str, Any]:
    words = np.random.default_rng(step).integers(100, 1000, TOKENS).astype(str).tolist()
    text, start = " ".join(words), " ".join(words[: TOKENS // 3])
    kept = {"text": start, "rest": "", "deviation": 0.5, "ended_early": False, "chosen": False}
    segment = {"text": start, "reward": 0.5, "baseline": 0.1, "advantage": 0.4}
    response = {"text": text, "reward": 1.0, "advantage": 0.5, "length": TOKENS, "answer": "12"}
    facts = {"step": step, "prompt_id": "a", "problem": "Why?", "answer": "12", "split_position": TOKENS // 3}
    return facts | {
        "candidates": [kept] * GROUP,
        "segment": segment,
        "skip_prompt": start,
        "responses": [response] * GROUP,
    }


# ---------------------------------------------------------------- all of it

FEW, LONG, STEPS = (128, 256, 512, 1024), (1024, 2048, 4096, 8192), (100, 300, 1000, 3000)
DATA, ROWS = (recipe.DAPO_PROMPTS, 100_000, 400_000, 1_600_000), (10_000, 40_000, 160_000, 640_000)
PARTS = (
    Part("draw of a batch", "data rows", DATA, lambda n: recipe.draws(n, PROMPTS), "data", "trainer"),
    Part("order of rows", "prompts", FEW, _order, PROMPTS, "trainer"),
    Part("rows fetched", "prompts", (8, 16, 32, 64), _fetch, PROMPTS, "trainer"),
    Part("rows written", "prompts", (8, 16, 32, 64), _write, PROMPTS, "trainer"),
    Part("records unpickled", "prompts", (16, 32, 64, 128), _records, PROMPTS, "trainer"),
    Part(
        *("advantage step", "prompts", (16, 32, 64, 128)),
        lambda n: recipe.training_step(n, GROUP, TOKENS, TOKENS // 3),
        *(PROMPTS, "trainer"),
    ),
    Part("- of 16 prompts", "tokens", LONG, lambda n: recipe.training_step(16, GROUP, n, n // 3), TOKENS, "within"),
    Part("- rollout metrics", "prompts", FEW, _of_rows("rollout_metrics"), PROMPTS, "within"),
    Part("- loss weights", "prompts", FEW, _of_rows("loss_weights"), PROMPTS, "within"),
    Part("- visits and trackers", "prompts", FEW, _trackers, PROMPTS, "within"),
    Part("a tree written", "files", STEPS, _tree_write, LAST_STEP, "trainer", 4),
    Part("rollout of a prompt", "tokens", LONG, _prompt, TOKENS, "worker", PROMPTS / RANKS),
    Part("100 rewards", "tokens", LONG, _rewards, TOKENS, "worker", PROMPTS * GROUP / RANKS / 100),
    Part(
        *("SPO: advantage step", "rows", FEW, lambda n: recipe.training_step(n, 1, 64, None)),
        *(PROMPTS * GROUP, "other method"),
    ),
    Part("logratio: rows of its forward", "prompts", (32, 64, 128, 256), _log_ratios, PROMPTS, "other method"),
    Part("start: check of a file", "rows", ROWS, _check, "data", "once"),
    Part("start: prompts' lengths", "rows", (1000, 2000, 4000, 8000), _lengths, "data", "once"),
    Part("trackers saved", "data rows", DATA, _save, "data", "once"),
    Part("page of the run", "steps", STEPS, _page, LAST_STEP, "once"),
)


def report(found: Sequence[tuple[Part, Growth]]) -> str:
    """Make a table of what was measured and what the reference step takes, with the sum of the trainer's parts."""
    sums = dict.fromkeys((recipe.DAPO_PROMPTS, LARGE), 0.0)
    rows = []
    for part, growth in found:
        cells = []
        for data in sums:
            seconds = growth.at(data if part.at == "data" else part.at) * part.times
            sums[data] += seconds * (part.role == "trainer")
            cells.append(f"{seconds:.3g} s" if part.role in ("other method", "once") else _with_share(seconds))
        sizes, spent = ", ".join(f"{size:,}" for size in growth.sizes), ", ".join(f"{s:.2g}" for s in growth.seconds)
        memory = f"{growth.bytes[-1] / 1e6:.0f}"
        rows.append([part.name, part.role, f"{sizes} {part.unit}", spent, memory, f"{growth.exponent:.2f}", *cells])
    rows.append(["sum of the trainer's", *[""] * 5, *map(_with_share, sums.values())])
    return table(["part", "role", "sizes", "seconds", "MB", "exponent", "17k prompts", "2M prompts"], rows)


def _with_share(seconds: float) -> str:
    return f"{seconds:.3g} s ({seconds / STEP_S:.1%})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = parser_of("scale", __doc__ or "")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = [(part, measured(part, options.repeats)) for part in PARTS if options.only in part.name]
    print(report(found))
    values = [{"part": part.name, "exponent": growth.exponent} | vars(growth) for part, growth in found]
    write_json(options.out, {"reference": [PROMPTS, GROUP, TOKENS, RANKS, STEP_S], "values": values})
    return 0
