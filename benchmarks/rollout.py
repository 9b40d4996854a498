"""Rollout of SKPO (candidates G, 3, 1), GRPO and two-batch SKPO, side by side: the same prompts, budget and server.

    python -m benchmarks.rollout simulated [--prompts 128] [--group 8] [--response-length 3072] [--replicas 8 64]
    python -m benchmarks.rollout real [--prompts 8 32] [--group 8] [--response-length 64] [--repeats 5]

Both print a table of medians and write every single run to ``--out``.  Time ratios are against GRPO of the same seed or
repetition; "time / tokens" is the ratio of the times over the ratio of the generated tokens: 1 is the token bound, which
a server that is always equally busy would reach.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import stamp, write_json
from benchmarks.virtual_time import run_virtual

# ---------------------------------------------------------------- the simulated model and task


@dataclass(frozen=True)
class Workload:
    """A batch of prompts for a model whose response lengths are long-tailed.

    A response to prompt q has exp(mu_q + response_sigma * z) tokens with mu_q ~ Normal(log(median_length), prompt_sigma),
    at most the budget; one after [s, q] is ``skip_factor`` as long (SPEC section 9).  The prompt's tracked mean length is
    the mean of G such responses, as after its first visit.  Problems have a uniform number of tokens.
    """

    prompts: int = 128
    group_size: int = 8
    response_length: int = 3072
    median_length: float = 700.0
    prompt_sigma: float = 0.6
    response_sigma: float = 0.55
    skip_factor: float = 0.9
    problem_tokens: tuple[int, int] = (80, 320)
    reward_seconds: float = 0.05


_VOCABULARY, _END = 1000, 2
_KEY_TOKENS = 64
"""A problem is known by its last tokens, with which [s, q] ends as well."""


class LongTailedModel:
    """Writes responses of drawn lengths; the same prompt and request seed give the same length under every method."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self.workload, self.seed = workload, seed
        rng = np.random.default_rng([seed, 0])
        self.log_means = np.log(workload.median_length) + workload.prompt_sigma * rng.standard_normal(workload.prompts)
        low, high = workload.problem_tokens
        self.problems = [
            rng.integers(3, _VOCABULARY, size=int(rng.integers(low, high, endpoint=True))).tolist()
            for _ in range(workload.prompts)
        ]
        self._numbers: dict[tuple[int, ...], tuple[int, int]] = {}

    def know(self, number: int, problem_ids: Sequence[int]) -> None:
        """Recognise the templated problem from now on."""
        self._numbers[tuple(problem_ids[-_KEY_TOKENS:])] = (number, len(problem_ids))

    def length(self, number: int, request_seed: int, skip: bool) -> int:
        """Tokens of one whole response, the end token included, before any cut."""
        z = np.random.default_rng([self.seed, 1, number, request_seed]).standard_normal()
        tokens = np.exp(self.log_means[number] + self.workload.response_sigma * z)
        return max(1, round(float(tokens) * (self.workload.skip_factor if skip else 1.0)))

    def write(self, prompt_ids: Sequence[int], sampling_params: dict[str, Any]) -> list[int]:
        """Token ids of one completion; a ``simulated_server.Writer``."""
        number, problem_tokens = self._numbers[tuple(prompt_ids[-_KEY_TOKENS:])]
        request_seed = int(sampling_params["seed"])
        length = self.length(number, request_seed, skip=len(prompt_ids) > problem_tokens)
        limit = sampling_params.get("max_tokens", self.workload.response_length)
        kind = np.random.default_rng([self.seed, 2, number, request_seed])
        tokens: list[int] = kind.integers(3, _VOCABULARY, size=min(length, limit)).tolist()
        if length <= limit:
            tokens[-1] = _END
        return tokens


