"""Tools by name, for configurations, tasks and the command line.

Worked example::

    register_tool(add)
    get_tool("add"), get_tool("calculator")
    get_tool("search", passages="passages.jsonl")       # a factory: a tool that needs something to work on

Another package offers its tools by entry points; they are imported only when somebody asks for one::

    [project.entry-points."opd_env.tools"]
    weather = "my_package.tools:weather"                # a Tool, or a function that returns one

Test it alone: ``pytest tests/tools/test_tool_registration.py``
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from opd_env.errors import unknown
from opd_env.tools.contract import Tool

ENTRY_POINT_GROUP = "opd_env.tools"

Factory = Callable[..., Tool]

_BUILT_IN = {
    name: EntryPoint(name, f"opd_env.tools.builtin.{value}", ENTRY_POINT_GROUP)
    for name, value in {
        "calculator": "calculator:calculator",
        "python": "python:python_tool",
        "search": "search:make_search_tool",
    }.items()
}
_registered: dict[str, Tool | Factory] = {}


def register_tool(tool: Tool | Factory, *, name: str | None = None) -> Tool | Factory:
    """Makes a tool available by name.

    Args:
        tool: a tool, or a factory: a function that takes options by name and returns a tool.
        name: required for a factory; a tool has its own.

    Returns:
        What was given, so that it serves as a decorator above ``@tool``.

    Raises:
        ValueError: the name is taken, or ``tool`` is neither of the two.
    """
    if isinstance(tool, Tool):
        if name not in (None, tool.name):
            raise ValueError(f"the tool is named {tool.name!r}, not {name!r}; rename it with @tool(name={name!r})")
        name = tool.name
    elif not callable(tool) or name is None:
        raise ValueError(f"{tool!r} is no tool: decorate the function with @tool, or give a factory with name=...")
    if name in _registered or name in _BUILT_IN:
        raise ValueError(f"a tool named {name!r} is registered already; choose another name")
    _registered[name] = tool
    return tool


def get_tool(name: str, /, **options: Any) -> Tool:
    """The tool of that name.

    Args:
        name: one of ``list_tools()``.
        options: what a factory takes, such as ``passages`` for ``search``; none for a finished tool.

    Raises:
        ValueError: no tool has that name, it cannot be imported, or its options are missing or unknown.
    """
    entry = _find(name)
    if isinstance(entry, Tool):
        if options:
            raise ValueError(f"tool {name!r} takes no options, got {', '.join(options)}")
        return entry
    try:
        inspect.signature(entry).bind(**options)
    except TypeError as error:
        message = f"tool {name!r}: {error}; it is made by get_tool({name!r}, ...) with {_options_of(entry)}"
        raise ValueError(message) from error
    tool = entry(**options)
    if not isinstance(tool, Tool):
        raise ValueError(f"the factory of tool {name!r} returned {type(tool).__name__}, expected a Tool")
    return tool


def describe_tool(name: str) -> tuple[str, str]:
    """What a tool does, in one line, and the options that it takes; nothing is made for this.

    Raises:
        ValueError: no tool has that name, or it cannot be imported.
    """
    entry = _find(name)
    about = entry.description if isinstance(entry, Tool) else inspect.getdoc(entry) or ""
    return next(iter(about.splitlines()), ""), "" if isinstance(entry, Tool) else _options_of(entry)


def _find(name: str) -> Tool | Factory:
    if name in _registered:
        return _registered[name]
    point = _BUILT_IN.get(name) or _entry_points().get(name)
    if point is None:
        raise ValueError(unknown("tool", name, list_tools()))
    try:
        entry: Tool | Factory = point.load()
    except Exception as error:
        package = point.dist.name if point.dist else "its package"
        raise ValueError(f"tool {name!r} of {package} ({point.value}) cannot be imported: {error!r}") from error
    return entry


def list_tools() -> list[str]:
    """Names of all tools, sorted: the kit's own, registered ones, and other packages' (which this does not import)."""
    return sorted({*_BUILT_IN, *_registered, *_entry_points()})


def _options_of(factory: Factory) -> str:
    parameters = inspect.signature(factory).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


def _entry_points() -> dict[str, EntryPoint]:
    """Entry points by name. One whose name is taken is left out with a warning."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _BUILT_IN or point.name in _registered or point.name in points:
            warnings.warn(f"the entry point {point.name} = {point.value} is left out: its name is taken", stacklevel=3)
        else:
            points[point.name] = point
    return points
