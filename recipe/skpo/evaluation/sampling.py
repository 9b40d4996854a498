"""Offline sampling: token ids in, completions out, for evaluation and analyses.

Training samples through verl's server (``rollout``); everything else asks a ``Sampler``.  ``draw_stored`` puts a file
between: stored draws are read back, so that a killed command resumes where it stopped and a finished one needs no
model.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from recipe.skpo.errors import ConfigError
from recipe.skpo.output.metrics import json_lines
from recipe.skpo.task.digests import value_digest

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
        top_k: so many of the likeliest tokens are sampled from; -1 is all.
    """

    key: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    n: int
    temperature: float
    top_p: float
    top_k: int = -1

    @property
    def digest(self) -> str:
        """Differs if anything but the key does: another prompt, another tokenizer, other sampling."""
        return value_digest(asdict(replace(self, key="")))[:16]


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


Draw = Callable[[Sequence[Request]], list[list[Completion]]]
"""The ``sample`` of a sampler."""


@contextmanager
def opened_by_first_draw(open_sampler: Callable[[], Sampler]) -> Iterator[Draw]:
    """Yield the ``sample`` of a sampler that its first call opens and the end of the block closes."""
    with ExitStack() as stack:

        @cache
        def sampler() -> Sampler:
            return stack.enter_context(closing(open_sampler()))

        yield lambda requests: sampler().sample(requests)


# ---------------------------------------------------------------- stored draws


def append_completions(
    path: Path, drawn: Mapping[str, Sequence[Completion]], requests: Mapping[str, str] | None = None
) -> None:
    """Append completions to a store, one line per key, and wait until they are on disk.

    A last line cut short by a kill is ended first, so that the next one is not joined to it.

    Args:
        path: the store.
        drawn: key to completions.
        requests: key to the digest of its request; a key that says what was asked needs none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {key: {"request": digest} for key, digest in (requests or {}).items()}
    lines = [
        json.dumps({"key": key, **asked.get(key, {}), "completions": [asdict(item) for item in completions]}) + "\n"
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
    return {key: completions for key, (completions, _) in _read_store(path).items()}


def _read_store(path: Path) -> dict[str, tuple[list[Completion], str | None]]:
    """Read completions and digest of the request by key; None if the line has no digest."""
    try:
        return {
            line["key"]: (
                [
                    Completion(tuple(item["token_ids"]), item["text"], item["finish_reason"], tuple(item["logprobs"]))
                    for item in line["completions"]
                ],
                line.get("request"),
            )
            for line in json_lines(path)
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a store of completions ({error!r}); give another output folder") from None


def draw_stored(
    requests: Sequence[Request],
    store: Path,
    sample: Draw,
    prompts_per_call: int = 16,
    report: Callable[[str], None] = print,
) -> dict[str, list[Completion]]:
    """Return the completions of all requests, which have distinct keys, by key; stored ones come from the store.

    Requests are always cut into the same calls of ``prompts_per_call``, and a call with anything missing is drawn as a
    whole, so that an interrupted command asks the engine for the same batches as one that was not.  The store is
    appended to after every call, and ``report`` gets one line of progress.

    Raises:
        ValueError: two requests with one key.
        ConfigError: the store holds another number of completions per prompt, or those of another request.
    """
    if len({request.key for request in requests}) != len(requests):
        raise ValueError(f"{store}: two requests have the same key")
    in_store = _read_store(store)
    for request in requests:
        completions, digest = in_store.get(request.key, ([], None))
        if len(completions) not in (0, request.n):
            raise ConfigError(
                f"{store}: holds {len(completions)} completions of {request.key!r}, this command draws {request.n}; "
                f"give another output folder"
            )
        # A line without a digest is an older one.
        if digest not in (None, request.digest):
            raise ConfigError(
                f"{store}: the completions of {request.key!r} are of another prompt or sampling, because the data, the "
                f"tokenizer or an option has changed; give another output folder"
            )
    stored = {key: completions for key, (completions, _) in in_store.items()}
    calls = [requests[start : start + prompts_per_call] for start in range(0, len(requests), prompts_per_call)]
    missing = [call for call in calls if any(request.key not in stored for request in call)]
    for number, call in enumerate(missing, start=1):
        new = {request.key: drawn for request, drawn in zip(call, sample(call), strict=True)}
        append_completions(store, new, {request.key: request.digest for request in call})
        stored |= new
        report(f"{store.name}: {number} of {len(missing)} calls drawn")
    return {request.key: stored[request.key] for request in requests}
