"""Splits by hash: the same in every process, about 80, 10 and 10 percent."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from opd_env.tasks.data.splits import SPLITS, split_of


@given(st.text())
def test_any_text_belongs_to_one_split(key):
    assert split_of(key) in SPLITS
    assert split_of(key) == split_of(key)


def test_published_assignments_never_change():
    assert [split_of(f"key {number}") for number in range(12)] == (
        ["train"] * 3 + ["validation", "train", "test"] + ["train"] * 5 + ["validation"]
    ), "every task that divides its data by this hash would need a new version"


def test_shares_are_eight_one_one():
    shares = Counter(split_of(str(number)) for number in range(20_000))
    assert abs(shares["train"] - 16_000) < 300
    assert abs(shares["validation"] - 2_000) < 200
    assert abs(shares["test"] - 2_000) < 200
