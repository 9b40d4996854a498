"""Pictures of the analyses, from their tables alone; matplotlib without a display."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette, which colour-blind readers can distinguish, and a grey."""


def _figure(rows: int, columns: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.0 * columns, height * rows), squeeze=False, layout="constrained"
    )
    plt.close(figure)  # keeps it out of pyplot's list of open windows
    flat = list(axes.ravel())
    for axis in flat:
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, flat


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def _legend(axis: Axes, **options: Any) -> None:
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, frameon=False, **options)


def _powers_of_two(axis: Axes, values: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(values), [str(value) for value in values], rotation=45)
    axis.minorticks_off()


def draw_sign_consistency(table: pd.DataFrame) -> Figure:
    """Draw sign accuracy and MAE against K, SKPO over its visits, both by class and by spread."""
    figure, (over_k, error, visits, by_class, by_spread, error_class) = _figure(2, 3)
    overall, monte_carlo = table[table["by"] == "all"], table[table["estimator"] == "monte_carlo"]
    curve = overall[overall["estimator"] == "monte_carlo"].sort_values("samples")
    samples = [int(value) for value in curve["samples"]]
    skpo = overall[overall["estimator"] == "skpo"]
    last = skpo[skpo["trend"] == 0].sort_values("visit").tail(1)

    over_k.plot(samples, curve["sign_accuracy"], "o-", color=COLORS[0], label="MC, against the group mean")
    over_k.plot(
        samples, curve["sign_accuracy_to_prompt_value"], "o--", color=COLORS[5], label="MC, against the prompt's value"
    )
    error.plot(samples, curve["mae"], "o-", color=COLORS[0], label="MC group-relative")
    for _, row in last.iterrows():
        over_k.axhline(row["sign_accuracy"], color=COLORS[1], label=f"SKPO, K={int(row['samples'])}, last visit")
        error.axhline(row["mae"], color=COLORS[1], label="SKPO, batch-normalised, last visit")
    _label(over_k, "Sign accuracy", "K samples per segment", "share of right signs")
    _label(error, "Error of normalised advantages", "K samples per segment", "mean absolute error")

    for number, (trend, rows) in enumerate(skpo.groupby("trend")):
        name = "value stands still" if trend == 0 else f"value rises by {trend} logits per visit"
        visits.plot(rows["visit"], rows["sign_accuracy"], "o-", color=COLORS[1 + number], label=name)
        exact = overall[(overall["estimator"] == "skpo_exact_baseline") & (overall["trend"] == trend)]
        visits.plot(
            exact["visit"], exact["sign_accuracy"], ":", color=COLORS[1 + number], label=f"{name}, exact baseline"
        )
    _label(visits, "SKPO's estimator over visits", "earlier visits of the prompt", "share of right signs")

    shown = [value for value in samples if value in (samples[0], 64, 512, samples[-1])]
    for axis, by, column, x, y in (
        (by_class, "correct", "sign_accuracy", "correct among the G outcomes", "share of right signs"),
        (by_spread, "spread", "sign_accuracy", "std of true probabilities, up to", "share of right signs"),
        (error_class, "correct", "mae", "correct among the G outcomes", "mean absolute error"),
    ):
        for number, value in enumerate(shown):
            rows = monte_carlo[(monte_carlo["by"] == by) & (monte_carlo["samples"] == value)]
            alpha = 0.35 + 0.65 * number / max(1, len(shown) - 1)
            axis.plot(rows["group"], rows[column], "o-", color=COLORS[0], alpha=alpha, label=f"MC, K={value}")
        rows = table[(table["estimator"] == "skpo") & (table["by"] == by)]
        axis.plot(rows["group"], rows[column], "s-", color=COLORS[1], label="SKPO, last visit")
        _label(axis, {"correct": "By correctness class", "spread": "By quality spread"}[by], x, y)
    for axis in (over_k, error):
        _powers_of_two(axis, samples)
    for axis in (over_k, error, visits, by_class, by_spread, error_class):
        _legend(axis)
    return figure


