"""What the report page holds of a run: its numbers, its config and its trees, each within a bound.

Long texts keep their beginning and end, long series and many trees are sampled evenly, and ``notes`` says what is left
out.  Secrets of the config are hidden.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

from data_prep.untrusted import UntrustedError, read_yaml
from recipe.skpo.output.glossary import described, unit_of
from recipe.skpo.output.metrics import read_steps
from recipe.skpo.output.redaction import HIDDEN, hide_secrets
from recipe.skpo.output.summary import LABELS, certainty, held_out, minutes_of
from recipe.skpo.output.trees import read_trees, spread, tree_index

T = TypeVar("T")

LARGEST_PAGE = 4_800_000
"""Bytes of the whole page."""

LONGEST_TEXT = 6_000
"""Characters of one text of a tree; less where a tree has so many texts that it would pass ``LARGEST_TREE``."""

LARGEST_TREE = 220_000
"""Characters of all texts of one tree."""

MOST_TREES = 400
MOST_POINTS = 400
"""Points of one series; less where there are so many series that they would pass ``MOST_NUMBERS``."""

MOST_NUMBERS = 60_000
LONGEST_NAME = 300
"""Characters of a metric's name or of one setting."""

LARGEST_CURVES, LARGEST_CONFIG, LARGEST_HEADLINE, LARGEST_MEANINGS = 1_500_000, 500_000, 100_000, 200_000
"""Bytes of these parts; trees get the rest."""

UPSTREAM, DOWNSTREAM, TRACKER, TIMES = "skpo/upstream/", "skpo/downstream/", "skpo/tracker/", "timing_s/"
POLARITY = "skpo/polarity/"

CURVES: list[tuple[str, list[tuple[str, str]]]] = [
    ("Reward and baseline", [("reward", f"{DOWNSTREAM}reward/mean"), ("baseline", f"{UPSTREAM}baseline/mean")]),
    ("Groups without a signal", [("", f"{DOWNSTREAM}all_equal_share")]),
    (
        "Spread of the advantages",
        [("upstream", f"{UPSTREAM}advantage/std"), ("downstream", f"{DOWNSTREAM}advantage/std")],
    ),
    (
        "Length in tokens",
        [
            ("segment", f"{UPSTREAM}length/mean"),
            ("response", f"{DOWNSTREAM}length/mean"),
            ("tracked", f"{TRACKER}length/mean"),
        ],
    ),
    ("Deviation d of the segment", [("", f"{UPSTREAM}deviation/mean")]),
    ("Candidates that ended early", [("", f"{UPSTREAM}early_finish_share")]),
    ("Loss", [("upstream", f"{UPSTREAM}loss"), ("downstream", f"{DOWNSTREAM}loss")]),
    (
        "Tokens whose ratio was clipped",
        [
            ("upstream, low", f"{UPSTREAM}ratio_clipped_low_share"),
            ("upstream, high", f"{UPSTREAM}ratio_clipped_high_share"),
            ("downstream, low", f"{DOWNSTREAM}ratio_clipped_low_share"),
            ("downstream, high", f"{DOWNSTREAM}ratio_clipped_high_share"),
        ],
    ),
    (
        "Signal to noise of segment rewards",
        [
            ("estimate", f"{UPSTREAM}signal_to_noise"),
            ("low", f"{UPSTREAM}signal_to_noise_low"),
            ("high", f"{UPSTREAM}signal_to_noise_high"),
        ],
    ),
    ("Responses that begin with the segment", [("", f"{DOWNSTREAM}copied_share")]),
    ("Reward under [s, q] minus held-out reward", [("gap", "skpo/validation/skip_gap")]),
    ("Policy KL of a step", [("", "skpo/policy_kl")]),
    ("Entropy", [("", "actor/entropy")]),
    ("Entropy and its target", [("entropy", f"{POLARITY}entropy"), ("target", f"{POLARITY}target")]),
    ("Phase of the entropy, phi", [("", f"{POLARITY}phi")]),
    (
        "Sum of |A| by polarity",
        [
            ("expanding", f"{POLARITY}expanding/advantage_share"),
            ("expanding, reweighted", f"{POLARITY}expanding/advantage_share_after"),
            ("contracting", f"{POLARITY}contracting/advantage_share"),
            ("contracting, reweighted", f"{POLARITY}contracting/advantage_share_after"),
        ],
    ),
    (
        "Mean polarity",
        [("before the reweighting", f"{POLARITY}mean"), ("after it", f"{POLARITY}predicted_change")],
    ),
    ("Predicted against measured changes of the entropy", [("correlation", f"{POLARITY}correlation")]),
    ("Gradient norm", [("norm", "actor/grad_norm")]),
    ("Rollout against actor", [("", "skpo/rollout_actor_logprob_gap/mean")]),
    ("Value tracker", [("value", f"{TRACKER}value/mean")]),
    ("Drift since the last visit", [("drift", f"{TRACKER}drift/mean")]),
    ("Effective count", [("", f"{TRACKER}effective_count/mean")]),
    (
        "Seconds per step",
        [
            ("whole step", f"{TIMES}step"),
            ("rollout", f"{TIMES}gen"),
            ("old log-probs", f"{TIMES}old_log_prob"),
            ("update", f"{TIMES}update_actor"),
        ],
    ),
    (
        "Tokens generated per step",
        [
            ("all", "skpo/tokens/generated"),
            ("upstream", f"{UPSTREAM}tokens_generated"),
            ("downstream", f"{DOWNSTREAM}tokens_generated"),
        ],
    ),
    (
        "Prompt tokens from the prefix cache",
        [("upstream", f"{UPSTREAM}prefix_cache/hit_rate"), ("downstream", f"{DOWNSTREAM}prefix_cache/hit_rate")],
    ),
]
"""Title, then label ("" for the unit) and metric of each line.

Lines without numbers are left out; every other metric can be picked.
"""

