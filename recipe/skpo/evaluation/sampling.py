"""Offline sampling: token ids in, completions out, for evaluation and analyses.

Training samples through verl's server (``rollout``); everything else asks a ``Sampler``.  ``VllmSampler`` is vLLM in
this process's service, on GPUs or, with ``recipe.skpo.cpu``, on a machine without one.  ``draw_stored`` puts a file
between: what was drawn once is read back, so that a killed command goes on where it stopped and a finished one needs
no model.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from recipe.skpo.devices import detect_platform
from recipe.skpo.output.metrics import json_lines

SEED_BOUND = 2**31 - 1


class SamplingError(RuntimeError):
    """Sampling cannot start or a store does not fit; one line with the fix."""


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: what was sampled, the end-of-sequence token included where there is one.
        text: the same without special tokens.
        finish_reason: ``stop`` if it ended by itself, ``length`` if it ran into ``max_tokens``.
        logprobs: log-probability of each token in the distribution it was drawn from, in nats; as long as
            ``token_ids``, or empty where the source has none.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt of ``draw_stored``.

    Attributes:
        key: unique among the requests of one store, and stable: a rerun finds its completions by it.
        prompt_ids: token ids.
        max_tokens: longest completion.
        seed: of its first completion; completion i has ``seed + i``.
    """

    key: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int


