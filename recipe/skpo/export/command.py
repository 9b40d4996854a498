"""Export a trained checkpoint as a Hugging Face folder, and upload it if asked to.

    python -m recipe.skpo.export RUN [--step N|best] --to FOLDER [--adapter] [--push NAME [--public]]

The folder holds the weights in bfloat16, or the LoRA adapter alone, with tokenizer, chat template, generation config
and a model card.  Nothing is replaced.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from data_prep.untrusted import one_line, read_json
from recipe.skpo.errors import ConfigError
from recipe.skpo.evaluation.adapters import has_adapter
from recipe.skpo.evaluation.models import Checkpoint, filled, find_checkpoint, write_model
from recipe.skpo.evaluation.options import require
from recipe.skpo.evaluation.results import Parser, run_cli
from recipe.skpo.export.card import Card
from recipe.skpo.output.files import write_atomic
from recipe.skpo.task.model_files import load_tokenizer
from recipe.skpo.task.run_settings import run_settings

_MODEL_FILES = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""Ends of the names of files that are copied where a checkpoint has the whole model; no code, and no links."""

_LOADED = (
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    "chat_template.*",
)
"""Names, at the top of a repository, by which transformers, peft and vLLM load a model."""
_TEMPLATES = "additional_chat_templates/"
"""The one folder that transformers reads too."""


def export(
    run: str | Path, to: str | Path, step: str | None = None, adapter: bool = False, trusted: Sequence[str] = ()
) -> Path:
    """Export a checkpoint of a run.

    Args:
        run: the run's folder, its ``checkpoints``, or one checkpoint.
        to: a folder that is empty or not there yet.
        step: number of the checkpoint, or ``best``; None is the latest.
        adapter: write the LoRA adapter alone instead of the whole model.
        trusted: names that the checkpoint may import beyond those that verl saves (SECURITY.md).

    Returns:
        The folder.

    Raises:
        ConfigError: no such checkpoint, no adapter, or a folder that holds something.
    """
    target = Path(to).expanduser().resolve()
    require(not target.exists() or target.is_dir(), f"--to: {target} is a file; give a folder")
    held = next(target.iterdir(), None) if target.is_dir() else None
    require(held is None, f"--to: {target} holds {held.name if held else ''}; nothing is replaced, give another folder")
    folder = Path(run).expanduser()
    require(folder.is_dir(), f"{run} is not a folder; give that of a run, such as outputs/<run>")
    checkpoint = find_checkpoint(str(folder), trusted, step)
    actor = _actor(checkpoint)
    if adapter:
        lacks = checkpoint.shards is None or not has_adapter(checkpoint.shards)
        require(not lacks, f"--adapter: {actor} has no LoRA adapter; leave it out to export the whole model")
    with filled(target) as partial_target:
        if checkpoint.shards is None:
            _copy_model(Path(checkpoint.model), partial_target)
        else:
            write_model(checkpoint, partial_target, adapter)
        settings = run_settings(folder)
        if settings is not None and settings.chat.custom_chat_template:
            load_tokenizer(str(partial_target), settings.chat).save_pretrained(partial_target)
        card = Card.read(actor, settings.config.parent if settings else None, checkpoint.label, adapter)
        write_atomic(partial_target / "README.md", card.text())
        if adapter and card.hub is not None:
            # By this, peft and transformers find the base model themselves.
            path = partial_target / "adapter_config.json"
            named = read_json(path) | {"base_model_name_or_path": card.hub}
            write_atomic(path, json.dumps(named, indent=2) + "\n")
    return target


def _actor(checkpoint: Checkpoint) -> Path:
    """Return the folder ``global_step_N/actor`` of a checkpoint.

    Raises:
        ConfigError: the model does not come from a run.
    """
    folder = (checkpoint.shards or Path(checkpoint.model)).resolve()
    actor = folder.parent if folder.name == "huggingface" else folder
    require(
        actor.name == "actor" and re.fullmatch(r"global_step_\d+", actor.parent.name) is not None,
        f"{folder} is not a checkpoint of a run (.../global_step_N/actor); copy it as it is",
    )
    return actor


def _copy_model(model: Path, target: Path) -> None:
    """Copy the files of a whole model, with the umask's modes."""
    for path in sorted(model.iterdir()):
        # A link may lead to any file of whoever exports a run that somebody sent.
        if path.suffix in _MODEL_FILES and path.is_file() and not path.is_symlink():
            shutil.copyfile(path, target / path.name)


# ---------------------------------------------------------------- the hub


def open_hub(name: str) -> Any:
    """Return a client of the Hugging Face hub that is logged in; before minutes of work, not after them.

    Raises:
        ConfigError: a name that no repository can have, or no login.
    """
    from huggingface_hub import HfApi

    require(
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None,
        f"--push: {one_line(name, 60)} is not the name of a repository; give <user or organisation>/<name>",
    )
    hub = HfApi()
    _asked(hub.whoami)
    return hub


def push(hub: Any, folder: Path, name: str, public: bool = False) -> str:
    """Upload a folder as a model, private unless it is to be ``public``; return its address.

    A repository of this name that is there keeps its visibility and its history.  Of its files, those by which another
    model would be loaded are removed by the same commit; files of the user stay, and so do folders.

    Raises:
        ConfigError: the hub refuses, or cannot be reached.
    """
    address = _asked(lambda: hub.create_repo(repo_id=name, private=not public, exist_ok=True))

    def upload() -> None:
        # The hub's patterns would find these names in folders too.  What is uploaded is not removed.
        there = [path for path in hub.list_repo_files(repo_id=name) if _is_loaded(path)]
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Export of verl-skpo",
            delete_patterns=[escape(path) for path in there],
        )

    _asked(upload)
    return str(address)


def _is_loaded(path: str) -> bool:
    """Tell whether a file of a repository would be part of the model."""
    at_top = "/" not in path and any(fnmatchcase(path, pattern) for pattern in _LOADED)
    return at_top or path.startswith(_TEMPLATES)


def _asked(request: Callable[[], Any]) -> Any:
    try:
        return request()
    except Exception as error:  # process border: the client has errors of its own, of its HTTP library and of sockets
        reason = one_line(error) or type(error).__name__
        raise ConfigError(
            f"--push: the hub cannot be used ({reason}); log in with `hf auth login`, or export HF_TOKEN, and unset "
            f"HF_HUB_OFFLINE"
        ) from error


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = Parser(prog="python -m recipe.skpo.export", description=__doc__)
    parser.add_argument("run", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--step", help="number of the checkpoint, or best (trainer.keep_best); the latest if not given")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="empty, or not there yet")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, not merged into its model")
    parser.add_argument("--push", metavar="NAME", help="upload to this repository of the Hugging Face hub, private")
    parser.add_argument("--public", action="store_true", help="make a repository that is not there yet public")
    parser.add_argument("--trusted-globals", nargs="*", default=[], metavar="NAME", help="see SECURITY.md")
    flags = parser.parse_args(argv)

    def command() -> list[Path]:
        require(flags.push is not None or not flags.public, "--public: is for --push; give both, or none")
        hub = open_hub(flags.push) if flags.push else None
        folder = export(flags.run, flags.to, flags.step, flags.adapter, flags.trusted_globals)
        if hub is not None:
            try:
                print(push(hub, folder, flags.push, flags.public))
            except ConfigError as error:
                by_hand = f"`hf upload {flags.push} {folder}` uploads it and removes nothing"
                raise ConfigError(f"{error}; {folder} is whole: {by_hand}") from None
        return [folder]

    return run_cli(command)
