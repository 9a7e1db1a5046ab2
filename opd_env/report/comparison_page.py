"""Writes comparisons as one self-contained page in the look of the reports: no scripts, no requests.

Worked example::

    write_comparison([compare(read_side("runs/a"), read_side("runs/b"))], "runs/compare.html")

Test it alone: ``pytest tests/evaluation/test_comparison.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from opd_env.episode.files import write_whole
from opd_env.evaluation.comparison import Comparison, Flip, MetricDifference, Side
from opd_env.evaluation.counts import NEITHER_GOOD_NOR_BAD, WORSE_WHEN_HIGHER
from opd_env.report.charts import Series, line_chart, rate_dots
from opd_env.report.names import BEHAVIOUR
from opd_env.report.page import template
from opd_env.report.transcript import shorten, transcript

MOST_FLIPS = 30
"""Flips of each direction that are shown with their transcripts."""

_TONES = ("before", "after", "teacher", "other")


class _Model(NamedTuple):
    """A side as the page's passages know it."""

    key: str
    title: str


def write_comparison(comparisons: Sequence[Comparison], path: str | Path) -> Path:
    """Writes the page of one or more comparisons with the same first side.

    Args:
        comparisons: at least one.
        path: the file; its folder is made if it is missing.

    Raises:
        StoreError: the file cannot be written.
    """
    path = Path(path)
    write_whole(path, template("compare.html.jinja").render(_context(comparisons)))
    return path


def summary_sentence(comparison: Comparison) -> str:
    """What the comparison found, in one sentence."""
    paired = comparison.accuracy
    change = f"{100 * paired.value:+.1f} points [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
    p_value = f"p = {paired.p_value:.2g}" if paired.p_value >= 1e-4 else "p < 0.0001"
    test = "McNemar's exact test" if comparison.single else "sign test over problems"
    return (
        f"Accuracy changes by {change} from {comparison.first.name} to {comparison.second.name}, paired on {paired.n}"
        f" common problems: {paired.gained} gained, {paired.lost} lost, {p_value} ({test})."
    )


def metric_title(name: str) -> str:
    """What tables call a metric."""
    return BEHAVIOUR.get(name, (name.replace("_", " "), ""))[0]


def _context(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    first = comparisons[0].first
    sides = [first, *(comparison.second for comparison in comparisons)]
    models = [_Model(_TONES[min(number, len(_TONES) - 1)], side.name) for number, side in enumerate(sides)]
    rates = [comparisons[0].metrics[0].first, *(comparison.metrics[0].second for comparison in comparisons)]
    settings = first.settings
    facts = [(name, settings.get(name)) for name in ("split", "version", "samples", "seed", "prompt_hash")]
    facts += [(side.name, side.path) for side in sides if side.name != side.path]
    return {
        "label": first.label or settings.get("task"),
        "facts": [(name.replace("_", " "), str(value)) for name, value in facts if value not in (None, "")],
        "accuracies": list(zip(models, rates, strict=True)),
        "headline": " ".join(map(summary_sentence, comparisons)),
        "charts": _charts(sides, models),
        "parts": [_part(one, models[0], model) for one, model in zip(comparisons, models[1:], strict=True)],
    }


def _part(comparison: Comparison, first: _Model, second: _Model) -> dict[str, Any]:
    reach = max(max(abs(one.difference.low), abs(one.difference.high)) for one in comparison.metrics)
    reach = next((step for step in (0.05, 0.1, 0.25, 0.5) if reach <= step), 1.0)
    flips = [
        (title, len(all_flips), [_episode(comparison, flip, first, second) for flip in all_flips[:MOST_FLIPS]])
        for title, all_flips in (("Gained", comparison.gained), ("Lost", comparison.lost))
    ]
    played = [one for _, _, episodes in flips for episode in episodes for one in episode["played"]]
    return {
        "first": first,
        "second": second,
        "notes": comparison.notes,
        "marks": [(0, f"{-100 * reach:g}"), (50, "0"), (100, f"{100 * reach:+g}")],
        "rows": [_row(metric, reach) for metric in comparison.metrics],
        "flips": flips,
        "by_token": comparison.first.decode is not None or comparison.second.decode is not None,
        "thinks": any(passage.kind == "thinking" for _, _, blocks in played for b in blocks for passage in b.passages),
    }


def _row(metric: MetricDifference, reach: float) -> dict[str, Any]:
    change = metric.difference

    def at(value: float) -> float:
        return round(50 + 50 * max(-reach, min(reach, value)) / reach, 2)

    better = (change.value > 0) != (metric.name in WORSE_WHEN_HIGHER)
    tone = (
        "unclear"
        if not change.clear
        else "clear"
        if metric.name in NEITHER_GOOD_NOR_BAD
        else "up"
        if better
        else "down"
    )
    return {
        "title": metric_title(metric.name),
        "note": BEHAVIOUR.get(metric.name, ("", ""))[1],
        "first": metric.first,
        "second": metric.second,
        "change": str(change),
        "value": f"{100 * change.value:+.1f}",
        "interval": f"{100 * change.low:+.1f} … {100 * change.high:+.1f}",
        "tone": tone,
        "left": at(change.low),
        "width": round(at(change.high) - at(change.low), 2),
        "at": at(change.value),
    }


def _episode(comparison: Comparison, flip: Flip, first: _Model, second: _Model) -> dict[str, Any]:
    played = []
    for model, side, place in ((first, comparison.first, flip.first), (second, comparison.second, flip.second)):
        one = side.trajectories[place]
        played.append((model, one, transcript(one, side.decode if len(one.token_ids) else None)))
    return {"question": shorten(flip.question), "played": played}


def _charts(sides: Sequence[Side], models: Sequence[_Model]) -> list[tuple[str, Any]]:
    charts = []
    for field in ("accuracy", "tool_call_validity"):
        series: list[Series] = []
        for side, model in zip(sides, models, strict=True):
            dots = rate_dots(model.title, [(step, getattr(one, field)) for step, one in side.curve], model.key)
            if len(dots.values) > 1:
                series += [replace(dots, low=None, high=None, dots=False), dots]
        if series:
            charts.append((metric_title(field), line_chart(series, percent=True)))
    return charts
