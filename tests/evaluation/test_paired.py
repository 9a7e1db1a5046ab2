"""Differences of metrics: exact values, intervals that cover the truth, and honest widths where nothing varies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.evaluation.statistics import bootstrap_interval, compare_paired, difference_of_shares, sign_test

ONES = [1.0] * 6


def test_sign_test_is_the_enumerated_binomial_tail() -> None:
    for gained, lost in itertools.product(range(7), repeat=2):
        flips = gained + lost
        heads = [sum(coins) for coins in itertools.product((0, 1), repeat=flips)]
        extreme = sum(abs(count - flips / 2) >= abs(gained - flips / 2) for count in heads) / len(heads)
        assert sign_test(gained, lost) == pytest.approx(extreme)


def test_sign_test_has_known_values_and_survives_thousands_of_flips() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(10, 2) == pytest.approx(0.03857421875)
    assert 0 <= sign_test(5000, 100) < 1e-300


def test_paired_comparison_of_verdicts() -> None:
    first = [0] * 30 + [1] * 20 + [1] * 5 + [0] * 45
    second = [1] * 30 + [1] * 20 + [0] * 5 + [0] * 45
    got = compare_paired(first, second)
    assert (got.value, got.gained, got.lost, got.n) == (0.25, 30, 5, 100)
    # Bonett and Price by hand: p12 = 31/102, p21 = 6/102.
    centre = 25 / 102
    half = 1.959964 * math.sqrt((31 / 102 + 6 / 102 - centre**2) / 102)
    assert (got.low, got.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert got.p_value == sign_test(30, 5)
    assert str(got) == "+25.0 points [+13.8, +35.2], 30 gained, 5 lost, p = 2.2e-05"


def test_pairs_without_a_flip_still_have_an_interval() -> None:
    got = compare_paired([1, 0, 1, 1], [1, 0, 1, 1])
    assert got.value == 0
    assert got.low < 0 < got.high
    assert got.p_value == 1.0


def test_paired_comparison_of_averages_is_a_bootstrap_over_problems() -> None:
    first, second = [0.25, 0.5, 0.75, 0.0] * 10, [0.5, 0.5, 1.0, 0.25] * 10
    got = compare_paired(first, second)
    assert (got.low, got.high) == bootstrap_interval(np.subtract(second, first))
    assert (got.gained, got.lost) == (30, 0)


def test_pairs_of_different_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 scores"):
        compare_paired([0, 1], [1])
    with pytest.raises(ValueError, match="0 and 0 scores"):
        compare_paired([], [])


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
