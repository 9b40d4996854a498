"""vLLM as a ``Sampler``: in this process's service, on GPUs or, with ``recipe.skpo.cpu``, on a machine without one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipe.skpo.devices import detect_platform
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.options import option
from recipe.skpo.evaluation.sampling import Completion, Request

FREE = ("engine.num_threads", "engine.kv_cache_gib", "engine.gpu_memory_utilization")
"""What may differ when an interrupted command resumes: memory and threads."""


def detected_platform() -> str:
    """Return ``SKPO_PLATFORM`` if it is set, else ``gpu`` if an NVIDIA driver lists a GPU, else ``cpu``."""
    return os.environ.get("SKPO_PLATFORM") or detect_platform()


@dataclass(frozen=True)
class EngineConfig:
    """How a model is served; each option's help says what it is."""

    platform: str = option(
        help="default: SKPO_PLATFORM, else detected", choices=("cpu", "gpu"), factory=detected_platform
    )
    dtype: str = option("bfloat16", "of weights and computation")
    max_model_len: int = option(0, "longest prompt and response together, in tokens; 0: the model's context", least=0)
    max_num_seqs: int = option(128, "responses sampled at the same time", least=1)
    max_num_batched_tokens: int = option(4096, "tokens of one engine step", least=1)
    gpu_memory_utilization: float = option(0.6, "GPUs: share of each one's memory")
    tensor_parallel_size: int = option(1, "GPUs per model", least=1)
    num_threads: int = option(2, "CPU: threads", least=1)
    kv_cache_gib: int = option(1, "CPU: whole GiB of key-value cache", least=1)
    prompts_per_call: int = option(16, "prompts drawn and stored together", least=1)

    def apply_platform(self) -> None:
        """Set the CPU platform's variables, which must be there before verl or vLLM is imported; not on GPUs."""
        if self.platform == "cpu":
            from recipe.skpo import cpu

            cpu.apply_environment(cpu.environment(self.num_threads, self.kv_cache_gib))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``vllm.LLM`` without the model; on the CPU those of ``config/platform/cpu.yaml``."""
        shared = ("dtype", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in shared} | {
            "max_model_len": self.max_model_len or None,
            "enable_prefix_caching": True,
            # As verl's rollout: log-probs of the distribution that was sampled from, after temperature and top-p.
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        }
        if self.platform == "cpu":
            # vLLM's CPU default block of 128 tokens is longer than a short prompt: nothing would ever be shared.
            arguments |= {"enforce_eager": True, "block_size": 32}
            if self.max_model_len:
                # A prompt is read whole, as in training; without a limit its length is not known here.
                arguments["enable_chunked_prefill"] = False
                arguments["max_num_batched_tokens"] = max(self.max_num_batched_tokens, self.max_model_len)
            return arguments
        return arguments | {"gpu_memory_utilization": self.gpu_memory_utilization}

    def open(self, model: str, **more: Any) -> "VllmSampler":
        """Start vLLM with a model's folder or name; ``more`` are further arguments of ``vllm.LLM``."""
        return VllmSampler(self, model, **more)


class VllmSampler:
    """vLLM's offline engine.

    Raises:
        ConfigError: vLLM is not installed, or does not take the further arguments ``more``.
    """

    def __init__(self, config: EngineConfig, model: str, **more: Any) -> None:
        config.apply_platform()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(f"vLLM cannot be imported ({error}); install the platform's requirements") from error
        try:
            self._llm: Any = LLM(model=model, **(config.arguments() | more))
        except TypeError as error:
            if not more:
                raise
            raise ConfigError(f"vLLM does not take one of {', '.join(more)} ({error}); leave it out") from error

    def sample(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See ``Sampler.sample``."""
        from vllm import SamplingParams, TokensPrompt

        parameters = [
            SamplingParams(
                n=request.n,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                max_tokens=request.max_tokens,
                # vLLM gives child i of a request with n > 1 the seed + i.
                seed=request.seed,
                logprobs=0,
            )
            for request in requests
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [[_completion(output) for output in request.outputs] for request in outputs]

    def close(self) -> None:
        """End the engine and its process."""
        self._llm.llm_engine.engine_core.shutdown()


def _completion(output: Any) -> Completion:
    token_ids = tuple(int(token) for token in output.token_ids)
    logprobs = tuple(float(step[token].logprob) for step, token in zip(output.logprobs, token_ids, strict=True))
    return Completion(token_ids, output.text, str(output.finish_reason), logprobs)
