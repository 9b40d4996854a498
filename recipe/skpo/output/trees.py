"""Rollout trees: what single prompts' rollouts looked like, kept in a bounded folder of parquet files.

One file per step, ``trees/step_000012.parquet``, one row per tree, columns as in ``TREE_SCHEMA``.  Which prompts of a
step are kept is drawn with a seed.  Once the folder is over its bound, steps are removed so that the others stay spread
evenly from the first to the newest.  A resume removes the steps that are trained again.
"""

import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recipe.skpo.method.rows import RolloutRecord, Rows, Transcript
from recipe.skpo.output.files import replacing
from recipe.skpo.output.run_folder import by_step

logger = logging.getLogger(__name__)

FOLDER = "trees"
"""Name of the folder inside a run's folder."""

LONGEST_TEXT = 100_000
"""Characters after which a stored text is cut, with a mark; 3,072 tokens are about 12,000."""


def _column(name: str, type_: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, type_, metadata={"description": description})


TREE_SCHEMA = pa.schema(
    [
        _column("step", pa.int64(), "training step"),
        _column("prompt_id", pa.string(), "id of the prompt in the data file"),
        _column("problem", pa.string(), "content of the prompt's last message"),
        _column("answer", pa.string(), "ground truth"),
        _column("split_position", pa.int64(), "t_q in tokens"),
        _column(
            "candidates",
            pa.list_(
                pa.struct(
                    [
                        _column("text", pa.string(), "the kept tokens: what becomes the segment if chosen"),
                        _column("rest", pa.string(), "what it wrote after the cut; only of those that ended early"),
                        _column("deviation", pa.float64(), "d: mean of -log pi over the kept tokens, nats per token"),
                        _column("ended_early", pa.bool_(), "ended by itself, at t_q at the latest"),
                        _column("chosen", pa.bool_(), "the one that became the segment"),
                    ]
                )
            ),
            "upstream candidates in the order they were sampled",
        ),
        _column(
            "segment",
            pa.struct(
                [
                    _column("text", pa.string(), "text of the chosen candidate's kept tokens"),
                    _column("reward", pa.float64(), "mean of the responses' rewards"),
                    _column("baseline", pa.float64(), "value tracker of the prompt, read before its update"),
                    _column("advantage", pa.float64(), "single-stream advantage, normalised over the batch"),
                ]
            ),
            "the chosen segment s",
        ),
        _column("skip_prompt", pa.string(), "[s, q] as the model read it, special tokens included"),
        _column(
            "responses",
            pa.list_(
                pa.struct(
                    [
                        _column("text", pa.string(), "response under [s, q]"),
                        _column("reward", pa.float64(), "reward of the response"),
                        _column("advantage", pa.float64(), "advantage among its siblings"),
                        _column("length", pa.int64(), "tokens"),
                        _column("answer", pa.string(), "answer the reward function found; null if it tells none"),
                    ]
                )
            ),
            "downstream responses; failed ones are left out",
        ),
    ]
)
"""Columns of a trees file; the descriptions are in the file too, as metadata of its fields."""


def sample_rows(rows: Sequence[int], count: int, seed: int, step: int) -> list[int]:
    """``count`` of ``rows`` (all, if there are fewer), in order; the same for the same seed and step."""
    chosen = random.Random(f"{seed} {step}").sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]


def rollout_tree(
    step: int,
    rows: Rows,
    segment: int,
    advantages: torch.Tensor,
    baselines: torch.Tensor,
    transcript: Transcript,
    decode: Callable[..., str],
) -> dict[str, Any]:
    """Describe one prompt's rollout as a row of ``TREE_SCHEMA``.

    Args:
        step: training step.
        rows: the batch.
        segment: the prompt's upstream row.
        advantages: float (rows,).
        baselines: float (rows,), read before their update.
        transcript: of the prompt's valid responses, in order.
        decode: token ids to text; takes ``skip_special_tokens``.
    """
    record = rows.records[segment]
    assert isinstance(record, RolloutRecord)
    candidates = []
    for index, candidate in enumerate(record.candidates):
        tokens = candidate.token_ids.tolist()
        text, whole = decode(tokens[: candidate.kept]), decode(tokens)
        candidates.append(
            {
                "text": text,
                # Cut from the whole text if possible: decoded alone, a text may lose its leading space.
                "rest": whole[len(text) :] if whole.startswith(text) else decode(tokens[candidate.kept :]),
                "deviation": candidate.deviation,
                "ended_early": candidate.ended_early,
                "chosen": index == record.chosen,
            }
        )
    written = zip(rows.siblings(segment), transcript.responses, transcript.answers, strict=True)
    return {
        "step": step,
        "prompt_id": rows.prompt_ids[segment],
        "problem": transcript.problem,
        "answer": transcript.ground_truth,
        "split_position": record.split_position,
        "candidates": candidates,
        "segment": {
            "text": candidates[record.chosen]["text"],
            "reward": float(rows.rewards[segment]),
            "baseline": float(baselines[segment]),
            "advantage": float(advantages[segment]),
        },
        "skip_prompt": decode(transcript.skip_prompt, skip_special_tokens=False),
        "responses": [
            {
                "text": decode(response),
                "reward": float(rows.rewards[row]),
                "advantage": float(advantages[row]),
                "length": int(rows.lengths[row]),
                "answer": answer,
            }
            for row, response, answer in written
        ],
    }


