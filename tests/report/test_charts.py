"""Charts are well-formed SVG whose marks stand where the values are."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.report.charts import Series, line_chart, nice_ticks, short_number

values = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


def points(svg: str, css: str = "line") -> list[tuple[float, float]]:
    corners = re.search(rf'<polyline class="{css}" points="([^"]+)"', svg)
    assert corners is not None
    return [tuple(map(float, pair.split(","))) for pair in corners[1].split()]  # type: ignore[misc]


@given(
    st.lists(st.one_of(values, st.just(math.nan)), min_size=1, max_size=60).filter(
        lambda v: not all(map(math.isnan, v))
    )
)
def test_any_values_give_well_formed_svg_inside_its_frame(numbers: list[float]) -> None:
    svg = line_chart([Series("loss", list(range(len(numbers))), numbers)])
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        for name in ("x1", "x2", "cx"):
            assert 0 <= float(element.attrib.get(name, 0)) <= width
        for name in ("y1", "y2", "cy"):
            assert 0 <= float(element.attrib.get(name, 0)) <= height


def test_higher_values_stand_higher_and_later_steps_further_right() -> None:
    drawn = points(line_chart([Series("kl", [1, 2, 4], [0.0, 1.0, 3.0])]))
    assert drawn[0][0] < drawn[1][0] < drawn[2][0]
    assert drawn[0][1] > drawn[1][1] > drawn[2][1]
    assert (drawn[2][0] - drawn[1][0]) == pytest.approx(2 * (drawn[1][0] - drawn[0][0]), abs=0.2)


def test_percent_charts_share_one_axis_unless_all_values_are_small() -> None:
    large, other = (points(line_chart([Series("a", [1, 2], [0.5, top])], percent=True)) for top in (0.6, 1.0))
    assert large[0] == other[0]
    assert "100 %" in line_chart([Series("a", [1], [0.5])], percent=True)
    assert "100 %" not in line_chart([Series("a", [1], [0.02])], percent=True)


def test_a_gap_interrupts_the_line_and_a_lone_value_is_a_dot() -> None:
    svg = line_chart([Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 3.0, math.nan])])
    assert svg.count("<polyline") == 1
    assert svg.count('class="line dot"') == 1
    assert svg.count("<title>") == 3


def test_long_series_are_smoothed_and_thinned() -> None:
    steps = list(range(5000))
    svg = line_chart([Series("a", steps, [float(step % 2) for step in steps])])
    assert len(points(svg, "raw")) == 400
    smoothed = [y for _, y in points(svg)]
    assert max(smoothed[5:-5]) - min(smoothed[5:-5]) < 0.1 * 124  # the saw-tooth is averaged away
    assert len(svg) < 60_000


def test_dots_have_whiskers_and_the_reference_a_label() -> None:
    dots = Series("held-out", [0, 10], [0.4, 0.9], [0.3, 0.8], [0.5, 1.0], dots=True)
    svg = line_chart([dots], reference=("teacher", 0.95), percent=True)
    assert svg.count('class="whisker"') == 2
    assert svg.count('class="dots"') == 2
    assert ">teacher</text>" in svg
    assert "held-out, step 10: 90.0 %" in svg


def test_names_are_escaped() -> None:
    svg = line_chart([Series('<b onload="x">', [1], [1.0])], reference=("<i>", 1.0))
    assert "<b" not in svg
    assert "<i>" not in svg
    ElementTree.fromstring(svg)


@given(values, values)
def test_ticks_are_few_and_hold_the_range(first: float, second: float) -> None:
    low, high = sorted((first, second))
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert 2 <= len(ticks) <= 4
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0345, "0.0345"), (2e-5, "2e-5"), (1234, "1,234"), (45678, "46k"), (3.2e7, "3.2e7"), (-2.5, "-2.5")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text
