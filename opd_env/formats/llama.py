"""Llama 3.1, 3.2, 3.3: a JSON object as the whole turn, or anything after ``<|python_tag|>``.

::

    <|start_header_id|>assistant<|end_header_id|>\\n\\n                                            prompt
    {"name": "calculator", "parameters": {"expression": "6*7"}}<|eot_id|>                      sampled
    <|start_header_id|>ipython<|end_header_id|>\\n\\n"42"<|eot_id|><|start_header_id|>assistant…   appended
    The answer is 42.<|eot_id|>                                                                sampled

A turn that begins with an object is a call when the object has a key that calls have (``name``, ``parameters``,
``arguments``, ``function``), readable or not; another object is an answer. Several objects are separated by ``;``.
After ``<|python_tag|>`` stands the same JSON, or a built-in tool as ``tool.call(query="…")``. The template writes one
call in a turn, no text beside it, and quotes what a tool answered as a JSON string.

Test it alone: ``pytest tests/formats/test_parse.py tests/formats/test_families.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from opd_env.formats.json_calls import JSONProblem, broken_call, check_call, decode_json, repaired_call, skip_space
from opd_env.formats.parse import ParsedCall, ParsedTurn, Span, read_turn
from opd_env.formats.pythonic import read_python_calls
from opd_env.formats.template import TemplateFormat
from opd_env.messages import ToolCall
from opd_env.tools import ToolErrorKind

_MARKS = re.compile(r"<think>|<\|python_tag\|>\s*|\{")
_CALL_KEYS = ("name", "parameters", "arguments", "function")
_LOOKS_LIKE_A_CALL = re.compile(r"""["'](?:name|parameters|arguments|function)["']\s*:""")
_KEYS = ("parameters", "arguments")
_EXAMPLE = 'write nothing but {"name": "…", "parameters": {…}}'
_EXAMPLE_TAG = 'write <|python_tag|>name.call(argument="…")'
_BUILT_IN = re.compile(r"[^\W\d]\w*\.call\(")


def parse_llama(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart; arguments as for ``Parser``."""

    def read(match: re.Match[str], blank: bool) -> Sequence[ParsedCall]:
        if match.group() == "{":
            return _read_objects(text, match.start(), match.start(), repair) if blank else ()
        body = match.end()
        if _BUILT_IN.match(text, body):
            calls = read_python_calls(text, match.start(), body, separator="\n", example=_EXAMPLE_TAG, repair=repair)
            return [_built_in(call) for call in calls]
        return _read_objects(text, match.start(), body, repair, tagged=True)

    return read_turn(text, _MARKS, read, thinking=thinking)


def _read_objects(text: str, start: int, body: int, repair: bool, tagged: bool = False) -> Sequence[ParsedCall]:
    """The calls from ``text[body]`` to the end of the turn; empty when it is an answer that happens to be JSON."""
    calls: list[ParsedCall] = []
    position = body
    while True:
        try:
            value, end = decode_json(text, position)
        except JSONProblem as problem:
            if not (calls or tagged or _LOOKS_LIKE_A_CALL.search(text, body, body + 4096)):
                return ()
            return [*calls, _broken(text, start, position, problem, repair)]
        if not (calls or tagged) and not (isinstance(value, dict) and any(key in value for key in _CALL_KEYS)):
            return ()
        after = skip_space(text, end)
        more = text[after : after + 1] == ";"
        span = Span(start, after + more)
        call = check_call(value, span, text[position:end], _EXAMPLE, _KEYS, repair)
        if not more and after < len(text):
            calls.append(_followed(text, call, end, repair))
            return calls
        calls.append(call)
        if not more or skip_space(text, after + 1) == len(text):
            calls[-1] = replace(calls[-1], span=Span(start, len(text)))
            return calls
        start, position = span.stop, skip_space(text, span.stop)


def _broken(text: str, start: int, body: int, problem: JSONProblem, repair: bool) -> ParsedCall:
    span, raw = Span(start, len(text)), text[body:].strip()
    if repair and (repaired := repaired_call(raw, span, _EXAMPLE, _KEYS)):
        return repaired
    return broken_call(span, raw, str(problem), not problem.unfinished, _EXAMPLE)


def _followed(text: str, call: ParsedCall, end: int, repair: bool) -> ParsedCall:
    """A call that is not the whole turn, because text follows it."""
    span = Span(call.span.start, len(text))
    if repair:
        return replace(call, span=span, repairs=(*call.repairs, "text after the call"))
    message = f"text follows the call; {_EXAMPLE}"
    return ParsedCall(span, text[span.start : end].strip(), error=ToolErrorKind.INVALID_JSON, message=message)


def _built_in(call: ParsedCall) -> ParsedCall:
    """``tool.call(…)`` calls ``tool``."""
    return call if call.name is None else replace(call, name=call.name.removesuffix(".call"))


class LlamaFormat(TemplateFormat):
    """One call in a turn, ``{"name": …, "parameters": …}``, and no text beside it."""

    name: ClassVar[str] = "llama"
    parser = staticmethod(parse_llama)
    text_beside_calls: ClassVar[bool] = False
    parallel_calls: ClassVar[bool] = False

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        objects = [
            f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, '
            f'"parameters": {json.dumps(call.arguments, ensure_ascii=False)}}}'
            for call in calls
        ]
        return "; ".join(objects) or content
