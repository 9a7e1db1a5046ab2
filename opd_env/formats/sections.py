"""Calls between marker tokens in a marked section: DeepSeek and Kimi.

::

    section  =  BEGIN call+ END
    call     =  CALL head arguments CALL_END        head: the name, in the family's own spelling; arguments: JSON

The JSON is read first, so that a marker inside a string is text. A section that is not closed is not finished, and
any marker outside a section is a malformed call.

DeepSeek V3, R1-0528 and V3.1::

    <｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 6 * 7?<｜Assistant｜></think>                    prompt
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>calculator<｜tool▁sep｜>{"expression": "6*7"}             sampled
    <｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>
    <｜tool▁output▁begin｜>42<｜tool▁output▁end｜>                                                      appended
    The answer is 42.<｜end▁of▁sentence｜>                                                             sampled

Kimi K2, whose calls are named by identifiers such as ``functions.calculator:0``::

    <|im_user|>user<|im_middle|>What is 6 * 7?<|im_end|><|im_assistant|>assistant<|im_middle|>       prompt
    <|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0                            sampled
    <|tool_call_argument_begin|>{"expression": "6*7"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>
    <|im_system|>calculator<|im_middle|>## Return of functions.calculator:0\\n42<|im_end|>             appended
    <|im_assistant|>assistant<|im_middle|>
    The answer is 42.<|im_end|>                                                                      sampled

Test it alone: ``pytest tests/formats/test_parse_all.py tests/formats/test_families.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from opd_env.formats.chat_template import KIMI_CALL_ID
from opd_env.formats.json_calls import JSONProblem, broken_call, check_call, decode_json, repaired_call, skip_space
from opd_env.formats.parse import ParsedCall, ParsedTurn, Span, read_turn
from opd_env.formats.template import TemplateFormat
from opd_env.messages import ToolCall
from opd_env.tools import ToolErrorKind

_NAME = r"[^\s<{`]{1,256}"


@dataclass(frozen=True)
class Section:
    """The markers of one family."""

    begin: str
    end: str
    call: str
    call_end: str
    head: str
    """Regular expression of what stands between ``call`` and the arguments. The group ``name`` holds the name, or
    the group ``fenced`` where the arguments stand in a block fenced by three backticks."""
    example: str
    """How to write a call, for error messages."""
    separator: str
    """The marker inside a call."""

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """What may open a thinking block or a section, and what is at a wrong place outside of one."""
        return re.compile(f"<think>|{self._borders.pattern}|{re.escape(self.separator)}")

    @cached_property
    def _borders(self) -> re.Pattern[str]:
        """Where a call that cannot be read ends at the latest."""
        return re.compile("|".join(map(re.escape, (self.begin, self.end, self.call, self.call_end))))

    @cached_property
    def _head(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self.head})\s*")

    def parse(self, text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
        """A ``Parser``."""

        def read(match: re.Match[str], blank: bool) -> Sequence[ParsedCall]:
            if match.group() == self.begin:
                return self._read(text, match.start(), match.end(), repair)
            message = f"{match.group()} stands outside {self.begin} … {self.end}; {self.example}"
            return [ParsedCall(Span(*match.span()), "", error=ToolErrorKind.INVALID_JSON, message=message)]

        return read_turn(text, self._marks, read, thinking=thinking)

    def _read(self, text: str, start: int, body: int, repair: bool) -> Sequence[ParsedCall]:
        """The calls of the section whose opening marker is ``text[start:body]``."""
        calls: list[ParsedCall] = []
        while True:
            place = skip_space(text, body)
            if text.startswith(self.call, place):
                calls.append(self._read_call(text, start, place + len(self.call), repair))
                start = body = calls[-1].span.stop
            elif calls and text.startswith(self.end, place):
                calls[-1] = replace(calls[-1], span=Span(calls[-1].span.start, place + len(self.end)))
                return calls
            elif calls and (place == len(text) or text.startswith(self.begin, place)):
                reason = calls[-1].message or f"the calls are not finished: {self.end} is missing; {self.example}"
                kind = calls[-1].error or ToolErrorKind.UNTERMINATED
                span = Span(calls[-1].span.start, place)
                return [*calls[:-1], ParsedCall(span, calls[-1].raw, error=kind, message=reason)]
            else:  # something else than a call
                mark, stop = self._border(text, place, self.end, self.call_end)
                calls.append(self._broken(text, start, body, stop, f"{self.call} does not follow", bool(mark)))
                if mark not in (self.call, self.call_end):
                    return calls
                start = body = stop

    def _read_call(self, text: str, start: int, body: int, repair: bool) -> ParsedCall:
        """One call, whose opening marker ends at ``body``; its span begins at ``start``."""
        head = self._head.match(text, body)
        fence = "```" if head is not None and head.groupdict().get("fenced") else ""
        name = "" if head is None else head.group("fenced" if fence else "name")
        reason = "no name and arguments follow"
        if head is not None:
            try:
                value, stop = decode_json(text, head.end())
                stop = skip_space(text, stop)
                closing = skip_space(text, stop + len(fence))
                if text.startswith(fence, stop) and text.startswith(self.call_end, closing):
                    span, whole = Span(start, closing + len(self.call_end)), {"name": name, "arguments": value}
                    return check_call(whole, span, text[body:closing].strip(), self.example, repair=repair)
                reason = f"{fence}{self.call_end} does not follow the arguments"
            except JSONProblem as problem:
                reason = str(problem)
        # It ends at its closing marker, or where something else begins.
        mark, stop = self._border(text, body, self.call_end)
        closed = mark == self.call_end
        broken = self._broken(text, start, body, stop, reason, closed)
        if repair and closed and head is not None:
            arguments = text[head.end() : stop - len(self.call_end)].strip().removesuffix(fence)
            wrapped = f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
            return repaired_call(wrapped, broken.span, self.example) or broken
        return broken

    def _border(self, text: str, start: int, *inside: str) -> tuple[str, int]:
        """The next marker (empty: there is none), and the end of the text before it, with it if it is ``inside``."""
        border = self._borders.search(text, start)
        if border is None:
            return "", len(text)
        return border.group(), border.end() if border.group() in inside else border.start()

    def _broken(self, text: str, start: int, body: int, stop: int, reason: str, closed: bool) -> ParsedCall:
        return broken_call(Span(start, stop), text[body:stop].strip(), reason, closed, self.example)


_DEEPSEEK = Section(
    begin="<｜tool▁calls▁begin｜>",
    end="<｜tool▁calls▁end｜>",
    call="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    separator="<｜tool▁sep｜>",
    head=rf"function\s*<｜tool▁sep｜>\s*(?P<fenced>{_NAME})\s*```json|(?P<name>{_NAME})\s*<｜tool▁sep｜>",
    example="write a call in the form that the system message shows",
)
_DEEPSEEK_TOOLS = """## Tools
You can call these functions, given as JSON schemas:
{{schemas}}

