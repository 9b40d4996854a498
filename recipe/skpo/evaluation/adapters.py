"""The LoRA adapter beside a model: ``python -m recipe.skpo.evaluation.adapters <folder>`` merges it in.

verl's merger writes base model and adapter apart; evaluation reads whole models.  peft adds them in float32.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from data_prep.untrusted import UntrustedError, read_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.output.files import write_atomic

META = "lora_train_meta.json"
"""verl's file with the adapter's rank and alpha, beside the weights of the ranks."""
ADAPTER = "lora_adapter"
"""Folder of the adapter in the one that verl's merger wrote."""


def has_adapter(actor: Path) -> bool:
    """Find out whether a folder of verl's FSDP checkpoint has an adapter.

    Raises:
        ConfigError: rank or alpha are not known; verl's merger would take 0 for alpha, and the adapter would be lost.
    """
    file = actor / META
    if not file.is_file():
        return False
    try:
        meta = read_json(file)
        known = all(type(meta[name]) is int and meta[name] > 0 for name in ("r", "lora_alpha"))
    except (UntrustedError, KeyError, TypeError):
        known = False
    if not known:
        raise ConfigError(
            f"checkpoint: {file} has no rank r and lora_alpha above 0, without which an adapter cannot be merged; name "
            f"another checkpoint"
        )
    return True


def merge_adapter(folder: Path) -> None:
    """Add the adapter in ``folder`` to the model there, in float32; the files are bfloat16 again.

    Raises:
        ConfigError: weights of the model are missing.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    base, loading = read
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(
            f"checkpoint: {missing[0]} and {len(missing) - 1} more weights of the base model are missing; name a "
            f"checkpoint that was saved with actor_rollout_ref.actor.checkpoint.save_lora_only=false"
        )
    merged = PeftModel.from_pretrained(base, str(folder / ADAPTER)).merge_and_unload(safe_merge=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    merged.to(torch.bfloat16).save_pretrained(folder)
    shutil.rmtree(folder / ADAPTER)


def keep_adapter(folder: Path) -> None:
    """Remove the model in ``folder`` and leave the adapter and the tokenizer there, as peft and vLLM read them.

    Raises:
        ConfigError: no adapter is there.
    """
    adapter = folder / ADAPTER
    if not adapter.is_dir():
        raise ConfigError("checkpoint: its weights hold no adapter, although it says so; name another checkpoint")
    for name in ("config.json", "generation_config.json", *(path.name for path in folder.glob("model*.safetensors*"))):
        (folder / name).unlink(missing_ok=True)
    config = read_json(adapter / "adapter_config.json")
    # The merger collects them in a set, whose order differs from process to process.
    config["target_modules"].sort()
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    (adapter / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    shutil.rmtree(adapter)


if __name__ == "__main__":
    try:
        merge_adapter(Path(sys.argv[1]))
    except ConfigError as error:
        sys.exit(str(error))
