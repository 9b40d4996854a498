"""A checkpoint with a LoRA adapter becomes one model: through verl's merger, then ours."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.adapters import ADAPTER, META, has_adapter, merge_adapter


@pytest.fixture
def adapted() -> Any:
    """A tiny random model with a random adapter of rank 4, whose alpha is not its rank."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, tie_word_embeddings=True, **sizes))
    options: dict[str, Any] = {"r": 4, "lora_alpha": 24, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **options)).eval()


def merged_by_verl(adapted: Any, actor: Path, target: Path) -> dict[str, torch.Tensor]:
    """What verl's merger leaves in ``target``; returns the base model's weights by their usual names."""
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    actor.mkdir(), target.mkdir()
    (actor / META).write_text(json.dumps({"r": 4, "lora_alpha": 24, "task_type": "CAUSAL_LM"}))
    merger = object.__new__(FSDPModelMerger)
    merger.config = SimpleNamespace(local_dir=str(actor), target_dir=str(target))
    state = dict(adapted.state_dict())
    assert merger.save_lora_adapter(state) == str(target / ADAPTER)
    return state


def test_the_merged_model_computes_what_the_adapted_one_does(adapted, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(50)[None]
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        with adapted.disable_adapter():
            base = adapted(input_ids=tokens).logits
    state = merged_by_verl(adapted, tmp_path / "actor", tmp_path / "target")
    adapted.get_base_model().save_pretrained(tmp_path / "target", state_dict=state)
    assert has_adapter(tmp_path / "actor")
    merge_adapter(tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert merged.dtype == torch.bfloat16
    with torch.no_grad():
        found = merged.float()(input_ids=tokens).logits
    # bfloat16 has 8 bits.
    assert (found - expected).abs().max() < 0.02 * (expected - base).abs().max()


def test_an_adapter_without_its_base_model_is_refused(adapted, tmp_path: Path) -> None:
    """As saved with verl's save_lora_only: transformers would make the rest up."""
    state = merged_by_verl(adapted, tmp_path / "actor", tmp_path / "target")
    embedding = {name: tensor for name, tensor in state.items() if "embed_tokens" in name}
    adapted.get_base_model().save_pretrained(tmp_path / "target", state_dict=embedding)
    with pytest.raises(ConfigError, match=r"more weights of the base model are missing; name a checkpoint that was"):
        merge_adapter(tmp_path / "target")


@pytest.mark.parametrize(
    "meta", ["{}", "{", "[]", '{"r": 8}', '{"r": 8, "lora_alpha": 0}', '{"r": "8", "lora_alpha": 16}']
)
def test_an_adapter_of_unknown_scale_is_refused(meta: str, tmp_path: Path) -> None:
    """verl's merger would warn and write alpha 0, with which the adapter does nothing."""
    assert not has_adapter(tmp_path)
    (tmp_path / META).write_text(meta)
    with pytest.raises(ConfigError, match="has no rank r and lora_alpha above 0, without which"):
        has_adapter(tmp_path)
