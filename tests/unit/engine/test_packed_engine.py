"""Packed and shared rows change what is computed, not the result: our engine against verl's own padded rows."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from recipe.skpo.engine import attention
from recipe.skpo.engine.log_probs import log_probs
from recipe.skpo.engine.packing import PackedSequence
from recipe.skpo.engine.sizes import BLOCK
from tests.support.engine_rows import micro_batch

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


@pytest.mark.parametrize(
    ("model_type", "share"), [*((name, True) for name in sorted(attention.SERVED)), ("qwen2", False)]
)
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


def test_lora_gradients_are_those_of_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from recipe.skpo.engine.fsdp import PackedEngine

    prompts, responses = make_rows()
    found = []
    for engine_class in (FSDPEngineWithLMHead, PackedEngine):
        engine = make_engine(engine_class, make_model("qwen2"), monkeypatch)
        torch.manual_seed(1)
        lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", init_lora_weights=False)
        engine.module = get_peft_model(engine.module, lora)
        found.append(results(engine, prompts, responses, 1.0)[:3])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_flex_attention_agrees_with_the_varlen_path(share: bool) -> None:
    model = make_model("qwen2", hidden_size=96).eval()  # heads of 16: flex wants a power of two
    prompts, responses = make_rows((5, 3, 0))
    packed = PackedSequence(prompts, responses, share=share, multiple=BLOCK)
    found = []
    for attend in (attention.VARLEN, attention.BLOCKS):
        model.set_attn_implementation(attend)
        with torch.no_grad():
            output = model.model(input_ids=packed.input_ids, position_ids=packed.position_ids, packed=packed)
        found.append(output.last_hidden_state[0, packed.predictors])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert packed.positions % BLOCK == 0


def test_log_probs_do_not_depend_on_the_chunks() -> None:
    torch.manual_seed(0)
    head, hidden, labels = torch.nn.Linear(16, 31, bias=False), torch.randn(50, 16), torch.randint(31, (50,))
    whole, chunked = (log_probs(head, hidden, labels, 0.7, chunk) for chunk in (50, 7))
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b)
    wanted = (head(hidden) / 0.7).log_softmax(-1)
    torch.testing.assert_close(whole[0], wanted.gather(1, labels[:, None]).squeeze(1))
    torch.testing.assert_close(whole[1], -(wanted.exp() * wanted).sum(-1))


# ---------------------------------------------------------------- what is served


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("gemma2", {}, "model type gemma2 is not tested with packed attention"),
        ("gpt_oss", {}, "model type gpt_oss is not tested with packed attention"),
        ("qwen3_next", {}, "model type qwen3_next is not tested with packed attention"),
        ("granite", {}, "model type granite is not tested with packed attention"),
        ("deepseek_v3", {}, "model type deepseek_v3 is not tested with packed attention"),
        ("mistral", {"sliding_window": 4096}, "it attends to a window of 4096 tokens"),
        ("phi3", {"sliding_window": 2047}, "it attends to a window of 2047 tokens"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "it has layers of type sliding_attention"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("qwen2", {}, None),
    ],
)
def test_a_model_that_cannot_be_served_is_named(model_type: str, options: dict, reason: str | None) -> None:
    assert attention.reason_against(CONFIG_MAPPING[model_type](**options)) == reason


def test_it_gets_padded_rows_with_verls_numbers_and_one_line(monkeypatch, caplog) -> None:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from recipe.skpo.engine.fsdp import PackedEngine

    prompts, responses = make_rows()
    options = {"sliding_window": 16}
    theirs = results(make_engine(FSDPEngineWithLMHead, make_model("mistral", **options)), prompts, responses, 1.0)
    engine = make_engine(PackedEngine, make_model("mistral", **options), monkeypatch)
    ours = results(engine, prompts, responses, 1.0)
    for wanted, found in zip(theirs[:3], ours[:3], strict=True):
        torch.testing.assert_close(found, wanted)
    (line,) = [record.getMessage() for record in caplog.records if "packed attention" in record.getMessage()]
    assert line == "packed attention: it attends to a window of 16 tokens; the actor uses padded rows with sdpa"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "reason"),
    [
        (64, torch.bfloat16, 9, None),
        (64, torch.float32, 9, "they compute in bfloat16 or float16, not torch.float32"),
        (12, torch.bfloat16, 9, "a head dimension of 12 is not a multiple of 8 up to 256"),
        (512, torch.bfloat16, 9, "a head dimension of 512 is not a multiple of 8 up to 256"),
        (64, torch.bfloat16, 7, "an old card is older than Ampere"),
    ],
)
def test_what_the_kernels_cannot_compute_goes_to_flex(head_dim, dtype, capability, reason, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    config = SimpleNamespace(num_attention_heads=4, hidden_size=4 * head_dim, head_dim=None)
    assert attention.kernel_reason(config, dtype, torch.device("cuda")) == reason
    assert attention.kernel_reason(config, dtype, torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["_varlen_attn", "_varlen_attn_backward"])
def test_the_private_kernels_take_what_we_pass(name: str) -> None:
    """The arguments are the same in torch 2.11 (CUDA) and 2.13 (CPU); importing our module makes the kernels known."""
    operator = getattr(torch.ops.torch_attn, name).default
    wanted = {
        "_varlen_attn": "query key value cu_seq_q cu_seq_k max_q max_k is_causal scale window_size",
        "_varlen_attn_backward": "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state "
        "scale window_size",
    }[name].split()
    assert [argument.name for argument in operator._schema.arguments][: len(wanted)] == wanted


def test_the_kernels_are_called_with_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for CUDA, with kernels that check their arguments and compute by the branch for CPUs."""
    plain = {name: getattr(attention, name) for name in ("_forward", "_backward")}
    packed = PackedSequence(*make_rows())
    q, k, v = (torch.randn(packed.positions, heads, 8, requires_grad=True) for heads in (6, 2, 2))

    def gradients() -> list[torch.Tensor]:
        out = attention.MergedAttention.apply(q, k, v, packed, 0.3)
        return [out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), (q, k, v))]

    def checked(compute, tensors, sizes, causal: bool, scale: float, window: list[int]):
        cu_q, cu_k, longest_q, longest_k = sizes
        assert cu_q.dtype == cu_k.dtype == torch.int32 and window == ([-1, 0] if causal else [-1, -1])
        assert (int(cu_q[-1]), int(cu_k[-1])) == (len(tensors[-3]), len(tensors[-2]))
        assert (longest_q, longest_k) == (int(cu_q.diff().max()), int(cu_k.diff().max())) and int(cu_k.diff().min()) > 0
        documents = (attention.Documents(cu_q, longest_q), attention.Documents(cu_k, longest_k))
        with monkeypatch.context() as context:
            context.setattr(attention, "_has_kernels", lambda q: False)
            return compute(*documents, causal, scale)

    def forward(q, k, v, *rest):
        *sizes, causal, scale, window = rest
        results = checked(partial(plain["_forward"], q, k, v), (q, k, v), sizes, causal, scale, window)
        return *results, torch.zeros(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, *rest):
        *sizes, causal, rng_state, scale, window = rest
        assert all(x.is_contiguous() for x in (grad, q, k, v, out, lse)) and rng_state.dtype == torch.uint64
        assert lse.shape == (q.shape[1], len(q)) and out.shape == q.shape
        compute = partial(plain["_backward"], grad, q, k, v, out, lse)
        return checked(compute, (q, k, v), sizes, causal, scale, window)

    wanted = gradients()
    kernels = SimpleNamespace(_varlen_attn=forward, _varlen_attn_backward=backward)
    monkeypatch.setattr(torch.ops, "torch_attn", kernels)
    monkeypatch.setattr(attention, "_has_kernels", lambda q: True)
    for found, expected in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_padding_mask_and_unknown_options_are_refused() -> None:
    model = make_model("qwen2")
    model.set_attn_implementation(attention.VARLEN)
    packed = PackedSequence(*make_rows())
    inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "packed": packed}
    with pytest.raises(ValueError, match="takes no padding mask"):
        model.model(**inputs, attention_mask=torch.ones_like(packed.input_ids))
    x = torch.randn(1, 6, packed.positions, 8)
    with pytest.raises(ValueError, match=r"cannot serve this model \(softcap\)"):
        attention.varlen_attention(model, x, x, x, None, 1.0, packed, softcap=30.0)


