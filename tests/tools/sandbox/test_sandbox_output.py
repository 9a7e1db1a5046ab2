"""What a program wrote, as text: total, capped, equal from run to run."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.tools.sandbox.base import Limits, Program
from opd_env.tools.sandbox.read_back import OutputReader, clean_output, shorten


@given(st.binary(max_size=500))
def test_any_bytes_become_text_that_can_be_written_and_holds_no_control_characters(data):
    text = clean_output(data)
    text.encode("utf-8")
    assert not any(ord(char) < 32 and char not in "\t\n" for char in text)


def test_addresses_do_not_differ_from_run_to_run():
    assert clean_output(b"<object object at 0x7f3a11> at 0x12") == "<object object at 0x...> at 0x..."


def test_invalid_utf8_terminal_escapes_and_direction_marks_are_made_harmless():
    assert clean_output(b"a\xffb\x1b[31m\r\nc\xe2\x80\xae") == "a\\xffb[31m\nc"


@given(st.text(max_size=300), st.integers(8, 100))
def test_shorten_keeps_short_texts_and_marks_the_cut_of_long_ones(text, limit):
    short = shorten(text, limit)
    if len(text) <= limit:
        assert short == text
    else:
        assert "characters cut ...]" in short
        assert short.startswith(text[: limit // 2])


def test_the_reader_keeps_no_more_than_its_cap_and_says_so():
    read_end, write_end = os.pipe()
    reader = OutputReader(read_end, 10)
    os.write(write_end, b"x" * 11)
    reader.drain()
    assert reader.full
    assert reader.take() == ("x" * 10, True)
    os.write(write_end, b"y")
    os.close(write_end)
    reader.drain()
    assert reader.take() == ("y", False)
    assert reader.ended
    reader.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b", "x" * 300])
def test_file_names_with_folders_are_refused(name):
    with pytest.raises(ValueError, match="plain file name"):
        Program("", {name: b""})


def test_code_over_the_limit_is_refused_and_lone_surrogates_are_accepted():
    with pytest.raises(ValueError, match="at most 10"):
        Program("x" * 11, limits=Limits(code_bytes=10))
    assert Program("'\ud800'").source == b"'\xed\xa0\x80'"


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="wall_s"):
        Limits(wall_s=0)
