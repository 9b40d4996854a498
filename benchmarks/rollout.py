"""Rollout of SKPO (candidates G, 3, 1), GRPO and two-batch SKPO on clusters in virtual time, by the recipe's workers.

The model is replaced by a distribution of response lengths, the servers by ``simulated_server``; verl's client and
router, the recipe's workers and its trackers are the real ones.  The same prompt and request seed give the same length
under every method.
"""

import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import report
from benchmarks.report import parser_of
from benchmarks.simulated_server import Cluster, LocalHandle, ServerConstants
from benchmarks.virtual_time import run_virtual
from benchmarks.workers import Prompt, RolloutCost, Variant, compose, quiet, roll_out, variants
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.trainer.state import SkpoState

# ---------------------------------------------------------------- the simulated model and task


@dataclass(frozen=True)
class Workload:
    """A batch of prompts for a model whose response lengths are long-tailed.

    A response to prompt q has exp(mu_q + response_sigma * z) tokens, at most the budget, with a standard normal z and
    mu_q ~ Normal(log(median_length), prompt_sigma); one after [s, q] is ``skip_factor`` as long.  The
    prompt's tracked mean length is the mean of G such responses, as after its first visit.  Problems have a uniform
    number of tokens.
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
"""A problem is recognised by its last tokens, with which [s, q] ends as well."""


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
        """Remember a templated problem."""
        self._numbers[tuple(problem_ids[-_KEY_TOKENS:])] = (number, len(problem_ids))

    def length(self, number: int, request_seed: int, skip: bool) -> int:
        """Return the tokens of one whole response, the end token included, before any cut."""
        z = np.random.default_rng([self.seed, 1, number, request_seed]).standard_normal()
        tokens = np.exp(self.log_means[number] + self.workload.response_sigma * z)
        return max(1, round(float(tokens) * (self.workload.skip_factor if skip else 1.0)))

    def write(self, prompt_ids: Sequence[int], sampling_params: dict[str, Any]) -> list[int]:
        """Write one completion; a ``simulated_server.Writer``."""
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
    """Write a model folder without weights: token n is the word "wn"."""
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


# ---------------------------------------------------------------- the clusters


def simulate(
    workload: Workload, replicas: int, seeds: Sequence[int], constants: ServerConstants, compared: Sequence[Variant]
) -> list[dict[str, Any]]:
    """Run every variant on every seed, on a cluster of so many replicas; one record per rollout."""
    records = []
    configs: dict[tuple[str, int], Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_tokenizer(Path(folder))
        for variant in compared:
            key = (variant.config_method, variant.candidates)
            config = configs[key] = configs.get(key) or compose(
                [
                    "platform=cpu",
                    f"method={variant.config_method}",
                    f"actor_rollout_ref.model.path={model}",
                    f"skpo.group_size={workload.group_size}",
                    f"skpo.candidates={variant.candidates}",
                    "skpo.initial_length=1024",
                    "skpo.seed_requests=true",
                    "skpo.prompt_timeout_s=1e6",
                    f"data.max_prompt_length={workload.problem_tokens[1]}",
                    f"data.max_response_length={workload.response_length}",
                ]
            )
            for seed in seeds:
                cost = run_virtual(_rollout(variant, config, workload, replicas, seed, constants))
                shape = f"{workload.prompts} prompts, {replicas} x {constants.slots} slots"
                records.append({"variant": variant.name, "shape": shape, "run": seed, **asdict(cost)})
    return records


async def _rollout(
    variant: Variant, config: Any, workload: Workload, replicas: int, seed: int, constants: ServerConstants
) -> RolloutCost:
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
        messages = [{"role": "user", "content": " ".join(f"w{token}" for token in problem)}]
        prompts.append(Prompt(str(number), messages, "", "simulated", visit))

    class Reward:
        async def compute_score(self, data: Any) -> dict[str, Any]:
            await asyncio.sleep(workload.reward_seconds)
            return {"reward_score": 1.0, "reward_extra_info": {}}

    cluster = Cluster(config, replicas, constants, model.write)
    try:
        return await roll_out(variant, config, cluster.client, LocalHandle(Reward()), prompts)
    finally:
        cluster.stop()


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = parser_of("rollout", __doc__ or "")
    shapes = ["32x1x64", "32x1x256", "128x8x256", "128x64x256"]
    help_text = "prompts x replicas x sequences that a replica runs at once"
    parser.add_argument("--shapes", nargs="+", default=shapes, help=help_text)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--response-length", type=int, default=3072)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    quiet()
    records, settings = [], {}
    for name in options.shapes:
        prompts, replicas, slots = map(int, name.split("x"))
        workload, constants = Workload(prompts, options.group, options.response_length), ServerConstants(slots=slots)
        settings[name] = {"workload": asdict(workload), "server": asdict(constants)}
        seeds = range(1, options.seeds + 1)
        records += simulate(workload, replicas, seeds, constants, variants(options.group))
        print(f"{name}: done", file=sys.stderr)
    report(records, settings, options.out)
    return 0
