"""Tools by name.

Test it alone: ``pytest tests/tools/test_tool_registration.py``
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from opd_env.tools.base import Tool

_BUILT_IN = {"calculator": "opd_env.tools.calculator:calculator"}
_registered: dict[str, Tool] = {}


def register_tool(tool: Tool) -> Tool:
    """Makes a tool available by its name."""
    if tool.name in _registered or tool.name in _BUILT_IN:
        raise ValueError(f"a tool named {tool.name!r} is registered already")
    _registered[tool.name] = tool
    return tool


def get_tool(name: str) -> Tool:
    """The tool of that name."""
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        close = difflib.get_close_matches(name, list_tools(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no tool named {name!r}{hint} Registered: {', '.join(list_tools())}")
    module, attribute = _BUILT_IN[name].split(":")
    found: Any = getattr(importlib.import_module(module), attribute)
    return found  # type: ignore[no-any-return]


def list_tools() -> list[str]:
    """Names of all tools, sorted."""
    return sorted([*_BUILT_IN, *_registered])
