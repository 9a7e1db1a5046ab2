"""Tables that commands print.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from opd_env.episode.trajectory import Decode, Trajectory
from opd_env.evaluation.read_run import mixture_of, mixture_text
from opd_env.report.transcript import transcript

_METRICS = {
    "accuracy": "accuracy",
    "tool_call_validity": "tool-call validity",
    "called": "episodes with a call",
    "malformed": "only malformed calls",
    "truncated": "episodes cut by a limit",
}


def before_after_table(results: Mapping[str, Any]) -> Group:
    """Student before and after training beside the teacher or teachers, each with its 95 % interval."""
    title = f"{results['after']['n']} held-out problems, with 95 % intervals"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="", title_justify="left")
    columns = {"student before": results["before"], "student after": results["after"], "teacher": results["teacher"]}
    if members := mixture_of(results):
        del columns["teacher"]
        columns |= {f"teacher {number}": entry for number, entry in enumerate(members.values(), start=1)}
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in _METRICS.items():
        if key in results["after"]:
            table.add_row(label, *(_rate(entry, key) for entry in columns.values()))
    told = f"teachers 1 to {len(members)} alone; they teach as {mixture_text(results)}, which plays no episodes"
    return Group(table, *([Text(told)] if members else []))


_STYLES = dict.fromkeys(("prompt", "scaffold", "history"), "dim")
_STYLES |= {"text": "green", "thinking": "magenta", "tool_call": "yellow"}


def transcript_text(trajectory: Trajectory, decode: Decode | None, *, prompt: bool = True) -> Text:
    """One episode coloured by kind: as it stands in the token arrays, or without a decoder as its turns were recorded.

    Args:
        trajectory: a finished episode.
        decode: text of token ids.
        prompt: show the opening messages too.
    """
    shown = Text()
    for block in transcript(trajectory, decode if len(trajectory.token_ids) else None):
        if block.role != "prompt" or prompt:
            for passage in block.passages:
                shown.append(passage.text, style=_STYLES.get(passage.kind, "cyan"))
            if decode is None:
                shown.append("\n")
    return shown


def _rate(summary: Mapping[str, Any], key: str) -> str:
    value, interval = summary.get(key), summary.get(f"{key}_ci")
    if not isinstance(value, int | float):
        return "–"
    text = f"{100 * value:.1f} %"
    if interval is None or None in interval:
        return text
    return f"{text}\n[dim]{100 * interval[0]:.1f} – {100 * interval[1]:.1f}[/]"
