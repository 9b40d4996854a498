"""The short summary at the end of a run, read from its files."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, concat_tables
from pyarrow.parquet import read_table

from data_prep.untrusted import UntrustedError, one_line, read_yaml
from recipe.skpo.output.best import kept_best
from recipe.skpo.output.collapse import collapse
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.metrics import mean, read_lines, read_steps
from recipe.skpo.output.run_folder import checkpoints_of, stored_checkpoints
from recipe.skpo.output.trees import read_trees, spread, tree_index

LABELS = {
    "acc": "accuracy",
    "reward": "mean reward",
    "well_formed": "share of well-formed answers",
    "acc_of_well_formed": "accuracy among well-formed",
}
"""Labels of the held-out numbers."""


def held_out(line: dict[str, float]) -> dict[str, dict[str, float]]:
    """Read the validation numbers of one metrics line per data source.

    Returns:
        ``{source: {"acc": share correct, "well_formed": share, "acc_of_well_formed": share}}``; the last two only
        if the reward function reports ``well_formed``.  ``{source: {"reward": mean}}`` if it reports no ``acc``.
    """
    means: dict[str, dict[str, float]] = {}
    for name, value in line.items():
        # val-core/<data source>/<variable>/mean@<n>; a data source may contain slashes
        section, _, rest = name.partition("/")
        if section in ("val-core", "val-aux") and rest.rpartition("/")[2].startswith("mean@"):
            source, _, variable = rest.rpartition("/")[0].rpartition("/")
            if isinstance(value, int | float):
                means.setdefault(source, {})[variable] = value
    result = {}
    for source, values in means.items():
        # Runs of former releases have the plain number that a reward function returned as ``acc`` too.
        plain = "score" not in values and values.get("acc") == values.get("reward")
        if "acc" in values and not plain:
            result[source] = {"acc": values["acc"]}
            if "well_formed" in values:
                formed = values["well_formed"]
                result[source] |= {
                    "well_formed": formed,
                    "acc_of_well_formed": values["acc"] / formed if formed else 0.0,
                }
        elif "reward" in values:
            result[source] = {"reward": values["reward"]}
    return result


def decoding(output_dir: Path) -> str:
    """Say how a run's validation draws its responses: ``greedy``, or ``temperature 0.6, top-p 0.95, mean of 4``.

    Returns:
        The words; "" if ``config.yaml`` does not say it.
    """
    node: Any = None
    with suppress(UntrustedError, OSError):
        node = read_yaml(output_dir / "config.yaml")
    for key in ("actor_rollout_ref", "rollout", "val_kwargs"):
        node = node.get(key) if isinstance(node, Mapping) else None
    options: dict[str, Any] = {"temperature": None, "top_p": 1, "top_k": -1, "n": 1} | dict(node or {})
    numbers = [options[name] for name in ("temperature", "top_p", "top_k", "n")]
    if not all(isinstance(value, (int, float)) for value in numbers):
        return ""
    temperature, top_p, top_k, n = numbers
    words = ["greedy"] if temperature == 0 or top_k == 1 else [f"temperature {temperature:g}"]
    if words != ["greedy"]:
        words += [f"top-p {top_p:g}"] if top_p != 1 else []
        words += [f"top-k {top_k:g}"] if top_k > 0 else []
    return ", ".join([*words, f"mean of {n:g}"] if n > 1 else words)


def problems(output_dir: Path) -> dict[str, int]:
    """Count the validation problems of a run per data source; none where its config or its files cannot be read."""
    with suppress(UntrustedError, OSError, ArrowException, AttributeError, KeyError, TypeError, ValueError):
        data = read_yaml(output_dir / "config.yaml")["data"]
        files = [data["val_files"]] if isinstance(data["val_files"], str) else data["val_files"]
        sources = concat_tables([read_table(file, columns=["data_source"]) for file in files])[
            "data_source"
        ].to_pylist()
        most = data.get("val_max_samples") or -1
        return Counter(sources) if most < 0 or most >= len(sources) else {}
    return {}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion (Wilson 1927): ``share`` of ``count`` problems."""
    z2 = 1.96**2 / count
    middle, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def change(before: float, after: float, count: int) -> str:
    """Say in words by how much an accuracy over ``count`` problems changed, with its 95% interval."""
    half = 1.96 * math.sqrt((before * (1 - before) + after * (1 - after)) / count)
    by = f"{after - before:+.3f} +- {half:.3f}"
    if abs(after - before) <= half:
        return f"no change that {count} problems could show ({by})"
    return f"{'rose' if after > before else 'fell'} ({by})"


def certainty(
    before: float | None, after: float | None, count: int | None
) -> tuple[tuple[float, float] | None, str | None]:
    """Return the 95% interval of an accuracy over ``count`` problems, and its change since ``before`` in words.

    Each is None where it is not known: a reward function of one's own may return an ``acc`` that is not a share.
    """
    if not count or after is None or not 0 <= after <= 1:
        return None, None
    changed = change(before, after, count) if before is not None and 0 <= before <= 1 else None
    return wilson_interval(after, count), changed


