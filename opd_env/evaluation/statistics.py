"""Uncertainty of what an evaluation reports: rates with intervals, pass@k, and differences on the same problems.

The independent unit is the *problem*: k episodes of one problem, and the tool calls inside one episode,
resemble each other, so an interval that counted them one by one would be too narrow. Worked example::

    rate([1, 0, 1, 1])                           # one episode per problem: Wilson interval, n = 4
    rate([3, 0, 4, 1], [4, 4, 4, 4])             # four episodes per problem: bootstrap over problems, n = 4
    pass_at_k(episodes=4, correct=1, k=2)        # 0.5
    compare_paired([0, 1, 0], [1, 1, 1])         # difference 0.67, two problems gained, none lost, p = 0.5
    difference_of_shares(([1, 0], [2, 0]), ([3, 1], [3, 1]))       # calls: some problems have none

Test it alone: ``pytest tests/evaluation/test_statistics.py tests/evaluation/test_paired.py``
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
_CELLS_AT_ONCE = 2_000_000
"""Bootstrap indices held in memory at once (16 MB)."""


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval. ``str()`` gives ``84.0 % [79.1, 88.0]``."""

    value: float
    """NaN when nothing was observed."""
    low: float
    high: float
    n: int
    """Problems that the value rests on (not episodes, not calls)."""

    def __str__(self) -> str:
        if self.n == 0:
            return "–"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def overlaps(self, other: Rate) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high

    def to_json(self) -> dict[str, Any]:
        """JSON values; NaN becomes null."""
        if self.n == 0:
            return {"value": None, "low": None, "high": None, "n": 0}
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Rate:
        """The inverse of ``to_json``."""
        return cls(entry["value"], entry["low"], entry["high"], entry["n"]) if entry["n"] else NO_RATE


NO_RATE = Rate(math.nan, math.nan, math.nan, 0)
"""Nothing was observed."""


def wilson(successes: int, n: int) -> Rate:
    """A share of independent yes-or-no trials with its Wilson score interval.

    Never leaves [0, 1] and keeps a width at 0 and at n successes, where the normal interval has none.
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), p. 209.

    Raises:
        ValueError: ``successes`` is not in 0 … n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials; expected 0 <= successes <= trials")
    if n == 0:
        return NO_RATE
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The two ends are exact; only rounding could put them a hair beyond the share itself.
    return Rate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)


def rate(successes: ArrayLike, trials: ArrayLike | None = None, *, seed: int = 0) -> Rate:
    """The pooled share ``sum(successes) / sum(trials)`` with an interval that is clustered by problem.

    The interval is a percentile bootstrap that draws whole problems. Where the trials of each problem agree, one
    trial per problem would say as much: then it is the Wilson interval of the problems, which also keeps a width
    when all are 0 or all are 1 (the bootstrap would have none).

    Args:
        successes: one number per problem, shape ``[problems]``: successful trials, or any sum of scores in
            0 … ``trials``.
        trials: trials per problem, same shape; None means one each. Problems without a trial are left out.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the shapes differ or a success count lies outside 0 … trials.
    """
    successes_P = np.asarray(successes, dtype=np.float64).reshape(-1)
    trials_P = np.ones_like(successes_P) if trials is None else np.asarray(trials, dtype=np.float64).reshape(-1)
    if successes_P.shape != trials_P.shape:
        raise ValueError(
            f"{len(successes_P)} success counts but {len(trials_P)} trial counts; expected one per problem"
        )
    bad = ~((successes_P >= 0) & (successes_P <= trials_P))
    if bad.any():
        problem = int(np.argmax(bad))
        raise ValueError(f"problem {problem}: {successes_P[problem]} successes of {trials_P[problem]} trials")
    seen = trials_P > 0
    successes_P, trials_P = successes_P[seen], trials_P[seen]
    problems = len(successes_P)
    if problems == 0:
        return NO_RATE
    value = float(successes_P.sum() / trials_P.sum())
    agreed = bool(((successes_P == 0) | (successes_P == trials_P)).all() and (trials_P == trials_P[0]).all())
    if agreed or value in (0.0, 1.0):
        edge = wilson(round(value * problems), problems)
        return Rate(value, edge.low, edge.high, problems)
    low, high = bootstrap_interval(successes_P, trials_P, seed=seed)
    return Rate(value, low, high, problems)


def standard_error(numerators: ArrayLike, denominators: ArrayLike) -> float:
    """Standard error of ``sum(numerators) / sum(denominators)``, clustered by problem; NaN for fewer than two problems.

    Linearised as in W. Cochran, Sampling Techniques (1977), equation 6.13; for one trial per problem it is the sample
    standard deviation over the square root of n.
    """
    numerators_P, denominators_P = (np.asarray(part, dtype=np.float64) for part in (numerators, denominators))
    n, total = int((denominators_P > 0).sum()), float(denominators_P.sum())
    if n < 2:
        return math.nan
    residual_P = numerators_P - numerators_P.sum() / total * denominators_P
    return math.sqrt(n / (n - 1) * float((residual_P**2).sum())) / total


def bootstrap_interval(
    numerators: ArrayLike, denominators: ArrayLike | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of ``sum(numerators) / sum(denominators)``, problems drawn with replacement.

    Args:
        numerators: one number per problem, shape ``[problems]``, at least one problem.
        denominators: positive, same shape; None means 1 each (the interval of a mean).
        seed: seed of the draws: same numbers, same interval.

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    numerators_P = np.asarray(numerators, dtype=np.float64)
    denominators_P = np.ones_like(numerators_P) if denominators is None else np.asarray(denominators, dtype=np.float64)
    drawn = draws(len(numerators_P), seed)
    return percentiles([numerators_P[drawn_RP].sum(1) / denominators_P[drawn_RP].sum(1) for drawn_RP in drawn])


def draws(problems: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """``RESAMPLES`` draws of as many problems as there are, in blocks of shape ``[resamples, problems]``."""
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS_AT_ONCE // problems)
    for start in range(0, RESAMPLES, block):
        yield rng.integers(problems, size=(min(block, RESAMPLES - start), problems))


def percentiles(blocks: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Ends of the middle 95 %; a resample in which the value is undefined (NaN) is left out."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(np.concatenate(blocks), [tail, 1 - tail])
    return float(low), float(high)


def pass_at_k(episodes: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k episodes is correct.

    ``1 − C(n − c, k) / C(n, k)``; NaN when there are fewer than k episodes to estimate it from.
    Source: M. Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374, equation 1.

    Raises:
        ValueError: ``k < 1`` or ``correct`` is not in 0 … episodes.
    """
    if k < 1 or not 0 <= correct <= episodes:
        raise ValueError(
            f"pass@{k} of {correct} correct among {episodes}; expected k >= 1 and 0 <= correct <= episodes"
        )
    if episodes < k:
        return math.nan
    return 1 - math.comb(episodes - correct, k) / math.comb(episodes, k)


