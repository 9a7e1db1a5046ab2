"""The order of problems: an endless row of shuffled passes, known by its seed alone.

Because the problem at any place can be computed, a run that continues needs no record of what it has seen::

    [problem_at(place, size=3, seed=0) for place in range(6)]     # every problem once, then every problem again

Test it alone: ``pytest tests/trainer/test_order.py``
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def problem_at(place: int, size: int, seed: int) -> int:
    """Index of the problem at ``place`` (from 0) of the endless order of ``size`` problems."""
    epoch, offset = divmod(place, size)
    return int(_epoch(size, seed, epoch)[offset])


@lru_cache(maxsize=4)
def _epoch(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)