def minutes_of(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Sum the minutes of steps and validations over all launches; start-ups are not among them.  None if not logged."""
    names = ("timing_s/step", "timing_s/testing")
    seconds = [value for line in lines for name in names if isinstance(value := line.get(name), (int, float))]
    return sum(seconds) / 60 if seconds else None


def summary(output_dir: Path, minutes: float | None = None) -> str:
    """Compose the summary; ``minutes`` is the wall time of this launch, None if nothing was trained."""
    lines = read_lines(output_dir / "metrics.jsonl")
    steps, whole = max((int(line["step"]) for line in lines), default=0), minutes_of(lines)
    times = [f"{whole:.1f} minutes of steps and validations in all launches"] if whole is not None else []
    times += [f"{minutes:.1f} in this one, its start included"] if minutes is not None else []
    text = ["", f"{output_dir.name}: {steps} steps{', ' if times else ''}{'; '.join(times)}"]
    text += _held_out_rows(lines, output_dir)
    text += [f"  {name:<12} {words}" for name, words in _answers(lines).items()]
    if warned := collapse(read_steps(output_dir / "metrics.jsonl")):
        text.append(f"  {'warning':<12} {warned}")
    checkpoints = list(stored_checkpoints(checkpoints_of(output_dir)).values())
    trees = write_sample_trees(output_dir)
    places = {
        "best": _best(output_dir),
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "metrics": output_dir / "metrics.jsonl",
        "three trees": trees,
        "evaluate": f"python -m recipe.skpo.evaluation checkpoint={output_dir} benchmarks=[aime24,math500]"
        if checkpoints
        else None,
        "compare": "the same command with method=grpo" if _is_skpo(lines) else None,
    }
    return "\n".join([*text, *(f"  {name:<12} {place}" for name, place in places.items() if place)])


def _held_out_rows(lines: Sequence[dict[str, Any]], output_dir: Path) -> list[str]:
    validated = [(int(line["step"]), held_out(line)) for line in lines if held_out(line)]
    if not validated:
        return []
    (first, before), (last, after) = validated[0], validated[-1]
    how, counts, text = decoding(output_dir), problems(output_dir), list[str]()
    for source in after:
        count, earlier = counts.get(source), before.get(source, {})
        interval, changed = certainty(earlier.get("acc") if first < last else None, after[source].get("acc"), count)
        of = f", {count} problems" if count else ""
        title = f"held-out {one_line(source)}{of}{', ' if how else ''}{how}"
        text.append(f"  {title:<40} step {first:<6} step {last}")
        for key, label in LABELS.items():
            if key in after[source]:
                row = f"    {label:<38} {earlier.get(key, math.nan):>8.3f}    {after[source][key]:>8.3f}"
                if key == "acc" and interval:
                    row += f"   95% interval {interval[0]:.3f} to {interval[1]:.3f}"
                text.append(row)
        if changed:
            text.append(f"    {'change':<38} {changed}")
    return text


def _best(output_dir: Path) -> str | None:
    """Say which step is the best one and how many validations followed, where ``trainer.keep_best`` was set."""
    kept = kept_best(output_dir)
    if kept is None:
        return None
    validations, best = kept
    after = sum(step > best for step in validations.values)
    since = f", {after} validation{'s' if after > 1 else ''} ago" if after else ""
    return f"step {best}{since}: {one_line(validations.name)} {validations.values[best]:.3f}"


def _is_skpo(lines: Sequence[dict[str, Any]]) -> bool:
    return any("skpo/upstream/reward/mean" in line for line in lines)


def _answers(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Answer what a run cost, where it had no signal, and what its trackers did; what was not logged is left out."""

    def column(name: str) -> list[float]:
        return [float(line[name]) for line in lines if name in line]

    def course(values: list[float], form: str) -> str:
        return f"{values[0]:{form}} -> {values[-1]:{form}}"

    answers, generated, seconds = dict[str, str](), column("skpo/tokens/generated"), column("timing_s/step")
    responses = sum(column("skpo/downstream/tokens_generated"))
    if generated and seconds:
        answers["cost"] = f"{mean(seconds):.3g} s and {mean(generated):,.0f} generated tokens a step"
        if responses:
            answers["cost"] += f", {sum(generated) / responses:.2f} x those of the responses, which GRPO has to pay too"
    if equal := column("skpo/downstream/all_equal_share"):
        answers["no signal"] = f"in {mean(equal):.0%} of the groups, whose rewards were equal ({course(equal, '.0%')})"
    parts = {"value": ("value", ".2f"), "effective count": ("effective_count", ".2f"), "drift": ("drift", ".2g")}
    tracked = {label: (column(f"skpo/tracker/{name}/mean"), form) for label, (name, form) in parts.items()}
    said = [f"{label} {course(values, form)}" for label, (values, form) in tracked.items() if values]
    if seen := column("skpo/tracker/prompts_seen"):
        said.insert(0, f"{seen[-1]:,.0f} prompts")
    if said:
        answers["trackers"] = ", ".join(said)
    return answers


def write_sample_trees(output_dir: Path, count: int = 3) -> Path | None:
    """Write ``count`` rollout trees, spread from first to last, as readable text; None if there are none."""
    index = tree_index(output_dir)
    if not index:
        return None
    target = output_dir / "sample_trees.txt"
    shown = read_trees([index[place] for place in spread(len(index), count)])
    write_atomic(target, "\n\n".join(render_tree(tree) for tree in shown) + "\n")
    return target


def render_tree(tree: dict[str, Any]) -> str:
    """Render one rollout tree: problem, candidates with d, chosen segment, responses with rewards."""
    lines = [f"step {tree['step']}   problem: {tree['problem']}   answer: {tree['answer']}"]
    lines.append(f"  upstream candidates, cut at t_q = {tree['split_position']}")
    for candidate in tree["candidates"]:
        mark = "->" if candidate["chosen"] else "  "
        early = "  (ended early)" if candidate["ended_early"] else ""
        lines.append(f"  {mark} d={candidate['deviation']:.3f}  {candidate['text']!r}{early}")
    segment = tree["segment"]
    lines.append(f"  segment reward {segment['reward']:+.2f}, advantage {segment['advantage']:+.2f}")
    lines.append("  downstream responses to [segment, problem]")
    for response in tree["responses"]:
        lines.append(f"     {response['reward']:+.0f}  A={response['advantage']:+.2f}  {response['text']!r}")
    return "\n".join(lines)