def majority_at_k(answers: Mapping[str | None, tuple[int, int]], k: int) -> float:
    """Chance that the answer which most of k episodes gave is correct.

    The mean over all ``C(n, k)`` choices of k among the problem's n episodes, ties broken by a fair draw; NaN when
    there are fewer than k. An episode without an answer (None) does not vote, and without any vote the problem
    counts as wrong. Source of the vote: X. Wang et al., Self-Consistency, arXiv 2203.11171.

    Args:
        answers: per extracted answer, the episodes that gave it and how many of those were graded correct.
        k: episodes that vote, at least 1.

    Raises:
        ValueError: ``k < 1``.
    """
    if k < 1:
        raise ValueError(f"majority@{k}; expected k >= 1")
    episodes = sum(given for given, _ in answers.values())
    if episodes < k:
        return math.nan
    silent = answers.get(None, (0, 0))[0]
    voted = {answer: counts for answer, counts in answers.items() if answer is not None}
    wins = 0.0
    for winner, (given, correct) in voted.items():
        if correct == 0:
            continue
        others = [counts[0] for answer, counts in voted.items() if answer != winner]
        for votes in range(1, min(given, k) + 1):
            shares = _wins_against(others, silent, votes, k - votes)
            wins += correct / given * math.comb(given, votes) * shares
    return wins / math.comb(episodes, k)


def _wins_against(others: Sequence[int], silent: int, votes: int, rest: int) -> float:
    """Ways to choose ``rest`` further episodes so that no other answer has more than ``votes``, a tie among t for 1/t.

    ``ways[chosen, ties]`` grows by one answer at a time: the coefficients of a generating polynomial.
    """
    ways: dict[tuple[int, int], int] = {(0, 0): 1}
    for given in others:
        grown: dict[tuple[int, int], int] = {}
        for (chosen, ties), count in ways.items():
            for more in range(min(given, votes, rest - chosen) + 1):
                key = chosen + more, ties + (more == votes)
                grown[key] = grown.get(key, 0) + count * math.comb(given, more)
        ways = grown
    return sum(count * math.comb(silent, rest - chosen) / (ties + 1) for (chosen, ties), count in ways.items())


