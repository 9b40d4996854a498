"""A sampler without a model, and a parquet of small problems."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from data_prep.schema import Row, write_parquet
from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.options import ModelSettings
from recipe.skpo.evaluation.problems import Reward
from recipe.skpo.evaluation.sampling import Completion, Request

SOURCE = "skpo/arithmetic"


def engine(**changes: Any) -> EngineConfig:
    return EngineConfig(**({"platform": "cpu", "prompts_per_call": 4} | changes))


def reward(answer_format: str = "any") -> Reward:
    return Reward(ModelSettings(answer_format=answer_format).reward)


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

    def sample(self, requests: Sequence[Request]) -> list[list[Completion]]:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        ((n, temperature, top_p),) = {(request.n, request.temperature, request.top_p) for request in requests}
        prompts = [list(request.prompt_ids) for request in requests]
        limits, seeds = [request.max_tokens for request in requests], [request.seed for request in requests]
        settings = {"n": n, "temperature": temperature, "top_p": top_p}
        self.calls.append({"prompts": prompts, "limits": limits, "seeds": seeds, **settings})
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
def own_model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of ``model_folder`` whose weights a test may replace by ``replace_weights``."""
    return shutil.copytree(model_folder, tmp_path / "model")


def replace_weights(model: Path) -> None:
    """Put other weights of the same names and shapes at the same path."""
    (path,) = model.glob("*.safetensors")
    save_file({name: values + 1 for name, values in load_file(path).items()}, path)


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in an empty folder; it must refuse in one line, which is returned, and make no folder ``out``."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[list[str]], int], arguments: list[str]) -> str:
        assert main([*arguments, "--out", "out"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and not Path("out").exists()
        return error.removeprefix("error: ")

    return run


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
