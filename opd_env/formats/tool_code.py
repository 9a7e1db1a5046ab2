"""Gemma 2 and 3: calls in a fenced block of ``tool_code``, answers in one of ``tool_output``.

Gemma's template knows no tools. The prompt describes them, as Google's guide to function calling with Gemma does::

    <start_of_turn>model\\n                                                                   prompt
    ```tool_code\\ncalculator(expression="6*7")\\n```<end_of_turn>                              sampled
    \\n<start_of_turn>user\\n```tool_output\\n42\\n```<end_of_turn>\\n<start_of_turn>model\\n      appended
    The answer is 42.<end_of_turn>                                                          sampled

A block holds one call on each line, written as in ``pythonic``.

Test it alone: ``pytest tests/formats/test_parse.py tests/formats/test_families.py``
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from opd_env.formats.parse import ParsedCall, ParsedTurn, read_turn
from opd_env.formats.pythonic import read_python_calls, write_python_call
from opd_env.formats.template import TemplateFormat, join_calls
from opd_env.messages import ToolCall

_MARKS = re.compile(r"<think>|```tool_code\s*")
_EXAMPLE = 'write ```tool_code\nname(argument="…")\n```'


def parse_tool_code(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart. Arguments as for ``parse_hermes``."""

    def read(match: re.Match[str], blank: bool) -> Sequence[ParsedCall]:
        return read_python_calls(text, *match.span(), end="```", separator="\n", example=_EXAMPLE, repair=repair)

    return read_turn(text, _MARKS, read, thinking=thinking)


class ToolCodeFormat(TemplateFormat):
    """See the module."""

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
        """See ``TemplateFormat``."""
        block = "".join(f"{write_python_call(call)}\n" for call in calls)
        return join_calls(content, f"```tool_code\n{block}```") if calls else content