def test_the_checkpoints_config_does_not_know_our_attention(tmp_path, monkeypatch) -> None:
    from transformers import AutoConfig

    from recipe.skpo.engine.fsdp import PackedEngine

    engine = make_engine(PackedEngine, make_model("qwen2"), monkeypatch)
    engine.module.config.save_pretrained(tmp_path)
    assert "skpo" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).config._attn_implementation == "sdpa"


# ---------------------------------------------------------------- micro-batches


@pytest.mark.parametrize(
    ("prompts_in_budget", "share", "together"),
    [(2.5, True, True), (1, True, True), (0.99, True, False), (2, False, False)],
)
def test_micro_batches_keep_prompts_whole_within_the_budget(prompts_in_budget, share, together, monkeypatch) -> None:
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.fsdp import transformer_impl

    from recipe.skpo.engine.fsdp import SHARE_VARIABLE, PackedEngine

    monkeypatch.setenv(SHARE_VARIABLE, str(int(share)))
    engine = make_engine(PackedEngine, make_model("qwen2"), monkeypatch)
    engine.get_data_parallel_size, engine.ulysses_sequence_parallel_size = lambda: 1, 1
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    seen: list[TensorDict] = []
    monkeypatch.setattr(engine, "forward_step", lambda micro_batch, **kwargs: seen.append(micro_batch) or (None, {}))
    monkeypatch.setattr(transformer_impl, "postprocess_batch_func", lambda **kwargs: None)
    prompts, responses = make_rows((4,) * 6)
    groups = [slice(at, at + 5) for at in range(0, 30, 5)]
    longest = max(PackedSequence(prompts[group], responses[group]).positions for group in groups)
    budget = int(prompts_in_budget * longest)
    data = micro_batch(prompts, responses, 1.0)
    tu.assign_non_tensor(data, force_group_size=5, use_dynamic_bsz=True, max_token_len_per_gpu=budget)
    engine.forward_backward_batch(data, None, forward_only=True)
    assert sum(len(part) for part in seen) == 30
    for part in seen:
        rows = len(part) % 5 == 0 and [row.tolist() for row in part["prompts"].unbind()]
        assert not together or (
            rows and all(len({*map(tuple, rows[at + 1 : at + 5])}) == 1 for at in range(0, len(rows), 5))
        )
        assert engine.prepare_model_inputs(part)[0]["input_ids"].numel() <= budget
