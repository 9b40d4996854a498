"""Tokens of every prompt of a data file: counted by the thousand, and kept for the next start and for verl's filter.

A count is kept under a digest of the file and of everything that decides it: tokenizer, chat template and its options.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = ("transformers", "tokenizers")


def folder() -> Path:
    """Return the folder of what is kept."""
    return Path(os.environ.get("SKPO_CACHE", ".cache")) / "prompt_lengths"


def count_tokens(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Count the tokens of rendered prompts; a fast tokenizer takes them all at once, on all cores."""
    if not getattr(tokenizer, "is_fast", False):
        return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    backend = tokenizer.backend_tokenizer
    # State of the last call with such an option.
    backend.no_truncation()
    backend.no_padding()
    return [len(found.ids) for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def lengths_file(data: Path, column: str, tokenizer: Any, options: Mapping[str, Any]) -> Path | None:
    """Return where the lengths of a file's prompts are kept.

    Args:
        data: parquet file.
        column: of the prompts.
        tokenizer: with the template that is used.
        options: that the template reads, must be JSON.

    Returns:
        None where digests do not decide them: code of the model's own, a template that reads the clock.
    """
    own_code = not type(tokenizer).__module__.startswith("transformers.")
    template = json.dumps(tokenizer.chat_template)
    # verl gives a tokenizer without padding another one.
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name in template}
    if own_code or not getattr(tokenizer, "is_fast", False) or "strftime_now" in template:
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    decides = [column, template, options, special, state, [version(name) for name in _PACKAGES]]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    with data.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return folder() / f"{digest.hexdigest()[:32]}.npy"


def read_lengths(path: Path | None) -> np.ndarray | None:
    """Read kept lengths, int32 (rows,); None if there are none, or if they are damaged."""
    try:
        found = None if path is None else np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found is not None and found.dtype == np.int32 and found.ndim == 1 else None


def write_lengths(path: Path, lengths: np.ndarray) -> None:
    """Keep lengths, atomically; without a folder to write to they are counted again next time."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(temporary, lengths)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
