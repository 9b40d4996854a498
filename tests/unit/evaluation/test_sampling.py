"""Stored draws, and how vLLM is asked; no model is started."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.sampling import (
    Completion,
    Request,
    append_completions,
    draw_stored,
    opened_by_first_draw,
    read_completions,
)
from recipe.skpo.task.prompts import automatic_bos, problem_tokens


class CountingSampler:
    """Answers with the seed as its only token and notes every call."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.fail_at, self.closed = fail_at, False

    def sample(self, requests: Sequence[Request]) -> list[list[Completion]]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append([request.seed for request in requests])
        return [
            [Completion((seed,), f"t{seed}", "stop", (-0.5,)) for seed in range(request.seed, request.seed + request.n)]
            for request in requests
        ]

    def close(self) -> None:
        self.closed = True


def requests(count: int = 5, n: int = 2) -> list[Request]:
    return [Request(f"p{index}", (1, index), 10 + index, 100 * index, n, 1.0, 1.0) for index in range(count)]


def draw(store: Path, sampler: CountingSampler | None = None, n: int = 2) -> dict[str, list[Completion]]:
    """Five prompts, two per call; without a sampler a draw fails."""
    sample = (sampler or CountingSampler(fail_at=0)).sample
    return draw_stored(requests(n=n), store, sample, prompts_per_call=2, report=lambda _: None)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "draws.jsonl"


@pytest.fixture
def drawn(store: Path) -> dict[str, list[Completion]]:
    """A finished store's completions."""
    return draw(store, CountingSampler())


def test_draws_are_in_order_and_stored_as_plain_json_lines(store: Path) -> None:
    sampler = CountingSampler()
    found = draw(store, sampler)
    assert list(found) == ["p0", "p1", "p2", "p3", "p4"]
    assert sampler.calls == [[0, 100], [200, 300], [400]]
    assert json.loads(store.read_text(encoding="utf-8").splitlines()[3]) == {
        "key": "p3",
        "request": requests()[3].digest,
        "completions": [
            {"token_ids": [i], "text": f"t{i}", "finish_reason": "stop", "logprobs": [-0.5]} for i in (300, 301)
        ],
    }
    assert draw(store) == found, "a finished store needs no model"


