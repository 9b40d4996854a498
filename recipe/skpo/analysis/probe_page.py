"""What a probe's numbers mean in words, by stated thresholds, and the page that shows both."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from recipe.skpo.settings import SkpoSettings

NOISY, CLEAR = 0.5, 1.0
"""Signal to noise below which four fifths of the variance of a segment's reward are noise, above which half is not."""
UNREAD = 0.1
"""Accuracy that [s, q] may lose against q."""
SHORT = 0.5
"""Share of the plain length below which responses to [s, q] are too short."""
COPIED = 0.5
"""Share of copies, beyond chance, from which siblings hardly differ where s stands."""
EQUAL = 0.75
"""Share of groups with equal rewards from which few prompts teach anything downstream."""
FEW = 3
"""Candidates of which the median is as good as that of more, where segments hardly differ."""

THRESHOLDS = {
    "signal to noise: mostly noise below": NOISY,
    "signal to noise: clear above": CLEAR,
    "accuracy lost under [s, q]: at most (and two standard errors)": UNREAD,
    "length under [s, q] as a share of the plain one: at least": SHORT,
    "copies of s beyond chance: below": COPIED,
    "groups of equal rewards: below": EQUAL,
}


def verdict(numbers: Mapping[str, Any], settings: SkpoSettings) -> dict[str, Any]:
    """Judge the numbers of ``probe.measure``.

    A change is one that the settings take and do not have yet.

    Returns:
        ``headline``, ``findings`` and ``changes``, sentences; ``thresholds``.
    """
    read = _reads(numbers)
    told, headline, changes = _signal(numbers, settings)
    findings, more = _groups(numbers, settings)
    if read:
        headline = "Not as it is: the model does not answer [s, q] as well as q, so that training may collapse."
    return {
        "headline": headline,
        "findings": [told, *(read or [_as_good(numbers)]), *findings],
        "changes": [*([_other_mode(numbers)] if read else []), *changes, *more],
        "thresholds": THRESHOLDS,
    }


def _signal(numbers: Mapping[str, Any], settings: SkpoSettings) -> tuple[str, str, list[str]]:
    found = numbers["signal"]
    ratio, low, high = (found[name] for name in ("signal_to_noise", "low", "high"))
    if ratio != ratio:  # NaN
        return (
            "All rewards are equal: no segment and no response is better than another one.",
            "No signal: every response has the same reward.",
            ["data or model: choose problems that the model solves sometimes"],
        )
    told = (
        f"The true value of a prompt's segments varies by {found['signal']:.3f} (standard deviation, rewards are "
        f"from -1 to 1), a mean of G rewards by {found['noise']:.3f} around it: signal to noise {ratio:.2f} "
        f"(95% interval {low:.2f} to {high:.2f})."
    )
    lighter, fewer = _lighter(numbers, settings), []
    if settings.candidate_count > FEW:
        fewer = [f"skpo.candidates={FEW}: which of the candidates is the segment hardly matters"]
    split = _range(numbers)
    if high < NOISY:
        return told, "Mostly noise: a segment's reward says little about the segment.", [*lighter, *fewer, *split]
    if low > CLEAR:
        return told, "A clear signal: segments differ by more than the noise of their rewards.", split
    if low > NOISY:
        return (
            told,
            "Some signal: segments differ, by about as much as their rewards are noisy.",
            [*lighter, *split],
        )
    return (
        told,
        f"Not decided: the interval of the signal to noise holds {NOISY:g}.",
        ["probe.prompts, probe.continuations: raise them to decide", *lighter, *split],
    )


def _lighter(numbers: Mapping[str, Any], settings: SkpoSettings) -> list[str]:
    """Say how a noisy upstream objective gets less weight; empty if it has that already."""
    share = f"{numbers['token_share']:.2g}"
    if settings.upstream.shrinkage or settings.weight_up <= float(share):
        return []
    return [
        f"skpo.weight_up={share} (the segment's share of the trained tokens) or skpo.upstream.shrinkage=true; "
        f"preset=small_batch sets the former"
    ]