def _storable(value: Any) -> Any:
    """Return the value with every text in it cut at ``LONGEST_TEXT`` and without characters that UTF-8 cannot hold."""
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            value = f"{value[:LONGEST_TEXT]} [cut here: {len(value)} characters in all]"
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return value


def stored_steps(folder: Path) -> dict[int, Path]:
    """Step to file, in the order of steps."""
    return by_step(folder, r"step_(\d+)\.parquet")


class TreeStore:
    """The folder of a run's trees while it trains.

    Args:
        folder: of the trees; made if it is not there.
        max_mb: bound of all files together, in megabytes (10^6 bytes).  The newest step is kept whatever its size.
        resumed_at: step of the checkpoint resumed from; files of later steps are removed.  0 for a fresh start.
        keep: so many trees are kept in memory for the next validation.

    Attributes:
        latest: the last of this launch's trees that no validation has taken.
    """

    def __init__(self, folder: Path, max_mb: float, resumed_at: int, keep: int = 0) -> None:
        """Open the folder, without files of later steps."""
        self.folder, self.max_bytes = folder, max_mb * 1e6
        self.latest: deque[Mapping[str, Any]] = deque(maxlen=keep)
        folder.mkdir(parents=True, exist_ok=True)
        stale = [path for step, path in stored_steps(folder).items() if step > resumed_at]
        for path in [*stale, *folder.glob(".step_*")]:  # the second: what a kill left
            path.unlink(missing_ok=True)
        # Nobody else writes here, and a look at every file in every step takes long on a network disk.
        self._sizes = {step: path.stat().st_size for step, path in stored_steps(folder).items()}

    def write(self, step: int, trees: Sequence[Mapping[str, Any]]) -> None:
        """Write the trees of one step, atomically, and thin the folder out if it is over its bound."""
        if not trees:
            return
        self.latest.extend(trees)
        table = pa.Table.from_pylist([_storable(tree) for tree in trees], schema=TREE_SCHEMA)
        with replacing(self._file(step)) as file:
            pq.write_table(table, file, compression="zstd")
            size = file.tell()
        self._sizes[step] = size
        self._thin_out()

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.parquet"

    def _thin_out(self) -> None:
        """Remove the step whose neighbours are closest to each other, the earliest on a tie, until the rest fits."""
        total = sum(self._sizes.values())
        while total > self.max_bytes and len(self._sizes) > 1:
            steps = sorted(self._sizes)
            inner = range(1, len(steps) - 1)
            index = min(inner, key=lambda index: steps[index + 1] - steps[index - 1], default=0)
            step = steps[index]
            self._file(step).unlink(missing_ok=True)
            total -= self._sizes.pop(step)


def tree_index(output_dir: Path) -> list[tuple[Path, int]]:
    """File and row of every stored tree of a run, in the order of steps; files that cannot be read are left out."""
    found = []
    for path in stored_steps(output_dir / FOLDER).values():
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError):
            logger.warning("%s cannot be read and is left out", path)
            continue
        found += [(path, row) for row in range(rows)]
    return found


def read_trees(index: Sequence[tuple[Path, int]]) -> Iterator[dict[str, Any]]:
    """Yield the trees at some places of ``tree_index``, in their order, with one file in memory at a time.

    Those of a file that cannot be read are left out.
    """
    for path, places in groupby(index, key=lambda place: place[0]):
        try:
            table = pq.read_table(path, schema=TREE_SCHEMA)
        except (pa.ArrowException, OSError):
            logger.warning("%s cannot be read and is left out", path)
            continue
        for _, row in places:
            yield table.slice(row, 1).to_pylist()[0]


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` of the indices 0 to ``total`` - 1, evenly from the first to the last."""
    if total <= count:
        return list(range(total))
    return [0] if count == 1 else sorted({round(index * (total - 1) / (count - 1)) for index in range(count)})
