"""Digests of files and values: a run, and a folder of stored draws, know by them what they were made of."""

import hashlib
import json
from pathlib import Path
from typing import Any

_WHOLE = 64 << 20
"""Bytes up to which a weight file is read as a whole; of a larger one the header and ``_BLOCKS`` blocks."""

_BLOCKS, _BLOCK = 256, 4096


def value_digest(value: Any) -> str:
    """Return a digest of a value of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str | None:
    """Return a digest of a file's bytes; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        return None


def model_folder(path: str) -> Path | None:
    """Return the model's folder; for a name on the hub, the one in its cache."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        # Whoever has loaded only the tokenizer may have only its file.
        found = [try_to_load_from_cache(path, name) for name in ("config.json", "tokenizer_config.json")]
    except HFValidationError:
        return None
    return next((Path(cached).parent for cached in found if isinstance(cached, str)), None)


def model_digest(model: str) -> str | None:
    """Return what differs if a model's responses do: a digest of weights and configs, or the commit of a hub's name.

    Args:
        model: folder or name, whose tokenizer has been loaded: the cache has the commit of a name only then.
    """
    folder = model_folder(model)
    if folder is None:
        return None
    if not Path(model).is_dir():
        # The hub's cache has a folder per commit.
        return folder.name
    configs = [file_digest(folder / name) for name in ("config.json", "generation_config.json")]
    return value_digest([weights_digest(folder), *configs])


def weights_digest(folder: Path) -> str | None:
    """Return a digest of a model's weight files; None if there are none.  Of large files a megabyte each is read."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return value_digest([[file.name, _sampled_digest(file)] for file in files]) if files else None


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
