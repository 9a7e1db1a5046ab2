"""Mistral: ``[TOOL_CALLS]`` and a JSON array, or (since 2025) ``[TOOL_CALLS]name[ARGS]{…}``.

::

    <s>[AVAILABLE_TOOLS][…][/AVAILABLE_TOOLS][INST]What is 6 * 7?[/INST]                            prompt
    [TOOL_CALLS][{"name": "calculator", "arguments": {"expression": "6*7"}, "id": "call00001"}]</s>   sampled
    [TOOL_RESULTS]{"content": 42, "call_id": "call00001"}[/TOOL_RESULTS]                               appended
    The answer is 42.</s>                                                                            sampled

Calls are numbered within a turn and results refer to them by that number, in the order of the calls; identifiers
that the student makes up are read over.

Test it alone: ``pytest tests/formats/test_parse.py tests/formats/test_families.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from opd_env.formats.chat_template import CALL_ID
from opd_env.formats.json_calls import JSONProblem, broken_call, check_call, decode_json, repaired_call, skip_space
from opd_env.formats.parse import ParsedCall, ParsedTurn, Span, read_turn
from opd_env.formats.template import TemplateFormat
from opd_env.messages import ToolCall

_MARK = "[TOOL_CALLS]"
_MARKS = re.compile(r"<think>|\[THINK\]|\[TOOL_CALLS\]\s*")
_NAMED = re.compile(r"([^\s\[\]{}]{1,256})(?:\[CALL_ID\][^\[\]{}]{0,256})?(?:\[ARGS\])?\s*(?=\{)")
_EXAMPLE_ARRAY = 'write [TOOL_CALLS][{"name": "…", "arguments": {…}}]'
_EXAMPLE_NAMED = "write [TOOL_CALLS]name[ARGS]{…}"


def parse_mistral(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart; arguments as for ``Parser``."""

    def read(match: re.Match[str], blank: bool) -> Sequence[ParsedCall]:
        start, body = match.span()
        if named := _NAMED.match(text, body):
            return [_read_named(text, start, named, repair)]
        if text[body : body + 1] == "[":
            return _read_array(text, start, body, repair)
        problem = JSONProblem("neither [ nor name[ARGS] follows [TOOL_CALLS]", unfinished=body == len(text))
        return [_broken(text, start, body, problem, repair, _EXAMPLE_ARRAY)]

    return read_turn(text, _MARKS, read, thinking=thinking, think="[THINK]" if "[/THINK]" in text else "<think>")


def _read_array(text: str, start: int, body: int, repair: bool) -> Sequence[ParsedCall]:
    calls: list[ParsedCall] = []
    position = skip_space(text, body + 1)
    while True:
        try:
            value, end = decode_json(text, position)
            after = skip_space(text, end)
            mark = text[after : after + 1]
            if mark not in (",", "]") or not mark:
                raise JSONProblem("neither , nor ] follows an object", unfinished=after == len(text))
        except JSONProblem as problem:
            return [*calls, _broken(text, start, position, problem, repair, _EXAMPLE_ARRAY)]
        raw = text[position:end]
        calls.append(check_call(value, Span(start, after + 1), raw, _EXAMPLE_ARRAY, repair=repair))
        if mark == "]":
            return calls
        start, position = after + 1, skip_space(text, after + 1)


def _read_named(text: str, start: int, named: re.Match[str], repair: bool) -> ParsedCall:
    try:
        value, end = decode_json(text, named.end())
    except JSONProblem as problem:
        broken = _broken(text, start, named.end(), problem, False, _EXAMPLE_NAMED)
        wrapped = f'{{"name": {json.dumps(named[1])}, "arguments": {broken.raw}}}'
        return (repaired_call(wrapped, broken.span, _EXAMPLE_NAMED) if repair else None) or broken
    whole = {"name": named[1], "arguments": value}
    return check_call(whole, Span(start, end), text[named.start() : end], _EXAMPLE_NAMED, repair=repair)


def _broken(text: str, start: int, body: int, problem: JSONProblem, repair: bool, example: str) -> ParsedCall:
    """A block that cannot be read ends where another begins, or with the turn."""
    stop = text.find(_MARK, body)
    stop = len(text) if stop < 0 else stop
    span, raw = Span(start, stop), text[body:stop].strip()
    if repair and (repaired := repaired_call(raw.removesuffix("]"), span, example)):
        return repaired
    finished = not problem.unfinished or stop < len(text)
    return broken_call(span, raw, str(problem), finished, example)


class MistralFormat(TemplateFormat):
    """An array of calls, or calls by name, as the template writes them."""

    name: ClassVar[str] = "mistral"
    parser = staticmethod(parse_mistral)
    text_beside_calls: ClassVar[bool] = False

    def __init__(self, tokenizer: Any, repair: bool = False) -> None:
        template = str(tokenizer.chat_template)
        self._named = "[ARGS]" in template
        self._spaced = "[TOOL_CALLS] [" in template
        super().__init__(tokenizer, repair)

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        if self._named:
            blocks = [f"{_MARK}{call.name}[ARGS]{json.dumps(call.arguments, ensure_ascii=False)}" for call in calls]
            return content + "".join(blocks)
        objects = [
            {"name": call.name, "arguments": call.arguments, "id": CALL_ID.format(number=number)}
            for number, call in enumerate(calls, start=1)
        ]
        array = json.dumps(objects, ensure_ascii=False)
        return f"{_MARK}{' ' * self._spaced}{array}" if calls else content
