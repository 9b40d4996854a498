"""A sampler without a model, and a parquet of small problems."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.schema import Row, write_parquet
from recipe.skpo.evaluation.options import EngineConfig
from recipe.skpo.evaluation.sampling import Completion, per_prompt

SOURCE = "skpo/arithmetic"


def engine(**changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "platform": "cpu",
        "dtype": "bfloat16",
        "max_model_len": 0,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 4096,
        "gpu_memory_utilization": 0.6,
        "tensor_parallel_size": 1,
        "num_threads": 2,
        "kv_cache_gib": 1,
        "prompts_per_call": 4,
    }
    return EngineConfig(**(values | changes))


class FakeSampler:
    """``sampling.Sampler`` without a model: the script answers (prompt tokens, seed) with a text.

    Args:
        tokenizer: turns texts into tokens and back.
        script: text of a completion.
        fail_after: calls that succeed before one raises KeyboardInterrupt, as a kill does; None never.
    """

    def __init__(self, tokenizer: Any, script: Callable[[str, int], str], fail_after: int | None = None) -> None:
        self.tokenizer, self.script, self.fail_after = tokenizer, script, fail_after
        self.calls: list[dict[str, Any]] = []
        self.closed = False

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
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        assert seeds is not None
        limits = per_prompt(max_tokens, len(prompts))
        self.calls.append({"prompts": prompts, "n": n, "limits": limits, "seeds": list(seeds)})
        return [
            [self._complete(prompt, seed + index, limit) for index in range(n)]
            for prompt, seed, limit in zip(prompts, seeds, limits, strict=True)
        ]

    def _complete(self, prompt: list[int], seed: int, limit: int) -> Completion:
        text = self.script(self.tokenizer.decode(prompt, skip_special_tokens=True), seed)
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        rng = random.Random(seed)
        kept = ids[:limit]
        return Completion(
            tuple(kept),
            self.tokenizer.decode(kept, skip_special_tokens=True),
            "stop" if len(ids) <= limit else "length",
            tuple(-rng.random() for _ in kept),
        )

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def problems_file(tmp_path: Path) -> Path:
    """Six problems, "0 + 0?" to "5 + 5?"."""
    path = tmp_path / "problems.parquet"
    rows = [
        Row(SOURCE, [{"role": "user", "content": f"{n} + {n}?"}], str(2 * n), "math", "val", n, f"{n} + {n}?")
        for n in range(6)
    ]
    write_parquet(rows, path)
    return path
