"""Repairs: off by default, each one listed, and nothing that stands inside a string is touched."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.formats import FORMATS, parse_hermes
from opd_env.formats.json_calls import repair_json


def block(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize(
    ("body", "repairs"),
    [
        ("{'name': 'a', 'arguments': {'x': 'it\\'s \"so\"'}}", ["single quotes"]),
        ('{"name": "a", "arguments": {"x": "it\'s \\"so\\"",},}', ["trailing comma"]),
        ('```json\n{"name": "a", "arguments": {"x": "it\'s \\"so\\""}}\n```', ["code fence"]),
        ('{"name": "a", "arguments": {"x": "it\'s \\"so\\""}', ["missing brackets"]),
        ('{"name": "functions.a", "arguments": {"x": "it\'s \\"so\\""}}', ["dotted name"]),
        ('{"name": "a", "arguments": "{\\"x\\": \\"it\'s \\\\\\"so\\\\\\"\\"}"}', ["arguments as a string"]),
        (
            "```\n{'name': 'my.a', 'arguments': {'x': 'it\\'s \"so\"',}\n```",
            ["code fence", "single quotes", "trailing comma", "missing brackets", "dotted name"],
        ),
    ],
)
def test_a_small_fault_is_put_right_and_listed(body: str, repairs: list[str]) -> None:
    (call,) = parse_hermes(block(body), repair=True).calls
    assert (call.name, call.arguments, list(call.repairs)) == ("a", {"x": 'it\'s "so"'}, repairs)
    (call,) = parse_hermes(block(body)).calls
    assert call.repairs == ()
    assert call.error is not None or call.name == "functions.a"


def test_python_constants_are_constants() -> None:
    body = "{'name': 'a', 'arguments': {'x': [True, False, None, 'None']}}"
    (call,) = parse_hermes(block(body), repair=True).calls
    assert call.arguments == {"x": [True, False, None, "None"]}
    assert call.repairs == ("single quotes", "Python constants")


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[1, 2",
        '{"name": "a", "arguments": {"x": NaN}}',
        '{"name": "a", "name": "b"}',
        "{'name': 'a'",
        "a(x=1)",
        "]",
    ],
)
def test_what_would_have_to_be_guessed_stays_an_error(body: str) -> None:
    (call,) = parse_hermes(block(body), repair=True).calls
    assert call.error is not None or call.repairs == ("single quotes", "missing brackets")


def test_an_unfinished_call_is_never_completed() -> None:
    (call,) = parse_hermes('<tool_call>{"name": "a", "arguments": {"x": 1', repair=True).calls
    assert call.error is not None


def test_other_syntaxes_repair_too() -> None:
    (call,) = FORMATS["llama"].parser('{"name": "a", "parameters": {}} The answer is 6.', repair=True).calls
    assert (call.name, call.repairs) == ("a", ("text after the call",))
    (call,) = FORMATS["llama"].parser("{'name': 'a', 'parameters': {'x': 1}}", repair=True).calls
    assert (call.arguments, call.repairs) == ({"x": 1}, ("single quotes",))
    (call,) = FORMATS["mistral"].parser("[TOOL_CALLS][{'name': 'a', 'arguments': {}}]", repair=True).calls
    assert (call.name, call.repairs) == ("a", ("single quotes",))
    (call,) = FORMATS["mistral"].parser("[TOOL_CALLS]a[ARGS]{'x': 1}", repair=True).calls
    assert (call.arguments, call.repairs) == ({"x": 1}, ("single quotes",))
    (call,) = FORMATS["pythonic"].parser("[functions.a(x=1)]", repair=True).calls
    assert (call.name, call.repairs) == ("a", ("dotted name",))


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text() | st.booleans(), max_size=3), max_size=3))
def test_strings_are_never_touched(value: dict[str, object]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    for candidate, _ in repair_json(f"{text[:-1]},}}" if value else f"```\n{text}\n```"):
        try:
            assert json.loads(candidate) == value
        except json.JSONDecodeError:
            continue


@pytest.mark.parametrize("unit", ["'", '"', "{", "[,", ",}", "\\", "```", "a", "\n", "'\\"])
def test_repairing_takes_linear_time(unit: str) -> None:
    def seconds(repeats: int) -> float:
        start = time.process_time()
        parse_hermes(block(unit * repeats), repair=True)
        return time.process_time() - start

    seconds(50)
    short, long = min(seconds(300) for _ in range(3)), min(seconds(4_800) for _ in range(2))
    assert long < 16 * short * 6 + 0.05