class Sampler(Protocol):
    """What evaluation and analyses need of a model."""

    def sample(
        self,
        prompts: list[list[int]],
        *,
        n: int,
        temperature: float,
        top_p: float,
        max_tokens: int | Sequence[int],
        seeds: Sequence[int] | None,
    ) -> list[list[Completion]]:
        """Draw ``n`` completions for each prompt.

        Args:
            prompts: token ids per prompt.
            n: completions per prompt; 1 where ``temperature`` is 0.
            temperature, top_p: of the sampler; temperature 0 is greedy.
            max_tokens: longest completion, one number or one per prompt.
            seeds: one per prompt; completion i is drawn with ``seed + i``.  None leaves the draws to the engine.

        Returns:
            Per prompt its ``n`` completions, in the order of ``prompts``.
        """
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is started.

    Attributes:
        model: Hugging Face folder or name.
        platform: ``cpu`` or ``gpu``.
        dtype: of weights and computation.
        max_model_len: longest prompt and completion together, in tokens; None takes the model's context.
        max_num_seqs: requests that are computed at the same time.
        max_num_batched_tokens: tokens of one engine step.
        gpu_memory_utilization: share of each GPU's memory; not used on the CPU.
        tensor_parallel_size: GPUs per model.
        num_threads, kv_cache_gib: CPU platform: threads, and whole GiB of key-value cache.
    """

    model: str
    platform: str
    dtype: str = "bfloat16"
    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 4096
    gpu_memory_utilization: float = 0.6
    tensor_parallel_size: int = 1
    num_threads: int = 2
    kv_cache_gib: int = 1

    def __post_init__(self) -> None:
        if self.platform not in ("cpu", "gpu"):
            raise SamplingError(f"platform: must be cpu or gpu, got {self.platform!r}")


def detected_platform() -> str:
    """``SKPO_PLATFORM`` where it is set, else ``gpu`` where an NVIDIA driver lists a GPU, else ``cpu``."""
    return os.environ.get("SKPO_PLATFORM") or detect_platform()


def engine_arguments(options: VllmOptions) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; on the CPU the ones of ``config/platform/cpu.yaml``."""
    arguments: dict[str, Any] = {
        "model": options.model,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_prefix_caching": True,
        # As verl's rollout: log-probs of the distribution that was sampled from, after temperature and top-p.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if options.platform == "cpu":
        # vLLM's CPU default block of 128 tokens is longer than a short prompt: nothing would ever be shared.
        return arguments | {"enforce_eager": True, "block_size": 32}
    return arguments | {"gpu_memory_utilization": options.gpu_memory_utilization}


def apply_cpu_environment(options: VllmOptions) -> None:
    """Set the CPU platform's variables, which vLLM's engine process inherits; does nothing on GPUs."""
    if options.platform == "cpu":
        from recipe.skpo import cpu

        cpu.apply_environment(cpu.environment(options.num_threads, options.kv_cache_gib))


class VllmSampler:
    """vLLM's offline engine.

    Raises:
        SamplingError: vLLM is not installed.
    """

    def __init__(self, options: VllmOptions) -> None:
        apply_cpu_environment(options)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
        except ImportError as error:
            raise SamplingError(f"vLLM cannot be imported ({error}); install the platform's requirements") from error
        self._llm: Any = LLM(**engine_arguments(options))

    def sample(
        self,
        prompts: list[list[int]],
        *,
        n: int,
        temperature: float,
        top_p: float,
        max_tokens: int | Sequence[int],
        seeds: Sequence[int] | None,
    ) -> list[list[Completion]]:
        """See ``Sampler.sample``."""
        from vllm import SamplingParams, TokensPrompt

        limits = per_prompt(max_tokens, len(prompts))
        parameters = [
            SamplingParams(
                n=n,
                temperature=temperature,
                top_p=top_p,
                max_tokens=limit,
                # vLLM gives child i of a request with n > 1 the seed + i.
                seed=None if seeds is None else seeds[index],
                logprobs=0,
            )
            for index, limit in enumerate(limits)
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [[_completion(output) for output in request.outputs] for request in outputs]

    def close(self) -> None:
        """End the engine and its process."""
        self._llm.llm_engine.engine_core.shutdown()


def _completion(output: Any) -> Completion:
    token_ids = tuple(int(token) for token in output.token_ids)
    logprobs = tuple(float(step[token].logprob) for step, token in zip(output.logprobs, token_ids, strict=True))
    return Completion(token_ids, output.text, str(output.finish_reason), logprobs)


def per_prompt(max_tokens: int | Sequence[int], count: int) -> list[int]:
    """One limit per prompt.

    Raises:
        ValueError: another number of limits than prompts, or one below 1.
    """
    limits = [max_tokens] * count if isinstance(max_tokens, int) else [int(limit) for limit in max_tokens]
    if len(limits) != count or any(limit < 1 for limit in limits):
        raise ValueError(f"max_tokens: needs {count} numbers >= 1, got {max_tokens}")
    return limits


# ---------------------------------------------------------------- stored draws


def append_completions(path: Path, drawn: Mapping[str, Sequence[Completion]]) -> None:
    """Append completions to a store, one line per key, and see them on disk; a torn last line is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"key": key, "completions": [asdict(completion) for completion in completions]})
        for key, completions in drawn.items()
    ]
    with path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((("\n" if torn else "") + "".join(line + "\n" for line in lines)).encode())
        file.flush()
        os.fsync(file.fileno())


def read_completions(path: Path) -> dict[str, list[Completion]]:
    """A store's completions by key; the last line of a key counts, what a kill tore is skipped.

    Raises:
        SamplingError: the file is no store.
    """
    try:
        return {
            line["key"]: [
                Completion(tuple(item["token_ids"]), item["text"], item["finish_reason"], tuple(item["logprobs"]))
                for item in line["completions"]
            ]
            for line in json_lines(path)
        }
    except (KeyError, TypeError) as error:
        raise SamplingError(f"{path}: is no store of completions ({error!r}); give another --out") from None


def draw_stored(
    requests: Sequence[Request],
    store: Path,
    open_sampler: Callable[[], Sampler],
    *,
    n: int,
    temperature: float,
    top_p: float,
    prompts_per_call: int = 16,
    report: Callable[[str], None] = print,
) -> dict[str, list[Completion]]:
    """Completions of all requests, from the store where they are there.

    Requests are always cut into the same calls, and a call of which anything is missing is drawn as a whole, so that
    an interrupted command asks the engine for the same batches as one that was not.

    Args:
        requests: with distinct keys.
        store: JSON lines, appended to after every call.
        open_sampler: called once, and only if something is missing.
        n, temperature, top_p: as in ``Sampler.sample``.
        prompts_per_call: prompts of one call.
        report: called with one line of progress per call.

    Returns:
        Completions by key.

    Raises:
        ValueError: two requests with one key.
        SamplingError: the store holds another number of completions per prompt.
    """
    keys = [request.key for request in requests]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{store}: two requests have the same key")
    stored = read_completions(store)
    for key in keys:
        if key in stored and len(stored[key]) != n:
            raise SamplingError(
                f"{store}: holds {len(stored[key])} completions of {key!r} where {n} are asked for; give another --out"
            )
    calls = [requests[start : start + prompts_per_call] for start in range(0, len(requests), prompts_per_call)]
    missing = [call for call in calls if any(request.key not in stored for request in call)]
    if missing:
        sampler = open_sampler()
        for number, call in enumerate(missing, start=1):
            drawn = sampler.sample(
                [list(request.prompt_ids) for request in call],
                n=n,
                temperature=temperature,
                top_p=top_p,
                max_tokens=[request.max_tokens for request in call],
                seeds=[request.seed for request in call],
            )
            new = {request.key: completions for request, completions in zip(call, drawn, strict=True)}
            append_completions(store, new)
            stored |= new
            report(f"{store.name}: {number} of {len(missing)} calls drawn")
    return {key: stored[key] for key in keys}