def _range(numbers: Mapping[str, Any]) -> list[str]:
    lower, upper = (numbers["signal_by_split"][name] for name in ("lower half", "upper half"))
    if lower["high"] < upper["low"]:
        return ["skpo.split_low: raise it to the middle of the range; later cuts have more signal"]
    if upper["high"] < lower["low"]:
        return ["skpo.split_high: lower it to the middle of the range; earlier cuts have more signal"]
    return []


def _reads(numbers: Mapping[str, Any]) -> list[str]:
    """Say where responses to [s, q] are worse or far shorter than those to q; empty if nowhere."""
    gap, modes = numbers["skip_gap"], numbers["modes"]
    own, plain = modes[numbers["skip"]], modes["q"]
    found = []
    if gap["accuracy"] < -max(UNREAD, 2 * gap["error"]):
        found.append(
            f"Under [s, q] {own['accuracy']:.3f} of the responses are right, under q {plain['accuracy']:.3f}: the "
            f"prompt is unfamiliar to the model."
        )
    if gap["length_share"] < SHORT:
        found.append(
            f"Responses to [s, q] have {own['length']:.1f} tokens, those to q {plain['length']:.1f}: the model takes "
            f"[s, q] for something else."
        )
    return found


def _as_good(numbers: Mapping[str, Any]) -> str:
    gap, modes = numbers["skip_gap"], numbers["modes"]
    own, plain = modes[numbers["skip"]], modes["q"]
    return (
        f"The model reads [s, q]: accuracy {own['accuracy']:.3f} against {plain['accuracy']:.3f} under q (difference "
        f"{gap['accuracy']:+.3f} +- {2 * gap['error']:.3f}), {own['length']:.1f} against {plain['length']:.1f} tokens."
    )


def _other_mode(numbers: Mapping[str, Any]) -> str:
    modes = numbers["modes"]
    others = {name: values["accuracy"] for name, values in modes.items() if name not in ("q", numbers["skip"])}
    best = max(others, key=lambda name: others[name])
    if others[best] <= modes[numbers["skip"]]["accuracy"]:
        return "skpo.skip: no other mode is better; train the model on prompts of this kind first, or use method=grpo"
    warning = "; but a segment decides the response that continues it" if best == "continual" else ""
    return f"skpo.skip={best}: accuracy {others[best]:.3f} on the same prompts{warning}"


def _groups(numbers: Mapping[str, Any], settings: SkpoSettings) -> tuple[list[str], list[str]]:
    modes, chance, mode = numbers["modes"], numbers["copy_chance"], numbers["skip"]
    own, findings, changes = modes[mode], [], []
    findings.append(
        f"{own['copied_share']:.0%} of the responses begin with all of s (by chance {chance:.0%}), in a segment of "
        f"{numbers['segment_length']:.1f} tokens."
    )
    if own["copied_share"] - chance > COPIED:
        findings.append("Siblings repeat s, its errors included, and differ only in what follows.")
        changes.append("skpo.split_high: lower it, so that less is copied")
        chat = modes["chat"]["copied_share"]
        if mode != "chat" and chat < own["copied_share"] - COPIED / 2:
            changes.append(f"skpo.skip=chat: {chat:.0%} of its responses copy s")
    findings.append(
        f"{own['all_equal_share']:.0%} of the groups of G have equal rewards, which teach nothing downstream."
    )
    if own["all_equal_share"] > EQUAL:
        keep = "keep" if settings.curriculum.enable else "set"
        changes.append(f"data: choose problems that the model solves sometimes, and {keep} skpo.curriculum.enable=true")
    return findings, changes


