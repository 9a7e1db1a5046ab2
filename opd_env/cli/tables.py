"""Tables that commands print.

Test it alone: ``pytest tests/core/test_cli.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

_METRICS = {
    "accuracy": "accuracy",
    "tool_call_validity": "tool-call validity",
    "called": "episodes with a call",
    "malformed": "episodes with a malformed call",
    "truncated": "episodes cut by a limit",
}


def before_after_table(results: Mapping[str, Any]) -> Table:
    """Student before and after training beside the teacher, each with its 95 % interval."""
    title = f"{results['after']['n']} held-out problems, with 95 % intervals"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="", title_justify="left")
    table.add_column("")
    for name in ("student before", "student after", "teacher"):
        table.add_column(name, justify="right")
    for key, label in _METRICS.items():
        if key in results["after"]:
            table.add_row(label, *(_rate(results[name], key) for name in ("before", "after", "teacher")))
    return table


def _rate(summary: Mapping[str, Any], key: str) -> str:
    value, interval = summary.get(key), summary.get(f"{key}_ci")
    if not isinstance(value, int | float):
        return "–"
    text = f"{100 * value:.1f} %"
    if interval is None or None in interval:
        return text
    return f"{text}\n[dim]{100 * interval[0]:.1f} – {100 * interval[1]:.1f}[/]"
