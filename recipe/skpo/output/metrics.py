"""What a run shows in numbers: metrics split by role, and the metrics file.

verl's own score and length metrics mix both phases' rows; everything published here is under ``skpo/upstream``,
``skpo/downstream``, ``skpo/tracker`` or ``skpo/polarity``.  Names avoid the substrings that verl reduces by (max, min,
sum, total).
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from data_prep.untrusted import UntrustedError, parse_json, read_json
from recipe.skpo.method.polarity import polarity
from recipe.skpo.method.rows import DOWNSTREAM, UPSTREAM, RolloutRecord, Rows
from recipe.skpo.method.variance import SegmentVariance
from recipe.skpo.output.files import write_atomic

logger = logging.getLogger(__name__)

LAST_STEP = 2**53
"""The largest step that every reader of JSON, the report's page among them, holds exactly."""


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean of at least one number."""
    listed = list(values)
    return sum(listed) / len(listed)


def rollout_metrics(rows: Rows, advantages: torch.Tensor) -> dict[str, float]:
    """Compute the metrics of what a step rolled out, over the valid rows of each phase.

    The advantages are float (rows,).  Tokens are sums over the batch; seconds are means over prompts;
    ``prefix_cache/hit_rate`` is cached / prefilled prompt tokens.
    """
    result: dict[str, float] = {}
    for name, phase in (("upstream", UPSTREAM), ("downstream", DOWNSTREAM)):
        valid = rows.valid_mask & (rows.phase == phase)
        if not valid.any():
            continue
        noted = [record for record, counts in zip(rows.records, valid.tolist(), strict=True) if record and counts]
        prefilled = float(sum(record.prefilled for record in noted))
        result |= {
            f"skpo/{name}/reward/mean": float(rows.rewards[valid].mean()),
            f"skpo/{name}/advantage/mean": float(advantages[valid].mean()),
            f"skpo/{name}/advantage/std": float(advantages[valid].std(correction=0)),
            f"skpo/{name}/length/mean": float(rows.lengths[valid].to(torch.float64).mean()),
            f"skpo/{name}/tokens_generated": float(sum(record.generated for record in noted)),
            f"skpo/{name}/tokens_prefilled": prefilled,
            f"skpo/{name}/prefix_cache/hit_rate": sum(record.cached for record in noted) / max(prefilled, 1.0),
        }
    rollouts = [record for row in rows.segments if isinstance(record := rows.records[row], RolloutRecord)]
    if rollouts:
        result |= {
            "skpo/upstream/split_position/mean": mean(record.split_position for record in rollouts),
            "skpo/upstream/deviation/mean": mean(record.deviation for record in rollouts),
            "skpo/upstream/early_finish_share": mean(record.early_share for record in rollouts),
            "skpo/upstream/seconds/mean": mean(record.seconds for record in rollouts),
            "skpo/downstream/seconds/mean": mean(record.downstream_seconds for record in rollouts),
            "skpo/downstream/copied_share": mean(record.copied_share for record in rollouts),
        }
    cut = [share for record in rollouts if (share := record.boundary_share) is not None]
    if cut:  # with split=boundary_token
        result["skpo/upstream/boundary_share"] = mean(cut)
    if rows.responses.any():
        result["skpo/downstream/all_equal_share"] = _equal_share(rows)
    return result


def _equal_share(rows: Rows) -> float:
    """Return the share of groups whose valid responses all have the same reward."""
    rewards, groups = rows.rewards[rows.responses], rows.prompts[rows.responses]
    low, high = (
        torch.full((int(groups.max()) + 1,), torch.nan).scatter_reduce(0, groups, rewards, kind, include_self=False)
        for kind in ("amin", "amax")
    )
    there = ~low.isnan()
    return float((low == high).sum()) / float(there.sum())


def signal_metrics(signal: SegmentVariance) -> dict[str, float]:
    """Return signal to noise of the segments' rewards with its interval; nothing where it is not known."""
    parts = signal.parts()
    found = parts.components() if parts is not None else None
    if found is None or math.isnan(found.signal_to_noise):
        return {}
    name = "skpo/upstream/signal_to_noise"
    return {name: found.signal_to_noise, f"{name}_low": found.low, f"{name}_high": found.high}


