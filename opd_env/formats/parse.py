"""Reads an assistant turn written in the Hermes syntax. Pure and total: any text gives a result, in linear time.

Worked example::

    turn = parse_hermes('Well.<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>')
    turn.calls[0].name, turn.calls[0].arguments     # 'calculator', {'expression': '6*7'}
    turn.content                                    # 'Well.'

Rules
- A call is ``<tool_call>`` JSON ``</tool_call>``. The JSON is read first, so that tags inside its strings are text.
- Nothing is repaired. A block that cannot be read is a call with a typed error, which the student is told:
  a malformed call is never mistaken for a final answer. A closing tag without an opening one is such a block.
- ``<think>`` … ``</think>`` is thinking; a call inside it is a thought, not a call.

Test it alone: ``pytest tests/core/test_parse.py``
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from opd_env.tools import ToolErrorKind


class Span(NamedTuple):
    """Half-open range ``[start, stop)``: of characters in ``text``, or of tokens once a format has mapped it."""

    start: int
    stop: int


@dataclass(frozen=True)
class ParsedCall:
    """One attempted call. ``error`` is None exactly when ``name`` and ``arguments`` were read."""

    span: Span
    """The whole block, tags included."""
    raw: str
    """The block without its tags."""
    name: str | None = None
    arguments: dict[str, Any] | None = None
    error: ToolErrorKind | None = None
    message: str = ""
    """What is wrong and how to write it, for the student; empty when nothing is."""


@dataclass(frozen=True)
class ParsedTurn:
    """An assistant turn taken apart. Spans are of characters in ``text``, or of tokens when a format says so."""

    text: str
    content: str
    """Text outside thinking and calls, stripped."""
    calls: tuple[ParsedCall, ...] = ()
    thinking: tuple[Span, ...] = ()


_TAG = re.compile(r"<think>|<tool_call>|</tool_call>")
_CALL_TAG = re.compile(r"<tool_call>|</tool_call>")
_CLOSE = re.compile(r"\s*</tool_call>")
_EXAMPLE = 'write <tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>'


def parse_hermes(text: str) -> ParsedTurn:
    """Takes a turn apart. See the module's rules.

    Args:
        text: the assistant's turn without its end-of-turn token.
    """
    calls: list[ParsedCall] = []
    thinking: list[Span] = []
    content: list[str] = []
    position = 0
    while match := _TAG.search(text, position):
        content.append(text[position : match.start()])
        if match.group() == "<think>":
            end = text.find("</think>", match.end())
            position = len(text) if end < 0 else end + len("</think>")
            thinking.append(Span(match.start(), position))
        elif match.group() == "<tool_call>":
            call = _read_block(text, match.start(), match.end())
            calls.append(call)
            position = call.span.stop
        else:
            position = match.end()
            calls.append(
                ParsedCall(
                    Span(*match.span()),
                    raw="",
                    error=ToolErrorKind.INVALID_JSON,
                    message=f"</tool_call> without <tool_call> before it; {_EXAMPLE}",
                )
            )
    content.append(text[position:])
    return ParsedTurn(text, "".join(content).strip(), tuple(calls), tuple(thinking))


def _read_block(text: str, start: int, body: int) -> ParsedCall:
    """Reads the block whose opening tag is ``text[start:body]``."""
    json_start = body
    while json_start < len(text) and text[json_start] in " \t\r\n":
        json_start += 1
    try:
        value, end = _decode(text, json_start)
        if close := _CLOSE.match(text, end):
            return _check_call(value, text[body : close.start()].strip(), Span(start, close.end()))
        reason = "</tool_call> does not follow the JSON"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
    except ValueError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"

    # The JSON is unreadable or unfinished: the block ends at its closing tag, or where another opens.
    follower = _CALL_TAG.search(text, body)
    if follower is None or follower.group() == "<tool_call>":
        stop = len(text) if follower is None else follower.start()
        message = f"the call is not finished ({reason}); {_EXAMPLE}"
        return ParsedCall(Span(start, stop), text[body:stop].strip(), error=ToolErrorKind.UNTERMINATED, message=message)
    message = f"the call is not readable: {reason}; {_EXAMPLE}"
    raw = text[body : follower.start()].strip()
    return ParsedCall(Span(start, follower.end()), raw, error=ToolErrorKind.INVALID_JSON, message=message)


def _decode(text: str, start: int) -> tuple[Any, int]:
    """Decodes the JSON value at ``start``: its value and its end.

    ``json`` counts the lines before every error, from the start of its input. It is given a window of the text,
    so that a turn of many broken blocks is still read in linear time.
    """
    window = text[start : start + 4096]
    try:
        value, length = _DECODER.raw_decode(window)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(window) - 8 or error.msg.startswith("Unterminated string")
        if len(window) < 4096 or not cut:
            raise
        value, length = _DECODER.raw_decode(text[start:])
    return value, start + length


def _check_call(value: object, raw: str, span: Span) -> ParsedCall:
    def wrong(message: str) -> ParsedCall:
        return ParsedCall(span, raw, error=ToolErrorKind.NOT_AN_OBJECT, message=f"{message}; {_EXAMPLE}")

    if not isinstance(value, dict):
        return wrong(f"the call is a JSON {_json_type(value)}, not an object")
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str):
        return wrong('"name" is missing' if name is None else f'"name" is a JSON {_json_type(name)}, not a string')
    if not isinstance(arguments, dict):
        return wrong(f'"arguments" is a JSON {_json_type(arguments)}, not an object')
    return ParsedCall(span, raw, name, arguments)


def _json_type(value: object) -> str:
    names = {
        type(None): "null",
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "array",
    }
    return names.get(type(value), "object")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return result


def _clean_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


class _Decoder(json.JSONDecoder):
    """JSON as RFC 8259 has it, minus what cannot be passed on: NaN, infinities, duplicate keys, lone surrogates."""

    def __init__(self) -> None:
        super().__init__(
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
            parse_float=_clean_float,
            strict=False,
        )

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        value, end = super().raw_decode(s, idx)
        if _SURROGATE_ESCAPE.search(s, idx, end):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError("it holds half of a surrogate pair") from None
        return value, end


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_DECODER = _Decoder()
