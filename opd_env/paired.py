"""The difference of any metric between two models that played the same problems, with its interval.

Worked example::

    difference_of_shares(([0, 1, 0], [1, 1, 1]), ([1, 1, 1], [1, 1, 1]))      # +66.7 points and an interval
    difference_of_shares(([1, 0], [2, 0]), ([3, 1], [3, 1]))                  # calls: some problems have none

Yes-or-no scores have a test of their own as well, ``opd_env.statistics.compare_paired``.

Test it alone: ``pytest tests/core/test_paired.py``
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from opd_env.statistics import compare_paired, draws, percentiles, rate


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
