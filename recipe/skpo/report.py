"""The short summary at the end of a run, read from what the run wrote."""

from pathlib import Path
from typing import Any

from data_prep.untrusted import one_line
from recipe.skpo.metrics import read_lines
from recipe.skpo.output.files import write_atomic
from recipe.skpo.trees import read_trees, spread, tree_index


def held_out(line: dict[str, float]) -> dict[str, dict[str, float]]:
    """Validation numbers of one metrics line per data source: accuracy, share of well-formed answers.

    Returns:
        ``{source: {"acc": share correct, "well_formed": share, "acc_of_well_formed": share}}``; the last two only
        where the reward function reports ``well_formed``.
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in line.items():
        # val-core/<data source>/<variable>/mean@<n>; a data source may contain slashes
        section, _, rest = name.partition("/")
        if section in ("val-core", "val-aux") and rest.rpartition("/")[2].startswith("mean@"):
            source, _, variable = rest.rpartition("/")[0].rpartition("/")
            if isinstance(value, int | float):
                found.setdefault(source, {})[variable] = value
    result = {}
    for source, values in found.items():
        if "acc" in values:
            result[source] = {"acc": values["acc"]}
            if "well_formed" in values:
                formed = values["well_formed"]
                result[source] |= {
                    "well_formed": formed,
                    "acc_of_well_formed": values["acc"] / formed if formed else 0.0,
                }
    return result


def summary(output_dir: Path, minutes: float | None = None) -> str:
    """Text of the summary.

    Args:
        output_dir: of the run.
        minutes: wall time of this launch; None where nothing was trained.
    """
    lines = read_lines(output_dir / "metrics.jsonl")
    validated = [(int(line["step"]), held_out(line)) for line in lines if held_out(line)]
    steps = max((int(line["step"]) for line in lines), default=0)
    launch = f", {minutes:.1f} minutes in this launch" if minutes is not None else ""
    text = ["", f"{output_dir.name}: {steps} steps{launch}"]
    if validated:
        (first, before), (last, after) = validated[0], validated[-1]
        for source in after:
            text.append(f"  held-out {one_line(source)}, greedy           step {first:<6} step {last}")
            for label, key in (
                ("accuracy", "acc"),
                ("share of well-formed answers", "well_formed"),
                ("accuracy among well-formed", "acc_of_well_formed"),
            ):
                if key in after[source]:
                    earlier = before.get(source, {}).get(key, float("nan"))
                    text.append(f"    {label:<30} {earlier:>8.3f}    {after[source][key]:>8.3f}")
    checkpoints = sorted(output_dir.glob("checkpoints/global_step_*"), key=lambda path: int(path.name.split("_")[-1]))
    text += [f"  checkpoint   {checkpoints[-1]}"] if checkpoints else []
    text.append(f"  metrics      {output_dir / 'metrics.jsonl'}")
    trees = write_sample_trees(output_dir)
    if trees is not None:
        text.append(f"  three trees  {trees}")
    return "\n".join(text)


def write_sample_trees(output_dir: Path, count: int = 3) -> Path | None:
    """Write ``count`` rollout trees, spread from first to last, as readable text; None where there are none."""
    index = tree_index(output_dir)
    if not index:
        return None
    target = output_dir / "sample_trees.txt"
    shown = read_trees([index[place] for place in spread(len(index), count)])
    write_atomic(target, "\n\n".join(render_tree(tree) for tree in shown) + "\n")
    return target


def render_tree(tree: dict[str, Any]) -> str:
    """One rollout tree as text: problem, candidates with d, chosen segment, responses with rewards."""
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
