"""Stored draws, and how vLLM is asked; no model is started."""

import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.engine import EngineConfig
from recipe.skpo.evaluation.sampling import (
    Completion,
    LazySampler,
    Request,
    append_completions,
    draw_stored,
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


def draw(store: Path, sampler: CountingSampler | None, count: int = 5, n: int = 2) -> dict[str, list[Completion]]:
    none: Any = None
    return draw_stored(requests(count, n), store, sampler or none, prompts_per_call=2, report=lambda _: None)


def test_draws_are_in_order(tmp_path: Path) -> None:
    sampler = CountingSampler()
    drawn = draw(tmp_path / "draws.jsonl", sampler)
    assert list(drawn) == ["p0", "p1", "p2", "p3", "p4"]
    assert [completion.token_ids for completion in drawn["p3"]] == [(300,), (301,)]
    assert sampler.calls == [[0, 100], [200, 300], [400]]


def test_finished_store_needs_no_model_and_gives_the_same(tmp_path: Path) -> None:
    first = draw(tmp_path / "draws.jsonl", CountingSampler())
    assert draw(tmp_path / "draws.jsonl", None) == first


def test_interrupted_draws_go_on_with_the_same_calls(tmp_path: Path) -> None:
    store = tmp_path / "draws.jsonl"
    with pytest.raises(KeyboardInterrupt):
        draw(store, CountingSampler(fail_at=1))
    assert set(read_completions(store)) == {"p0", "p1"}
    again = CountingSampler()
    drawn = draw(store, again)
    assert again.calls == [[200, 300], [400]]
    assert drawn == draw(tmp_path / "whole.jsonl", CountingSampler())


def test_call_of_which_a_part_is_missing_is_drawn_as_a_whole(tmp_path: Path) -> None:
    store = tmp_path / "draws.jsonl"
    draw(store, CountingSampler())
    lines = store.read_text().splitlines()
    store.write_text("\n".join(line for line in lines if '"p3"' not in line) + "\n")
    again = CountingSampler()
    draw(store, again)
    assert again.calls == [[200, 300]]


def test_torn_last_line_is_skipped_and_the_next_one_is_not_joined_to_it(tmp_path: Path) -> None:
    store = tmp_path / "draws.jsonl"
    draw(store, CountingSampler())
    content = store.read_bytes()
    store.write_bytes(content[:-20])
    again = CountingSampler()
    drawn = draw(store, again)
    assert again.calls == [[400]]
    assert drawn == draw(store, None)


def test_store_keeps_every_character(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x00d\r\ne\U0001f600 \ud800"
    append_completions(tmp_path / "s.jsonl", {"k": [Completion((), text, "stop")]})
    assert read_completions(tmp_path / "s.jsonl")["k"][0].text == text


def test_another_number_of_completions_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "draws.jsonl", CountingSampler())
    with pytest.raises(ConfigError, match="holds 2 completions of 'p0', this command draws 3"):
        draw(tmp_path / "draws.jsonl", CountingSampler(), n=3)


def test_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "draws.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="is not a store"):
        draw(tmp_path / "draws.jsonl", CountingSampler())


def test_equal_keys_are_refused(tmp_path: Path) -> None:
    twice = [*requests(1), *requests(1)]
    with pytest.raises(ValueError, match="same key"):
        draw_stored(twice, tmp_path / "s.jsonl", CountingSampler())


def test_a_lazy_sampler_is_opened_once_by_its_first_draw_and_closed_whatever_happens() -> None:
    opened: list[CountingSampler] = []

    def open_sampler() -> CountingSampler:
        opened.append(CountingSampler(fail_at=2))
        return opened[-1]

    with LazySampler(open_sampler):
        pass
    assert opened == []
    with pytest.raises(KeyboardInterrupt), LazySampler(open_sampler) as sampler:
        for request in requests(3):
            sampler.sample([request])
    assert [(len(made.calls), made.closed) for made in opened] == [(2, True)]


# ---------------------------------------------------------------- vLLM


class FakeEngine:
    """``vllm.LLM`` as far as the sampler uses it: every child's token is 7, with its log-prob."""

    made: dict[str, Any]
    asked: list[Any]

    def __init__(self, **arguments: Any) -> None:
        FakeEngine.made = arguments
        self.ended = False
        self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=self._end))

    def _end(self) -> None:
        self.ended = True

    def generate(self, inputs: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
        FakeEngine.asked = list(zip(inputs, parameters, strict=True))
        step = {7: types.SimpleNamespace(logprob=-0.25), 9: types.SimpleNamespace(logprob=-9.0)}
        return [
            types.SimpleNamespace(
                outputs=[
                    types.SimpleNamespace(token_ids=[7], text="seven", finish_reason="length", logprobs=[step])
                    for _ in range(item.n)
                ]
            )
            for item in parameters
        ]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("vllm")
    module.LLM = FakeEngine
    module.SamplingParams = lambda **given: types.SimpleNamespace(**given)
    module.TokensPrompt = lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids}
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_is_asked_prompt_by_prompt(fake_vllm: None) -> None:
    sampler = EngineConfig(platform="gpu", max_model_len=99).open("m")
    assert (FakeEngine.made["model"], FakeEngine.made["max_model_len"]) == ("m", 99)
    drawn = sampler.sample([Request("a", (1, 2), 5, 10, 2, 0.7, 0.9), Request("b", (3,), 6, 20, 2, 0.7, 0.9)])
    assert drawn == [[Completion((7,), "seven", "length", (-0.25,))] * 2] * 2
    assert [item["prompt_token_ids"] for item, _ in FakeEngine.asked] == [[1, 2], [3]]
    assert [(p.n, p.temperature, p.top_p, p.max_tokens, p.seed, p.logprobs) for _, p in FakeEngine.asked] == [
        (2, 0.7, 0.9, 5, 10, 0),
        (2, 0.7, 0.9, 6, 20, 0),
    ]
    sampler.close()
    assert sampler._llm.ended


