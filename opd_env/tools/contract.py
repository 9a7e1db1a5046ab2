"""A tool: a Python function, and the JSON Schema that a model calls it by.

Worked example::

    @tool(timeout_s=2.0, deterministic=True)
    def power(base: int, exponent: Annotated[int, "a whole number, 0 or more"] = 2) -> int:
        '''Raises an integer to a power.

        Args:
            base: the number to raise.
        '''
        return base**exponent

    power.schema["function"]["parameters"]["required"]      # ['base']
    power(3)                                                # 9: still the plain function

A function that is no complete description of a tool is refused where it is defined, with file, line and all that is
missing. ``docs/tools.md`` has an example of each option.

Test it alone: ``pytest tests/tools/test_tool_registration.py``
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from opd_env.tools.schema import read_signature
from opd_env.tools.validation import check_arguments, make_validator

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

    from opd_env.tools.sandbox import Sandbox

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_MIN_OUTPUT_CHARS = 100


@dataclass(frozen=True, eq=False)
class Shared:
    """A state for all tools that name this very object: made once for each episode, at the first call of any of them.

    ``state=list`` on two tools gives each its own list; ``basket = Shared(list)`` and ``state=basket`` on both give
    them one. It goes wherever a factory does, but not with ``isolation="process"``: no two processes have one object.
    Tools of a toolbox that share anything have one event loop, and lose together all that they were given when a call
    of one of them is ended by its time limit.
    """

    make: Callable[[], Any]
    """May be ``async``; a ``close()`` of what it makes is called when the episode ends."""

    def __call__(self) -> Any:
        """Makes one, as the kit does."""
        return self.make()


class Isolation(StrEnum):
    """Where a tool's code runs, and so what its time limit can end."""

    THREAD = "thread"
    """A thread of this process (15 µs a call), for code that neither blocks the interpreter nor ends the process;
    ``opd_env.tools.run.time_limit`` says what is covered."""
    PROCESS = "process"
    """A child process (about 0.1 ms a call), killed when the time is up, whatever the code does. The function is copied
    there: it and this process do not see each other's later changes of variables."""


class ToolOptions(TypedDict, total=False):
    """The options of ``tool``; the fields of ``Tool`` say what they mean."""

    name: str
    timeout_s: float
    max_output_chars: int
    state: Callable[[], Any] | None
    injected: Mapping[str, Callable[[], Any]]
    secrets: Sequence[str]
    retry_on: Sequence[type[Exception]]
    retries: int
    max_concurrent: int | None
    mutates_state: bool
    deterministic: bool
    ends_episode: bool
    listed: bool
    isolation: Isolation | str
    sandbox: Callable[[], Sandbox] | None