def write_tokenizer(folder: Path) -> Path:
    """A model folder without weights: token n is the word "wn"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "</s>", *(f"w{number}" for number in range(3, _VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=words[0], pad_token=words[1], eos_token=words[_END]
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16384,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    GenerationConfig(eos_token_id=_END).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- simulated


def simulate(
    workload: Workload,
    replicas: Sequence[int],
    seeds: Sequence[int],
    constants: Any,
    context: int | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Every variant on every seed and number of replicas; one record per rollout.

    Args:
        workload: prompts, budget, lengths.
        replicas: numbers of replicas to try.
        seeds: one run each.
        constants: ``simulated_server.ServerConstants``.
        context: the model's context in tokens; None means that every sequence fits.
        say: takes a line about what is done.
    """
    from benchmarks.workers import compose, variants

    records = []
    with tempfile.TemporaryDirectory() as folder:
        model_folder = write_tokenizer(Path(folder))
        low, high = workload.problem_tokens
        for variant in variants(workload.group_size):
            config = compose(
                [
                    "platform=cpu",
                    f"method={variant.config_method}",
                    f"actor_rollout_ref.model.path={model_folder}",
                    f"skpo.group_size={workload.group_size}",
                    f"skpo.candidates={variant.candidates}",
                    "skpo.initial_length=1024",
                    "skpo.seed_requests=true",
                    "skpo.prompt_timeout_s=1e6",
                    f"data.max_prompt_length={high}",
                    f"data.max_response_length={workload.response_length}",
                    *([f"actor_rollout_ref.rollout.max_model_len={context}"] if context else []),
                ]
            )
            for count in replicas:
                for seed in seeds:
                    cost = run_virtual(_simulated_rollout(variant, config, workload, count, seed, constants))
                    records.append({"variant": variant.name, "replicas": count, "run": seed, **cost.as_dict()})
                say(f"{variant.name}, {count} replicas: {len(seeds)} seeds done")
    return records


async def _simulated_rollout(
    variant: Any, config: Any, workload: Workload, replicas: int, seed: int, constants: Any
) -> Any:
    from benchmarks.simulated_server import Cluster, LocalHandle
    from benchmarks.workers import Prompt, roll_out
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.state import SkpoState

    # verl's router breaks ties, and its worker chooses a reward worker, by the global generator.
    random.seed(seed)
    model = LongTailedModel(workload, seed)
    state = SkpoState(SkpoSettings.from_config(config.skpo), workload.response_length)
    prompts = []
    for number, problem in enumerate(model.problems):
        model.know(number, problem)
        earlier = [model.length(number, 2**40 + index, skip=True) for index in range(workload.group_size)]
        state.observe(str(number), 0.0, float(np.minimum(earlier, workload.response_length).mean()))
        visit = state.next_visit(str(number), 1)
        text = " ".join(f"w{token}" for token in problem)
        prompts.append(
            Prompt(str(number), [{"role": "user", "content": text}], "", "simulated", visit.split_position, visit.seed)
        )

    class Reward:
        async def compute_score(self, data: Any) -> dict[str, Any]:
            await asyncio.sleep(workload.reward_seconds)
            return {"reward_score": 1.0, "reward_extra_info": {}}

    cluster = Cluster(config, replicas, constants, model.write)
    try:
        return await roll_out(variant, config, cluster.client, LocalHandle(Reward()), prompts)
    finally:
        cluster.stop()


# ---------------------------------------------------------------- what is printed


@dataclass(frozen=True)
class Line:
    """One variant of one shape, medians over its runs.

    Attributes:
        time_ratio, token_ratio: against GRPO of the same run.
        over_token_bound: time_ratio / token_ratio.
        downstream_cached: share of the downstream prefill that came from the prefix cache, None for GRPO.
        cut: share of the responses (GRPO's or downstream) that wrote all that they were allowed.
        two_batch_time: seconds of this variant / those of the two-batch form with as many candidates, None for others.
    """

    variant: str
    shape: int
    seconds: float
    generated: float
    prefilled: float
    cached: float
    time_ratio: float
    token_ratio: float
    over_token_bound: float
    downstream_cached: float | None
    cut: float
    two_batch_time: float | None
    phases: dict[str, dict[str, float]]


def summarise(records: Sequence[dict[str, Any]], shape: str) -> list[Line]:
    """Medians per variant and shape (``replicas`` or ``prompts``), ratios taken run by run."""
    runs = {(record["variant"], record[shape], record["run"]): record for record in records}

    def total(record: dict[str, Any], name: str) -> float:
        return sum(phase[name] for phase in record["phases"].values())

    lines = []
    for name, size in dict.fromkeys((record["variant"], record[shape]) for record in records):
        own = [record for record in records if (record["variant"], record[shape]) == (name, size)]
        pairs = [(record, runs["GRPO", size, record["run"]]) for record in own]
        times = [record["seconds"] / base["seconds"] for record, base in pairs]
        tokens = [total(record, "generated") / total(base, "generated") for record, base in pairs]
        bounds = [time / token for time, token in zip(times, tokens, strict=True)]
        other = f"two-batch {name}"
        naive = [record["seconds"] / runs[other, size, record["run"]]["seconds"] for record in own] if (
            other,
            size,
            own[0]["run"],
        ) in runs else []
        last = [list(record["phases"].values())[-1] for record in own]
        downs = [record["phases"]["downstream"] for record in own if "downstream" in record["phases"]]
        lines.append(
            Line(
                variant=name,
                shape=size,
                seconds=statistics.median(record["seconds"] for record in own),
                generated=statistics.median(total(record, "generated") for record in own),
                prefilled=statistics.median(total(record, "prefilled") for record in own),
                cached=statistics.median(total(record, "cached") for record in own),
                time_ratio=statistics.median(times),
                token_ratio=statistics.median(tokens),
                over_token_bound=statistics.median(bounds),
                downstream_cached=statistics.median(d["cached"] / d["prefilled"] for d in downs) if downs else None,
                cut=statistics.median(phase["cut"] / phase["requests"] for phase in last),
                two_batch_time=statistics.median(naive) if naive else None,
                phases={
                    phase: {
                        field: statistics.median(record["phases"][phase][field] for record in own)
                        for field in own[0]["phases"][phase]
                    }
                    for phase in own[0]["phases"]
                },
            )
        )
    return lines


