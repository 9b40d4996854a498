"""What crosses training steps, and the one file of a checkpoint that carries it.

SPEC section 4.  Trackers, drift clock, random generator and counters live in the trainer process alone; workers are
stateless and are handed each prompt's split position and seed.  The file is an ``.npz`` read without pickle, written
under a temporary name and renamed, so that it is whole or absent.
"""

import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.skpo.segments import sample_split_position
from recipe.skpo.settings import SkpoSettings
from recipe.skpo.tracker import DriftClock, KLAdaptiveTracker

FILE_NAME = "skpo_state.npz"
_FORMAT = 1
_SEED_BOUND = 2**31 - 1


DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What reading a truncated or altered ``.npz`` raises."""


class StateError(RuntimeError):
    """The SKPO state of a checkpoint is missing, damaged or of another run; the message says which and what to do."""


@dataclass(frozen=True)
class Visit:
    """What the trainer decides for one prompt before it is rolled out.

    Attributes:
        ordinal: running number of the visit, from 0, over the whole run.
        split_position: t_q in tokens.
        seed: of the prompt's sampled requests.
    """

    ordinal: int
    split_position: int
    seed: int


class SkpoState:
    """Trackers, drift clock, generator and counters of one run.

    Args:
        settings: the run's settings.
        response_budget: longest response in tokens; bounds the assumed length of a prompt never visited.
    """

    def __init__(self, settings: SkpoSettings, response_budget: int) -> None:
        self.settings = settings
        constants = {
            "rho_min": settings.tracker.rho_min,
            "rho_max": settings.tracker.rho_max,
            "half_life": settings.tracker.half_life,
        }
        # 0.5 in [0, 1] is reward 0: the baseline of a first visit (SPEC section 4).
        self.values = KLAdaptiveTracker(0.5, **constants)
        self.lengths = KLAdaptiveTracker(min(settings.initial_length, response_budget), **constants)
        self.clock = DriftClock(settings.tracker.drift)
        self.rng = np.random.default_rng(settings.seed)
        self.visits = 0

    def next_visit(self, prompt_id: str) -> Visit:
        """Draw the split position and the seed of the next rollout of ``prompt_id``; two draws of the generator."""
        split = sample_split_position(
            self.lengths.value(prompt_id), self.rng, self.settings.split_low, self.settings.split_high
        )
        visit = Visit(self.visits, split, int(self.rng.integers(_SEED_BOUND)))
        self.visits += 1
        return visit

    def baseline(self, prompt_id: str) -> float:
        """V of the prompt mapped to reward units, in [-1, 1]; 0 on the first visit."""
        return 2.0 * self.values.value(prompt_id) - 1.0

    def observe(self, prompt_id: str, reward: float, mean_length: float) -> float:
        """Update both trackers after a visit.

        Args:
            reward: R_I in [-1, 1].
            mean_length: mean token length of the prompt's downstream responses.

        Returns:
            The drift D since the previous visit that both updates used.
        """
        drift = self.clock.drift(prompt_id)
        self.values.update(prompt_id, (reward + 1.0) / 2.0, drift)
        self.lengths.update(prompt_id, mean_length, drift)
        self.clock.visit(prompt_id)
        return drift

    def save(self, folder: Path) -> Path:
        """Write the state into ``folder`` (made if absent), atomically; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": _FORMAT,
            "group_size": self.settings.group_size,
            "drift": self.settings.tracker.drift,
            "visits": self.visits,
            "rng": self.rng.bit_generator.state,
        }
        arrays = {
            f"{part}.{name}": array
            for part, source in self._parts().items()
            for name, array in source.state_dict().items()
        }
        temporary = folder / f".{FILE_NAME}.{os.getpid()}"
        with temporary.open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        target = folder / FILE_NAME
        temporary.replace(target)
        return target

    def load(self, folder: Path) -> None:
        """Replace everything by the state saved in ``folder``.

        Raises:
            StateError: no file, a damaged one, or one of a run with another group size or drift unit.
        """
        path = require_state_file(folder)
        try:
            with np.load(path, allow_pickle=False) as archive:
                meta = json.loads(str(archive["meta"]))
                arrays = {name: archive[name] for name in archive.files if name != "meta"}
            self._check_meta(path, meta)
            for part, target in self._parts().items():
                prefix = f"{part}."
                target.load_state_dict({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
            self.rng.bit_generator.state = meta["rng"]
            self.visits = int(meta["visits"])
        except DAMAGE as error:
            raise StateError(
                f"{path}: cannot be read as SKPO state ({error}); resume from an older checkpoint with "
                f"trainer.resume_mode=resume_path trainer.resume_from_path=<.../global_step_N>"
            ) from error

    def _check_meta(self, path: Path, meta: dict[str, Any]) -> None:
        if meta["format"] != _FORMAT:
            raise StateError(f"{path}: has format {meta['format']}, this version of verl-skpo reads {_FORMAT}")
        for name, mine in (("group_size", self.settings.group_size), ("drift", self.settings.tracker.drift)):
            if meta[name] != mine:
                raise StateError(
                    f"{path}: was saved with {name}={meta[name]}, this run has {mine}; use the same value, or start "
                    f"a new run with trainer.resume_mode=disable and another output_dir"
                )

    def _parts(self) -> dict[str, KLAdaptiveTracker | DriftClock]:
        return {"values": self.values, "lengths": self.lengths, "clock": self.clock}


def require_state_file(folder: Path) -> Path:
    """The SKPO state file of a checkpoint folder.

    Raises:
        StateError: it is not there.  Never reset silently: training on with empty trackers would look like a resume.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise StateError(
            f"{folder}: holds no {FILE_NAME}, so the trackers of this run are lost; resume from a checkpoint that "
            f"SKPO wrote, or start anew with trainer.resume_mode=disable and another output_dir"
        )
    return path
