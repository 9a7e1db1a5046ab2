"""Kimi K2: calls between marker tokens, named by identifiers such as ``functions.calculator:0``.

::

    <|im_user|>user<|im_middle|>What is 6 * 7?<|im_end|><|im_assistant|>assistant<|im_middle|>       prompt
    <|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0                            sampled
    <|tool_call_argument_begin|>{"expression": "6*7"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>
    <|im_system|>calculator<|im_middle|>## Return of functions.calculator:0\\n42<|im_end|>             appended
    <|im_assistant|>assistant<|im_middle|>
    The answer is 42.<|im_end|>                                                                      sampled

A result names its call as the format numbers it, from 0 within the turn; numbers that the student makes up are read
over.

Test it alone: ``pytest tests/formats/test_parse_all.py tests/formats/test_families.py``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

from opd_env.formats.chat_template import KIMI_CALL_ID
from opd_env.formats.parse import ParsedTurn
from opd_env.formats.sections import Section
from opd_env.formats.template import TemplateFormat
from opd_env.messages import ToolCall

_SECTION = Section(
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


def parse_kimi(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart. Arguments as for ``parse_hermes``."""
    return _SECTION.parse(text, thinking, repair)


class KimiFormat(TemplateFormat):
    """See the module."""

    name: ClassVar[str] = "kimi"
    parser = staticmethod(parse_kimi)

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """See ``TemplateFormat``."""
        blocks = "".join(
            f"{_SECTION.call}{KIMI_CALL_ID.format(name=call.name, index=index)}{_SECTION.separator}"
            f"{json.dumps(call.arguments, ensure_ascii=False)}{_SECTION.call_end}"
            for index, call in enumerate(calls)
        )
        return f"{content}{_SECTION.begin}{blocks}{_SECTION.end}" if calls else content
