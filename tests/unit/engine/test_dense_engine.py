"""Shared prompts change what is computed, not the result: packing against separate rows, our engine against verl's."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM

import tests.support.reference  # noqa: F401  (how hypothesis runs)
from recipe.skpo.engine.dense import pack_rows
from tests.support.engine_rows import micro_batch

VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double()


def random_rows(seed: int, groups: list[tuple[int, list[int]]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Shuffled rows of (prompt length, response lengths) groups."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = [], []
    for prompt_length, lengths in groups:
        prompt = torch.randint(VOCABULARY, (prompt_length,), generator=generator)
        for length in lengths:
            prompts.append(prompt.clone())
            responses.append(torch.randint(VOCABULARY, (length,), generator=generator))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[i] for i in order], [responses[i] for i in order]


def separate(model: LlamaForCausalLM, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Log-probs of one row computed alone, (response tokens,)."""
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1)


groups = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), groups=groups)
def test_packed_rows_have_the_log_probs_of_separate_rows(model, seed: int, groups) -> None:
    prompts, responses = random_rows(seed, groups)
    packed = pack_rows(prompts, responses)
    output = model(
        input_ids=packed.input_ids, attention_mask=packed.attention_mask, position_ids=packed.position_ids
    ).logits
    found = output.flatten(0, 1)[packed.predictors].log_softmax(-1).gather(1, packed.labels[:, None]).squeeze(1)
    wanted = torch.cat([separate(model, *row) for row in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_prompt_is_laid_out_once() -> None:
    prompts, responses = random_rows(0, [(10, [3, 4, 5])])
    packed = pack_rows(prompts, responses)
    assert packed.input_ids.shape == (1, 10 + 3 + 4 + 5)


def test_short_trees_share_a_sequence() -> None:
    prompts, responses = random_rows(0, [(10, [10]), (4, [6]), (5, [5])])
    assert pack_rows(prompts, responses).input_ids.shape == (2, 20)


# ---------------------------------------------------------------- the engine


def run_engine(engine_class: type, model: LlamaForCausalLM, data: TensorDict) -> dict[str, torch.Tensor]:
    engine = object.__new__(engine_class)
    engine.pad_to_length = None
    engine.use_ulysses_sp = False
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False)
    inputs, arguments = engine.prepare_model_inputs(data)
    return engine.prepare_model_outputs(model(**inputs), arguments, data, None)


@pytest.mark.parametrize("temperature", [0.6, "per row"])
def test_engine_gives_what_verls_own_gives(model, temperature) -> None:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.padding import no_padding_2_padding

    from recipe.skpo.engine.dense import SharedPrefixEngine

    prompts, responses = random_rows(3, [(6, [3, 5, 1, 4]), (4, [2, 2]), (9, [5])])
    single = model.float()
    value = torch.linspace(0.5, 1.5, len(prompts)) if temperature == "per row" else temperature
    weights, found = torch.arange(1.0, 1 + sum(map(len, responses))), {}
    for engine_class in (FSDPEngineWithLMHead, SharedPrefixEngine):
        data = micro_batch(prompts, responses, value)
        output = run_engine(engine_class, single, data)
        padded = {name: no_padding_2_padding(values, data) for name, values in output.items()}
        flat = torch.cat([row[: len(r)] for row, r in zip(padded["log_probs"], responses, strict=True)])
        single.zero_grad()
        (flat * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in single.parameters() if p.grad is not None])
        found[engine_class.__name__] = (padded, gradient)
    (theirs, their_gradient), (ours, our_gradient) = found.values()
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-5
    model.double()


@pytest.mark.parametrize("option", ["use_remove_padding", "use_fused_kernels"])
def test_options_it_does_not_know_are_refused(model, option: str) -> None:
    from verl.utils import tensordict_utils as tu

    from recipe.skpo.engine.dense import SharedPrefixEngine

    data = micro_batch(*random_rows(0, [(3, [2])]), 1.0)
    tu.assign_non_tensor(data, **{option: True})
    with pytest.raises(ValueError, match=f"share_prefixes=true cannot be used with {option}=true"):
        run_engine(SharedPrefixEngine, model, data)


def test_engine_is_found_under_its_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.engine.base import EngineRegistry

    from recipe.skpo.engine.dense import DEVICE, SharedPrefixEngine

    monkeypatch.setenv("VERL_ENGINE_DEVICE", DEVICE)
    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", backend) is SharedPrefixEngine
