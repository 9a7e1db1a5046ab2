"""Intervals and tests against published values, enumeration and simulation."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.evaluation.statistics import (
    NO_RATE,
    Rate,
    bootstrap_interval,
    majority_at_k,
    pass_at_k,
    rate,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    got = wilson(successes, n)
    assert got.value == successes / n
    assert (round(got.low, 4), round(got.high, 4)) == (low, high)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_value_and_mirrors(counts: tuple[int, int]) -> None:
    successes, n = counts
    got = wilson(successes, n)
    if n == 0:
        assert got is NO_RATE
        return
    mirrored = wilson(n - successes, n)
    assert 0 <= got.low <= got.value <= got.high <= 1
    assert got.high - got.low > 0
    assert got.low == pytest.approx(1 - mirrored.high, abs=1e-12)


def test_wilson_ends_solve_the_score_equation() -> None:
    for end in (wilson(7, 30).low, wilson(7, 30).high):
        assert abs(7 / 30 - end) / math.sqrt(end * (1 - end) / 30) == pytest.approx(1.959964, abs=1e-5)


def test_impossible_counts_are_refused_with_the_values() -> None:
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        wilson(5, 4)
    with pytest.raises(ValueError, match=r"problem 1: 3\.0 successes of 2\.0 trials"):
        rate([1, 3], [2, 2])
    with pytest.raises(ValueError, match="problem 0"):
        rate([math.nan])
    with pytest.raises(ValueError, match="2 success counts but 1 trial counts"):
        rate([1, 1], [1])


def test_one_episode_per_problem_is_wilson() -> None:
    assert rate([1, 0, 1, 1, 0]) == wilson(3, 5)
    assert rate([True, False]) == wilson(1, 2)


def test_a_rate_pools_trials_and_counts_problems() -> None:
    got = rate([1, 6, 0], [1, 8, 0])
    assert got.value == 7 / 9
    assert got.n == 2  # the problem without a trial says nothing


def test_nothing_observed_is_nan_and_prints_a_dash() -> None:
    got = rate([0, 0], [0, 0])
    assert got.n == 0
    assert math.isnan(got.value)
    assert str(got) == "–"
    assert rate([]) is NO_RATE


def test_rate_prints_percent_with_its_interval() -> None:
    assert str(Rate(0.84, 0.7905, 0.88, 200)) == "84.0 % [79.0, 88.0]"


def test_intervals_overlap_when_they_share_a_point() -> None:
    assert Rate(0.5, 0.4, 0.6, 9).overlaps(Rate(0.7, 0.6, 0.8, 9))
    assert not Rate(0.5, 0.4, 0.6, 9).overlaps(Rate(0.7, 0.61, 0.8, 9))


def test_bootstrap_has_the_quantiles_of_full_enumeration() -> None:
    successes, trials = np.array([0.0, 1, 3, 4, 2]), np.array([4.0, 2, 4, 4, 3])
    every = sorted(
        successes[list(drawn)].sum() / trials[list(drawn)].sum() for drawn in itertools.product(range(5), repeat=5)
    )
    low, high = bootstrap_interval(successes, trials)
    expected_low, expected_high = np.quantile(every, [0.025, 0.975])
    assert low == pytest.approx(expected_low, abs=0.03)
    assert high == pytest.approx(expected_high, abs=0.03)


def test_bootstrap_is_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.linspace(0, 1, 40)
    whole = bootstrap_interval(scores, seed=3)
    monkeypatch.setattr("opd_env.evaluation.statistics._CELLS_AT_ONCE", 40)
    assert bootstrap_interval(scores, seed=3) == whole
    assert bootstrap_interval(scores, seed=4) != whole


def test_clustering_widens_the_interval_of_correlated_episodes() -> None:
    solved = np.append(np.repeat([8, 0], 50), 4)  # 101 problems whose 8 episodes all but always agree
    clustered = rate(solved, np.full(101, 8))
    naive = wilson(404, 808)
    by_problem = wilson(50, 101)
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)
    assert clustered.high - clustered.low == pytest.approx(by_problem.high - by_problem.low, abs=0.02)


def test_episodes_that_agree_are_worth_one_each() -> None:
    assert rate([4, 0, 4], [4, 4, 4]) == wilson(2, 3)
    assert rate([4, 0, 2], [4, 4, 2]) != wilson(2, 3)  # unequal weights: a pooled share is not theirs


@pytest.mark.parametrize("solved", [0, 4])
def test_all_or_nothing_keeps_a_width(solved: int) -> None:
    got = rate([solved] * 25, [4] * 25)
    expected = wilson(25 if solved else 0, 25)
    assert got == expected
    assert got.high - got.low > 0.1


def test_the_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        chance = rng.beta(2, 2, size=60)  # problems differ in how hard they are; mean 0.5
        got = rate(rng.binomial(4, chance), np.full(60, 4), seed=trial)
        covered += got.low <= 0.5 <= got.high
    assert 0.90 <= covered / 300 <= 0.99


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_episode(counts: tuple[int, int, int]) -> None:
    n, correct, k = counts
    outcomes = [True] * correct + [False] * (n - correct)
    subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
    assert pass_at_k(n, correct, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_nan_without_enough_episodes_and_refuses_nonsense() -> None:
    assert math.isnan(pass_at_k(3, 3, 4))
    assert pass_at_k(100_000, 1, 10) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="k >= 1"):
        pass_at_k(3, 1, 0)
    with pytest.raises(ValueError, match="4 correct among 3"):
        pass_at_k(3, 4, 1)


def test_importing_statistics_pulls_in_no_heavy_library() -> None:
    code = "import sys, opd_env.evaluation.statistics; print({'torch', 'pyarrow', 'matplotlib'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


ANSWERS = st.dictionaries(
    st.sampled_from([None, "a", "b", "c"]),
    st.tuples(st.integers(1, 3), st.integers(0, 3)).map(lambda pair: (pair[0], min(pair))),
    min_size=1,
)


@given(ANSWERS, st.integers(1, 6))
def test_majority_equals_the_vote_of_every_subset(answers: dict[str | None, tuple[int, int]], k: int) -> None:
    episodes = [(answer, i < right) for answer, (given_, right) in answers.items() for i in range(given_)]
    if len(episodes) < k:
        assert math.isnan(majority_at_k(answers, k))
        return
    outcomes = []
    for chosen in itertools.combinations(episodes, k):
        votes = Counter(answer for answer, _ in chosen if answer is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        shares = [answers[answer][1] / answers[answer][0] for answer in winners]
        outcomes.append(sum(shares) / len(shares) if shares else 0.0)
    assert majority_at_k(answers, k) == pytest.approx(sum(outcomes) / len(outcomes))


def test_majority_of_one_is_the_share_of_correct_episodes() -> None:
    assert majority_at_k({"a": (2, 2), "b": (1, 0), None: (1, 0)}, 1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k >= 1"):
        majority_at_k({}, 0)
