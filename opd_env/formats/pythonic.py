"""Calls as a Python list, ``[search(query="…"), add(a=1, b=2)]``: Llama 3.2, Llama 4, ToolACE, LFM2 and others.

A turn that begins with ``[name(`` is a list of calls. Arguments are named and literal: strings, numbers, ``True``,
``False``, ``None`` (or ``true``, ``false``, ``null``), lists and dicts of these. Nothing is ever evaluated.

Worked example::

    parse_pythonic('[add(a=1, b=[2, "x"])]').calls[0].arguments      # {'a': 1, 'b': [2, 'x']}

Gemma 2 and 3 write the same calls in a fenced block of ``tool_code``, one on each line. Their template knows no tools.
The prompt describes them, as Google's guide to function calling with Gemma does::

    <start_of_turn>model\\n                                                                   prompt
    ```tool_code\\ncalculator(expression="6*7")\\n```<end_of_turn>                              sampled
    \\n<start_of_turn>user\\n```tool_output\\n42\\n```<end_of_turn>\\n<start_of_turn>model\\n      appended
    The answer is 42.<end_of_turn>                                                          sampled

Test it alone: ``pytest tests/formats/test_parse.py tests/formats/test_families.py``
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from opd_env.formats.json_calls import broken_call, is_unicode, repair_name
from opd_env.formats.parse import ParsedCall, ParsedTurn, Span, read_turn
from opd_env.formats.template import TemplateFormat, join_calls
from opd_env.messages import ToolCall
from opd_env.tools import ToolErrorKind

_MARKS = re.compile(r"<think>|\[(?=\s*[^\W\d][\w.]*\s*\()")
_TOKEN = re.compile(r"""[()\[\]{},\n]|```|'''|\"\"\"|["']""")
_STRING_END = {quote: re.compile(rf"(?s:\\.|(?P<end>{quote}))") for quote in ("'", '"', "'''", '"""')}
_DEEPEST = 64
_SOURCE = "<tool call>"
# Python warns of \\d in a string. It is the student's text: nobody who reads the log wrote it.
warnings.filterwarnings("ignore", message="invalid ", module=_SOURCE)
_EXAMPLE = 'write [name(argument="…")]'
_TOOL_CODE = re.compile(r"<think>|```tool_code\s*")
_TOOL_CODE_EXAMPLE = 'write ```tool_code\nname(argument="…")\n```'
_NAMES = {"true": True, "false": False, "null": None}