To call functions, write nothing after them but this, with one call for each, directly one after the other:
<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>
Arguments are a JSON object that fits the function's parameters. What the functions return is given to you next."""


class DeepSeekFormat(TemplateFormat):
    """DeepSeek's: ``name<｜tool▁sep｜>{…}`` (V3.1), or ``function<｜tool▁sep｜>name`` and the JSON in a fenced block.

    Both spellings are read, whichever the template writes. The published templates write calls and results but do not
    describe the tools: the kit does, at the end of the system message. They take arguments as JSON text.
    """

    name: ClassVar[str] = "deepseek"
    parser = staticmethod(_DEEPSEEK.parse)

    def __init__(self, tokenizer: Any, repair: bool = False) -> None:
        self._fenced = "```json" in str(tokenizer.chat_template)
        shown = self._call("function_name", "arguments").replace("{", "{{").replace("}", "}}")
        self.tool_section = _DEEPSEEK_TOOLS.format(call=shown)
        super().__init__(tokenizer, repair)

    def _call(self, name: str, arguments: str) -> str:
        head = f"function<｜tool▁sep｜>{name}\n```json\n" if self._fenced else f"{name}<｜tool▁sep｜>"
        return f"<｜tool▁call▁begin｜>{head}{arguments}{chr(10) + '```' if self._fenced else ''}<｜tool▁call▁end｜>"

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        blocks = [self._call(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in calls]
        section = f"{_DEEPSEEK.begin}{(chr(10) * self._fenced).join(blocks)}{_DEEPSEEK.end}"
        return content + section if calls else content


_KIMI = Section(
    begin="<|tool_calls_section_begin|>",
    end="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    separator="<|tool_call_argument_begin|>",
    head=r"(?:functions\.)?(?P<name>[^\s<]{1,256}?):\d{1,9}\s*<\|tool_call_argument_begin\|>",
    example=(
        "write <|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),
)


class KimiFormat(TemplateFormat):
    """Kimi's. A result names its call as the format numbers it, from 0 in each turn, whatever the student wrote."""

    name: ClassVar[str] = "kimi"
    parser = staticmethod(_KIMI.parse)

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        blocks = "".join(
            f"{_KIMI.call}{KIMI_CALL_ID.format(name=call.name, index=index)}{_KIMI.separator}"
            f"{json.dumps(call.arguments, ensure_ascii=False)}{_KIMI.call_end}"
            for index, call in enumerate(calls)
        )
        return f"{content}{_KIMI.begin}{blocks}{_KIMI.end}" if calls else content
