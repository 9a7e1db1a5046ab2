"""The tools of one episode: looks a call up, checks it, runs it, and always gives a result.

Test it alone: ``pytest tests/tools/test_toolbox.py``
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from opd_env.tools.base import Tool
from opd_env.tools.errors import ToolError, ToolErrorKind
from opd_env.tools.registry import get_tool


@dataclass(frozen=True)
class ToolResult:
    """What came of one call."""

    name: str
    """The tool's name as the student wrote it."""
    content: str
    """What the student reads: the answer, or the error's JSON."""
    error: ToolErrorKind | None = None
    """None when the tool answered."""
    seconds: float = 0.0
    """Wall time of the call, checks included."""
    truncated: bool = False
    """The answer was cut to the tool's ``max_output_chars``."""

    @property
    def ok(self) -> bool:
        """Whether the tool answered."""
        return self.error is None


class Toolbox:
    """The tools of one episode, with their per-episode state."""

    def __init__(self, tools: Sequence[str | Tool]) -> None:
        self._tools = {tool.name: tool for tool in (get_tool(t) if isinstance(t, str) else t for t in tools)}

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Schemas of all tools, in order."""
        return [tool.schema for tool in self._tools.values()]

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def call(self, name: str, arguments: object) -> ToolResult:
        """Runs one call. Total: whatever the tool or the student does, there is a result."""
        start = time.perf_counter()
        try:
            if name not in self._tools:
                raise ToolError(ToolErrorKind.UNKNOWN_TOOL, f"no tool named {name!r}")
            if not isinstance(arguments, Mapping):
                raise ToolError(ToolErrorKind.NOT_AN_OBJECT, "arguments must be an object")
            value = self._tools[name].function(**arguments)
            content = value if isinstance(value, str) else json.dumps(value)
            return ToolResult(name, content, None, time.perf_counter() - start)
        except ToolError as error:
            return ToolResult(name, error.content, error.kind, time.perf_counter() - start)
        except Exception as error:
            failure = ToolError(ToolErrorKind.EXCEPTION, f"{type(error).__name__}: {error}")
            return ToolResult(name, failure.content, failure.kind, time.perf_counter() - start)

    def reset(self) -> None:
        """Starts a new episode: new state for every tool."""

    def close(self) -> None:
        """Ends the episode."""

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