HELD_OUT = "held-out "
"""The held-out numbers are among the metrics as ``held-out <source>: <label>``."""


class ReportError(ValueError):
    """A run folder that no page can be made from; the message names the file and the fix in one line."""


def run_steps(output_dir: Path) -> list[dict[str, Any]]:
    """Read what a run logged, one record per step.

    Raises:
        ReportError: there is no run in the folder.
    """
    steps = read_steps(output_dir / "metrics.jsonl")
    if not steps:
        raise ReportError(f"{output_dir / 'metrics.jsonl'}: missing or empty; name the folder of a run (output_dir)")
    return steps


# ---------------------------------------------------------------- JSON


def embed(value: Any) -> str:
    """Encode JSON for a ``<script type="application/json">``: pure ASCII, without ``<``, ``>`` and ``&``.

    Raises:
        ValueError: a number that is not finite, which JSON does not have.
    """
    # ensure_ascii also escapes control characters, U+2028, U+2029 and lone surrogates.
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def that_fit(items: Sequence[T], room: int) -> list[T]:
    """Return the first of ``items`` that take at most ``room`` bytes once they are embedded."""
    sizes = accumulate(len(embed(item)) + 1 for item in items)
    return [item for item, size in zip(items, sizes, strict=True) if size <= room]


# ---------------------------------------------------------------- numbers


def number(value: Any) -> float | None:
    """Round a value to six significant digits; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def held_out_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Name the held-out numbers of one step in words, as ``held-out <source>: <label>``."""
    return {
        f"{HELD_OUT}{source}: {LABELS[key]}": value
        for source, found in held_out(dict(line)).items()
        for key, value in found.items()
    }


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Map metric to value of one step, finite ones only, rounded; held-out numbers are named in words too."""
    given = [*line.items(), *held_out_numbers(line).items()]
    rounded = ((name, number(value)) for name, value in given if name != "step")
    return {name: value for name, value in rounded if value is not None}


def series_of(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Map a metric's name to its steps and values."""
    series: dict[str, list[list[float]]] = {}
    for line in steps:
        for name, value in numbers_of(line).items():
            xs, ys = series.setdefault(name, [[], []])
            xs.append(int(line["step"]))
            ys.append(value)
    return series


def meanings(names: Iterable[str]) -> dict[str, str]:
    """Map each of the first thousand metrics that the glossary knows to its meaning."""
    found = [(name, metric.text) for name in islice(names, 1_000) if (metric := described(name)) is not None]
    return dict(that_fit(found, LARGEST_MEANINGS))


