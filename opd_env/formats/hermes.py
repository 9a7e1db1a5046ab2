"""ChatML with Hermes tool calls: the packaged models, SmolLM2, Qwen 2.5, Qwen 3, Hermes.

::

    <|im_start|>user\\nWhat is 6 * 7?<|im_end|>\\n<|im_start|>assistant\\n          prompt
    <tool_call>\\n{"name": "calculator", …}\\n</tool_call><|im_end|>               sampled
    \\n<|im_start|>user\\n<tool_response>\\n42\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n    appended
    The answer is 42.<|im_end|>                                                   sampled

A call is ``<tool_call>`` JSON ``</tool_call>``. The JSON is read first, so that tags inside its strings are text. A
closing tag without an opening one is a malformed call.

Test it alone: ``pytest tests/formats/test_parse.py tests/formats/test_formats.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import ClassVar

from opd_env.formats.json_calls import JSONProblem, broken_call, check_call, decode_json, repaired_call, skip_space
from opd_env.formats.parse import ParsedCall, ParsedTurn, Span, read_turn
from opd_env.formats.template import TemplateFormat, join_calls
from opd_env.messages import ToolCall
from opd_env.tools import ToolErrorKind

_MARKS = re.compile(r"<think>|<tool_call>|</tool_call>")
_CALL_TAG = re.compile(r"<tool_call>|</tool_call>")
_CLOSE = re.compile(r"\s*</tool_call>")
_EXAMPLE = 'write <tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>'


def parse_hermes(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart; arguments as for ``Parser``."""

    def read(match: re.Match[str], blank: bool) -> Sequence[ParsedCall]:
        if match.group() == "<tool_call>":
            return [_read_block(text, match.start(), match.end(), repair)]
        message = f"</tool_call> without <tool_call> before it; {_EXAMPLE}"
        return [ParsedCall(Span(*match.span()), "", error=ToolErrorKind.INVALID_JSON, message=message)]

    return read_turn(text, _MARKS, read, thinking=thinking)


def _read_block(text: str, start: int, body: int, repair: bool) -> ParsedCall:
    """Reads the block whose opening tag is ``text[start:body]``."""
    try:
        value, end = decode_json(text, skip_space(text, body))
        if close := _CLOSE.match(text, end):
            raw = text[body : close.start()].strip()
            return check_call(value, Span(start, close.end()), raw, _EXAMPLE, repair=repair)
        reason = "</tool_call> does not follow the JSON"
    except JSONProblem as problem:
        reason = str(problem)

    # The JSON is unreadable or unfinished: the block ends at its closing tag, or where another opens.
    follower = _CALL_TAG.search(text, body)
    if follower is None or follower.group() == "<tool_call>":
        stop = len(text) if follower is None else follower.start()
        message = f"the call is not finished ({reason}); {_EXAMPLE}"
        return ParsedCall(Span(start, stop), text[body:stop].strip(), error=ToolErrorKind.UNTERMINATED, message=message)
    raw, span = text[body : follower.start()].strip(), Span(start, follower.end())
    if repair and (repaired := repaired_call(raw, span, _EXAMPLE)):
        return repaired
    return broken_call(span, raw, reason, True, _EXAMPLE)


class HermesFormat(TemplateFormat):
    """Hermes calls. Where the template knows no tools (SmolLM2), the kit adds the tool section."""

    name: ClassVar[str] = "hermes"
    parser = staticmethod(parse_hermes)
    tool_section: str | None = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
    result_block: ClassVar[tuple[str, str]] = ("<tool_response>\n", "\n</tool_response>")

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        blocks = [
            f'<tool_call>\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, '
            f'"arguments": {json.dumps(call.arguments, ensure_ascii=False)}}}\n</tool_call>'
            for call in calls
        ]
        return join_calls(content, "\n".join(blocks))