def test_cpu_engine_has_the_values_of_the_platforms_config(compose_config: Any) -> None:
    rollout = compose_config("platform=cpu").actor_rollout_ref.rollout
    arguments = EngineConfig(platform="cpu").arguments()
    assert arguments["enforce_eager"] == rollout.enforce_eager
    assert arguments["block_size"] == rollout.engine_kwargs.vllm.block_size
    assert arguments["max_num_batched_tokens"] == rollout.max_num_batched_tokens
    assert arguments["logprobs_mode"] == rollout.logprobs_mode
    assert arguments["dtype"] == rollout.dtype
    assert "gpu_memory_utilization" not in arguments and arguments["max_model_len"] is None
    gpu = EngineConfig(platform="gpu").arguments()
    assert "block_size" not in gpu and gpu["gpu_memory_utilization"] == 0.6


def test_cpu_environment_is_set_before_vllm_starts(fake_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment is put back by hand, because setting it is what is tested.
    before = dict(os.environ)
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    try:
        EngineConfig(platform="cpu", num_threads=3, kv_cache_gib=2).open("m")
        assert os.environ["VERL_PLATFORM"] == "cpu"
        assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---------------------------------------------------------------- prompts


def test_problem_tokens_are_those_of_the_rollout(model_folder: Path, bos_model_folder: Path) -> None:
    from transformers import AutoTokenizer
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": "1 + 1 é?"}]
    for folder in (model_folder, bos_model_folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        builder = create_continuous_token_builder(tokenizer, hf_model_type="llama")
        assert problem_tokens(tokenizer, messages) == list(builder.build_initial_tokens(messages))


def test_bos_of_a_problem(model_folder: Path, bos_model_folder: Path, chatml_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    found = []
    for folder in (model_folder, bos_model_folder, chatml_model_folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found.append(automatic_bos(tokenizer) == tokenizer.bos_token_id and tokenizer.bos_token_id is not None)
    assert found == [False, True, False]


def test_store_is_plain_json_lines(tmp_path: Path) -> None:
    draw(tmp_path / "draws.jsonl", CountingSampler(), count=1)
    (line,) = (tmp_path / "draws.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "key": "p0",
        "completions": [
            {"token_ids": [i], "text": f"t{i}", "finish_reason": "stop", "logprobs": [-0.5]} for i in range(2)
        ],
    }
