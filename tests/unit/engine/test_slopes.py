"""Entropy slopes of every engine and layout against their definition in float64 over separate rows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_from_nested

from recipe.skpo.engine import log_probs, sizes
from recipe.skpo.method.rows import SLOPE_FIELD, WANT_SLOPES
from tests.support.engine_rows import micro_batch
from tests.unit.engine.test_packed_engine import make_engine, make_model, make_rows, on_the_cpu

__all__ = ["on_the_cpu"]  # a fixture of every test here


def expected_slopes(module: Any, prompts: Any, responses: Any, temperatures: torch.Tensor) -> torch.Tensor:
    """C - S_a of every response token, by the definition, row by row."""
    module, found = module.double(), []
    for prompt, response, temperature in zip(prompts, responses, temperatures.tolist(), strict=True):
        logits = module(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        log_p = (logits / temperature).log_softmax(-1)
        own = log_p.exp() * (log_p - (log_p.exp() * log_p).sum(-1, keepdim=True))
        correction = (log_p.exp() * own).sum(-1)
        found.append(correction - own.gather(1, response[:, None]).squeeze(1))
    return torch.cat(found).detach()


def asked(prompts: Any, responses: Any, temperatures: torch.Tensor, remove_padding: bool = False) -> TensorDict:
    data = micro_batch(prompts, responses, temperatures)
    tu.assign_non_tensor(data, use_remove_padding=remove_padding, **{WANT_SLOPES: True})
    return data


def of_responses(output: dict[str, torch.Tensor], data: TensorDict) -> torch.Tensor:
    return response_from_nested(output[SLOPE_FIELD], data["response_mask"]).values().double()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "SLOPE_CHUNK", 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("layout", ["padded", "packed", "not packable", "shared prefixes"])
def test_each_layout_gives_the_slopes_of_separate_rows(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipe.skpo.engine.dense import SharedPrefixEngine
    from recipe.skpo.engine.fsdp import PackedEngine
    from recipe.skpo.engine.slopes import SlopesEngine

    kind = {"padded": SlopesEngine, "shared prefixes": SharedPrefixEngine}.get(layout, PackedEngine)
    window = {"sliding_window": 512} if layout == "not packable" else {}  # longer than the rows
    model = "mistral" if window else "qwen2"
    prompts, responses = make_rows()
    temperatures = torch.linspace(0.5, 1.5, len(prompts))
    engine = make_engine(kind, make_model(model, **window), monkeypatch)
    data = asked(prompts, responses, temperatures)
    with torch.no_grad():
        _, found = engine.forward_step(data, None, True)
    wanted = expected_slopes(make_model(model, **window), prompts, responses, temperatures)
    torch.testing.assert_close(of_responses(found["model_output"], data), wanted, rtol=1e-4, atol=1e-6)
    tu.assign_non_tensor(data, **{WANT_SLOPES: False})
    with torch.no_grad():
        _, without = engine.forward_step(data, None, True)
    assert SLOPE_FIELD not in without["model_output"], "an update does not pay for them"
    for name in ("log_probs", "entropy"):
        assert torch.equal(without["model_output"][name].values(), found["model_output"][name].values())


@pytest.mark.usefixtures("small_chunks")
def test_verls_rows_without_padding_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from recipe.skpo.engine.slopes import SlopesEngine

    prompts, responses = make_rows()
    temperatures = torch.linspace(0.5, 1.5, len(prompts))
    module = make_model("qwen2")
    engine = make_engine(SlopesEngine, module, monkeypatch)
    engine.pad_to_length, engine.pad_to_length_bucket = True, 64
    engine.engine_config.entropy_from_logits_with_chunking = False
    engine.compute_entropy_from_logits = lambda logits: logits.sum(-1)
    data = asked(prompts, responses, temperatures, remove_padding=True)
    inputs, arguments = engine.prepare_model_inputs(data)
    with torch.no_grad():
        # Each row by itself, as flash attention computes them; then the padding.
        rows = [module(input_ids=row[None]).logits[0] for row in data["input_ids"].unbind()]
        padding = torch.zeros(inputs["input_ids"].shape[1] - sum(map(len, rows)), rows[0].shape[1])
        output = SimpleNamespace(logits=torch.cat([*rows, padding])[None])
        found = engine.prepare_model_outputs(output, arguments, data, None)
    assert len(padding) == arguments["pad_size"] > 0
    wanted = expected_slopes(make_model("qwen2"), prompts, responses, temperatures)
    torch.testing.assert_close(of_responses(found, data), wanted, rtol=1e-4, atol=1e-6)


def test_no_second_tensor_over_the_vocabulary_stays_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes_seen: list[int] = []
    original = log_probs.entropy_slopes

    def watched(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sizes_seen.append(len(values))
        return original(values, labels)

    monkeypatch.setattr(log_probs, "entropy_slopes", watched)
    tokens = 3 * sizes.SLOPE_CHUNK + 5
    found = log_probs.slopes(torch.randn(tokens, 11, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.long), 0.7)
    assert (max(sizes_seen), sum(sizes_seen)) == (sizes.SLOPE_CHUNK, tokens)
    assert found.dtype == torch.float32


def test_engine_is_found_under_its_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.engine.base import EngineRegistry

    from recipe.skpo.engine.slopes import DEVICE, SlopesEngine

    monkeypatch.setenv("VERL_ENGINE_DEVICE", DEVICE)
    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", backend) is SlopesEngine