def table(lines: Sequence[Line], shape: str) -> str:
    """The lines as a Markdown table, seconds and tokens per phase below each other in one cell's order."""
    head = [shape, "method", "seconds", "by phase", "generated", "prefilled", "cached"]
    head += ["time / GRPO", "tokens / GRPO", "time / tokens", "time / two-batch", "downstream cached", "cut"]
    rows = [head, ["---"] * len(head)]
    for line in sorted(lines, key=lambda line: line.shape):
        by_phase = ", ".join(f"{phase} {values['seconds']:.1f}" for phase, values in line.phases.items())
        rows.append(
            [
                str(line.shape),
                line.variant,
                f"{line.seconds:.1f}",
                by_phase,
                f"{line.generated:,.0f}",
                f"{line.prefilled:,.0f}",
                f"{line.cached:,.0f}",
                f"{line.time_ratio:.3f}",
                f"{line.token_ratio:.3f}",
                f"{line.over_token_bound:.3f}",
                "" if line.two_batch_time is None else f"{line.two_batch_time:.3f}",
                "" if line.downstream_cached is None else f"{line.downstream_cached:.3f}",
                f"{line.cut:.3f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def report(kind: str, shape: str, records: list[dict[str, Any]], constants: dict[str, Any], out: Path) -> None:
    """Print the table and store everything."""
    lines = summarise(records, shape)
    content = {"kind": kind, "measured": stamp(), "constants": constants}
    write_json(out, {**content, "medians": [asdict(line) for line in lines], "runs": records})
    print(table(lines, shape))
    print(f"written: {out}")


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    simulated = kinds.add_parser("simulated", help="a cluster in virtual time")
    simulated.add_argument("--prompts", type=int, default=128)
    simulated.add_argument("--group", type=int, default=8)
    simulated.add_argument("--response-length", type=int, default=3072)
    simulated.add_argument("--replicas", type=int, nargs="+", default=[8, 64])
    simulated.add_argument("--slots", type=int, default=256, help="sequences that a replica runs at once")
    simulated.add_argument("--context", type=int, help="max_model_len (default: fits the longest sequence)")
    simulated.add_argument("--seeds", type=int, default=5)
    simulated.add_argument("--out", type=Path, default=Path("outputs/benchmarks/rollout_simulated.json"))
    real = kinds.add_parser("real", help="vLLM on this machine's CPU")
    real.add_argument("--prompts", type=int, nargs="+", default=[8, 32])
    real.add_argument("--group", type=int, default=8)
    real.add_argument("--response-length", type=int, default=64)
    real.add_argument("--initial-length", type=int, default=40, help="assumed mean response length, sets t_q")
    real.add_argument("--repeats", type=int, default=5)
    real.add_argument("--model", default="", help="checkpoint folder (default: the embedded model)")
    real.add_argument("--threads", type=int, default=2)
    real.add_argument("--out", type=Path, default=Path("outputs/benchmarks/rollout_real.json"))
    options = parser.parse_args(argv)
    if options.kind == "real":
        from benchmarks.engine import measure

        records, facts = measure(options)
        report("real", "prompts", records, facts, options.out)
        return 0
    from benchmarks.simulated_server import ServerConstants
    from benchmarks.workers import quiet

    quiet()
    workload = Workload(options.prompts, options.group, options.response_length)
    constants = ServerConstants(slots=options.slots)
    records = simulate(workload, options.replicas, range(1, options.seeds + 1), constants, options.context)
    facts = {"workload": asdict(workload), "server": asdict(constants), "context": options.context}
    report("simulated", "replicas", records, facts, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
