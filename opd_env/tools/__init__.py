"""What a student can call: the tool contract, tools by name, and the tools that come with the kit.

Worked example::

    from opd_env.tools import Toolbox, tool

    @tool
    def add(a: int, b: int) -> int:
        '''Adds two integers.

        Args:
            a: the first.
            b: the second.
        '''
        return a + b

    with Toolbox([add, "calculator"]) as toolbox:
        toolbox.call("add", {"a": 1, "b": 2}).content        # '3'
        toolbox.call("add", {"a": "one"}).error              # ToolErrorKind.SCHEMA

Stands on ``errors`` alone; it knows no task, model or episode. Read first: ``contract``, then ``box``. ``run`` (where a
tool's code runs), ``builtin``, ``mcp`` and ``sandbox`` are rooms in it. Who may change it: a newcomer may add a tool to
``builtin``; ``run`` and ``mcp`` change with their hostile tests; the sandbox is sealed.

Test it alone: ``pytest tests/tools``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_env.tools.box import Toolbox, ToolResult
from opd_env.tools.catalogue import get_tool, list_tools, register_tool
from opd_env.tools.contract import Shared, Tool, tool
from opd_env.tools.schema import Injected
from opd_env.tools.tool_error import ToolError, ToolErrorKind

if TYPE_CHECKING:
    from opd_env.tools.sandbox import open_sandbox

__all__ = [
    "Injected",
    "Shared",
    "Tool",
    "ToolError",
    "ToolErrorKind",
    "ToolResult",
    "Toolbox",
    "get_tool",
    "list_tools",
    "open_sandbox",
    "register_tool",
    "tool",
]


def __getattr__(name: str) -> Any:
    """Imports the sandbox only when it is asked for (PEP 562)."""
    if name == "open_sandbox":
        from opd_env.tools.sandbox import open_sandbox

        return open_sandbox
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
