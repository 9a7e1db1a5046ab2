"""Two models that played the same problems: their difference with its interval, and a test.

Worked example::

    compare_paired([0, 1, 0], [1, 1, 1])         # difference 0.67, two problems gained, none lost, p = 0.5
    difference_of_shares(([0, 1, 0], [1, 1, 1]), ([1, 1, 1], [1, 1, 1]))      # +66.7 points and an interval
    difference_of_shares(([1, 0], [2, 0]), ([3, 1], [3, 1]))                  # calls: some problems have none

Test it alone: ``pytest tests/evaluation/test_paired.py``
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from opd_env.evaluation.statistics import CONFIDENCE, bootstrap_interval, draws, percentiles, rate


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same problems."""

    difference: float
    """Mean score of the second minus the first."""
    low: float
    high: float
    n: int
    """Problems."""
    gained: int
    """Problems on which the second scores higher."""
    lost: int
    """Problems on which the first scores higher."""
    p_value: float
    """Two-sided exact sign test; McNemar's exact test when every score is 0 or 1."""

    def __str__(self) -> str:
        return (
            f"{100 * self.difference:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}],"
            f" {self.gained} gained, {self.lost} lost, p = {self.p_value:.2g}"
        )


def compare_paired(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> PairedComparison:
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
    return PairedComparison(float(difference_P.mean()), low, high, n, gained, lost, sign_test(gained, lost))


def sign_test(gained: int, lost: int) -> float:
    """Exact p-value that gains and losses are equally likely: ``2 P(X ≤ min)``, X ~ Binomial(both, ½)."""
    flips = gained + lost
    tail = sum(math.comb(flips, i) for i in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**flips))


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
