"""Differences of metrics: exact values, intervals that cover the truth, and honest widths where nothing varies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.paired import difference_of_shares
from opd_env.statistics import compare_paired

ONES = [1.0] * 6


def test_one_number_per_problem_gives_the_paired_interval() -> None:
    first, second = [0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1]
    found, paired = difference_of_shares((first, ONES), (second, ONES)), compare_paired(first, second)
    assert (found.value, found.low, found.high, found.n) == (pytest.approx(2 / 6), paired.low, paired.high, 6)


def test_sums_over_several_samples_are_shares() -> None:
    found = difference_of_shares(([1, 4, 2], [4, 4, 4]), ([2, 2, 2], [2, 2, 2]))
    assert found.value == pytest.approx(1 - 7 / 12)


def test_the_bootstrap_equals_one_written_in_plain_loops() -> None:
    top_first, bottom_first = np.array([1.0, 0, 2, 0, 3]), np.array([2.0, 1, 2, 0, 4])
    top_second, bottom_second = np.array([1.0, 1, 1, 2, 0]), np.array([1.0, 2, 1, 2, 1])
    found = difference_of_shares((top_first, bottom_first), (top_second, bottom_second), seed=3)
    rng = np.random.default_rng(3)
    values = []
    for drawn in rng.integers(5, size=(2000, 5)):
        sums = [sum(array[i] for i in drawn) for array in (top_first, bottom_first, top_second, bottom_second)]
        if sums[1] and sums[3]:
            values.append(sums[2] / sums[3] - sums[0] / sums[1])
    assert found.value == pytest.approx(5 / 7 - 6 / 9)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_two_models_without_variation_still_get_a_width() -> None:
    found = difference_of_shares(([2, 0, 1], [2, 0, 1]), ([1, 3, 0], [1, 3, 0]))
    assert found.value == 0
    assert found.low < -0.3
    assert found.high > 0.3
    assert not found.clear


def test_a_difference_that_is_the_same_everywhere_is_not_taken_for_certain() -> None:
    found = difference_of_shares(([1], [4]), ([2], [4]))
    assert found.value == 0.25
    assert found.low < 0.25 < found.high


def test_a_metric_that_one_model_never_shows_has_no_difference() -> None:
    found = difference_of_shares(([0, 0], [0, 0]), ([1, 1], [1, 2]))
    assert math.isnan(found.value)
    assert str(found) == "–"
    assert not found.clear


def test_scores_beyond_one_are_compared_too() -> None:
    found = difference_of_shares(([5.0, -5.0, 3.0], [1, 1, 1]), ([6.0, -4.5, 5.0], [1, 1, 1]))
    assert found.value == pytest.approx(3.5 / 3)
    assert 0.5 <= found.low <= found.high <= 2.0


def test_different_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="same problems"):
        difference_of_shares(([1, 1], [1, 1]), ([1], [1]))


@given(
    st.lists(
        st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda p: (min(p), max(p)))] * 2),
        min_size=1,
        max_size=12,
    )
)
def test_the_interval_holds_the_value_and_swapping_turns_it_round(rows: list[tuple[tuple[int, int], ...]]) -> None:
    first, second = (([row[s][0] for row in rows], [row[s][1] for row in rows]) for s in (0, 1))
    forth, back = difference_of_shares(first, second), difference_of_shares(second, first)
    if math.isnan(forth.value):
        assert math.isnan(back.value)
        return
    assert -1 <= forth.low <= forth.high <= 1
    assert forth.value == pytest.approx(-back.value)
    assert (forth.low, forth.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


def test_intervals_cover_the_true_difference_at_about_their_rate() -> None:
    rng = np.random.default_rng(0)
    truth = np.minimum(1, rng.beta(2, 2, size=200_000) + 0.1).mean() - 0.5
    covered = 0
    for _ in range(200):
        skill = rng.beta(2, 2, size=60)
        calls = rng.integers(0, 4, size=(2, 60))
        good = rng.binomial(calls, np.stack([skill, np.minimum(1, skill + 0.1)]))
        found = difference_of_shares((good[0], calls[0]), (good[1], calls[1]))
        covered += found.low <= truth <= found.high
    assert 0.9 <= covered / 200 <= 0.99
