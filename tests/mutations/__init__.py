"""Programs that are wrong on purpose: what ``scripts/mutations.py`` shows to the tests, which must turn red.

A table per subject: ``golden`` breaks the method, ``faults`` takes the handling of faults away.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """A named change of a module of ``recipe/skpo``: every ``old`` occurs once and becomes its ``new``.

    Attributes:
        tests: those that must notice, as pytest names them below ``tests/``.
    """

    module: str
    name: str
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    def path(self, root: Path = ROOT) -> Path:
        """The module's file."""
        return root / "recipe" / "skpo" / f"{self.module}.py"

    def apply(self, text: str) -> str:
        """The module's text with the changes.

        Raises:
            ValueError: a text to change is not there exactly once.
        """
        for old, new in self.changes:
            if text.count(old) != 1:
                raise ValueError(f"{self.module}: {self.name}: occurs {text.count(old)} times, not once: {old!r}")
            text = text.replace(old, new)
        return text
