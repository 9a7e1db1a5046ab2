"""Generated examples that are drawn in order, and only as far as somebody has asked.

Worked example::

    squares = Drawn(n * n for n in itertools.count())
    squares[3]      # 9: four values were drawn; squares[1] draws no more

Test it alone: ``pytest tests/tasks/data/test_drawn.py``
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Drawn(Generic[T]):
    """The values of an iterator by number. Threads may share it."""

    def __init__(self, rest: Iterator[T]) -> None:
        self._rest = rest
        self._values: list[T] = []
        self._lock = Lock()

    def __getitem__(self, index: int) -> T:
        """The value at ``index``, 0 or more.

        Raises:
            StopIteration: the iterator has fewer values.
        """
        if index >= len(self._values):
            with self._lock:
                while index >= len(self._values):
                    self._values.append(next(self._rest))
        return self._values[index]