@dataclass(frozen=True)
class Difference:
    """A metric of the second model minus that of the first, with its 95 % interval."""

    value: float
    """NaN when one of the two was not observed."""
    low: float
    high: float
    n: int
    """Problems that say something about the metric for either model."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class PairedDifference(Difference):
    """The same of a score, of which every problem has one for each model."""

    gained: int
    """Problems on which the second scores higher."""
    lost: int
    """Problems on which the first scores higher."""
    p_value: float
    """Two-sided exact sign test; McNemar's exact test when every score is 0 or 1."""

    def __str__(self) -> str:
        return (
            f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}],"
            f" {self.gained} gained, {self.lost} lost, p = {self.p_value:.2g}"
        )


def compare_paired(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> PairedDifference:
    """Compares two models problem by problem, which is sharper than comparing two intervals.

    The interval of yes-or-no scores is Bonett and Price's (one gained and one lost problem are added, so
    that it keeps a width without flips; J. Educ. Behav. Stat. 37 (2012), p. 479), and so it is where all problems
    differ alike; of any other scores, a bootstrap over problems.

    Args:
        first: one score in 0 … 1 per problem; the mean over its episodes when there are several.
        second: the same problems in the same order.
        seed: seed of the bootstrap.

    Raises:
        ValueError: different lengths, or no problem.
    """
    first_P, second_P = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first_P.shape != second_P.shape or not len(first_P):
        raise ValueError(
            f"{len(first_P)} and {len(second_P)} scores; a paired comparison needs one of each per problem"
        )
    difference_P = second_P - first_P
    n = len(difference_P)
    gained, lost = int((difference_P > 0).sum()), int((difference_P < 0).sum())
    if np.isin(difference_P, (-1, 0, 1)).all() or np.ptp(difference_P) == 0:
        padded = np.append(difference_P, (1.0, -1.0))
        half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * float(padded.std()) / math.sqrt(n + 2)
        centre = float(padded.mean())
        low, high = max(-1.0, centre - half), min(1.0, centre + half)
    else:
        low, high = bootstrap_interval(difference_P, seed=seed)
    return PairedDifference(float(difference_P.mean()), low, high, n, gained, lost, sign_test(gained, lost))


def sign_test(gained: int, lost: int) -> float:
    """Exact p-value that gains and losses are equally likely: ``2 P(X ≤ min)``, X ~ Binomial(both, ½)."""
    flips = gained + lost
    tail = sum(math.comb(flips, i) for i in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**flips))


def difference_of_shares(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike], *, seed: int = 0
) -> Difference:
    """Difference of two pooled shares ``sum(numerators) / sum(denominators)`` on the same problems.

    Where every problem has one number for each model, the interval is that of ``compare_paired``. Otherwise (calls,
    of which a problem may have several or none) it is a paired bootstrap: a problem is drawn with both models' sums.
    Where one model has no variation to draw from (all 0 or all 1), a bootstrap would take it for certain; then the
    two models' own intervals are combined, as if unpaired, by the method of G. Zou and A. Donner (Stat. Med. 27
    (2008), p. 1693, equation 1), which is wider than needed rather than too narrow.

    Args:
        first: numerators and denominators of the first model, one of each per problem, both of shape ``[problems]``.
        second: those of the second, the same problems in the same order.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the shapes differ.
    """
    arrays = [np.asarray(part, dtype=np.float64).reshape(-1) for side in (first, second) for part in side]
    if len({array.shape for array in arrays}) != 1:
        raise ValueError(f"shapes {[array.shape for array in arrays]}; a paired comparison needs the same problems")
    seen = (arrays[1] > 0) | (arrays[3] > 0)
    top_first, bottom_first, top_second, bottom_second = (array[seen] for array in arrays)
    n = int(seen.sum())
    if not bottom_first.any() or not bottom_second.any():
        return Difference(math.nan, math.nan, math.nan, n)
    value = float(top_second.sum() / bottom_second.sum() - top_first.sum() / bottom_first.sum())
    if all((bottom == bottom[0]).all() for bottom in (bottom_first, bottom_second)):
        paired = compare_paired(top_first / bottom_first, top_second / bottom_second, seed=seed)
        return Difference(value, paired.low, paired.high, n)
    if any((top == 0).all() or (top == bottom).all() for top, bottom in (
        (top_first, bottom_first), (top_second, bottom_second),
    )):  # fmt: skip
        one, two = rate(top_first, bottom_first, seed=seed), rate(top_second, bottom_second, seed=seed)
        below = math.hypot(two.value - two.low, one.high - one.value)
        above = math.hypot(two.high - two.value, one.value - one.low)
        return Difference(value, max(-1.0, value - below), min(1.0, value + above), n)
    with np.errstate(invalid="ignore"):
        low, high = percentiles(
            [
                top_second[drawn].sum(1) / bottom_second[drawn].sum(1)
                - top_first[drawn].sum(1) / bottom_first[drawn].sum(1)
                for drawn in draws(n, seed)
            ]
        )
    return Difference(value, low, high, n)
