"""The glossary of metrics: patterns, and the page's curves.  Golden and whole runs show that it is complete."""

import re

import pytest

from recipe.skpo.output.glossary import METRICS, Metric, described
from recipe.skpo.output.page_data import CURVES, curves


def test_a_pattern_describes_its_names_alone() -> None:
    metric = Metric("a/{b,c}/<n>/x.y", "", "")
    assert metric.names() == ["a/b/<n>/x.y", "a/c/<n>/x.y"]
    assert metric.describes("a/b/1/2/x.y") and metric.describes("a/c/q/x.y")
    assert not any(map(metric.describes, ("a/b/x.y", "a/d/q/x.y", "a/b/q/x_y", "z/a/b/q/x.y")))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_no_pattern_hides_another(metric: Metric) -> None:
    names = [re.sub(r"<\w+>", "some/text", name) for name in metric.names()]
    assert [described(name) for name in names] == [metric] * len(names)
    assert metric.meaning


def test_every_curve_of_the_page_is_in_the_table_and_has_a_label() -> None:
    names = [name for _, lines in CURVES for _, name in lines]
    assert all(map(described, names))
    shown = curves([{"step": 1} | dict.fromkeys(names, 0.5)], [])
    assert all(line["label"] for group in shown["groups"] for line in group["lines"])
    assert set(shown["meanings"]) == set(names)
