"""A tool: a Python function, and the JSON Schema that a model calls it by.

Test it alone: ``pytest tests/tools/test_tool_registration.py``
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload


@dataclass(frozen=True, eq=False)
class Tool:
    """Something that a student can call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    timeout_s: float = 10.0
    max_output_chars: int = 4000
    state: Callable[[], Any] | None = None
    mutates_state: bool = False
    deterministic: bool = False
    ends_episode: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the plain function: no checks, no limits."""
        return self.function(*args, **kwargs)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    timeout_s: float = 10.0,
    max_output_chars: int = 4000,
    state: Callable[[], Any] | None = None,
    mutates_state: bool = False,
    deterministic: bool = False,
    ends_episode: bool = False,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Makes a Tool of a typed, documented function."""

    def decorate(function: Callable[..., Any]) -> Tool:
        types = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
        names = [p for p in inspect.signature(function).parameters if p != "state"]
        hints = {p: str(getattr(h, "__name__", h)) for p, h in function.__annotations__.items()}
        parameters = {
            "type": "object",
            "properties": {p: {"type": types[hints[p]]} for p in names},
            "required": names,
            "additionalProperties": False,
        }
        return Tool(
            name or function.__name__, inspect.getdoc(function) or "", parameters, function, **options
        )

    return decorate if function is None else decorate(function)
