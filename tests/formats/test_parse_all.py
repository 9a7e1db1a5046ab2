"""What holds for every call syntax, and what each of them reads: any text at all gives a result, quickly."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.formats import FORMATS
from opd_env.formats.parse import ParsedTurn, Parser
from opd_env.tools import ToolErrorKind

PARSERS: dict[str, Parser] = {name: family.parser for name, family in FORMATS.items()}
GOOD = {
    "hermes": '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>',
    "llama": '{"name": "a", "parameters": {"x": 1}}',
    "mistral": '[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}]',
    "pythonic": "[a(x=1)]",
    "tool_code": "```tool_code\na(x=1)\n```",
    "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a<｜tool▁sep｜>{"x": 1}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi": '<|tool_calls_section_begin|><|tool_call_begin|>functions.a:0<|tool_call_argument_begin|>{"x": 1}'
    "<|tool_call_end|><|tool_calls_section_end|>",
}
every_syntax = pytest.mark.parametrize("syntax", PARSERS)
UNTERMINATED, INVALID, NOT_AN_OBJECT = (
    ToolErrorKind.UNTERMINATED,
    ToolErrorKind.INVALID_JSON,
    ToolErrorKind.NOT_AN_OBJECT,
)


def found(turn: ParsedTurn) -> list[tuple[object, object]]:
    return [(call.name, call.arguments if call.error is None else call.error) for call in turn.calls]


def deepseek(*calls: str, end: str = "<｜tool▁calls▁end｜>") -> str:
    """Calls, each with what stands between its markers, in a section."""
    return "<｜tool▁calls▁begin｜>" + "".join(f"<｜tool▁call▁begin｜>{c}<｜tool▁call▁end｜>" for c in calls) + end


def kimi(*calls: str, end: str = "<|tool_calls_section_end|>") -> str:
    """Likewise."""
    blocks = "".join(f"<|tool_call_begin|>{c}<|tool_call_end|>" for c in calls)
    return f"<|tool_calls_section_begin|>{blocks}{end}"


@every_syntax
def test_a_call_is_read_and_one_inside_thinking_is_a_thought(syntax: str) -> None:
    parse, good = PARSERS[syntax], GOOD[syntax]
    assert found(parse(good, False, False)) == [("a", {"x": 1})]
    turn = parse(f"<think>maybe {good}</think>\n{good}", False, False)
    assert found(turn) == [("a", {"x": 1})]
    assert turn.text[slice(*turn.thinking[0])] == f"<think>maybe {good}</think>"
    assert turn.content == ""
    assert found(parse(f"maybe {good}</think>{good}", True, False)) == [("a", {"x": 1})]
    assert parse(f"maybe {good}", True, False).calls == ()
    assert parse("", True, False).thinking == ()


def test_thinking_has_other_tags_in_mistral() -> None:
    turn = PARSERS["mistral"](f"[THINK]{GOOD['mistral']}[/THINK]No.")
    assert (turn.calls, turn.content) == ((), "No.")
    assert PARSERS["mistral"](f"{GOOD['mistral']}[/THINK]No.", thinking=True).content == "No."


@pytest.mark.parametrize(
    ("syntax", "text", "calls", "content"),
    [
        ("llama", '{"name": "a", "arguments": {"x": 1}}', [("a", {"x": 1})], ""),
        ("llama", '{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}} ', [("a", {}), ("b", {})], ""),
        ("llama", '<|python_tag|>{"name": "a", "parameters": {}}', [("a", {})], ""),
        ("llama", 'Hm. <|python_tag|>{"name": "a", "parameters": {}}', [("a", {})], "Hm."),
        ("llama", '<|python_tag|>brave_search.call(query="x")', [("brave_search", {"query": "x"})], ""),
        ("llama", "<|python_tag|>print(6*7)", [(None, INVALID)], ""),
        ("llama", "<|python_tag|>", [(None, UNTERMINATED)], ""),
        ("llama", '{"answer": 6}', [], '{"answer": 6}'),
        ("llama", "{6}", [], "{6}"),
        ("llama", 'It is {"name": "a", "parameters": {}}', [], 'It is {"name": "a", "parameters": {}}'),
        ("llama", '{"name": "a", "parameters": {', [(None, UNTERMINATED)], ""),
        ("llama", "{'name': 'a', 'parameters': {}}", [(None, INVALID)], ""),
        ("llama", '{"name": "a", "parameters": {}} The answer is 6.', [(None, INVALID)], ""),
        ("llama", '{"name": "a", "parameters": {}}; {"name', [("a", {}), (None, UNTERMINATED)], ""),
        ("llama", '{"name": 3, "parameters": {}}', [(None, NOT_AN_OBJECT)], ""),
        ("llama", '{"function": "a", "parameters": {}}', [(None, NOT_AN_OBJECT)], ""),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {}, "id": "123456789"}]', [("a", {})], ""),
        (
            "mistral",
            'Hm.[TOOL_CALLS][{"name": "a"}, {"name": "b", "arguments": {}}] So.',
            [("a", {}), ("b", {})],
            "Hm. So.",
        ),
        ("mistral", '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}', [("a", {"x": 1}), ("b", {})], ""),
        ("mistral", '[TOOL_CALLS]a[CALL_ID]123456789[ARGS]{"x": 1}', [("a", {"x": 1})], ""),
        ("mistral", "[TOOL_CALLS]a{}", [("a", {})], ""),
        ("mistral", "[TOOL_CALLS]", [(None, UNTERMINATED)], ""),
        ("mistral", "[TOOL_CALLS]a", [(None, INVALID)], ""),
        ("mistral", "[TOOL_CALLS]a[ARGS]{", [(None, UNTERMINATED)], ""),
        ("mistral", '[TOOL_CALLS][{"name": "a"}', [(None, UNTERMINATED)], ""),
        ("mistral", '[TOOL_CALLS][{"name": "a"} {"name": "b"}]', [(None, INVALID)], ""),
        ("mistral", '[TOOL_CALLS][{"name": "a"}, {"na', [("a", {}), (None, UNTERMINATED)], ""),
        ("mistral", '[TOOL_CALLS][1, {"name": "a"}]', [(None, NOT_AN_OBJECT), ("a", {})], ""),
        ("mistral", '[TOOL_CALLS][{[TOOL_CALLS][{"name": "a"}]', [(None, INVALID), ("a", {})], ""),
        ("mistral", '[{"name": "a", "arguments": {}}]', [], '[{"name": "a", "arguments": {}}]'),
        ("pythonic", "[a(x=1, y=-2.5), b()] So.", [("a", {"x": 1, "y": -2.5}), ("b", {})], "So."),
        ("pythonic", "[n.a(x={'k': [True, false, null]})]", [("n.a", {"x": {"k": [True, False, None]}})], ""),
        ("pythonic", '[a(x="), b(\\"]")]', [("a", {"x": '), b("]'})], ""),
        ("pythonic", "[a(x=1),]", [("a", {"x": 1})], ""),
        ("pythonic", "[a(1)]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=1, x=2)]", [(None, INVALID)], ""),
        ("pythonic", "[a(**{})]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=__import__('os').getcwd())]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=f'{1}')]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=1e999)]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=-1e999)]", [(None, INVALID)], ""),
        ("pythonic", "[a(x={1: 2})]", [(None, INVALID)], ""),
        ("pythonic", "[a(x={'k': 1, 'k': 2})]", [(None, INVALID)], ""),
        ("pythonic", "[a(x='\\ud800')]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=1) for a in b]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=" + "[" * 5000 + "]" * 5000 + ")]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=" + "-" * 5000 + "1)]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=" + "9" * 5000 + ")]", [(None, INVALID)], ""),
        ("pythonic", "[a(x=1", [(None, UNTERMINATED)], ""),
        ("pythonic", "[a(x=1), b(y='", [("a", {"x": 1}), (None, UNTERMINATED)], ""),
        ("pythonic", "[1, 2]", [], "[1, 2]"),
        ("pythonic", "It is [a(x=1)]", [], "It is [a(x=1)]"),
        ("tool_code", "Hm.\n```tool_code\na(x=1)\nb()\n```\nSo.", [("a", {"x": 1}), ("b", {})], "Hm.\n\nSo."),
        ("tool_code", "```tool_code\na(\n  x=1,\n)\n```", [("a", {"x": 1})], ""),
        ("tool_code", "```tool_code\na(x='```')\n```", [("a", {"x": "```"})], ""),
        ("tool_code", "```tool_code\nx = a(x=1)\n```", [(None, INVALID)], ""),
        ("tool_code", "```tool_code\n```", [(None, INVALID)], ""),
        ("tool_code", "```tool_code\na(x=1)", [(None, UNTERMINATED)], ""),
        ("tool_code", "```tool_code\na(x=1)\n", [("a", {"x": 1}), (None, UNTERMINATED)], ""),
        ("mistral", '[TOOL_CALLS][{"name": "a"},', [("a", {}), (None, UNTERMINATED)], ""),
        ("pythonic", "[a(x=1),", [("a", {"x": 1}), (None, UNTERMINATED)], ""),
        ("pythonic", "[a.b.c(x=1)]", [("a.b.c", {"x": 1})], ""),
        ("pythonic", "[a()(x=1)]", [(None, INVALID)], ""),
        ("tool_code", "```python\na(x=1)\n```", [], "```python\na(x=1)\n```"),
        ("deepseek", "Hm." + deepseek("a<｜tool▁sep｜>{}", "b<｜tool▁sep｜>{}"), [("a", {}), ("b", {})], "Hm."),
        ("deepseek", deepseek('function<｜tool▁sep｜>a\n```json\n{"x": 1}\n```'), [("a", {"x": 1})], ""),
        ("deepseek", deepseek('function<｜tool▁sep｜>a\n```json\n{"x": 1}'), [(None, INVALID)], ""),
        ("deepseek", deepseek('function<｜tool▁sep｜>{"x": 1}'), [("function", {"x": 1})], ""),
        ("deepseek", deepseek('a<｜tool▁sep｜>{"x": "<｜User｜>"}'), [("a", {"x": "<｜User｜>"})], ""),
        ("deepseek", deepseek('a<｜tool▁sep｜>{"x": 1, "x": 2}'), [(None, INVALID)], ""),
        ("deepseek", deepseek("a<｜tool▁sep｜>{'x': 1}"), [(None, INVALID)], ""),
        ("deepseek", deepseek("a<｜tool▁sep｜>[1]"), [(None, NOT_AN_OBJECT)], ""),
        ("deepseek", deepseek("a<｜tool▁sep｜>{}", end=""), [(None, UNTERMINATED)], ""),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a<｜tool▁sep｜>{", [(None, UNTERMINATED)], ""),
        ("deepseek", "<｜tool▁calls▁begin｜>", [(None, UNTERMINATED)], ""),
        ("deepseek", "So.<｜tool▁sep｜>", [(None, INVALID)], "So."),
        ("kimi", "Hm." + kimi('functions.a:0<|tool_call_argument_begin|>{"x": 1}'), [("a", {"x": 1})], "Hm."),
        (
            "kimi",
            kimi("functions.n.a:0<|tool_call_argument_begin|>{}", "b:7<|tool_call_argument_begin|>{}"),
            [("n.a", {}), ("b", {})],
            "",
        ),
        ("kimi", kimi("functions.a<|tool_call_argument_begin|>{}"), [(None, INVALID)], ""),
        ("kimi", kimi("functions.a:0{}"), [(None, INVALID)], ""),
        ("kimi", kimi("functions.a:0<|tool_call_argument_begin|>3"), [(None, NOT_AN_OBJECT)], ""),
        ("kimi", kimi("functions.a:0<|tool_call_argument_begin|>{}", end=""), [(None, UNTERMINATED)], ""),
        ("kimi", kimi("functions.a:0<|tool_call_argument_begin|>{"), [(None, INVALID)], ""),
        ("kimi", "<|tool_call_begin|>a:0<|tool_call_argument_begin|>{}", [(None, INVALID)] * 2, "a:0{}"),
    ],
)  # fmt: skip
def test_what_is_a_call_and_what_is_not(
    syntax: str, text: str, calls: list[tuple[object, object]], content: str
) -> None:
    turn = PARSERS[syntax](text, False, False)
    assert found(turn) == calls
    assert turn.content == content
    assert all(call.message for call in turn.calls if call.error)
    assert all(call.span.start < call.span.stop for call in turn.calls)


def test_calls_of_one_block_divide_it_among_them() -> None:
    text = 'Hm. [TOOL_CALLS] [{"name": "a"}, {"name": "b"}] So.'
    assert [text[slice(*call.span)] for call in PARSERS["mistral"](text).calls] == [
        '[TOOL_CALLS] [{"name": "a"},',
        ' {"name": "b"}]',
    ]
    text = "[a(x=1), b()] So."
    assert [text[slice(*call.span)] for call in PARSERS["pythonic"](text).calls] == ["[a(x=1),", " b()]"]
    text = '{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}'
    assert "".join(text[slice(*call.span)] for call in PARSERS["llama"](text).calls) == text


PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<think>", "</think>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]",
        "[CALL_ID]", "<|python_tag|>", "```tool_code\n", "```", "brave.call(",
        "[f(", "f(x=", "\n", ", ", ";", "=", ")", "]", "}",
        "[", "{", '"', "'", "'''", "\\", ",", ":", "1", "-", "#", "\x00", '{"name": "a", "arguments": {}}', '"name"',
        "lambda", "é", "\ud800", *GOOD.values(),
    ]
)  # fmt: skip


@every_syntax
@given(
    text=st.lists(PIECES | st.text(alphabet=st.characters()), max_size=25).map("".join),
    thinking=st.booleans(),
    repair=st.booleans(),
)
def test_any_text_gives_spans_that_do_not_overlap(syntax: str, text: str, thinking: bool, repair: bool) -> None:
    turn = PARSERS[syntax](text, thinking, repair)
    spans = sorted([*(call.span for call in turn.calls), *turn.thinking])
    assert all(0 <= span.start < span.stop <= len(text) for span in spans)
    assert all(a.stop <= b.start for a, b in pairwise(spans))
    for call in turn.calls:
        assert (call.error is None) == (call.name is not None and call.arguments is not None)
        assert (call.error is None) == (not call.message)
        assert repair or not call.repairs
        if call.error is None:
            json.dumps([call.name, call.arguments], ensure_ascii=False, allow_nan=False)


@every_syntax
@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>", "</tool_call>", "<think>", '<tool_call>"', "<tool_call>[", "<tool_call>1 ", '<tool_call>["',
        "[TOOL_CALLS]", "[TOOL_CALLS][", '[TOOL_CALLS][{"a": "', "[TOOL_CALLS]a[ARGS]{", "{", '{"name":',
        "<|python_tag|>", '<|python_tag|>{"name": "a"};',
        "```tool_code\n", "```tool_code\nf(", "[f(", "f(x=[", "f(x=1),", "'", '"""',
        "\n", " ",
    ],
)  # fmt: skip
def test_reading_takes_linear_time(syntax: str, unit: str) -> None:
    def seconds(repeats: int) -> float:
        text = GOOD[syntax][:12] + unit * repeats
        start = time.process_time()
        PARSERS[syntax](text, False, False)
        return time.process_time() - start

    seconds(50)
    short, long = min(seconds(500) for _ in range(3)), min(seconds(8_000) for _ in range(2))
    assert long < 16 * short * 6 + 0.05  # quadratic time would be 256 times as long