def polarity_metrics(advantages: torch.Tensor, reweighted: torch.Tensor, slopes: torch.Tensor) -> dict[str, float]:
    """Compute the shares of both branches of the polarity, and its mean, over the trained tokens of a step.

    Args:
        advantages: A, float (tokens,).
        reweighted: A', (tokens,).
        slopes: T, (tokens,).
    """
    before, after = polarity(advantages, slopes), polarity(reweighted, slopes)
    result = {"skpo/polarity/mean": float(before.mean()), "skpo/polarity/predicted_change": float(after.mean())}
    total = advantages.double().abs().sum().clamp(min=1e-30)
    for name, branch in (("expanding", before > 0), ("contracting", before < 0)):
        shares = {
            "token_share": branch.double().mean(),
            "advantage_share": advantages[branch].double().abs().sum() / total,
            "advantage_share_after": reweighted[branch].double().abs().sum() / total,
        }
        result |= {f"skpo/polarity/{name}/{share}": float(value) for share, value in shares.items()}
    return result


def update_metrics(sums: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Turn the sums that ``skpo_loss`` reports into shares.

    They are ``skpo/<phase>/<name>_sum``, already added over micro-batches and averaged over ranks and updates.

    Returns:
        Metrics (loss and, per trained token, clip shares and KL), and the KL that the policy moved by in this step,
        in nats per token over both phases.
    """
    result = {"skpo/loss": float(sums["skpo/loss"])}
    kl = tokens = 0.0
    for name in ("upstream", "downstream"):
        count = float(sums[f"skpo/{name}/tokens_sum"])
        result[f"skpo/{name}/loss"] = float(sums[f"skpo/{name}/loss_sum"])
        for share, source in (("ratio_clipped_low", "clipped_low"), ("ratio_clipped_high", "clipped_high")):
            result[f"skpo/{name}/{share}_share"] = sums[f"skpo/{name}/{source}_sum"] / count if count else 0.0
        result[f"skpo/{name}/kl"] = sums[f"skpo/{name}/kl_sum"] / count if count else 0.0
        kl, tokens = kl + sums[f"skpo/{name}/kl_sum"], tokens + count
    step_kl = float(kl / tokens) if tokens else 0.0
    result["skpo/policy_kl"] = step_kl
    return result, step_kl


def plain_numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """Every value of ``data`` that is a number, as a float."""
    numbers = {}
    for name, value in data.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            continue
    return numbers


def read_numbers(path: Path) -> dict[str, float]:
    """Read the numbers of a JSON object; of a damaged file none, with a warning: a resume needs none of them."""
    try:
        read = read_json(path)
    except (UntrustedError, OSError) as error:
        logger.warning("%s: %s; the metrics of this step are left out", path, error)
        return {}
    return plain_numbers(read) if isinstance(read, Mapping) else {}


class MetricsFile:
    """One JSON object per logged step, ``{"step": n, <name>: <number>, ...}``, kept across resumes.

    verl's own file logger starts empty at every launch.  Lines of steps after the checkpoint that is resumed from are
    dropped when the file is opened, because those steps are trained again.

    Args:
        path: the file.
        resumed_at: step of the checkpoint resumed from; 0 for a fresh start, which begins an empty file.
        saved: what was known of that step when its checkpoint was written.  verl logs a step after it is saved, so a
            kill in between leaves a checkpoint without its line; this takes the line's place.
    """

    def __init__(self, path: Path, resumed_at: int, saved: Mapping[str, float] | None = None) -> None:
        keep_lines(path, resumed_at)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if saved and not any(line["step"] == resumed_at and saved.keys() <= line.keys() for line in read_lines(path)):
            self.log(saved, resumed_at)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Append one line with every value of ``data`` that is a number; called by verl's ``Tracking``."""
        self._file.write(json.dumps({"step": step, **plain_numbers(data)}) + "\n")


def keep_lines(path: Path, resumed_at: int) -> None:
    """Make a JSON-lines file ready for a resume: lines of later steps go, because those steps are trained again.

    A fresh start, ``resumed_at`` 0, begins an empty file.  The file is replaced as a whole.
    """
    kept = [line for line in read_lines(path) if line["step"] <= resumed_at] if resumed_at else []
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, skipping malformed ones."""
    return [line for line in json_lines(path) if type(line.get("step")) is int and 0 <= line["step"] <= LAST_STEP]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file as one record per step, in order: a resume logs its validation in a line of its own."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def training_steps(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file that belong to an update."""
    return [line for line in read_lines(path) if "actor/grad_norm" in line]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, skipping malformed lines; empty if there is no file."""
    if not path.is_file():
        return []
    lines = []
    # Not splitlines: model text may hold U+0085 or U+2028, which it takes for ends of lines.  A kill may have cut a
    # character in two.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            read = parse_json(line)
        except UntrustedError:
            continue
        if isinstance(read, dict):
            lines.append(read)
    return lines
