"""Values drawn on demand: the same whatever the order or the number of threads, and no further than asked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from opd_env.tasks.data.splits import Drawn


def test_values_are_drawn_in_order_and_no_further_than_asked():
    numbers = count()
    drawn = Drawn(n * n for n in numbers)
    assert [drawn[index] for index in (3, 0, 3, 1)] == [9, 0, 9, 1]
    assert next(numbers) == 4


def test_threads_that_ask_at_once_get_the_same_values():
    drawn = Drawn(iter(range(1_000)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(drawn.__getitem__, [*range(1_000)] * 2)) == [*range(1_000)] * 2


def test_an_end_is_not_passed_over():
    with pytest.raises(StopIteration):
        Drawn(iter("ab"))[2]
