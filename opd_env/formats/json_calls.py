"""JSON as calls hold it: strict, total, in linear time, with the place where a value ends.

Worked example::

    decode_json('x = {"a": 1} …', 4)                            # ({'a': 1}, 12)
    decode_json('{"a": NaN}', 0)                                # JSONProblem: NaN is not JSON
    check_call({"name": "f", "arguments": {}}, Span(0, 31), raw, "write …")     # ParsedCall(name='f', …)

Small faults can be put right without guessing what was meant. That is off by default, and each is listed::

    get_format(tokenizer, repair=True).parse(ids).calls[0].repairs      # ('single quotes', 'trailing comma')

==========================  ==============================================================
code fence                  the block is wrapped in a fence of three backticks
single quotes               strings in single quotes, as Python writes them
Python constants            ``True``, ``False``, ``None``
trailing comma              a comma before a closing bracket
missing brackets            closing brackets are missing at the end of a complete block
dotted name                 ``functions.search`` for ``search``
arguments as a string       the arguments are a JSON text in a JSON string
text after the call         (Llama) text follows a call that should be the whole turn
==========================  ==============================================================

Test it alone: ``pytest tests/formats/test_parse.py tests/formats/test_repairs.py``
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NoReturn

from opd_env.formats.parse import ParsedCall, Span
from opd_env.tools import ToolErrorKind


class JSONProblem(Exception):
    """Why a text is not a JSON value that can be passed on."""

    def __init__(self, reason: str, unfinished: bool = False) -> None:
        super().__init__(reason)
        self.unfinished = unfinished
        """The text ends inside the value."""


def skip_space(text: str, start: int) -> int:
    """The first place from ``start`` on that holds no JSON white space."""
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """Decodes the JSON value at ``start``: its value and its end.

    ``json`` counts the lines before every error, from the start of its input. It is given a window of the text,
    so that a turn of many broken blocks is still read in linear time.

    Raises:
        JSONProblem: there is no such value.
    """
    window = text[start : start + 4096]
    try:
        try:
            value, length = DECODER.raw_decode(window)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(window) - 8 or error.msg.startswith("Unterminated string")
            if len(window) < 4096 or not cut:
                raise
            value, length = DECODER.raw_decode(text[start:])
    except json.JSONDecodeError as error:
        unfinished = error.msg.startswith("Unterminated string") or skip_space(text, start + error.pos) == len(text)
        raise JSONProblem(f"{error.msg} at character {error.pos + 1}", unfinished) from None
    except ValueError as error:
        raise JSONProblem(str(error)) from None
    except RecursionError:
        raise JSONProblem("it is nested too deeply") from None
    return value, start + length


def check_call(
    value: object, span: Span, raw: str, example: str, keys: tuple[str, ...] = ("arguments",), repair: bool = False
) -> ParsedCall:
    """A call from a decoded value.

    Args:
        value: any JSON value.
        span, raw: of the call's block.
        example: how to write a call, for error messages.
        keys: what the arguments may be named; the first is the name in messages.
        repair: whether a dotted name and arguments given as a JSON string are put right.
    """

    def wrong(message: str) -> ParsedCall:
        return ParsedCall(span, raw, error=ToolErrorKind.NOT_AN_OBJECT, message=f"{message}; {example}")

    repairs: list[str] = []
    if not isinstance(value, dict):
        return wrong(f"the call is a JSON {_json_type(value)}, not an object")
    name = value.get("name")
    arguments: object = next((value[key] for key in keys if key in value), {})
    if not isinstance(name, str):
        return wrong('"name" is missing' if name is None else f'"name" is a JSON {_json_type(name)}, not a string')
    if repair:
        name = repair_name(name, repairs)
        if isinstance(arguments, str):
            arguments = _read_or_repair(arguments, repairs, arguments)
            repairs.append("arguments as a string")
    if not isinstance(arguments, dict):
        return wrong(f'"{keys[0]}" is a JSON {_json_type(arguments)}, not an object')
    return ParsedCall(span, raw, name, arguments, repairs=tuple(repairs))


def _read_or_repair(text: str, repairs: list[str], default: Any = None) -> Any:
    """The JSON value that is the whole of ``text``, repaired if need be; repairs made are added to ``repairs``."""
    for candidate, names in chain([(text, [])], repair_json(text)):
        try:
            value = _decode_whole(candidate)
        except JSONProblem:
            continue
        repairs += names
        return value
    return default


def repaired_call(raw: str, span: Span, example: str, keys: tuple[str, ...] = ("arguments",)) -> ParsedCall | None:
    """A call from a block that is not JSON as it stands; None when no repair makes it a call."""
    repairs: list[str] = []
    value = _read_or_repair(raw, repairs)
    call = check_call(value, span, raw, example, keys, repair=True)
    return None if call.error else replace(call, repairs=(*repairs, *call.repairs))


def broken_call(span: Span, raw: str, reason: str, finished: bool, example: str) -> ParsedCall:
    """A call that cannot be read: finished, so that it is not readable, or cut off."""
    kind = ToolErrorKind.INVALID_JSON if finished else ToolErrorKind.UNTERMINATED
    state = "readable" if finished else "finished"
    return ParsedCall(span, raw, error=kind, message=f"the call is not {state}: {reason}; {example}")


def _decode_whole(text: str) -> Any:
    """The JSON value that is the whole of ``text`` but for white space. Raises JSONProblem."""
    value, end = decode_json(text, skip_space(text, 0))
    if skip_space(text, end) < len(text):
        raise JSONProblem("text follows the value")
    return value


_JSON_TYPES = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}


def _json_type(value: object) -> str:
    return _JSON_TYPES.get(type(value), "object")


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

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        value, end = super().raw_decode(s, idx)
        if _SURROGATE_ESCAPE.search(s, idx, end) and not is_unicode(value):
            raise ValueError("it holds half of a surrogate pair")
        return value, end


def is_unicode(value: object) -> bool:
    """Whether all text in a JSON value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
