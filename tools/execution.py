"""Runs a tool's code, in a thread of this process or in a process of its own.

``ToolCode`` is the code with the state of one episode; ``ThreadRunner`` puts a time limit around it. A tool
that asks for ``isolation="process"`` gets a ``ProcessRunner`` (``opd_env.tools.process``) instead.

Test it alone: ``pytest tests/tools/test_tool_limits.py``
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

from opd_env.tools.base import Isolation, Tool
from opd_env.tools.output import Output, encode_error, encode_output
from opd_env.tools.time_limit import run_with_limit

logger = logging.getLogger(__name__)
CLOSE_TIMEOUT_S = 2.0
"""Seconds that the ``close()`` of a state may take."""
_GRACE_S = 0.05


class Runner(Protocol):
    """Runs the calls of one tool in one episode after the other."""

    def call(self, arguments: Mapping[str, Any]) -> Output:
        """Runs one call with checked arguments.

        Raises:
            TimeoutError: the time was up; the call was ended and the state given up.
        """

    def end_episode(self) -> None:
        """Closes the state; the next call makes a new one."""


def make_runner(tool: Tool) -> Runner:
    """The runner that the tool asks for."""
    if tool.isolation is Isolation.PROCESS:
        from opd_env.tools.process import ProcessRunner

        return ProcessRunner(tool)
    return ThreadRunner(tool)


def prepare(tool: Tool) -> None:
    """Finds out early what would let every call of the tool fail.

    Raises:
        ValueError: the tool cannot be copied into the process that it asks for.
    """
    if tool.isolation is Isolation.PROCESS:
        from opd_env.tools.process import copy_of

        copy_of(tool)


class ToolCode:
    """A tool's function together with the state of one episode. Knows no time limit."""

    def __init__(self, tool: Tool) -> None:
        self.tool = tool
        self.state: Any = None
        self.has_state = False

    def call(self, arguments: Mapping[str, Any]) -> Output:
        """Runs one call; whatever the code raises becomes an error for the student."""
        try:
            keywords = self.tool.convert(arguments)
            if self.tool.state is not None:
                if not self.has_state:
                    self.state, self.has_state = self.tool.state(), True
                keywords["state"] = self.state
            value = self.tool.function(**keywords)
            if inspect.isawaitable(value):
                value = _await(value, self.tool.timeout_s + _GRACE_S)
            return encode_output(value, self.tool.max_output_chars)
        except BaseException as error:  # even SystemExit: this thread or process is the tool's alone
            logger.debug("tool %s raised", self.tool.name, exc_info=True)
            return encode_error(error, self.tool.max_output_chars)

    def close(self) -> None:
        """Closes the state, if there is one that can be closed."""
        close = getattr(self.state, "close", None)
        self.state, self.has_state = None, False
        if close is None:
            return
        try:
            close()
        except BaseException:
            logger.warning("closing the state of tool %s failed", self.tool.name, exc_info=True)


class ThreadRunner:
    """Runs a tool in worker threads of this process."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._code = ToolCode(tool)

    def call(self, arguments: Mapping[str, Any]) -> Output:
        """See ``Runner.call``."""
        code = self._code
        try:
            return run_with_limit(lambda: code.call(arguments), self._tool.timeout_s)
        except TimeoutError:
            self.end_episode()
            raise

    def end_episode(self) -> None:
        """See ``Runner.end_episode``. A ``close()`` that hangs is ended like a call."""
        code, self._code = self._code, ToolCode(self._tool)  # a call that was left behind keeps the old one
        if not code.has_state:
            return
        try:
            run_with_limit(code.close, CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("closing the state of tool %s took more than %g s", self._tool.name, CLOSE_TIMEOUT_S)


def _await(value: Awaitable[Any], timeout_s: float) -> Any:
    """Runs a coroutine; cancels it shortly after the caller has given up on it."""
    import asyncio

    async def run() -> Any:
        return await asyncio.wait_for(value, timeout_s)

    return asyncio.run(run())
