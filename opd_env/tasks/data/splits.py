"""Which split something belongs to, decided by a hash of its text; and lists that are drawn when they are needed.

The same text always lands in the same split, whatever the seed, the order or the amount of data, so nothing
of one split can turn up in another::

    split_of("Velmora")   # 'train', 'validation' or 'test', the same in every process

Test it alone: ``pytest tests/tasks/data/test_splits.py``
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from threading import Lock
from typing import Generic, TypeVar

SPLITS = ("train", "validation", "test")


def split_of(key: str) -> str:
    """The split of ``key``: about eight of ten keys are for training, one for validation, one for testing."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return ("test", "validation")[bucket] if bucket < 2 else "train"


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
