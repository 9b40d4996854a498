"""One actor update, forward and backward, with and without shared prompts (``share_prefixes``).

Drives the two engines' own code from a micro-batch to log-probs and back, without FSDP, Ray or an optimizer: those
cost the same in both.  Micro-batches hold whole prompts, ``--prompts-per-batch`` of them; each response has between
half and all of ``--response`` tokens.  The defaults are the sizes of the default run.  Both engines take turns.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import embedded
from benchmarks.report import parser_of, table, write_json

VOCABULARY = 1000
Rows = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Shape:
    """Tokens per prompt: a segment row under q, and ``group`` responses under [s, q]."""

    prompts: int
    group: int
    problem: int
    segment: int
    response: int

    def rows(self, generator: torch.Generator) -> list[Rows]:
        """Make, per prompt, the prompts and responses of its rows."""

        def tokens(count: int) -> torch.Tensor:
            return torch.randint(VOCABULARY, (count,), generator=generator)

        made = []
        for _ in range(self.prompts):
            problem, segment = tokens(self.problem), tokens(self.segment)
            lengths = torch.randint(max(1, self.response // 2), self.response + 1, (self.group,), generator=generator)
            prompts = [problem, *[torch.cat([segment, problem])] * self.group]
            made.append((prompts, [segment, *map(tokens, lengths.tolist())]))
        return made


def load_model(folder: str) -> Any:
    """Load a checkpoint, or with ``random`` make a small model, in float32 with sdpa, as on the CPU platform."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder != "random":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def micro_batch(rows: Sequence[Rows]) -> Any:
    """Pack rows as verl passes them to an engine."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    def nested(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    prompts, responses = ([row for part in rows for row in part[side]] for side in (0, 1))
    inputs = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    fields = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested(inputs),
        "position_ids": nested([torch.arange(len(row)) for row in inputs]),
    }
    data = TensorDict(fields, batch_size=len(prompts))
    tu.assign_non_tensor(data, use_remove_padding=False, calculate_entropy=False, pad_token_id=0, temperature=1.0)
    return data


def update(engine_class: type, model: Any, batches: Sequence[Any]) -> tuple[float, int]:
    """Run forward and backward over all micro-batches; returns seconds, and computed positions, padding included."""
    engine: Any = object.__new__(engine_class)
    engine.pad_to_length = None
    engine.use_ulysses_sp = False
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False)
    model.zero_grad()
    positions = 0
    start = time.perf_counter()
    for data in batches:
        inputs, arguments = engine.prepare_model_inputs(data)
        positions += inputs["input_ids"].numel()
        output = engine.prepare_model_outputs(model(**inputs), arguments, data, None)
        (-output["log_probs"].values().sum()).backward()
    return time.perf_counter() - start, positions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from recipe.skpo.engine.dense import SharedPrefixEngine

    parser = parser_of("update", __doc__ or "")
    parser.add_argument("--model", default="", help="checkpoint folder, or random (default: the embedded model)")
    for name, default in (("prompts", 4), ("group", 8), ("problem", 70), ("segment", 5), ("response", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompts-per-batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shared-only", action="store_true", help="leave separate rows out")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    shape = Shape(options.prompts, options.group, options.problem, options.segment, options.response)
    rows = shape.rows(torch.Generator().manual_seed(1))
    size = options.prompts_per_batch
    batches = [micro_batch(rows[first : first + size]) for first in range(0, len(rows), size)]
    options.model = options.model or str(embedded.model_folder())
    model = load_model(options.model)
    engines = {"separate rows": FSDPEngineWithLMHead, "shared prompts": SharedPrefixEngine}
    if options.shared_only:
        del engines["separate rows"]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    positions = {}
    for repeat in range(options.repeats + 1):
        for name, engine_class in engines.items():
            taken, positions[name] = update(engine_class, model, batches)
            if repeat:  # the first one warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = next(iter(medians.values()))
    lines = [[name, f"{value:.3f}", f"{base / value:.2f}", f"{positions[name]:,}"] for name, value in medians.items()]
    print(table(["engine", "seconds", "speed-up", "positions computed"], lines))
    settings = {**vars(options), "model": Path(options.model).name, "out": options.out.name}
    write_json(options.out, {"settings": settings, "seconds": seconds, "positions": positions})
    return 0
