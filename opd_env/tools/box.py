"""The tools of one environment: looks a call up, checks it, runs it, and always gives a result.

Worked example::

    with Toolbox(["calculator"]) as toolbox:
        toolbox.call("calculator", {"expression": "6 * 7"}).content     # '42'
        toolbox.call("calcluator", {}).error                            # ToolErrorKind.UNKNOWN_TOOL
        toolbox.reset()                                                 # the next episode

Test it alone: ``pytest tests/tools/test_box.py``
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from opd_env.errors import did_you_mean
from opd_env.tools.catalogue import get_tool
from opd_env.tools.contract import Isolation, Shared, Tool
from opd_env.tools.redaction import secrets_of
from opd_env.tools.run.answer import Answer, encode_error
from opd_env.tools.run.process import copy_of, process_runner
from opd_env.tools.run.thread import Episode, Runner, ThreadRunner
from opd_env.tools.tool_error import ToolError, ToolErrorKind

MAX_NAMES = 20
"""Tools named in the error about an unknown one."""


@dataclass(frozen=True)
class ToolResult:
    """The result of one call."""

    name: str
    """The tool's name as the student wrote it."""
    content: str
    """What the student reads: the answer, or the error's JSON."""
    error: ToolErrorKind | None = None
    """None when the tool answered."""
    seconds: float = 0.0
    """Wall time of the call, checks and the wait for a turn included."""
    truncated: bool = False
    """The answer was cut to the tool's ``max_output_chars``."""
    retries: int = 0
    """Attempts that failed before this one."""

    @property
    def ok(self) -> bool:
        """Whether the tool answered."""
        return self.error is None


class Toolbox:
    """The tools of one environment, with the state of its current episode.

    Args:
        tools: registered names or tools, in the order in which a model reads them.

    Raises:
        ValueError: an unknown name, something that is no tool, two tools of one name, or a tool that cannot be
            copied into the process that it asks for.
        SecretMissing: an environment variable that a tool needs is not set.
    """

    def __init__(self, tools: Sequence[str | Tool]) -> None:
        if isinstance(tools, str):
            raise ValueError(f"tools={tools!r} is one text, expected a list of tools, such as [{tools!r}]")
        self._tools: dict[str, Tool] = {}
        for entry in tools:
            tool = get_tool(entry) if isinstance(entry, str) else entry
            if not isinstance(tool, Tool):
                raise ValueError(f"{entry!r} is no tool; give a registered name, or a function decorated with @tool")
            if tool.name in self._tools:
                raise ValueError(f"two tools are named {tool.name!r}; rename one with @tool(name=...)")
            self._tools[tool.name] = tool
            secrets_of(tool)
            if tool.isolation is Isolation.PROCESS:
                copy_of(tool)
        self._runners: dict[str, Runner] = {}
        self._sharing = Episode([tool for tool in self if tool.shared])

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Schemas of the listed tools, in order, as chat templates expect them."""
        return [tool.schema for tool in self if tool.listed]

    def call(self, name: str, arguments: object) -> ToolResult:
        """Runs one call. Total: whatever the tool or the student does, there is a result.

        Args:
            name: the tool's name, as the student wrote it.
            arguments: what the student wrote as arguments, parsed from JSON.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C; nothing else is raised.
        """
        start = time.perf_counter()
        try:
            answer = self._run(name, arguments)
        except ToolError as error:
            answer = encode_error(error)
        seconds = time.perf_counter() - start
        return ToolResult(str(name), answer.content, answer.error, seconds, answer.truncated, answer.retries)

    def _run(self, name: object, arguments: object) -> Answer:
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            names = list(self._tools)
            more = ", ..." if len(names) > MAX_NAMES else ""
            known = f"the tools are: {', '.join(names[:MAX_NAMES])}{more}" if names else "there are no tools"
            message = f"no tool named {str(name)[:100]!r}{did_you_mean(str(name), self._tools)}; {known}"
            raise ToolError(ToolErrorKind.UNKNOWN_TOOL, message)
        checked = tool.check(arguments)
        runner = self._runner(tool)
        try:
            with _turn_of(tool):
                return runner.call(checked)
        except TimeoutError:
            lost = "; its state is lost" if tool.injected else ""
            if others := [one.name for one in self._sharing.tools if tool.shared and one is not tool]:
                lost += f", and with it that of {', '.join(others)}"
            message = f"the tool did not answer within {tool.timeout_s:g} s and was ended{lost}"
            raise ToolError(ToolErrorKind.TIMEOUT, message) from None

    def _runner(self, tool: Tool) -> Runner:
        if tool.name not in self._runners:
            on_thread = tool.isolation is Isolation.THREAD
            runner = ThreadRunner(tool, self._sharing if tool.shared else None) if on_thread else process_runner(tool)
            self._runners[tool.name] = runner
        return self._runners[tool.name]

    def shared(self, state: Shared) -> Any:
        """What tools share in the present episode, for a grader that plays the calls of an episode again.

        Args:
            state: what the tools name; made now when no call has made it.

        Raises:
            ValueError: no tool here names it.
            Exception: it is made now, and that fails.
        """
        tool = next((one for one in self if state in one.shared), None)
        if tool is None:
            raise ValueError(f"{state!r} is named by none of the tools {', '.join(self._tools) or '(there are none)'}")
        self._runner(tool)  # closes it when the episode ends
        return ThreadRunner(tool, self._sharing).shared(state)

    def sandbox_levels(self) -> dict[str, str]:
        """Opens the sandboxes that code of the student will run in; their levels by the tool's name.

        Raises:
            SandboxUnavailable: one does not work here; the message says why and what to do.
        """
        return {tool.name: str(tool.sandbox().level) for tool in self if tool.sandbox is not None}

    def sandbox_nodes(self) -> dict[str, str]:
        """The level on each node of a cluster where code of the student runs; empty without a cluster."""
        sandboxes = [tool.sandbox() for tool in self if tool.sandbox is not None]
        return {node: str(level) for sandbox in sandboxes for node, level in sandbox.nodes.items()}

    def reset(self) -> None:
        """Starts a new episode: closes the state of every tool; the first call of a tool makes a new one."""
        for runner in self._runners.values():
            runner.end_episode()

    def close(self) -> None:
        """Ends the last episode."""
        self.reset()
        self._runners.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_turns: WeakKeyDictionary[Tool, threading.Semaphore] = WeakKeyDictionary()
_turns_lock = threading.Lock()


def _after_fork() -> None:
    global _turns_lock
    _turns_lock = threading.Lock()
    _turns.clear()  # turns that other threads of the parent had taken are not ours to wait for


os.register_at_fork(after_in_child=_after_fork)


def _turn_of(tool: Tool) -> AbstractContextManager[Any]:
    """Waits until fewer than ``tool.max_concurrent`` calls are running. That ends: each call has its time limit."""
    if tool.max_concurrent is None:
        return nullcontext()
    with _turns_lock:
        return _turns.setdefault(tool, threading.Semaphore(tool.max_concurrent))