def draw_shortcut(means: pd.DataFrame) -> Figure:
    """Draw distinct answers, all-equal groups, length and accuracy by split position, with standard errors."""
    panels = (
        ("distinct", "Distinct answers per group", "answers"),
        ("all_equal", "Groups with equal rewards", "share of groups"),
        ("length", "Response length", "tokens"),
        ("accuracy", "Accuracy", "share correct"),
    )
    figure, axes = _figure(2, 2)
    for axis, (measure, title, unit) in zip(axes, panels, strict=True):
        for number, (mode, rows) in enumerate(means.groupby("mode", sort=False)):
            values, errors = rows[measure].to_numpy(), rows[f"{measure}_se"].fillna(0).to_numpy()
            if rows["share"].isna().all():  # plain responses know no position
                axis.axhline(values[0], color=COLORS[6], linewidth=1, label=str(mode))
                axis.axhspan(values[0] - errors[0], values[0] + errors[0], color=COLORS[6], alpha=0.1, linewidth=0)
            else:
                axis.errorbar(
                    rows["share"], values, yerr=errors, marker="o", color=COLORS[number], capsize=2, label=str(mode)
                )
        _label(axis, title, "split position / mean plain length", unit)
        axis.set_ylim(bottom=0)
    _legend(axes[0], loc="lower right")
    return figure


def draw_implicit_advantage(table: pd.DataFrame) -> Figure:
    """Draw value and inter-method advantage by relative position, with standard errors over problems."""
    figure, axes = _figure(1, 2)
    for axis, measure, title in zip(
        axes, ("value", "advantage"), ("Value of a partial response", "Inter-method advantage"), strict=True
    ):
        for number, (method, rows) in enumerate(table.groupby("method", sort=False)):
            color = COLORS[number % len(COLORS)]
            errors = rows[f"{measure}_se"].fillna(0)
            axis.plot(rows["position"], rows[measure], color=color, label=str(method))
            axis.fill_between(
                rows["position"], rows[measure] - errors, rows[measure] + errors, color=color, alpha=0.15, linewidth=0
            )
        _label(axis, title, "share of the response given", "mean reward of continuations")
    axes[1].axhline(0, color=COLORS[6], linewidth=0.8)
    axes[1].set_ylabel("difference to the mean over methods", fontsize=9)
    _legend(axes[0])
    return figure


def draw_polarity(words: pd.DataFrame, bins: pd.DataFrame, shown: int = 12) -> Figure:
    """Draw the words that expand and contract the entropy most, and the predicted against the measured change."""
    figure, (bars, scatter) = _figure(1, 2, height=4.2)
    ends = [words[words["polarity"] < 0].tail(shown).iloc[::-1], words[words["polarity"] > 0].head(shown).iloc[::-1]]
    for number, (name, rows) in enumerate(zip(("contracting", "expanding"), ends, strict=True)):
        places = [place + number * (len(ends[0]) + 1) for place in range(len(rows))]
        labels = [_plain(repr(str(text))) for text in rows["text"]]
        bars.barh(places, rows["polarity"], color=COLORS[1 - number], label=name)
        for place, label, value in zip(places, labels, rows["polarity"], strict=True):
            side: dict[str, Any] = {"ha": "right" if value > 0 else "left", "va": "center", "fontsize": 7}
            bars.annotate(label, (0, place), (-3 if value > 0 else 3, 0), textcoords="offset points", **side)
    bars.set_yticks([])
    _label(bars, "Words by polarity", "mean P = A T, nats per unit of step", "")
    errors = bins["change_se"].fillna(0)
    scatter.errorbar(bins["polarity"], bins["change"], yerr=errors, fmt="o", color=COLORS[0], capsize=2, markersize=4)
    scatter.axhline(0, color=COLORS[6], linewidth=0.8)
    scatter.axvline(0, color=COLORS[6], linewidth=0.8)
    _label(scatter, "One update", "predicted: P, mean of a bin of tokens", "measured change of the entropy, nats")
    _legend(bars, loc="lower right")
    return figure


