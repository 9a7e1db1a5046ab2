"""The Hermes parser: what is a call and what is not. The rules that all syntaxes share are in test_parse_all.py."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.formats.hermes import parse_hermes
from opd_env.tools import ToolErrorKind


def block(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(st.text(), st.text(min_size=1), st.dictionaries(st.text(), json_values, max_size=4), st.booleans())
def test_what_was_written_is_read(before: str, name: str, arguments: dict[str, object], ascii_only: bool) -> None:
    before = before.replace("<", "(")
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
    try:
        body.encode()
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        assert parse_hermes(block(body)).calls[0].error is ToolErrorKind.INVALID_JSON
        return
    turn = parse_hermes(before + block(body))
    assert turn.content == before.strip()
    (call,) = turn.calls
    assert (call.name, call.arguments, call.error) == (name, arguments, None)
    assert turn.text[call.span.start : call.span.stop] == block(body)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>", ToolErrorKind.UNTERMINATED),
        ('<tool_call>{"name": "a", "arguments": {}}', ToolErrorKind.UNTERMINATED),
        ('<tool_call>{"name": "a", "argum', ToolErrorKind.UNTERMINATED),
        (block('{"name": "a", "arguments": {}'), ToolErrorKind.INVALID_JSON),
        (block("{'name': 'a', 'arguments': {}}"), ToolErrorKind.INVALID_JSON),
        (block('{"name": "a", "arguments": {},}'), ToolErrorKind.INVALID_JSON),
        (block('```json\n{"name": "a", "arguments": {}}\n```'), ToolErrorKind.INVALID_JSON),
        (block('{"name": "a", "arguments": {}} {"name": "b", "arguments": {}}'), ToolErrorKind.INVALID_JSON),
        (block('{"name": "a", "name": "b", "arguments": {}}'), ToolErrorKind.INVALID_JSON),
        (block('{"name": "a", "arguments": {"x": NaN}}'), ToolErrorKind.INVALID_JSON),
        (block('{"name": "a", "arguments": {"x": 1e999}}'), ToolErrorKind.INVALID_JSON),
        (block('{"name": "a", "arguments": {"x": "\\ud800"}}'), ToolErrorKind.INVALID_JSON),
        (block('{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}"), ToolErrorKind.INVALID_JSON),
        (block("[" * 100_000), ToolErrorKind.INVALID_JSON),
        (block(""), ToolErrorKind.INVALID_JSON),
        ("</tool_call>", ToolErrorKind.INVALID_JSON),
        (block("[]"), ToolErrorKind.NOT_AN_OBJECT),
        (block('"calculator"'), ToolErrorKind.NOT_AN_OBJECT),
        (block('{"arguments": {}}'), ToolErrorKind.NOT_AN_OBJECT),
        (block('{"name": 3, "arguments": {}}'), ToolErrorKind.NOT_AN_OBJECT),
        (block('{"name": "a", "arguments": "{}"}'), ToolErrorKind.NOT_AN_OBJECT),
        (block('{"name": "a", "arguments": [1]}'), ToolErrorKind.NOT_AN_OBJECT),
    ],
)
def test_a_malformed_call_is_a_typed_error_and_never_an_answer(text: str, error: ToolErrorKind) -> None:
    (call,) = parse_hermes(text).calls
    assert call.error is error
    assert call.message
    assert call.name is None
    assert call.arguments is None


def test_tags_inside_json_strings_are_text() -> None:
    code = "print('</tool_call><tool_call>')"
    (call,) = parse_hermes(block(json.dumps({"name": "python", "arguments": {"code": code}}))).calls
    assert call.arguments == {"code": code}


def test_parallel_calls_keep_their_order_and_a_broken_one_does_not_hide_the_next() -> None:
    good = block('{"name": "b", "arguments": {"x": [1, {"y": 2}]}}')
    turn = parse_hermes(f"one {block('{broken')} two <tool_call>{good} three")
    assert [(call.name, call.error) for call in turn.calls] == [
        (None, ToolErrorKind.INVALID_JSON),
        (None, ToolErrorKind.UNTERMINATED),
        ("b", None),
    ]
    assert turn.content == "one  two  three"


def test_missing_arguments_are_empty_arguments() -> None:
    (call,) = parse_hermes(block('{"name": "now"}')).calls
    assert (call.name, call.arguments) == ("now", {})


def test_a_call_inside_thinking_is_a_thought() -> None:
    call = block('{"name": "a", "arguments": {}}')
    turn = parse_hermes(f"<think>maybe {call}</think>\n\nNo.")
    assert turn.calls == ()
    assert turn.content == "No."
    assert turn.text[slice(*turn.thinking[0])] == f"<think>maybe {call}</think>"
    assert parse_hermes(f"<think>maybe {call}").calls == ()
