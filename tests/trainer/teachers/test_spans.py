"""Spans of two tokenizers over one text: exact by hand, and by brute force over the bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opd_env.formats import get_format
from opd_env.formats.token_text import Decoded
from opd_env.trainer.teachers.cross_tokenizer import align
from tests.formats.families import family_tokenizer
from tests.tiny import tiny_tokenizer

BYTE_LEVEL = get_format(tiny_tokenizer())
OTHERS = [get_format(family_tokenizer(name)) for name in ("Gemma 3", "Mistral 0.3", "Llama 3", "Llama 2 tokenizer")]


def decoded(*tokens: str) -> Decoded:
    return Decoded([token.encode() for token in tokens])


def test_spans_end_where_both_have_a_boundary():
    student = decoded("The", " answer", " is", " 4", "2", ".")
    teacher = decoded("The", " ans", "wer is", " 42", ".")
    aligned = align(student, teacher)
    assert aligned.student_N.tolist() == [0, 1, 1, 2, 2, 3]
    assert aligned.teacher_M.tolist() == [0, 1, 1, 2, 3]
    assert aligned.num_spans == 4


def test_equal_tokens_are_spans_of_their_own():
    tokens = decoded("a", "b c", "d")
    aligned = align(tokens, tokens)
    assert aligned.student_N.tolist() == aligned.teacher_M.tolist() == [0, 1, 2]


def test_a_space_that_the_teacher_puts_before_the_text_joins_the_first_span():
    aligned = align(decoded("a", "b"), decoded(" ", "a", "b"))
    assert aligned.student_N.tolist() == [0, 1]
    assert aligned.teacher_M.tolist() == [0, 0, 1]


def test_a_boundary_within_a_character_counts_if_both_have_it():
    halves = Decoded([b"\xc3", b"\xa9", b"!"])
    aligned = align(halves, decoded("é", "!"))
    assert aligned.student_N.tolist() == [0, 0, 1]
    assert aligned.teacher_M.tolist() == [0, 1]
    assert align(halves, halves).student_N.tolist() == [0, 1, 2]


def test_bytes_that_are_not_utf_8_are_matched_as_characters():
    broken = Decoded([b"a", b"\xff", b"b"])
    aligned = align(broken, decoded("a", "\ufffd", "b"))
    assert aligned.student_N.tolist() == aligned.teacher_M.tolist() == [0, 1, 2]


def test_a_text_that_the_teacher_changes_is_one_span():
    aligned = align(decoded("e\u0301", "!"), decoded("é", "!"))
    assert aligned == (aligned.student_N, aligned.teacher_M, 1)
    assert aligned.student_N.tolist() == aligned.teacher_M.tolist() == [0, 0]


@given(st.lists(st.text(max_size=6), min_size=1, max_size=8).filter(any), st.sampled_from(OTHERS))
def test_both_sides_of_a_span_write_the_same_text(words, other):
    text = " ".join(words).encode("utf-8", "replace").decode()
    if not text:
        return
    student = BYTE_LEVEL.decoded(BYTE_LEVEL.render_turn(text)[:-1])
    teacher = other.decoded(other.render_turn(text)[:-1])
    aligned = align(student, teacher)
    assert sorted(set(aligned.student_N)) == sorted(set(aligned.teacher_M)) == list(range(aligned.num_spans))
    assert (np.diff(aligned.student_N) >= 0).all()
    assert (np.diff(aligned.teacher_M) >= 0).all()
    shift = len(teacher.text) - len(student.text)
    if not teacher.text.endswith(student.text):
        assert aligned.num_spans == 1
        return
    added = len(teacher.text[:shift].encode())
    for span in range(aligned.num_spans):
        ours, theirs = text_of(student, aligned.student_N, span), text_of(teacher, aligned.teacher_M, span)
        assert ours == (theirs[added:] if span == 0 else theirs)
    shared = set(student.byte_of_token.tolist()) & {at - added for at in teacher.byte_of_token.tolist()}
    assert aligned.num_spans == len({at for at in shared if at > 0})  # as fine as can be


def text_of(one: Decoded, spans, span: int) -> bytes:
    data = one.text.encode()
    members = np.flatnonzero(spans == span)
    return data[one.byte_of_token[members[0]] : one.byte_of_token[members[-1] + 1]]
