"""Packed and shared rows change what is computed, not the result: our engine against verl's own padded rows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

from recipe.skpo.engine import attention
from recipe.skpo.engine.log_probs import log_probs
from recipe.skpo.engine.packing import BLOCK, PackedSequence

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
EXTRA: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mistral": {"sliding_window": None, "head_dim": 8},
    "llama": {"tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's engines ask for the accelerator's name."""
    from recipe.skpo.engine import fsdp

    monkeypatch.setattr("verl.workers.engine.fsdp.transformer_impl.get_device_id", lambda: "cpu")
    for module in ("verl.workers.engine.fsdp.transformer_impl", fsdp.__name__):
        monkeypatch.setattr(f"{module}.get_device_name", lambda: "cpu")


def make_model(model_type: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SIZES | EXTRA.get(model_type, {}) | options)
    return AutoModelForCausalLM.from_config(config).train()


def make_rows(groups: tuple[int, ...] = (4, 3, 0)) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rows of SKPO: per prompt (q -> s) and ([s, q] -> o_i); the last prompt's only row shares nothing."""
    generator = torch.Generator().manual_seed(1)

    def tokens() -> torch.Tensor:
        length = int(torch.randint(1, 30, (1,), generator=generator))
        return torch.randint(SIZES["vocab_size"], (length,), generator=generator)

    prompts, responses = [], []
    for group in groups:
        q, s = tokens(), tokens()
        prompts += [q, *[torch.cat([s, q])] * group]
        responses += [s, *(tokens() for _ in range(group))]
    return prompts, responses


def micro_batch(prompts: list[torch.Tensor], responses: list[torch.Tensor], temperature: Any) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    inputs = [torch.cat(row) for row in zip(prompts, responses, strict=True)]
    fields = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested(inputs),
        "position_ids": nested([torch.arange(len(row)) for row in inputs]),
        "response_mask": nested([torch.ones_like(row) for row in responses]),
        "loss_mask": nested([torch.ones_like(row) for row in responses]),
    }
    data = TensorDict(fields, batch_size=len(prompts))
    tu.assign_non_tensor(data, use_remove_padding=False, calculate_entropy=True, pad_token_id=0)
    if isinstance(temperature, torch.Tensor):
        data["temperature"] = temperature
    else:
        tu.assign_non_tensor(data, temperature=temperature)
    return data


def make_engine(engine_class: type, module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch | None = None) -> Any:
    """An engine around a module, without FSDP and processes."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    engine = object.__new__(engine_class)
    engine.pad_to_length, engine.pad_to_length_bucket, engine.use_ulysses_sp, engine.rank = False, 1, False, 0
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, mixed_precision={"param_dtype": "fp32"})
    engine._autocast_dtype = torch.float32
    if monkeypatch is not None:
        monkeypatch.setattr(FSDPEngineWithLMHead, "_build_module", lambda self: module)
    engine.module = engine._build_module() if engine_class is not FSDPEngineWithLMHead else module
    engine.get_data_parallel_group = lambda: None
    return engine


def results(engine: Any, prompts: Any, responses: Any, temperature: Any) -> tuple[torch.Tensor, ...]:
    """Log-probs and entropies of response tokens, (tokens,), and the gradient of a weighted sum of both."""
    from verl.workers.utils.padding import no_padding_2_padding

    found: list[torch.Tensor] = []

    def loss(model_output: Any, data: TensorDict, dp_group: Any) -> tuple[torch.Tensor, dict]:
        for name in ("log_probs", "entropy"):
            padded = no_padding_2_padding(model_output[name], data)
            found.append(torch.cat([row[: len(r)] for row, r in zip(padded, responses, strict=True)]))
        weights = torch.linspace(-1, 2, len(found[0]))
        return (weights * found[0] + 0.1 * found[1]).mean(), {}

    engine.module.zero_grad()
    value, output = engine.forward_step(micro_batch(prompts, responses, temperature), loss, False)
    value.backward()
    gradient = torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.grad is not None])
    return found[0].detach(), found[1].detach(), gradient, output["metrics"]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("model_type", sorted(attention.SERVED))
def test_packed_rows_give_what_padded_rows_give(model_type: str, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from recipe.skpo.engine.fsdp import SHARE_VARIABLE, PackedEngine

    monkeypatch.setenv(SHARE_VARIABLE, str(int(share)))
    prompts, responses = make_rows()
    temperature = torch.linspace(0.5, 1.5, len(prompts)) if share else 0.7
    own, module = make_model(model_type), make_model(model_type)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    theirs = results(make_engine(FSDPEngineWithLMHead, own), prompts, responses, temperature)
    engine = make_engine(PackedEngine, module, monkeypatch)
    ours = results(engine, prompts, responses, temperature)
    assert engine.kind == attention.VARLEN
    for name, found, wanted in zip(("log-probs", "entropies", "gradient"), ours, theirs, strict=False):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    rows = sum(map(len, prompts + responses))
    saved = sum(len(prompts[first]) * (group - 1) for first, group in ((1, 4), (6, 3))) if share else 0
    counts = {name: metric.aggregate() for name, metric in ours[3].items()}
    assert counts == {"packing/positions_sum": rows - saved, "packing/tokens_sum": rows}