@dataclass(frozen=True, eq=False)
class Tool:
    """Something that a student can call. ``@tool`` makes one of a function; made directly, it takes any schema.

    Raises:
        ValueError: a field cannot be used; the message names the function's file and line and lists all problems.
    """

    name: str
    """What a student calls it by: a letter or ``_``, then up to 63 letters, digits, ``_``, ``-`` or ``.``."""
    description: str
    """What a student reads about it."""
    parameters: Mapping[str, Any]
    """JSON Schema (Draft 2020-12) of the arguments. Others are refused unless it sets ``additionalProperties``."""
    function: Callable[..., Any]
    """Gets the arguments by name; returns any JSON value. May be ``async``: the calls of an episode then share
    an event loop, which runs while a call does."""
    timeout_s: float = 10.0
    """Seconds of wall time for one call, retries and the making of its state included; waiting for a turn
    (``max_concurrent``) is not."""
    max_output_chars: int = 4000
    """What a student sees of an answer, the marker of a cut included."""
    state: Callable[[], Any] | None = None
    """Makes the state of an episode, for this tool alone, or ``Shared`` for all that name the same; short for
    ``injected={"state": ...}``."""
    injected: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Makes what a model does not see, by the parameter's name: once for each episode, at its first call of this
    tool. Its ``close()``, if it has one, is called when the episode ends; both may be ``async``. After a time-out all
    is given up and made anew."""
    secrets: Sequence[str] = ()
    """Environment variables that must be set, and whose values are taken out of all that a student or a log sees.
    ``opd_env.tools.redaction`` says what that covers."""
    retry_on: Sequence[type[Exception]] = ()
    """Exceptions that may pass, after which a call is tried again."""
    retries: int = 0
    """Most further attempts of a call, 0.1 s, 0.2 s, 0.4 s … after each other."""
    max_concurrent: int | None = None
    """Calls of this tool at one time, of all episodes of this process together; None sets no limit."""
    mutates_state: bool = False
    """A call changes what later calls answer, so order matters and answers must not be reused."""
    deterministic: bool = False
    """The same arguments (and state) give the same answer."""
    ends_episode: bool = False
    """A successful call is the last thing that happens in an episode."""
    listed: bool = True
    """The opening messages describe it. If not, it can still be called: a user may bring it up later."""
    isolation: Isolation | str = Isolation.THREAD
    """Where the code runs."""
    convert: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Turns checked JSON arguments into the keyword arguments of ``function``."""
    sandbox: Callable[[], Sandbox] | None = None
    """Gives the sandbox that code of the student runs in. A run opens it before its first episode, and its record
    says the level."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        try:
            object.__setattr__(self, "isolation", Isolation(self.isolation))
        except ValueError:
            problems.append(f"isolation={self.isolation!r}, expected one of {', '.join(Isolation)}")
        try:
            parameters = copy.deepcopy(dict(self.parameters))
            parameters.setdefault("additionalProperties", False)
            make_validator(parameters)
            injected = dict(self.injected) | ({} if self.state is None else {"state": self.state})
            named = [name for name in injected if name in parameters.get("properties", {})]
            wrong = {name: make for name, make in injected.items() if not callable(make)}
            problems += [f"its parameters name {name!r}, which the kit fills in" for name in named]
            problems += [
                f"{name}={make!r}, expected a callable that makes it, such as dict" for name, make in wrong.items()
            ]
            if self.isolation == Isolation.PROCESS and any(isinstance(make, Shared) for make in injected.values()):
                problems.append("a Shared state is in this process; leave isolation='process' out, or share nothing")
            object.__setattr__(self, "injected", injected)
            object.__setattr__(self, "parameters", parameters)
        except (ValueError, TypeError, RecursionError) as error:
            problems.append(str(error))
        if problems:
            raise ValueError(f"{_where(self.function)}: tool {self.name!r}: {'; '.join(problems)}")

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat templates and function-calling models expect it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": copy.deepcopy(function)}

    @property
    def shared(self) -> list[Shared]:
        """What it is given together with other tools."""
        return [make for make in self.injected.values() if isinstance(make, Shared)]

    def check(self, arguments: object) -> dict[str, Any]:
        """Checks arguments against ``parameters``; returns a copy of them.

        Raises:
            ToolError: kind ``not_an_object`` or ``schema``, all problems listed.
        """
        return check_arguments(self._validator, arguments)

    @cached_property
    def _validator(self) -> Draft202012Validator:
        return make_validator(self.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the plain function: no checks, no limits."""
        return self.function(*args, **kwargs)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(**options: Unpack[ToolOptions]) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, **options: Unpack[ToolOptions]
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Makes a ``Tool`` of a typed function with a Google docstring. With or without options in brackets.

    Args:
        function: its name, docstring and type hints become the tool's name, description and parameters.
        options: fields of ``Tool``.

    Raises:
        ValueError: the function is no complete description of a tool; file, line and all problems are named.
    """

    def decorate(function: Callable[..., Any]) -> Tool:
        if not inspect.isroutine(function):
            hint = "options go by name, as in @tool(name='add')"
            raise ValueError(f"@tool decorates a function, got {function!r}; {hint}")
        name = options.get("name") or getattr(function, "__name__", "")
        hidden = {*options.get("injected", ()), *(() if options.get("state") is None else ("state",))}
        try:
            signature = read_signature(function, hidden)
        except ValueError as error:
            raise ValueError(f"{_where(function)}: tool {name!r}: {error}") from error
        injected = {**signature.injected, **options.get("injected", {})}
        read = {"description": signature.description, "convert": signature.convert}
        fields = {**read, **options, "name": name, "injected": injected}
        return Tool(parameters=signature.parameters, function=function, **fields)  # type: ignore[arg-type]

    return decorate if function is None else decorate(function)


def _problems(tool: Any) -> Iterator[str]:
    """What is wrong with the plain fields of a tool, which may hold anything at all."""
    if not isinstance(tool.name, str) or not _NAME.fullmatch(tool.name):
        yield "its name must be a letter or '_', then up to 63 letters, digits, '_', '-' or '.'"
    if not isinstance(tool.description, str) or not tool.description.strip():
        yield "it needs a description, which the model reads"
    if not callable(tool.function):
        yield f"its function is {tool.function!r}, which cannot be called"
    if not (isinstance(tool.timeout_s, int | float) and 0 < tool.timeout_s < math.inf):
        yield f"timeout_s={tool.timeout_s!r}, expected seconds greater than 0 and finite"
    if not (isinstance(tool.max_output_chars, int) and tool.max_output_chars >= _MIN_OUTPUT_CHARS):
        yield f"max_output_chars={tool.max_output_chars!r}, expected at least {_MIN_OUTPUT_CHARS}"
    if isinstance(tool.secrets, str) or not all(isinstance(name, str) and name for name in tool.secrets):
        yield f"secrets={tool.secrets!r}, expected names of environment variables, such as ['SHOP_KEY']"
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in tool.retry_on):
        yield f"retry_on={tool.retry_on!r}, expected exception classes, such as [ConnectionError]"
    if not (isinstance(tool.retries, int) and tool.retries >= 0 and bool(tool.retries) == bool(tool.retry_on)):
        yield f"retries={tool.retries!r} and retry_on={tool.retry_on!r}, expected both or neither"
    if not (tool.max_concurrent is None or (isinstance(tool.max_concurrent, int) and tool.max_concurrent >= 1)):
        yield f"max_concurrent={tool.max_concurrent!r}, expected a whole number of at least 1, or None"


def _where(function: object) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
