"""What crosses training steps, and the one file of a checkpoint that carries it.

docs/method.md, sections 6, 7 and 13.  Trackers, drift clock, random generator and counters live in the trainer process
alone; workers are stateless and are handed each prompt's split position and seed.  The file is an ``.npz`` read without
pickle, written under a temporary name and renamed, so that it is whole or absent.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.untrusted import one_line, parse_json
from recipe.skpo.method.polarity import EntropyTrajectory
from recipe.skpo.method.rows import Visit
from recipe.skpo.method.segments import fixed_split_position, sample_split_position
from recipe.skpo.method.tracker import DriftClock, PromptTable
from recipe.skpo.method.variance import SegmentVariance
from recipe.skpo.output.files import replacing
from recipe.skpo.settings import PolaritySettings, SkpoSettings

FILE_NAME = "skpo_state.npz"
_FORMAT = 5
_FORMAT_3 = {
    "prompts.lengths": "prompts.sizes",
    "values.values": "prompts.values",
    "values.counts": "prompts.counts",
    "lengths.values": "prompts.lengths",
    "clock.visit_steps": "prompts.visit_steps",
    "clock.visit_kl": "prompts.visit_kl",
    "clock.steps": "prompts.steps",
    "clock.total_kl": "prompts.total_kl",
}
"""Arrays of format 3 that have another name now.  Its ``lengths.counts`` are equal to ``values.counts``."""
_SINCE_FORMAT_5 = ("prompts.squares", "signal.visits")

_SEED_BOUND = 2**31 - 1

DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError, zipfile.BadZipFile),
    *(zlib.error, OverflowError, RecursionError, MemoryError),
)
"""What reading a truncated or altered ``.npz`` raises."""


class StateError(RuntimeError):
    """The SKPO state of a checkpoint is missing, damaged or of another run; the message says which and what to do."""


class StoredSegments:
    """Each prompt's last trained tokens with their log-probs, for the drift ``logratio`` (docs/method.md, 12).

    Args:
        most_tokens: bound of all of them; over it, those stored longest ago are dropped.
    """

    TOKEN_BYTES = 8

    def __init__(self, most_tokens: int = 10**9) -> None:
        self.most_tokens = most_tokens
        self._tokens = 0
        self._rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, prompt_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32 (tokens,), and log pi of each when they were trained, float32 (tokens,), in nats."""
        return self._rows[prompt_id]

    def put(self, prompt_id: str, token_ids: Any, logprobs: Any) -> None:
        """Replace what is stored for the prompt by copies: a view would keep the whole batch in memory.

        Raises:
            ValueError: no token, or lengths that differ.
        """
        tokens, values = np.array(token_ids, dtype=np.int32), np.array(logprobs, dtype=np.float32)
        if not tokens.size or tokens.shape != values.shape:
            raise ValueError(f"{tokens.size} tokens with {values.size} log-probs for prompt {prompt_id}")
        self._drop(prompt_id)
        self._rows[prompt_id] = (tokens, values)
        self._tokens += tokens.size
        while self._tokens > self.most_tokens:
            self._drop(next(iter(self._rows)))

    def _drop(self, prompt_id: str) -> None:
        if prompt_id in self._rows:
            self._tokens -= self._rows.pop(prompt_id)[0].size

    def expected(self, prompts: int, tokens: int) -> str:
        """Say how much memory these prompts' segments of at most so many tokens can take."""
        most, wanted = (count * self.TOKEN_BYTES / 1e9 for count in (self.most_tokens, prompts * tokens))
        kept = f"; over {most:.1f} GB those stored longest ago are dropped" if wanted > most else ""
        return (
            f"skpo.tracker.drift=logratio keeps the last segments of {prompts:,} prompts: at most {wanted:.1f} GB in "
            f"the trainer and in every checkpoint{kept}"
        )

    def state_dict(self) -> dict[str, np.ndarray]:
        """``keys``, ``lengths``, and the rows one after another in ``token_ids`` and ``logprobs``."""
        rows = list(self._rows.values())
        return {
            "keys": np.array(list(self._rows), dtype=np.str_),
            "lengths": np.array([tokens.size for tokens, _ in rows], dtype=np.int64),
            "token_ids": np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in rows)]),
            "logprobs": np.concatenate([np.empty(0, np.float32), *(values for _, values in rows)]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the content by what ``state_dict`` returned.

        Raises:
            ValueError: arrays that do not fit together, or numbers out of range.
        """
        if (state["token_ids"] < 0).any() or not np.isfinite(state["logprobs"]).all():
            raise ValueError("stored segments have a token or log-prob out of range")
        ends = np.cumsum(state["lengths"])
        total = int(ends[-1]) if len(ends) else 0
        if not (len(state["keys"]) == len(ends) and total == len(state["token_ids"]) == len(state["logprobs"])):
            raise ValueError("stored segments have arrays of different lengths")
        self._rows, self._tokens = {}, 0
        for key, start, end in zip(state["keys"], ends - state["lengths"], ends, strict=True):
            self.put(str(key), state["token_ids"][start:end], state["logprobs"][start:end])


class SkpoState:
    """Table of prompts, stored segments, variance of segments, generator and counters of one run.

    Args:
        settings: the run's settings.
        response_budget: longest response in tokens; bounds the assumed length of a prompt never visited.
        polarity: the settings of that name.

    Attributes:
        entropy: trajectory of the mean entropy; it moves with ``polarity.enable`` alone.
        failures: prompt id to the number of its last visits in a row that left nothing to train on.
    """

    def __init__(self, settings: SkpoSettings, response_budget: int, polarity: PolaritySettings | None = None) -> None:
        self.settings = settings
        polarity = polarity or PolaritySettings()
        self.entropy = EntropyTrajectory(polarity.entropy, polarity.decay)
        tracker = settings.tracker
        self.prompts = PromptTable(
            min(settings.initial_length, response_budget),
            tracker.rho_min,
            tracker.rho_max,
            tracker.half_life,
            # The log-ratio is measured by the actor; the clock then only counts steps.
            tracker.drift if tracker.drift in DriftClock.UNITS else "kl_steps",
        )
        self.clock = self.prompts.clock
        self.segments = StoredSegments()
        self.signal = SegmentVariance()
        self.rng = np.random.default_rng(settings.seed)
        self.visits = 0
        self.tokens_generated = 0
        self.failures: dict[str, int] = {}

    def next_visit(self, prompt_id: str, step: int) -> Visit:
        """Draw the split position (unless it is fixed) and the seed of the next rollout of ``prompt_id``.

        Args:
            prompt_id: stable id.
            step: training step, from 1.
        """
        bounds = (self.settings.split_low, self.settings.split_high)
        mean_length = self.prompts.length(prompt_id)
        if self.settings.split == "fixed":
            split = fixed_split_position(mean_length, step, *bounds)
        else:
            split = sample_split_position(mean_length, self.rng, *bounds)
        visit = Visit(self.visits, split, int(self.rng.integers(_SEED_BOUND)), mean_length, step)
        self.visits += 1
        return visit

    def note_outcome(self, prompt_id: str, trained: bool) -> int:
        """Count a visit that failed, or forget the failures of a prompt that was trained; returns their number."""
        if trained:
            self.failures.pop(prompt_id, None)
            return 0
        self.failures[prompt_id] = self.failures.get(prompt_id, 0) + 1
        return self.failures[prompt_id]

    def baseline(self, prompt_id: str) -> float:
        """Return V of the prompt mapped to reward units, in [-1, 1]; 0 on the first visit."""
        return 2.0 * self.prompts.value(prompt_id) - 1.0

    def observe(self, prompt_id: str, reward: float, mean_length: float, log_ratio: float | None = None) -> float:
        """Update V and L of a prompt after a visit.

        Args:
            prompt_id: stable id.
            reward: R_I in [-1, 1].
            mean_length: mean token length of the prompt's downstream responses.
            log_ratio: D as measured by the actor; None takes the clock's.

        Returns:
            The drift D since the previous visit that was used.
        """
        return self.prompts.visit(prompt_id, (reward + 1.0) / 2.0, mean_length, log_ratio)

    def save(self, folder: Path) -> Path:
        """Write the state into ``folder`` (made if absent), atomically; return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": _FORMAT,
            "group_size": self.settings.group_size,
            "drift": self.settings.tracker.drift,
            "visits": self.visits,
            "tokens_generated": self.tokens_generated,
            "failures": self.failures,
            "entropy": self.entropy.state_dict(),
            "rng": self.rng.bit_generator.state,
        }
        target = folder / FILE_NAME
        with replacing(target) as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **self._arrays())  # type: ignore[arg-type]
        return target

    def load(self, folder: Path) -> None:
        """Replace everything by the state saved in ``folder``.

        Raises:
            StateError: no file, a damaged one, one with other content than ``save`` writes, or one of a run with
                another group size or drift unit.
        """
        path, known = require_state_file(folder), self._arrays()
        try:
            with _opened(path) as archive:
                meta = _meta(path, archive)
                names = _names(archive.files, meta["format"])
                later = _SINCE_FORMAT_5 if meta["format"] < _FORMAT else ()
                for name in names.keys() ^ (known.keys() - set(later)):
                    raise ValueError(f"it {'has' if name in names else 'lacks'} {one_line(name, 60)}")
                arrays = {name: archive[names[name]] for name in names}
            if later:
                # Not below the sum of squared weights, which those formats did not keep.
                arrays["prompts.squares"] = 1.0 / np.maximum(1.0, arrays["prompts.counts"])
                arrays["signal.visits"] = known["signal.visits"]
            self._check_meta(path, meta)
            for name, array in arrays.items():
                if not _alike(array, known[name]):
                    raise ValueError(f"{name} is an array of another kind")
            for part, target in self._parts().items():
                prefix = f"{part}."
                target.load_state_dict({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
            self.rng.bit_generator.state = meta["rng"]
            self.visits, self.tokens_generated = _count(meta, "visits"), _count(meta, "tokens_generated")
            # Both are absent from checkpoints of earlier versions.
            failures = meta.get("failures", {})
            self.failures = {str(prompt_id): _count(failures, prompt_id) for prompt_id in failures}
            if "entropy" in meta:
                self.entropy.load_state_dict(meta["entropy"])
        except DAMAGE as error:
            raise _damaged(path, error) from error

    def _check_meta(self, path: Path, meta: dict[str, Any]) -> None:
        for name, mine in (("group_size", self.settings.group_size), ("drift", self.settings.tracker.drift)):
            if meta[name] != mine:
                raise StateError(
                    f"{path}: was saved with {name}={meta[name]}, this run has {mine}; use the same value, or start "
                    f"again with trainer.resume_mode=disable and another output_dir"
                )

    def _arrays(self) -> dict[str, np.ndarray]:
        """Return what the file holds beside ``meta``: part and name to array."""
        return {
            f"{part}.{name}": array
            for part, source in self._parts().items()
            for name, array in source.state_dict().items()
        }

    def _parts(self) -> dict[str, PromptTable | StoredSegments | SegmentVariance]:
        return {"prompts": self.prompts, "segments": self.segments, "signal": self.signal}


def _names(stored: Iterable[str], file_format: int) -> dict[str, str]:
    """Return the arrays of a file: name in the current format to name in the file."""
    names = {name: name for name in stored if name != "meta"}
    if file_format == 3:
        names.pop("lengths.counts", None)
        names = {_FORMAT_3.get(name, name): name for name in names}
    return names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open the archive, unless reading a member could take more memory than the file has bytes.

    ``np.savez`` compresses nothing, and a member that is stored as it is cannot be larger than the file.

    Raises:
        ValueError: a member is compressed or is there twice.
    """
    with zipfile.ZipFile(path) as members:
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
            raise ValueError("a member is compressed")
        if len(set(members.namelist())) < len(members.namelist()):
            raise ValueError("a member is there twice")
    with np.load(path, allow_pickle=False) as archive:
        yield archive


def _alike(array: np.ndarray, known: np.ndarray) -> bool:
    """Whether an array has the kind of its counterpart; texts may be of any length but 0, which would take no room."""
    if known.dtype.kind == "U":
        return array.dtype.kind == "U" and array.dtype.itemsize > 0 and array.ndim == known.ndim
    return array.dtype == known.dtype and array.ndim == known.ndim


def _count(meta: Mapping[str, Any], name: str) -> int:
    value = meta[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {one_line(value, 40)}")
    return value


def _meta(path: Path, archive: Mapping[str, np.ndarray]) -> dict[str, Any]:
    meta: dict[str, Any] = parse_json(str(archive["meta"]))
    if meta["format"] not in (3, 4, _FORMAT):
        raise StateError(
            f"{path}: has format {one_line(meta['format'], 20)}, this version of verl-skpo reads 3 to {_FORMAT}; "
            f"resume with the version that wrote it, or start again with trainer.resume_mode=disable and another "
            f"output_dir"
        )
    return meta


def _damaged(path: Path, error: Exception) -> StateError:
    return StateError(
        f"{path}: cannot be read as SKPO state ({error}); resume from an older checkpoint with "
        f"trainer.resume_mode=resume_path trainer.resume_from_path=<.../global_step_N>"
    )


def require_state_file(folder: Path) -> Path:
    """Return the SKPO state file of a checkpoint folder.

    Raises:
        StateError: it is not there.  Never reset silently: training on with empty trackers would look like a resume.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise StateError(
            f"{folder}: holds no {FILE_NAME}, so the trackers of this run are lost; resume from a checkpoint that "
            f"SKPO wrote, or start again with trainer.resume_mode=disable and another output_dir"
        )
    return path
