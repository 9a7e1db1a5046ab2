"""Rows from files and from the hub: what is broken is named by file, line and reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.tasks.data.rows import hub_rows, read_jsonl

FIELDS = {"question": str, "answer": str}
GOOD = b'{"question": "q", "answer": "a", "more": [1]}\n'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data.jsonl"


def test_rows_keep_their_order_and_all_their_fields(file):
    file.write_bytes(GOOD + b"\n  \n" + b'{"question": "\xc3\xa9", "answer": "b"}')
    assert read_jsonl(file, FIELDS) == [
        {"question": "q", "answer": "a", "more": [1]},
        {"question": "é", "answer": "b"},
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "q", "answer": ', "not JSON: Expecting value at column 28"),
        (b'{"question": "q", "answer": "a"} x', "not JSON: Extra data at column 34"),
        (b'{"question": "\xff", "answer": "a"}', "not UTF-8 (byte 14)"),
        (b"[1, 2]", "a list, expected an object with 'question' and 'answer'"),
        (b"null", "a NoneType, expected an object"),
        (b"{}", "no field 'question', only an empty object"),
        (b'{"question": "q", "reply": "a"}', "no field 'answer', only 'question' and 'reply'"),
        (b'{"question": "q", "answer": 3}', "field 'answer' is a int, expected str"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_row_is_named_by_file_line_and_reason(file, line, reason):
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError) as caught:
        read_jsonl(file, FIELDS)
    message = str(caught.value)
    assert message.startswith(f"{file}, line 3: ")
    assert reason in message
    assert len(message.splitlines()) == 1


def test_a_check_of_the_caller_is_reported_in_the_same_way(file):
    def check(row):
        if row["answer"] != "a":
            raise ValueError("not an a")

    file.write_bytes(GOOD + GOOD.replace(b'"a"', b'"b"'))
    with pytest.raises(ValueError, match="line 2: not an a"):
        read_jsonl(file, FIELDS, check)


def test_a_missing_file_says_what_was_expected(file):
    with pytest.raises(FileNotFoundError, match=r"no file .*data.jsonl; expected one JSON object a line"):
        read_jsonl(file, FIELDS)


def test_a_file_without_rows_is_refused(file):
    file.write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_jsonl(file, FIELDS)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_in_one_sentence(tmp_path_factory, line):
    file = tmp_path_factory.mktemp("rows") / "data.jsonl"
    file.write_bytes(GOOD + line)
    try:
        rows = read_jsonl(file, FIELDS)
    except ValueError as error:
        outcome = str(error)
    else:
        outcome = f"{file}, line none" if rows[0]["question"] == "q" else "another row"
    assert outcome.startswith(f"{file}, line ")


def test_without_network_the_message_says_what_to_do(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"'openai/gsm8k' could not be loaded.*train\.jsonl.*path="):
        hub_rows("openai/gsm8k", "main", "train")


def test_rows_of_the_hub_come_through_datasets(monkeypatch):
    import datasets

    rows = [{"question": "q", "answer": "a"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *asked, split: datasets.Dataset.from_list(rows))
    assert hub_rows("openai/gsm8k", "main", "train") == rows