def parse_pythonic(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart; arguments as for ``Parser``."""

    def read(match: re.Match[str], blank: bool) -> Sequence[ParsedCall]:
        if not blank:
            return ()
        return read_python_calls(text, match.start(), match.end(), end="]", repair=repair)

    return read_turn(text, _MARKS, read, thinking=thinking)


def read_python_calls(
    text: str,
    start: int,
    body: int,
    *,
    end: str = "",
    separator: str = ",",
    example: str = _EXAMPLE,
    repair: bool = False,
) -> list[ParsedCall]:
    """Reads calls from ``text[body]`` on; their spans divide the block that begins at ``start``.

    Args:
        end: what ends the block: ``]``, a fence, or nothing but the end of the text.
        separator: what stands between calls: a comma or a line end.

    Returns:
        At least one call; the last one's span ends with the block.
    """
    calls: list[ParsedCall] = []
    for stop, kind in _cuts(text, body, end, separator):
        raw = text[body:stop].strip()
        after = stop + len(kind)
        if kind == "unfinished":
            message = f"the call is not finished; {example}"
            calls.append(ParsedCall(Span(start, stop), raw, error=ToolErrorKind.UNTERMINATED, message=message))
            return calls
        if raw or kind != separator:
            if raw or not calls:
                calls.append(_read_call(raw, Span(start, after), example, repair))
            else:
                calls[-1] = replace(calls[-1], span=Span(calls[-1].span.start, after))
            start = after
        body = after
    return calls


def _cuts(text: str, body: int, end: str, separator: str) -> list[tuple[int, str]]:
    """Where calls end, each with the separator or end that stands there; ``unfinished`` when the text ends first."""
    cuts: list[tuple[int, str]] = []
    depth, position = 0, body
    while match := _TOKEN.search(text, position):
        token, position = match.group(), match.end()
        if token in _STRING_END:
            closing = next((m for m in _STRING_END[token].finditer(text, position) if m["end"]), None)
            if closing is None:
                return [*cuts, (len(text), "unfinished")]
            position = closing.end()
        elif depth == 0 and token in (separator, end):
            cuts.append((match.start(), token))
            if token == end:
                return cuts
        elif token in "([{":
            depth += 1
        elif token in ")]}":
            depth = max(0, depth - 1)
    finished = not end and depth == 0
    return [*cuts, (len(text), "" if finished else "unfinished")]


def _read_call(raw: str, span: Span, example: str, repair: bool) -> ParsedCall:
    repairs: list[str] = []
    try:
        name, arguments = _call_of(raw)
    except _Problem as problem:
        return broken_call(span, raw, str(problem), True, example)
    if repair and not name.endswith(".call"):
        name = repair_name(name, repairs)
    return ParsedCall(span, raw, name, arguments, repairs=tuple(repairs))


class _Problem(Exception):
    """Why a text is not one call with literal arguments."""


def _call_of(raw: str) -> tuple[str, dict[str, Any]]:
    if sum(map(raw.count, "([{")) > _DEEPEST and _depth(raw) > _DEEPEST:
        raise _Problem("it is nested too deeply")
    try:
        node = ast.parse(raw, filename=_SOURCE, mode="eval").body
        if not isinstance(node, ast.Call):
            raise _Problem("it is not a call")
        if node.args:
            raise _Problem("every argument needs its name")
        arguments: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise _Problem("** is not allowed")
            if keyword.arg in arguments:
                raise _Problem(f"the argument {keyword.arg!r} stands twice")
            arguments[keyword.arg] = _literal(keyword.value)
        name = _name(node.func)
    except SyntaxError as error:
        raise _Problem(f"{error.msg} at character {error.offset or 1}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _Problem(str(error) or "it is nested too deeply") from None
    if ("\\" in raw or not raw.isascii()) and not is_unicode(arguments):
        raise _Problem("it holds half of a surrogate pair")
    return name, arguments


def _name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            return f"{_name(inner)}.{name}"
    raise _Problem("the name of the tool is not a name")


def _depth(text: str) -> int:
    deepest = depth = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest


def _literal(node: ast.expr) -> Any:
    """The JSON value that an expression writes out."""
    match node:
        case ast.Constant(value=None | bool() | int() | str() as value):
            return value
        case ast.Constant(value=float() as value) if abs(value) != float("inf"):
            return value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (int, float):
            return -_literal(node.operand)
        case ast.List(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise _Problem("the keys of a dict must be strings")
            if len(set(names)) != len(names):
                raise _Problem("a key stands twice")
            return {name: _literal(value) for name, value in zip(names, values, strict=True)}
    raise _Problem(f"{ast.unparse(node)[:60]!r} is not a literal value")


def write_python_call(call: ToolCall) -> str:
    """The call as Python text that ``read_python_calls`` reads back."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"


class PythonicFormat(TemplateFormat):
    """A list of calls as the turn."""

    name: ClassVar[str] = "pythonic"
    parser = staticmethod(parse_pythonic)
    text_beside_calls: ClassVar[bool] = False

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        return f"[{', '.join(map(write_python_call, calls))}]" if calls else content


def parse_tool_code(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart; arguments as for ``Parser``."""

    def read(match: re.Match[str], blank: bool) -> Sequence[ParsedCall]:
        return read_python_calls(
            text, *match.span(), end="```", separator="\n", example=_TOOL_CODE_EXAMPLE, repair=repair
        )

    return read_turn(text, _TOOL_CODE, read, thinking=thinking)


class ToolCodeFormat(TemplateFormat):
    """Gemma's fenced block."""

    name: ClassVar[str] = "tool_code"
    parser = staticmethod(parse_tool_code)
    tool_section: str | None = """You can call these functions, given as JSON schemas:
{schemas}

To call functions, answer with nothing but one block of code that holds one call on each line, every argument named:
```tool_code
name(argument="value")
```
What they return is given to you in a block of tool_output. Then call again, or give the final answer as plain text."""
    result_block: ClassVar[tuple[str, str]] = ("```tool_output\n", "\n```")

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        block = "".join(f"{write_python_call(call)}\n" for call in calls)
        return join_calls(content, f"```tool_code\n{block}```") if calls else content
