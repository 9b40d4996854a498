"""Offline sampling: token ids in, completions out, for evaluation and analyses.

Training samples through verl's server (``rollout``); everything else asks a ``Sampler``.  ``draw_stored`` puts a file
between: stored draws are read back, so that a killed command resumes where it stopped and a finished one needs no
model.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from recipe.skpo.errors import ConfigError
from recipe.skpo.output.metrics import json_lines

SEED_BOUND = 2**31 - 1


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: sampled tokens, the end-of-sequence token included if there is one.
        text: the same without special tokens.
        finish_reason: ``stop`` if it ended by itself, ``length`` if it ran into ``max_tokens``.
        logprobs: log-probability of each token in the distribution it was drawn from, in nats; as long as
            ``token_ids``, or empty if the source has none.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt, and how to sample for it.

    Attributes:
        key: unique among the requests of one store, and stable: a rerun finds its completions by it.
        prompt_ids: token ids.
        max_tokens: longest completion.
        seed: of its first completion; completion i is drawn with ``seed + i``.
        n: completions; 1 if ``temperature`` is 0.
        temperature: 0 is greedy.
        top_p: share of the probability mass that is sampled from.
    """

    key: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    n: int
    temperature: float
    top_p: float


def request_seed(seed: int, name: str, count: int) -> int:
    """Return a request's seed, whatever else is drawn with it; it has ``count`` consecutive seeds to itself."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8]) % (SEED_BOUND - count)


class Sampler(Protocol):
    """What evaluation and analyses need of a model."""

    def sample(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Draw each request's completions, in the order of ``requests``."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


class LazySampler:
    """A sampler that is opened by its first draw and closed at the end of the ``with`` block.

    Args:
        open_sampler: makes it.
    """

    def __init__(self, open_sampler: Callable[[], Sampler]) -> None:
        """Open nothing yet."""
        self._open = open_sampler
        self._sampler: Sampler | None = None

    def __enter__(self) -> Self:
        """Begin the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the sampler if it was opened."""
        if self._sampler is not None:
            self._sampler.close()

    def sample(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See ``Sampler.sample``."""
        self._sampler = self._sampler or self._open()
        return self._sampler.sample(requests)

    def close(self) -> None:
        """Leave closing to the end of the block."""


# ---------------------------------------------------------------- stored draws


def append_completions(path: Path, drawn: Mapping[str, Sequence[Completion]]) -> None:
    """Append completions to a store, one line per key, and wait until they are on disk.

    A last line cut short by a kill is ended first, so that the next one is not joined to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"key": key, "completions": [asdict(completion) for completion in completions]}) + "\n"
        for key, completions in drawn.items()
    ]
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines.insert(0, "\n")
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def read_completions(path: Path) -> dict[str, list[Completion]]:
    """Read a store's completions by key; the last line of a key counts, malformed lines are skipped.

    Raises:
        ConfigError: the file is not a store.
    """
    try:
        return {
            line["key"]: [
                Completion(tuple(item["token_ids"]), item["text"], item["finish_reason"], tuple(item["logprobs"]))
                for item in line["completions"]
            ]
            for line in json_lines(path)
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a store of completions ({error!r}); give another output folder") from None


def draw_stored(
    requests: Sequence[Request],
    store: Path,
    sampler: Sampler,
    prompts_per_call: int = 16,
    report: Callable[[str], None] = print,
) -> dict[str, list[Completion]]:
    """Return completions of all requests, stored ones from the store.

    Requests are always cut into the same calls, and a call with anything missing is drawn as a whole, so that an
    interrupted command asks the engine for the same batches as one that was not.

    Args:
        requests: with distinct keys.
        store: JSON lines, appended to after every call.
        sampler: asked only if something is missing.
        prompts_per_call: prompts of one call.
        report: called with one line of progress per call.

    Returns:
        Completions by key.

    Raises:
        ValueError: two requests with one key.
        ConfigError: the store holds another number of completions per prompt.
    """
    if len({request.key for request in requests}) != len(requests):
        raise ValueError(f"{store}: two requests have the same key")
    stored = read_completions(store)
    for request in requests:
        found = len(stored.get(request.key, ()))
        if found not in (0, request.n):
            raise ConfigError(
                f"{store}: holds {found} completions of {request.key!r}, this command draws {request.n}; give another "
                f"output folder"
            )
    calls = [requests[start : start + prompts_per_call] for start in range(0, len(requests), prompts_per_call)]
    missing = [call for call in calls if any(request.key not in stored for request in call)]
    for number, call in enumerate(missing, start=1):
        new = {request.key: drawn for request, drawn in zip(call, sampler.sample(call), strict=True)}
        append_completions(store, new)
        stored |= new
        report(f"{store.name}: {number} of {len(missing)} calls drawn")
    return {request.key: stored[request.key] for request in requests}
