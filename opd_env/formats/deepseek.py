"""DeepSeek V3, R1-0528 and V3.1: calls between marker tokens.

::

    <｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 6 * 7?<｜Assistant｜></think>                    prompt
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>calculator<｜tool▁sep｜>{"expression": "6*7"}             sampled
    <｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>
    <｜tool▁output▁begin｜>42<｜tool▁output▁end｜>                                                      appended
    The answer is 42.<｜end▁of▁sentence｜>                                                             sampled

V3, V3-0324 and R1-0528 write ``function<｜tool▁sep｜>name``, and the JSON in a fenced block. Both spellings are read,
whichever the template writes. The published templates write calls and results but do not describe the tools: the kit
does, at the end of the system message. They take arguments as JSON text.

Test it alone: ``pytest tests/formats/test_parse_all.py tests/formats/test_families.py``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from opd_env.formats.parse import ParsedTurn
from opd_env.formats.sections import Section
from opd_env.formats.template import TemplateFormat
from opd_env.messages import ToolCall

_NAME = r"[^\s<{`]{1,256}"
_SECTION = Section(
    begin="<｜tool▁calls▁begin｜>",
    end="<｜tool▁calls▁end｜>",
    call="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    separator="<｜tool▁sep｜>",
    head=rf"function\s*<｜tool▁sep｜>\s*(?P<fenced>{_NAME})\s*```json|(?P<name>{_NAME})\s*<｜tool▁sep｜>",
    example="write a call in the form that the system message shows",
)
_TOOLS = """## Tools
You can call these functions, given as JSON schemas:
{{schemas}}

To call functions, write nothing after them but this, with one call for each, directly one after the other:
<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>
Arguments are a JSON object that fits the function's parameters. What the functions return is given to you next."""


def parse_deepseek(text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
    """Takes a turn apart. Arguments as for ``parse_hermes``."""
    return _SECTION.parse(text, thinking, repair)


class DeepSeekFormat(TemplateFormat):
    """See the module."""

    name: ClassVar[str] = "deepseek"
    parser = staticmethod(parse_deepseek)

    def __init__(self, tokenizer: Any, repair: bool = False) -> None:
        self._fenced = "```json" in str(tokenizer.chat_template)
        shown = self._call("function_name", "arguments").replace("{", "{{").replace("}", "}}")
        self.tool_section = _TOOLS.format(call=shown)
        super().__init__(tokenizer, repair)

    def _call(self, name: str, arguments: str) -> str:
        head = f"function<｜tool▁sep｜>{name}\n```json\n" if self._fenced else f"{name}<｜tool▁sep｜>"
        return f"<｜tool▁call▁begin｜>{head}{arguments}{chr(10) + '```' if self._fenced else ''}<｜tool▁call▁end｜>"

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """See ``TemplateFormat``."""
        blocks = [self._call(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in calls]
        section = f"{_SECTION.begin}{(chr(10) * self._fenced).join(blocks)}{_SECTION.end}"
        return content + section if calls else content