# ---------------------------------------------------------------- the page


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.headline { font-size: 1.2rem; font-weight: 600; border-left: .3rem solid #0072b2; padding-left: .8rem; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; }
th, td:first-child { text-align: left; } td { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; } .hint { color: #555; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #eee; } pre { background: #242424; }
  .hint { color: #aaa; } td, th { border-color: #444; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

MODES = {"concat": "[s, q] (concat)", "chat": "s quoted (chat)", "continual": "q, s continued (continual)"}
ESTIMATORS = {
    "skpo after 0": "SKPO, first visit",
    "skpo after 1": "SKPO, after 1 visit",
    "skpo after 4": "SKPO, after 4 visits",
    "mc equal": "Monte Carlo with the rewards of one visit",
    "mc": "Monte Carlo with G rewards per segment",
}


def page(result: Mapping[str, Any]) -> str:
    """Build the page of a probe's result, as ``probe.run`` writes it to JSON; it needs no script and no network."""
    numbers, judged, sizes = result["numbers"], result["verdict"], result["sizes"]
    what = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sizes.items())
    parts = [
        f"<h1>Probe of {escape(str(result['model']))}</h1>",
        f'<p class="hint">{escape(", ".join(result["data"]))}: {escape(what)}</p>',
        f'<p class="headline">{escape(judged["headline"])}</p>',
        _list("What was found", judged["findings"]),
        _list("What to change", judged["changes"] or ["Nothing: the options as given."]),
        "<h2>Signal of the segments' rewards</h2>",
        _table(
            ["split range", "signal", "noise", "signal to noise", "95% interval"],
            [
                _components("all", numbers["signal"]),
                *(_components(*part) for part in numbers["signal_by_split"].items()),
            ],
        ),
        "<h2>Responses by prompt</h2>",
        _table(
            ["prompt", "accuracy", "standard error", "tokens", "begin with s", "equal groups", "groups"],
            [_mode(name, values, numbers) for name, values in numbers["modes"].items()],
        ),
        f'<p class="hint">By chance, {numbers["copy_chance"]:.1%} of the plain responses begin with a given s.</p>',
        "<h2>Right signs of the upstream advantage</h2>",
        _table(
            ["estimator", "against the other responses", "expected against true values"],
            [
                [ESTIMATORS[name], _number(value), _number(numbers["signs"]["expected"].get(name))]
                for name, value in numbers["signs"]["measured"].items()
            ],
        ),
        '<p class="hint">The other K - G responses of a segment are a noisy truth, so that the measured shares are too '
        "low. An estimate of 0 is not right: a mean of G rewards often equals that of a single earlier visit. The "
        "expected shares are simulated with the measured values and signal to noise.</p>",
        "<h2>Thresholds</h2>",
        _table(["", ""], [[name, f"{value:g}"] for name, value in judged["thresholds"].items()]),
        "<h2>Examples</h2>",
        *map(_example, result["examples"]),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Probe</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _list(title: str, items: Sequence[str]) -> str:
    return f"<h2>{title}</h2>\n<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], kind: str) -> str:
        return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"

    top = line(head, "th") if any(head) else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"


def _components(name: str, found: Mapping[str, float]) -> list[str]:
    values = [_number(found[key]) for key in ("signal", "noise", "signal_to_noise")]
    return [name, *values, f"{_number(found['low'])} to {_number(found['high'])}"]


def _mode(name: str, found: Mapping[str, float], numbers: Mapping[str, Any]) -> list[str]:
    copied = "" if name == "q" else f"{found['copied_share']:.1%}"
    label = MODES.get(name, name) + (", of this training" if name == numbers["skip"] else "")
    shares = [_number(found["accuracy"]), _number(found["accuracy_error"]), f"{found['length']:.1f}", copied]
    return [label, *shares, f"{found['all_equal_share']:.1%}", f"{found['groups']}"]


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"


def _example(example: Mapping[str, Any]) -> str:
    shown = {"problem": example["problem"], "answer": example["answer"], "s": example["segment"]}
    shown |= {f"response, {name}": text for name, text in example["responses"].items()}
    return "\n".join(f"<p>{escape(name)}</p><pre>{escape(text)}</pre>" for name, text in shown.items())
