"""One rollout tree as a piece of HTML, for a notebook."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.untrusted import visible

_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"


def tree_html(tree: Mapping[str, Any]) -> str:
    """Show a row of ``TREE_SCHEMA``; texts are escaped, and what cannot be seen in them is shown as escapes."""
    segment = tree["segment"]
    candidates = (
        ("→" if item["chosen"] else "", f"{item['deviation']:.3f}", item["text"], item["rest"])
        for item in tree["candidates"]
    )
    responses = (
        (f"{item['reward']:+.2f}", f"{item['advantage']:+.2f}", item["length"], item["answer"], item["text"])
        for item in tree["responses"]
    )
    facts = (
        ("problem", tree["problem"]),
        ("answer", tree["answer"]),
        ("segment", segment["text"]),
        *((name, f"{segment[name]:+.3f}") for name in ("reward", "baseline", "advantage")),
    )
    parts = [
        f"<h4>Step {_text(tree['step'])}, prompt {_text(tree['prompt_id'])}</h4>",
        _table((), facts),
        f"<h5>Candidates, cut at t_q = {_text(tree['split_position'])}</h5>",
        _table(("chosen", "d", "kept", "written after the cut"), candidates),
        "<h5>Responses to [segment, problem]</h5>",
        _table(("reward", "advantage", "tokens", "answer found", "text"), responses),
    ]
    return f"<div>{''.join(parts)}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(kind: str, cells: Sequence[Any]) -> str:
    shown = (f'<{kind} style="{_CELL}">{_text(cell)}</{kind}>' for cell in cells)
    return f"<tr>{''.join(shown)}</tr>"


def _text(value: Any) -> str:
    return "–" if value is None else html.escape(visible(str(value)))
