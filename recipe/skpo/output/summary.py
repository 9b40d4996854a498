"""The short summary at the end of a run, read from its files."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.untrusted import UntrustedError, one_line, read_yaml
from recipe.skpo.output.files import write_atomic
from recipe.skpo.output.metrics import read_lines
from recipe.skpo.output.run_folder import stored_checkpoints
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


def summary(output_dir: Path, minutes: float | None = None) -> str:
    """Compose the summary; ``minutes`` is the wall time of this launch, None if nothing was trained."""
    lines = read_lines(output_dir / "metrics.jsonl")
    validated = [(int(line["step"]), held_out(line)) for line in lines if held_out(line)]
    steps = max((int(line["step"]) for line in lines), default=0)
    launch = f", {minutes:.1f} minutes in this launch" if minutes is not None else ""
    text = ["", f"{output_dir.name}: {steps} steps{launch}"]
    if validated:
        (first, before), (last, after) = validated[0], validated[-1]
        how = decoding(output_dir)
        for source in after:
            shown = one_line(source)
            title = f"held-out {shown}, {how}" if how else f"held-out {shown}"
            text.append(f"  {title:<32} step {first:<6} step {last}")
            for key, label in LABELS.items():
                if key in after[source]:
                    earlier = before.get(source, {}).get(key, float("nan"))
                    text.append(f"    {label:<30} {earlier:>8.3f}    {after[source][key]:>8.3f}")
    checkpoints = list(stored_checkpoints(output_dir / "checkpoints").values())
    text += [f"  checkpoint   {checkpoints[-1]}"] if checkpoints else []
    text.append(f"  metrics      {output_dir / 'metrics.jsonl'}")
    trees = write_sample_trees(output_dir)
    if trees is not None:
        text.append(f"  three trees  {trees}")
    return "\n".join(text)


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
