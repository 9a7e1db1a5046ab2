"""Which tokens of two tokenizers stand for the same stretch of text.

Worked example, one turn cut by two tokenizers::

    student  ["The", " answer", " is", " 4", "2", "."]
    teacher  ["The", " ans", "wer is", " 42", "."]
    spans     0      1         1        2     2    3          boundaries that both have: 3, 13, 16, 17

A span ends where both have a boundary between characters: it is the smallest stretch whose probability both models give
as a product of their tokens' probabilities.

Test it alone: ``pytest tests/trainer/test_spans.py``
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
    count: int


def align(student: Decoded, teacher: Decoded) -> Aligned:
    """Spans of a text of at least one token each.

    Args:
        student: a turn as the student's tokens.
        teacher: the same text as the teacher's tokens. A tokenizer may put a space before it; one that changes it
            otherwise (by normalising Unicode, say) makes the whole turn one span.
    """
    shift = len(teacher.text) - len(student.text) if teacher.text.endswith(student.text) else None
    if shift is None or teacher.text[:shift].strip():
        zeros = (np.zeros(len(one.byte_of_token) - 1, dtype=np.int64) for one in (student, teacher))
        return Aligned(*zeros, count=1)
    ends_N, exact_N = _ends(student)
    ends_M, exact_M = _ends(teacher)
    ends_M = np.maximum(ends_M - shift, 0)
    shared = np.intersect1d(ends_N[exact_N], ends_M[exact_M])
    shared = np.union1d(shared[shared > 0], [len(student.text)])  # the end is a boundary of both, whatever precedes it
    return Aligned(np.searchsorted(shared, ends_N), np.searchsorted(shared, ends_M), len(shared))


def _ends(decoded: Decoded) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each token the character after its last one, and whether the token ends just before it, not within."""
    stops = decoded.byte_of_token[1:]
    ends = np.searchsorted(decoded.byte_of_char, stops)
    return ends, decoded.byte_of_char[ends] == stops
