"""Runs a tool's code, in a thread of this process or in a process of its own.

``ToolCode`` is the code with what it was given for one episode; ``ThreadRunner`` puts a time limit around it. A tool
that asks for ``isolation="process"`` gets a ``ProcessRunner`` (``opd_env.tools.run.process``) instead.

Test it alone: ``pytest tests/tools/run/test_limits.py tests/tools/test_tool_options.py``
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from opd_env.tools.contract import Isolation, Tool
from opd_env.tools.redaction import redact, secrets_of
from opd_env.tools.run.output import Output, encode_error, encode_output
from opd_env.tools.run.time_limit import TimeUp, run_with_limit
from opd_env.tools.shared import Shared

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

    def call(self, arguments: Mapping[str, Any]) -> Output:
        """Runs one call with checked arguments.

        Raises:
            TimeoutError: the time was up; the call was ended and the state given up.
        """

    def end_episode(self) -> None:
        """Closes what the episode was given; the next call makes it anew."""


_make_process_runner: Callable[[Tool], Runner] | None = None


def run_processes_by(make: Callable[[Tool], Runner] | None) -> None:
    """Lets something else run the tools that ask for a process, such as a cluster; None takes it back."""
    global _make_process_runner
    _make_process_runner = make


def make_runner(tool: Tool, episode: Episode | None = None) -> Runner:
    """The runner that the tool asks for.

    Args:
        tool: what it runs.
        episode: what the tool and others of its toolbox share; None for a tool that shares nothing.
    """
    if tool.isolation is Isolation.THREAD:
        return ThreadRunner(tool, episode)
    if _make_process_runner is not None:
        return _make_process_runner(tool)
    from opd_env.tools.run.process import ProcessRunner

    return ProcessRunner(tool)


def prepare(tool: Tool) -> None:
    """Finds out early what would let every call of the tool fail.

    Raises:
        ValueError: the tool cannot be copied into the process that it asks for.
        SecretMissing: an environment variable that it needs is not set.
    """
    secrets_of(tool)
    if tool.isolation is Isolation.PROCESS:
        from opd_env.tools.run.process import copy_of

        copy_of(tool)


_turns: WeakKeyDictionary[Tool, threading.Semaphore] = WeakKeyDictionary()
_turns_lock = threading.Lock()


def _after_fork() -> None:
    global _turns_lock
    _turns_lock = threading.Lock()
    _turns.clear()  # turns that other threads of the parent had taken are not ours to wait for


os.register_at_fork(after_in_child=_after_fork)


def turn_of(tool: Tool) -> AbstractContextManager[Any]:
    """Waits until fewer than ``tool.max_concurrent`` calls are running. That ends: each call has its time limit."""
    if tool.max_concurrent is None:
        return nullcontext()
    with _turns_lock:
        return _turns.setdefault(tool, threading.Semaphore(tool.max_concurrent))


class Given:
    """What tools were given for one episode, and the event loop that it belongs to."""

    def __init__(self) -> None:
        self.values: dict[object, Any] = {}
        """By the tool and the parameter's name; by the ``Shared`` object where it is shared."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.loop_is_free = threading.RLock()

    @property
    def is_open(self) -> bool:
        """Whether there may be something to close."""
        return bool(self.values) or self.loop is not None


class Episode:
    """The tools that were given something together: one tool, or all of a toolbox that share anything."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = tuple(tools)
        self.given = Given()


class ToolCode:
    """A tool's function together with what it was given for one episode. Ends nothing by itself but coroutines.

    Args:
        tool: whose function it is.
        episode: what is given is taken from there, and kept there.
    """

    def __init__(self, tool: Tool, episode: Episode | None = None) -> None:
        episode = episode or Episode([tool])
        self.tool = tool
        self.given = episode.given
        # What others made may hold their secrets.
        self._secrets = sorted({one for each in episode.tools for one in secrets_of(each)}, key=len, reverse=True)
        self._deadline = 0.0

    def call(self, arguments: Mapping[str, Any]) -> Output:
        """Runs one call, again if it may be; whatever the code raises becomes an error for the student."""
        self._deadline = time.monotonic() + self.tool.timeout_s + _GRACE_S
        pause, attempt = FIRST_RETRY_S, 0
        while True:
            try:
                output = encode_output(self._value(arguments), self.tool.max_output_chars, self._secrets)
                return dataclasses.replace(output, retries=attempt)
            except TimeUp:
                raise  # nobody waits for an answer any more, and logging could be hit by the next one
            except BaseException as error:  # even SystemExit: this thread or process is the tool's alone
                if attempt == self.tool.retries or not issubclass(type(error), tuple(self.tool.retry_on)):
                    self._log(logging.DEBUG, "tool %s raised")
                    output = encode_error(error, self.tool.max_output_chars, self._secrets)
                    return dataclasses.replace(output, retries=attempt)
            time.sleep(pause)
            pause, attempt = 2 * pause, attempt + 1

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

    def call(self, arguments: Mapping[str, Any]) -> Output:
        """See ``Runner.call``."""
        return self._limited(self._current(), lambda code: code.call(arguments))

    def shared(self, state: Shared) -> Any:
        """What ``state`` has made for this episode, or makes now.

        Raises:
            TimeoutError: it took longer than a call may.
            Exception: whatever the making raises.
        """
        return self._limited(self._current(), lambda code: code.shared(state))

    def _current(self) -> ToolCode:
        """The code for the present episode, which another tool of it may have ended."""
        if self._code.given is not self._episode.given:
            self._code = ToolCode(self._tool, self._episode)
        return self._code

    def _limited(self, code: ToolCode, run: Callable[[ToolCode], Value]) -> Value:
        try:
            return run_with_limit(lambda: run(code), self._tool.timeout_s)
        except TimeoutError:
            self.end_episode()
            raise

    def end_episode(self) -> None:
        """See ``Runner.end_episode``. A ``close()`` that hangs is ended like a call."""
        code = self._current()
        self._episode.given = Given()  # a call that was left behind keeps the old one
        if not code.given.is_open:
            return
        try:
            run_with_limit(code.close, CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("closing the state of tool %s took more than %g s", self._tool.name, CLOSE_TIMEOUT_S)