DECODER = _Decoder(
    parse_constant=_refuse_constant, object_pairs_hook=_unique_keys, parse_float=_clean_float, strict=False
)

_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_PIECE = re.compile(r""""(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[A-Za-z_]+|[^"'A-Za-z_]+""", re.DOTALL)
_TRAILING_COMMA = re.compile(r",(\s*)(?=[}\]])")
_PAIRS = {"{": "}", "[": "]"}
_LONGEST = 20_000  # characters; a longer block is not worth repairing


def repair_name(name: str, repairs: list[str]) -> str:
    """The last part of a dotted name; noted in ``repairs``."""
    last = name.rsplit(".", 1)[-1]
    if last == name or not last:
        return name
    repairs.append("dotted name")
    return last


def repair_json(text: str) -> Iterator[tuple[str, list[str]]]:
    """Texts that may be the JSON that was meant, with the names of the repairs, fewest first.

    Every repair keeps what stands inside strings as it is. Whether a candidate is JSON is for the caller to see.
    """
    if len(text) > _LONGEST:
        return
    names: list[str] = []
    if (inner := _inside_fence(text.strip())) is not None:
        text, names = inner, ["code fence"]
        yield text, names
    pieces = _PIECE.findall(text)
    if any(piece[0] == "'" for piece in pieces):
        pieces = [_double_quoted(piece) if piece[0] == "'" else piece for piece in pieces]
        names = [*names, "single quotes"]
        yield "".join(pieces), names
    if any(piece in _CONSTANTS for piece in pieces):
        pieces = [_CONSTANTS.get(piece, piece) for piece in pieces]
        names = [*names, "Python constants"]
        yield "".join(pieces), names
    # A piece outside strings holds all of ``, }``.
    without_commas = [piece if piece[0] == '"' else _TRAILING_COMMA.sub(r"\1", piece) for piece in pieces]
    if without_commas != pieces:
        pieces = without_commas
        names = [*names, "trailing comma"]
        yield "".join(pieces), names
    if missing := _missing_brackets(pieces):
        yield "".join(pieces) + missing, [*names, "missing brackets"]


def _inside_fence(text: str) -> str | None:
    if len(text) < 6 or not (text.startswith("```") and text.endswith("```")):
        return None
    language, line_end, code = text[3:-3].partition("\n")
    return code if line_end and (not language.strip() or language.strip().isalpha()) else text[3:-3]


def _double_quoted(piece: str) -> str:
    """A string in single quotes as JSON writes it. One that is not closed becomes something that is not JSON."""
    inner = piece[1:-1].replace("\\'", "'")
    return '"' + re.sub(r'(?<!\\)"', '\\"', inner) + '"'


def _missing_brackets(pieces: list[str]) -> str:
    """The closing brackets that the text lacks at its end; empty when brackets do not match otherwise."""
    expected: list[str] = []
    for piece in pieces:
        for char in "" if piece[0] == '"' else piece:
            if char in _PAIRS:
                expected.append(_PAIRS[char])
            elif char in "}]" and (not expected or expected.pop() != char):
                return ""
    return "".join(reversed(expected))
