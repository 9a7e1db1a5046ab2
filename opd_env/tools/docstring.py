"""Reads a Google docstring: what a tool does, and what its arguments are.

Worked example::

    parse_docstring("Adds.\\n\\nArgs:\\n    a: the first.\\n    b: the other.")
    # ("Adds.", {"a": "the first.", "b": "the other."})

Test it alone: ``pytest tests/tools/test_tool_schema.py``
"""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?|Attributes|References):\s*")
_ENTRY = re.compile(r"\*{0,2}(\w+)(?:\s*\([^)]*\))?:(?:\s+|$)(.*)")


def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Splits a Google docstring into its description and the descriptions of the arguments.

    Each is one line of text: line breaks inside a paragraph become spaces, paragraphs stay apart.
    """
    description: list[str] = []
    arguments: dict[str, str] = {}
    section, indent, current = "", 0, ""
    for line in inspect.cleandoc(docstring).splitlines():
        text = line.strip()
        if _SECTION.fullmatch(line):
            section, indent, current = text.rstrip(":"), 0, ""
        elif not section:
            description.append(text)
        elif section in ("Args", "Arguments", "Parameters") and text:
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            entry = _ENTRY.fullmatch(text) if depth == indent else None
            if entry:
                current, text = entry[1], entry[2]
                arguments[current] = text
            elif current:
                arguments[current] = f"{arguments[current]} {text}".strip()
    paragraphs = "\n".join(description).strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs), arguments
