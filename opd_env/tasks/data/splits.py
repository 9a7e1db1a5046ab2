"""Which split something belongs to, decided by a hash of its text.

The same text always lands in the same split, whatever the seed, the order or the amount of data, so nothing
of one split can turn up in another::

    split_of("Velmora")   # 'train', 'validation' or 'test', the same in every process

Test it alone: ``pytest tests/tasks/data/test_splits.py``
"""

from __future__ import annotations

import hashlib

SPLITS = ("train", "validation", "test")


def split_of(key: str) -> str:
    """The split of ``key``: about eight of ten keys are for training, one for validation, one for testing."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return ("test", "validation")[bucket] if bucket < 2 else "train"
