"""Flags that the commands with a model share: where it is and how vLLM serves it."""

import argparse
from dataclasses import dataclass, field
from typing import Any, get_args

from data_prep.untrusted import UntrustedError, parse_json
from recipe.skpo.evaluation.sampling import VllmOptions, VllmSampler, detected_platform
from recipe.skpo.task.run_settings import Chat, run_settings
from reward_fns import OUR_REWARD
from reward_fns.forms import OLD_FORMATS, AnswerFormat

FREE = ("engine.num_threads", "engine.kv_cache_gib", "engine.gpu_memory_utilization")
"""What may differ when an interrupted run goes on: memory and threads."""


@dataclass(frozen=True)
class EngineConfig:
    """How a model is served; see ``sampling.VllmOptions``.

    Attributes:
        platform: ``cpu`` or ``gpu``.
        dtype: of weights and computation.
        max_model_len: tokens of prompt and response together; 0 takes the model's context.
        max_num_seqs: responses that are sampled at the same time.
        max_num_batched_tokens: tokens of one engine step.
        gpu_memory_utilization, tensor_parallel_size: GPUs.
        num_threads, kv_cache_gib: CPU.
        prompts_per_call: prompts that are drawn and stored together.
    """

    platform: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    tensor_parallel_size: int
    num_threads: int
    kv_cache_gib: int
    prompts_per_call: int

    def open(self, model: str) -> VllmSampler:
        """Start vLLM with a model."""
        return VllmSampler(
            VllmOptions(
                model=model,
                platform=self.platform,
                dtype=self.dtype,
                max_model_len=self.max_model_len or None,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                gpu_memory_utilization=self.gpu_memory_utilization,
                tensor_parallel_size=self.tensor_parallel_size,
                num_threads=self.num_threads,
                kv_cache_gib=self.kv_cache_gib,
            )
        )


@dataclass(frozen=True)
class ModelSettings:
    """How a model is asked and judged.

    Attributes:
        chat: its chat template and the options of it.
        answer_format: in which its answers count (``reward_fns.forms``).
    """

    chat: Chat = field(default_factory=Chat)
    answer_format: str = "any"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``ModelSettings``; what is not given is that of the run that the model belongs to."""
    group = parser.add_argument_group("prompts and rewards (default: those of the model's run, if it has one)")
    group.add_argument(
        "--chat-template-kwargs", type=_mapping, metavar="JSON", help='such as {"enable_thinking": false}'
    )
    group.add_argument("--custom-chat-template", metavar="TEXT", help="Jinja template instead of the tokenizer's")
    group.add_argument(
        "--answer-format",
        type=lambda name: OLD_FORMATS.get(name, name),
        choices=get_args(AnswerFormat),
        help="form in which answers count (default any)",
    )


def model_settings(arguments: argparse.Namespace, model: str) -> ModelSettings:
    """The flags of parsed arguments, completed by the run that the model belongs to.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    run = run_settings(model)
    kwargs, template = arguments.chat_template_kwargs, arguments.custom_chat_template
    answer_format = arguments.answer_format
    if run is not None:
        kwargs = run.chat.chat_template_kwargs if kwargs is None else kwargs
        template = run.chat.custom_chat_template if template is None else template
        if answer_format is None and run.reward_path == OUR_REWARD:
            answer_format = run.reward_kwargs.get("answer_format")
    return ModelSettings(Chat(template, kwargs or {}), answer_format or "any")


def _mapping(text: str) -> dict[str, Any]:
    try:
        read = parse_json(text)
    except UntrustedError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None
    if not isinstance(read, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return read


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``EngineConfig``."""
    group = parser.add_argument_group("vLLM")
    group.add_argument("--platform", choices=("cpu", "gpu"), help="default: SKPO_PLATFORM, else detected")
    group.add_argument("--dtype", default="bfloat16", help="of weights and computation (default bfloat16)")
    group.add_argument("--max-model-len", type=int, default=0, help="prompt and response in tokens; 0: the model's")
    group.add_argument("--max-num-seqs", type=int, default=128, help="responses at the same time (default 128)")
    group.add_argument("--max-num-batched-tokens", type=int, default=4096, help="of an engine step (default 4096)")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.6, help="GPUs (default 0.6)")
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs per model (default 1)")
    group.add_argument("--num-threads", type=int, default=2, help="CPU (default 2)")
    group.add_argument("--kv-cache-gib", type=int, default=1, help="CPU (default 1)")
    group.add_argument("--prompts-per-call", type=int, default=16, help="drawn and stored together (default 16)")


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The engine flags of parsed arguments; the platform is detected where it is not given."""
    return EngineConfig(
        platform=arguments.platform or detected_platform(),
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        tensor_parallel_size=arguments.tensor_parallel_size,
        num_threads=arguments.num_threads,
        kv_cache_gib=arguments.kv_cache_gib,
        prompts_per_call=arguments.prompts_per_call,
    )
