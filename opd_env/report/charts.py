"""Small SVG line charts for reports: no library, no script, colours from the page's style sheet.

Worked example::

    line_chart([Series("rollouts", [1, 2, 3], [0.2, 0.5, 0.8])], reference=("teacher", 0.9), percent=True)

Test it alone: ``pytest tests/report/test_charts.py``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from opd_env.evaluation.statistics import Rate

_WIDTH, _HEIGHT = 340, 156
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 10, 22
_MOST_POINTS = 400
_Point = tuple[float, float]
_SMOOTHED_ABOVE = 40
"""Longer series are drawn thin, with their moving average on top."""


@dataclass(frozen=True)
class Series:
    """Values over training steps. A step whose value is not finite is a gap."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    """Ends of an interval per value, drawn as whiskers of dots."""
    high: Sequence[float] | None = None
    dots: bool = False
    """Draw the values as separate dots instead of a line."""
    tone: str = ""
    """CSS class that colours it; by default as the page colours a line."""


def rate_dots(name: str, rates: Sequence[tuple[float, Rate]], tone: str = "") -> Series:
    """Rates by step as dots with their intervals; those that were not observed are left out."""
    seen = [(step, rate) for step, rate in rates if rate.n]
    steps, values = [step for step, _ in seen], [rate.value for _, rate in seen]
    low, high = [rate.low for _, rate in seen], [rate.high for _, rate in seen]
    return Series(name, steps, values, low, high, dots=True, tone=tone)


def line_chart(
    series: Sequence[Series], *, reference: tuple[str, float] | None = None, percent: bool = False
) -> Markup:
    """One chart as an ``<svg>`` element that fills the width it is given.

    Args:
        series: at least one, with at least one finite value.
        reference: a labelled horizontal line.
        percent: values are shares: the axis starts at 0 and runs to 100 %, or less when all are small.
    """
    steps = [step for one in series for step in one.steps]
    finite = [v for one in series for v in (*one.values, *(one.low or ()), *(one.high or ())) if math.isfinite(v)]
    if reference is not None:
        finite.append(reference[1])
    small = 0 < max(finite) <= 0.3
    ticks = [0.0, 0.5, 1.0] if percent and not small else nice_ticks(0.0 if percent else min(finite), max(finite))
    first, last = min(steps), max(steps)
    bottom, top = min(ticks[0], *finite), max(ticks[-1], *finite)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - bottom) / (top - bottom) if top > bottom else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts: list[str] = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        label = f"{100 * tick:g} %" if percent else short_number(tick)
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<text class="tick" x="{_LEFT}" y="{_HEIGHT - 5}">{short_number(first)}</text>')
    if last > first:
        end = f'x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 5}" text-anchor="end"'
        parts.append(f'<text class="tick" {end}>step {short_number(last)}</text>')
    if reference is not None:
        name, value = reference
        height = y(value)
        parts.append(
            f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        )
        label_y = height + (13 if height < _TOP + 16 else -5)  # below a line at the very top
        parts.append(f'<text class="reference" x="{_LEFT + 4}" y="{label_y:.1f}">{escape(name)}</text>')
    frame = _Frame(x, y, percent)
    for one in series:
        drawn = _dots(one, frame) if one.dots else _line(one, frame)
        parts += [f'<g class="{one.tone}">' if one.tone else "<g>", *drawn, "</g>"]
    label = escape(", ".join(one.name for one in series))
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label} over steps">'
        + "".join(parts)
        + "</svg>"
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to four round numbers over ``low`` … ``high``; from 0 when that wastes little room."""
    if 0 < low <= 0.5 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, up to rounding
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 2
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    start, stop = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(start, stop + 1)]


def short_number(value: float) -> str:
    """A number in at most about six characters: ``1.2k``, ``0.035``, ``3e-05``."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-")
    if size >= 10_000:
        return f"{value / 1000:.0f}k"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class _Frame:
    """Where a step and a value lie in the picture."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    percent: bool

    def path(self, css: str, points: Sequence[_Point]) -> str:
        if len(points) == 1:
            (step, value) = points[0]
            return f'<circle class="{css} dot" cx="{self.x(step):.1f}" cy="{self.y(value):.1f}" r="2.5"/>'
        corners = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)
        return f'<polyline class="{css}" points="{corners}"/>'

    def hover(self, name: str, point: _Point) -> str:
        """An invisible spot that shows the value under the pointer."""
        step, value = point
        shown = f"{100 * value:.1f} %" if self.percent else short_number(value)
        spot = f'<circle class="spot" cx="{self.x(step):.1f}" cy="{self.y(value):.1f}" r="6">'
        return f"{spot}<title>{escape(name)}, step {short_number(step)}: {shown}</title></circle>"


def _line(one: Series, frame: _Frame) -> list[str]:
    runs = _runs(_thinned([(s, v) for s, v in zip(one.steps, one.values, strict=True)]))
    smooth = sum(map(len, runs)) > _SMOOTHED_ABOVE
    parts = [frame.path("raw" if smooth else "line", run) for run in runs]
    if smooth:
        parts += [frame.path("line", _moving_average(run)) for run in runs]
    return parts + [frame.hover(one.name, point) for run in runs for point in run[:: max(1, len(run) // 100)]]


def _dots(one: Series, frame: _Frame) -> list[str]:
    parts = []
    for index, point in enumerate(zip(one.steps, one.values, strict=True)):
        if not math.isfinite(point[1]):
            continue
        x, y = frame.x(point[0]), frame.y(point[1])
        if one.low is not None and one.high is not None:
            low, high = frame.y(one.low[index]), frame.y(one.high[index])
            parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(f'<circle class="dots" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        parts.append(frame.hover(one.name, point))
    return parts


def _thinned(points: list[_Point]) -> list[_Point]:
    """At most ``_MOST_POINTS`` points: means of equal stretches."""
    if len(points) <= _MOST_POINTS:
        return points
    stretches = np.array_split(np.array(points, dtype=np.float64), _MOST_POINTS)
    return [(float(stretch[0, 0]), float(stretch[:, 1].mean())) for stretch in stretches]


def _runs(points: Sequence[_Point]) -> list[list[_Point]]:
    """Stretches of finite values."""
    runs: list[list[_Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _moving_average(run: Sequence[_Point]) -> list[_Point]:
    """Centred means over a tenth of the run; narrower at its ends."""
    half = max(1, len(run) // 20)
    values = np.array([value for _, value in run])
    return [
        (step, float(values[max(0, index - half) : index + half + 1].mean())) for index, (step, _) in enumerate(run)
    ]
