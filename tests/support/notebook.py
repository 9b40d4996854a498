"""Executes the code cells of a notebook as Jupyter does, without its packages: a cell shows its last expression."""

import ast
import json
from pathlib import Path
from typing import Any


def execute(notebook: Path) -> list[str]:
    """Run all code cells in one namespace; returns what each shows, HTML where a value has it."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(cells):
        where = f"{notebook.name}: code cell {number}"
        tree = ast.parse("".join(cell["source"]), where)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, where, "exec"), names)
        value = eval(compile(ast.Expression(last.value), where, "eval"), names) if isinstance(last, ast.Expr) else None
        rich = getattr(value, "_repr_html_", None)
        shown.append(rich() if rich else repr(value))
    return shown