def curves(steps: Sequence[Mapping[str, Any]], notes: list[str], how: str = "") -> dict[str, Any]:
    """Collect the series, sampled evenly if they are long, and which of them are drawn together.

    Args:
        steps: of ``read_steps``.
        notes: gets what is left out.
        how: the held-out numbers were drawn, see ``summary.decoding``.
    """
    series = series_of(steps)
    most = min(MOST_POINTS, max(2, MOST_NUMBERS // max(1, len(series))))
    longest = max((len(xs) for xs, _ in series.values()), default=0)
    if longest > most:
        notes.append(f"Curves: at most {most} of {longest} points per line, evenly spaced, first and last among them.")
    sampled = []
    for name in sorted(name for name in series if len(name) <= LONGEST_NAME):
        kept = spread(len(series[name][0]), most)
        sampled.append((name, [[values[index] for index in kept] for values in series[name]]))
    shown = dict(that_fit(sampled, LARGEST_CURVES))
    if len(shown) < len(series):
        notes.append(f"Metrics: {len(shown)} of {len(series)}.")
    sources = sorted({name.rpartition(": ")[0] for name in shown if name.startswith(HELD_OUT)})
    ending = f", {how}" if how else ""
    held = [(source + ending, [(label, f"{source}: {label}") for label in LABELS.values()]) for source in sources]
    groups = [*held, *CURVES]
    drawn = [
        {
            "title": title,
            "lines": [{"label": label or unit_of(name), "name": name} for label, name in lines if name in shown],
        }
        for title, lines in groups
    ]
    return {"groups": [group for group in drawn if group["lines"]], "series": shown, "meanings": meanings(shown)}


def tokens_of(line: Mapping[str, Any]) -> float | None:
    """Return the tokens that a step generated, discarded ones included; None if not logged."""
    if (tokens := number(line.get("skpo/tokens/generated"))) is not None:
        return tokens
    # Runs of former releases have the two phases alone.
    phases = [number(line.get(f"{phase}tokens_generated")) for phase in (UPSTREAM, DOWNSTREAM)]
    return sum(found) if (found := [tokens for tokens in phases if tokens is not None]) else None


def headline(
    steps: Sequence[Mapping[str, Any]], counts: Mapping[str, int], room: int = LARGEST_HEADLINE
) -> dict[str, Any]:
    """Collect held-out numbers of the first and the last validation, steps, tokens, minutes; None if not logged.

    Args:
        steps: of ``read_steps``.
        counts: validation problems per data source, see ``summary.problems``; where they are known, an accuracy has
            its 95% interval and its change is told in words.
        room: bytes that the held-out numbers may take.
    """
    validated = [(int(line["step"]), held_out(dict(line))) for line in steps if held_out(dict(line))]
    sources = []
    if validated:
        (first, before), (last, after) = validated[0], validated[-1]
        for source, found in after.items():
            rows = [[key, number(before.get(source, {}).get(key)), number(value)] for key, value in found.items()]
            earlier = before.get(source, {}).get("acc") if first < last else None
            interval, changed = certainty(earlier, found.get("acc"), counts.get(source))
            told = {"problems": counts.get(source), "interval": interval, "change": changed}
            sources.append({"source": source, "first": first, "last": last, "rows": rows} | told)
    tokens = [count for line in steps if (count := tokens_of(line)) is not None]
    return {
        "sources": that_fit(sources, room),
        "steps": max((int(line["step"]) for line in steps), default=0),
        "tokens": number(sum(tokens)) if tokens else None,
        "minutes": number(minutes_of(steps)),
    }


# ---------------------------------------------------------------- config


def settings_of(config: Mapping[str, Any]) -> list[list[str]]:
    """List dotted path and value of every setting; secrets are hidden, wherever they are."""

    def pairs(node: Any, path: str) -> list[list[str]]:
        if isinstance(node, Mapping) and node:
            return [pair for key, value in node.items() for pair in pairs(value, f"{path}.{key}" if path else str(key))]
        return [[path, HIDDEN if node == HIDDEN else json.dumps(node, ensure_ascii=False, default=str)]]

    return pairs(hide_secrets(config), "")


def read_settings(output_dir: Path) -> list[list[str]] | None:
    """Read all settings of the run's ``config.yaml``; None if there is no such file.

    Raises:
        ReportError: the file is not a YAML mapping.
    """
    path = output_dir / "config.yaml"
    if not path.is_file():
        return None
    try:
        config = read_yaml(path) or {}
    except (UntrustedError, OSError) as error:
        raise ReportError(f"{path}: cannot be read as a config ({error}); repair or remove it") from None
    if not isinstance(config, Mapping):
        raise ReportError(f"{path}: is not a mapping of settings; repair or remove it")
    return settings_of(config)


def shorten(text: str) -> str:
    """Cut a name or a value after ``LONGEST_NAME`` characters."""
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}…"


def read_config(output_dir: Path, notes: list[str]) -> list[list[str]]:
    """Read the settings of the run's ``config.yaml`` that the page shows.

    Raises:
        ReportError: the file is not a YAML mapping.
    """
    found = read_settings(output_dir)
    if found is None:
        notes.append("Config: the run folder holds no config.yaml.")
        return []
    if any(len(text) > LONGEST_NAME for pair in found for text in pair):
        notes.append(f"Config: names and values are cut after {LONGEST_NAME} characters.")
    shown = that_fit([[shorten(text) for text in pair] for pair in found], LARGEST_CONFIG)
    if len(shown) < len(found):
        notes.append(f"Config: the first {len(shown)} of {len(found)} settings.")
    return shown


# ---------------------------------------------------------------- trees


def cut(text: str | None, longest: int) -> Any:
    """Return the text, or if it is too long its head, its tail (answers are at the end) and its length."""
    if text is None or len(text) <= longest:
        return text
    head = longest * 3 // 4
    return {"head": text[:head], "tail": text[len(text) - (longest - head) :], "length": len(text)}


def page_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a stored tree to what the page reads, see ``page_files/page.js``."""
    candidates, responses = tree["candidates"] or [], tree["responses"] or []
    longest = min(LONGEST_TEXT, max(20, LARGEST_TREE // (4 + 2 * len(candidates) + 2 * len(responses))))
    segment = tree["segment"] or {}
    return {
        "step": tree["step"],
        "prompt": cut(tree["prompt_id"], longest),
        "problem": cut(tree["problem"], longest),
        "answer": cut(tree["answer"], longest),
        "skip": cut(tree["skip_prompt"], longest),
        "split": tree["split_position"],
        "segment": {name: number(segment.get(name)) for name in ("reward", "baseline", "advantage")},
        "candidates": [
            {
                "text": cut(candidate["text"], longest),
                "rest": cut(candidate["rest"], longest),
                "d": number(candidate["deviation"]),
                "early": candidate["ended_early"],
                "chosen": candidate["chosen"],
            }
            for candidate in candidates
        ],
        "responses": [
            {
                "text": cut(response["text"], longest),
                "answer": cut(response["answer"], longest),
                "reward": number(response["reward"]),
                "advantage": number(response["advantage"]),
                "length": response["length"],
            }
            for response in responses
        ],
    }


def trees_for_page(output_dir: Path, room: int, notes: list[str]) -> list[str]:
    """Choose as many trees as fit into ``room`` bytes, spread evenly over the stored ones; each as embedded JSON."""
    index = tree_index(output_dir)
    count = min(len(index), MOST_TREES)
    encoded: list[str] = []
    # Reading a tree takes a tenth of a second: four tell about how many fit.
    sizes = [len(embed(page_tree(tree))) for tree in read_trees([index[place] for place in spread(len(index), 4)])]
    if sizes:
        count = min(count, int(1.25 * room * len(sizes) / sum(sizes)) + 1)
    while count:
        places = [index[place] for place in spread(len(index), count)]
        encoded = [embed(page_tree(tree)) for tree in read_trees(places)]
        size = sum(len(text) + 1 for text in encoded)
        if size <= room:
            break
        # The estimate may be too high; at least one tree less, so that this ends.
        count = min(count - 1, int(count * room / size))
    else:
        encoded = []
    if len(encoded) < len(index):
        notes.append(f"Trees: {len(encoded)} of {len(index)} stored ones, evenly spaced from first to last.")
    if any('"tail":' in text for text in encoded):
        notes.append(
            f"Texts longer than {LONGEST_TEXT} characters, or less where a tree has very many texts, "
            "keep their beginning and end here; the parquet files hold more."
        )
    return encoded
