"""Which tokens of two tokenizers stand for the same stretch of text.

Worked example, one turn cut by two tokenizers::

    student  ["The", " answer", " is", " 4", "2", "."]
    teacher  ["The", " ans", "wer is", " 42", "."]
    spans     0      1         1        2     2    3          boundaries that both have: 3, 13, 16, 17

A span ends where both have a boundary: it is the smallest stretch whose probability both models give
as a product of their tokens' probabilities.

Test it alone: ``pytest tests/trainer/teachers/test_spans.py``
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_env.formats.token_text import Decoded


class Aligned(NamedTuple):
    """Spans of one text, numbered from 0 in order."""

    student_N: NDArray[np.int64]
    """Span of each of the student's tokens; never falls."""
    teacher_M: NDArray[np.int64]
    """Span of each of the teacher's tokens; never falls."""
    num_spans: int


def align(student: Decoded, teacher: Decoded) -> Aligned:
    """Spans of a text of at least one token each.

    Args:
        student: a turn as the student's tokens.
        teacher: the same text as the teacher's tokens. A tokenizer may put a space before it; one that changes it
            otherwise (by normalising Unicode, say) makes the whole turn one span.
    """
    ends_N, ends_M = _ends(student), _ends(teacher)
    shift = len(teacher.text) - len(student.text)
    if not teacher.text.endswith(student.text) or teacher.text[:shift].strip():
        return Aligned(np.zeros_like(ends_N), np.zeros_like(ends_M), 1)
    ends_M = np.maximum(ends_M - _WIDEST * shift, 0)
    shared = np.intersect1d(ends_N, ends_M)
    shared = shared[shared > 0]
    return Aligned(np.searchsorted(shared, ends_N), np.searchsorted(shared, ends_M), len(shared))


_WIDEST = 4
"""Bytes of the widest character."""


def _ends(decoded: Decoded) -> NDArray[np.int64]:
    """Where each token ends: the character, times 4, plus the byte within it. A byte that is not UTF-8 is a character
    of one byte here and U+FFFD, of three, in the teacher's text; so bytes alone would not match."""
    stops = decoded.byte_of_token[1:]
    chars = np.searchsorted(decoded.byte_of_char, stops, side="right") - 1
    return _WIDEST * chars + stops - decoded.byte_of_char[chars]
