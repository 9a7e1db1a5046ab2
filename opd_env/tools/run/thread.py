"""A tool's code with what it was given for one episode (``ToolCode``), and a time limit around it (``ThreadRunner``).

A tool with ``isolation="process"`` has its ``ToolCode`` in a child (``opd_env.tools.run.process``).

Test it alone: ``pytest tests/tools/run/test_limits.py tests/tools/test_tool_options.py``
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from opd_env.tools.contract import Shared, Tool
from opd_env.tools.redaction import redact, secrets_of
from opd_env.tools.run.answer import Answer, encode_answer, encode_error
from opd_env.tools.run.time_limit import TimeUp, run_with_limit

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
CLOSE_TIMEOUT_S = 2.0
"""Seconds that closing what an episode was given may take."""
FIRST_RETRY_S = 0.1
"""Seconds before the first retry; before each further one it is twice as long."""
_GRACE_S = 0.05
_CANCEL_TIMEOUT_S = 0.5


class Runner(Protocol):
    """Runs the calls of one tool in one episode after the other."""

    def call(self, arguments: Mapping[str, Any]) -> Answer:
        """Runs one call with checked arguments.

        Raises:
            TimeoutError: the time was up; the call was ended and the state given up.
        """

    def end_episode(self) -> None:
        """Closes what the episode was given; the next call makes it anew."""


class Given:
    """What tools were given for one episode, and the event loop that it belongs to."""

    def __init__(self) -> None:
        self.values: dict[object, Any] = {}
        """By the tool and the parameter's name; by the ``Shared`` object where it is shared."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.loop_is_free = threading.RLock()


class Episode:
    """The tools that were given something together: one tool, or all of a toolbox that share anything."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = tuple(tools)
        self.given = Given()


class ToolCode:
    """A tool's function, with what it was given for one episode. Ends nothing by itself but coroutines."""

    def __init__(self, tool: Tool, episode: Episode | None = None) -> None:
        episode = episode or Episode([tool])
        self.tool = tool
        self.given = episode.given
        # What others made may hold their secrets.
        self._secrets = sorted({one for each in episode.tools for one in secrets_of(each)}, key=len, reverse=True)
        self._deadline = 0.0

    def call(self, arguments: Mapping[str, Any]) -> Answer:
        """Runs one call, again if it may be; whatever the code raises becomes an error for the student."""
        self._deadline = time.monotonic() + self.tool.timeout_s + _GRACE_S
        attempt = 0
        while True:
            try:
                answer = encode_answer(self._value(arguments), self.tool.max_output_chars, self._secrets)
            except TimeUp:
                raise  # nobody waits for an answer any more, and logging could be hit by the next one
            except BaseException as error:  # even SystemExit: this thread or process is the tool's alone
                if attempt < self.tool.retries and issubclass(type(error), tuple(self.tool.retry_on)):
                    time.sleep(FIRST_RETRY_S * 2**attempt)
                    attempt += 1
                    continue
                self._log(logging.DEBUG, "tool %s raised")
                answer = encode_error(error, self.tool.max_output_chars, self._secrets)
            return dataclasses.replace(answer, retries=attempt)

    def _value(self, arguments: Mapping[str, Any]) -> Any:
        keywords = self.tool.convert(arguments)
        for name, make in self.tool.injected.items():
            keywords[name] = self._made(make, make if isinstance(make, Shared) else (self.tool, name))
        return self._awaited(self.tool.function(**keywords))

    def _made(self, make: Callable[[], Any], key: object) -> Any:
        values = self.given.values
        if key not in values:
            values[key] = self._awaited(make())
        return values[key]

    def shared(self, state: Shared) -> Any:
        """What ``state`` made for this episode."""
        self._deadline = time.monotonic() + self.tool.timeout_s + _GRACE_S
        return self._made(state, state)

    def _awaited(self, value: Any) -> Any:
        """Runs a coroutine in the episode's event loop, and cancels it shortly after its caller has given up on it."""
        if not inspect.isawaitable(value):
            return value
        import asyncio

        async def wait() -> Any:
            return await asyncio.wait_for(value, self._deadline - time.monotonic())

        given = self.given
        with given.loop_is_free:
            given.loop = given.loop or asyncio.new_event_loop()
            return given.loop.run_until_complete(wait())

    def close(self) -> None:
        """Closes what the episode was given, as far as it can be closed, and its event loop."""
        self._deadline = time.monotonic() + CLOSE_TIMEOUT_S
        given = self.given
        values, given.values = given.values, {}
        for value in reversed(values.values()):
            try:
                if (close := getattr(value, "close", None)) is not None:
                    self._awaited(close())
            except BaseException:
                self._log(logging.WARNING, "closing the state of tool %s failed")
        # A coroutine whose time was up is cancelled by now, unless it blocks its loop; then both are left behind.
        if given.loop is not None and given.loop_is_free.acquire(timeout=_CANCEL_TIMEOUT_S):
            try:
                given.loop.run_until_complete(_cancel_others())
            finally:
                given.loop.close()
                given.loop = None
                given.loop_is_free.release()

    def _log(self, level: int, message: str) -> None:
        if logger.isEnabledFor(level):
            logger.log(level, f"{message}\n%s", self.tool.name, redact(traceback.format_exc(), self._secrets))


async def _cancel_others() -> None:
    import asyncio

    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT_S)
    await asyncio.get_running_loop().shutdown_asyncgens()


class ThreadRunner:
    """Runs a tool in worker threads of this process."""

    def __init__(self, tool: Tool, episode: Episode | None = None) -> None:
        self._tool = tool
        self._episode = episode or Episode([tool])
        self._code = ToolCode(tool, self._episode)

    def call(self, arguments: Mapping[str, Any]) -> Answer:
        """Runs one call."""
        return self._limited(lambda code: code.call(arguments))

    def shared(self, state: Shared) -> Any:
        """What ``state`` has made for this episode, or makes now.

        Raises:
            TimeoutError: it took longer than a call may.
            Exception: whatever the making raises.
        """
        return self._limited(lambda code: code.shared(state))

    def _current(self) -> ToolCode:
        """The code for the present episode, which another tool of it may have ended."""
        if self._code.given is not self._episode.given:
            self._code = ToolCode(self._tool, self._episode)
        return self._code

    def _limited(self, run: Callable[[ToolCode], Value]) -> Value:
        code = self._current()
        try:
            return run_with_limit(lambda: run(code), self._tool.timeout_s)
        except TimeoutError:
            self.end_episode()
            raise

    def end_episode(self) -> None:
        """Closes what the episode was given. A ``close()`` that hangs is ended like a call."""
        code = self._current()
        self._episode.given = Given()  # a call that was left behind keeps the old one
        if not code.given.values and code.given.loop is None:  # nothing to close
            return
        try:
            run_with_limit(code.close, CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("closing the state of tool %s took more than %g s", self._tool.name, CLOSE_TIMEOUT_S)