def test_interrupted_draws_resume_with_the_same_calls(store: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(store, CountingSampler(fail_at=1))
    assert set(read_completions(store)) == {"p0", "p1"}
    again = CountingSampler()
    assert draw(store, again) == draw(tmp_path / "whole.jsonl", CountingSampler())
    assert again.calls == [[200, 300], [400]]


@pytest.mark.parametrize(
    ("damage", "calls"),
    [
        (lambda lines: b"".join(line for line in lines if b'"p3"' not in line), [[200, 300]]),
        (lambda lines: b"".join(lines)[:-20], [[400]]),
    ],
    ids=["a part of a call is missing", "the last line is cut off"],
)
def test_what_is_missing_is_drawn_by_whole_calls(store: Path, drawn: Any, damage: Any, calls: list[list[int]]) -> None:
    store.write_bytes(damage(store.read_bytes().splitlines(keepends=True)))
    again = CountingSampler()
    assert draw(store, again) == drawn
    assert again.calls == calls
    assert draw(store) == drawn, "no line was joined to the cut one"


def test_store_keeps_every_character(store: Path) -> None:
    text = "a\u2028b\x85c\x00d\r\ne\U0001f600 \ud800"
    append_completions(store, {"k": [Completion((), text, "stop")]})
    assert read_completions(store)["k"][0].text == text


def test_stores_and_requests_that_do_not_fit_are_refused(store: Path, drawn: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 2 completions of 'p0', this command draws 3"):
        draw(store, n=3)
    changed = [replace(request, prompt_ids=(7,)) for request in requests()]
    with pytest.raises(ConfigError, match="completions of 'p0' are of another prompt or sampling"):
        draw_stored(changed, store, CountingSampler(fail_at=0).sample, report=lambda _: None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="is not a store"):
        draw(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="same key"):
        draw_stored([*requests(1), *requests(1)], store, CountingSampler().sample)


@pytest.mark.parametrize("change", [{"max_tokens": 1}, {"seed": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 9}])
def test_a_request_has_another_digest_where_anything_but_its_key_differs(change: dict[str, Any]) -> None:
    request = requests(1)[0]
    assert replace(request, key="other").digest == request.digest != replace(request, **change).digest


def test_a_store_of_an_earlier_version_is_read(store: Path, drawn: Any) -> None:
    lines = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        del line["request"]
    store.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert draw(store) == drawn


def test_a_sampler_is_opened_once_by_its_first_draw_and_closed_whatever_happens() -> None:
    opened: list[CountingSampler] = []

    def open_sampler() -> CountingSampler:
        opened.append(CountingSampler(fail_at=2))
        return opened[-1]

    with opened_by_first_draw(open_sampler):
        pass
    assert opened == []
    with pytest.raises(KeyboardInterrupt), opened_by_first_draw(open_sampler) as sample:
        for request in requests(3):
            sample([request])
    assert [(len(sampler.calls), sampler.closed) for sampler in opened] == [(2, True)]


# ---------------------------------------------------------------- vLLM


class FakeEngine:
    """``vllm.LLM`` as far as the sampler uses it: every child's token is 7, with its log-prob."""

    arguments: dict[str, Any]
    asked: list[Any]

    def __init__(self, **arguments: Any) -> None:
        FakeEngine.arguments = arguments
        self.ended = False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._end))

    def _end(self) -> None:
        self.ended = True

    def generate(self, inputs: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
        FakeEngine.asked = list(zip(inputs, parameters, strict=True))
        step = {7: SimpleNamespace(logprob=-0.25), 9: SimpleNamespace(logprob=-9.0)}
        child = SimpleNamespace(token_ids=[7], text="seven", finish_reason="length", logprobs=[step])
        return [SimpleNamespace(outputs=[child] * item.n) for item in parameters]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.LLM = FakeEngine
    module.SamplingParams = lambda **given: SimpleNamespace(**given)
    module.TokensPrompt = lambda prompt_token_ids: prompt_token_ids
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_is_asked_prompt_by_prompt(fake_vllm: None) -> None:
    sampler = EngineConfig(platform="gpu", max_model_len=99).open("m", max_num_seqs=3, kv_cache_dtype="fp8")
    expected = {"model": "m", "max_model_len": 99, "max_num_seqs": 3, "kv_cache_dtype": "fp8"}
    assert FakeEngine.arguments.items() >= expected.items()
    drawn = sampler.sample([Request("a", (1, 2), 5, 10, 2, 0.7, 0.9, 40), Request("b", (3,), 6, 20, 2, 0.7, 0.9, 40)])
    assert drawn == [[Completion((7,), "seven", "length", (-0.25,))] * 2] * 2
    shared = {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "logprobs": 0}
    assert [(prompt, vars(asked)) for prompt, asked in FakeEngine.asked] == [
        ([1, 2], shared | {"max_tokens": 5, "seed": 10}),
        ([3], shared | {"max_tokens": 6, "seed": 20}),
    ]
    sampler.close()
    assert sampler._llm.ended


def test_cpu_engine_has_the_values_of_the_platforms_config(compose_config: Any) -> None:
    rollout = compose_config("platform=cpu").actor_rollout_ref.rollout
    arguments = EngineConfig(platform="cpu").arguments()
    whole = EngineConfig(platform="cpu", max_model_len=5000).arguments()
    for name in ("enforce_eager", "max_num_batched_tokens", "logprobs_mode", "dtype"):
        assert arguments[name] == rollout[name]
    assert "enable_chunked_prefill" not in arguments
    assert whole["enable_chunked_prefill"] is rollout.enable_chunked_prefill is False
    assert whole["max_num_batched_tokens"] == whole["max_model_len"] == 5000
    assert arguments["block_size"] == rollout.engine_kwargs.vllm.block_size
    assert "gpu_memory_utilization" not in arguments and arguments["max_model_len"] is None
    gpu = EngineConfig(platform="gpu").arguments()
    assert "block_size" not in gpu and gpu["gpu_memory_utilization"] == 0.6


def test_cpu_environment_is_set_before_vllm_starts(fake_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    EngineConfig(platform="cpu", num_threads=3, kv_cache_gib=2).open("m")
    assert os.environ["VERL_PLATFORM"] == "cpu"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"


# ---------------------------------------------------------------- prompts


def test_problem_tokens_are_those_of_the_rollout(
    model_folder: Path, bos_model_folder: Path, chatml_model_folder: Path
) -> None:
    from transformers import AutoTokenizer
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": "1 + 1 é?"}]
    for folder, bos in ((model_folder, None), (bos_model_folder, 1), (chatml_model_folder, None)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        builder = create_continuous_token_builder(tokenizer, hf_model_type="llama")
        assert problem_tokens(tokenizer, messages) == list(builder.build_initial_tokens(messages))
        assert automatic_bos(tokenizer) == bos