CURVES = {
    "skpo/downstream/reward/mean": ("Downstream reward", "mean reward"),
    "actor/entropy": ("Entropy of the policy", "nats per token"),
    "skpo/downstream/all_equal_share": ("Groups without advantage", "share of groups"),
    "skpo/tokens/generated": ("Tokens generated", "tokens per step"),
}
"""Titles of metrics, and of their values; others have their name alone."""


def draw_curves(curves: pd.DataFrame, phases: pd.DataFrame, unit: str) -> Figure:
    """Draw a panel for every metric, over ``unit``, with intervals over runs; and seconds of a step by phase."""
    metrics = list(dict.fromkeys(curves["metric"]))
    count = len(metrics) + (not phases.empty)
    columns = min(3, count)
    figure, axes = _figure(-(-count // columns), columns)
    for axis in axes[count:]:
        axis.set_visible(False)
    groups = list(dict.fromkeys([*curves["group"], *phases["group"]]))
    for axis, metric in zip(axes, metrics, strict=False):
        for group, rows in curves[curves["metric"] == metric].groupby("group", sort=False):
            color = COLORS[groups.index(str(group)) % len(COLORS)]
            marker = "o" if len(rows) < 30 else None
            axis.plot(rows["x"], rows["mean"], marker=marker, markersize=3, color=color, label=_plain(str(group)))
            axis.fill_between(rows["x"], rows["low"], rows["high"], color=color, alpha=0.15, linewidth=0)
        axis.locator_params(axis="x", nbins=6)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        title, values = CURVES.get(metric, (metric, ""))
        _label(axis, _plain(title), unit, values)
    _legend(axes[0])
    if not phases.empty:
        _draw_phases(axes[count - 1], phases)
    return figure


def draw_differences(table: pd.DataFrame) -> Figure:
    """Draw every group's difference to the reference with its 95% interval, for the first metric of ``table_of``."""
    rows = table[(table["metric"] == table["metric"].iloc[0]) & table["against"].astype(bool)]
    figure, (axis, *_) = _figure(1, 1, 0.8 + 0.35 * len(rows))
    figure.set_figwidth(6.5)
    names = [_plain(str(group)) for group in rows["group"]]
    errors = (rows["difference_high"] - rows["difference"]).fillna(0).to_numpy()
    axis.errorbar(rows["difference"], names, xerr=errors, fmt="o", color=COLORS[0], capsize=3)
    axis.axvline(0, color=COLORS[6], linewidth=0.8)
    axis.invert_yaxis()
    _label(axis, f"Difference to {_plain(str(rows['against'].iloc[0]))}", "held-out accuracy, 95% interval", "")
    return figure


def _draw_phases(axis: Axes, phases: pd.DataFrame) -> None:
    """Draw one bar per group, its phases side by side; phases below 2% of the step and untimed seconds are other.

    Validation is not part of a step in verl's timing and is not shown.
    """
    wide = phases.pivot_table(index="group", columns="phase", values="seconds", sort=False).fillna(0.0)
    step = wide["step"]
    parts = wide.drop(columns=["step", "testing"], errors="ignore")
    large = [name for name in parts.columns if (parts[name] >= 0.02 * step).any()]
    shown = parts[large].assign(other=(step - parts[large].sum(axis=1)).clip(lower=0))
    left = pd.Series(0.0, index=shown.index)
    for number, name in enumerate(shown.columns):
        color = "#bbbbbb" if name == "other" else COLORS[number % len(COLORS)]
        axis.barh([_plain(str(group)) for group in shown.index], shown[name], left=left, color=color, label=str(name))
        left = left + shown[name]
    _label(axis, "Step time by phase", "seconds per step", "")
    axis.invert_yaxis()
    _legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def _plain(text: str) -> str:
    """Escape a name, which is data: a dollar sign must not start a formula."""
    return text.replace("$", r"\$")
