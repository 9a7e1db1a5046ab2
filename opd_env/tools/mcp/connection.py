"""The connection to an MCP server: starts or reaches it, calls its tools, and starts it again when it is gone.

A **life** is the time from one start of the server (or session with it) to its end. A call that finds no life begins
one. Of a call that failed with its server, the connection says whether it had reached it:

* ``CallNotSent``: it had not (the server had ended while idle, its session was over, nobody listened). It is safe to
  make again, for any tool.
* ``CallLost``: it had, or may have. It is made again only if the tool says that this does no harm.

``Tool.retry_on`` does the rest (``opd_env.tools.mcp.tools``), so these retries are counted like any others.

Test it alone: ``pytest tests/tools/mcp``
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import mcp
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CONNECTION_CLOSED

from opd_env.errors import UserError
from opd_env.tools.mcp.transports import (
    MAX_MESSAGE_BYTES,
    TOO_LONG,
    Attempt,
    HttpClient,
    ServerLog,
    current_attempt,
    stdio_transport,
)
from opd_env.tools.redaction import RedactingFilter, forms_of, redact
from opd_env.tools.run.answer import encodable
from opd_env.tools.tool_error import ToolError, ToolErrorKind

T = TypeVar("T")
logger = logging.getLogger(__name__)
START_TIMEOUT_S = 60.0
"""Seconds that a server may take to start, and to list its tools."""
MAX_TOOLS = 1000
"""Tools of one server; one that lists more, or lists without end, is refused."""
_LIFE_SIGN_TIMEOUT_S = 2.0
_CLOSE_TIMEOUT_S = 5.0
_SHOWN_CHARS = 500


class MCPUnavailable(UserError):
    """A server could not be started or reached."""


class CallNotSent(ToolError):
    """The call did not reach the server."""


class CallLost(ToolError):
    """The server or the connection failed during the call."""


class _Life:
    def __init__(self) -> None:
        self.client: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.over = asyncio.Event()
        self.reason = ""
        """Why we ended it."""
        self.task: asyncio.Task[None] | None = None


class Connection:
    """A client and, with stdio, its server. The ``async`` methods run in an event loop that all connections share."""

    def __init__(
        self, server: str | Sequence[str], timeout_s: float, secrets: Mapping[str, str], headers: Mapping[str, str]
    ) -> None:
        self._server = server
        self._label = repr(server if isinstance(server, str) else " ".join(server))
        self._timeout_s = timeout_s
        self._secrets = secrets
        self._forms = forms_of(secrets.values())
        self._headers = {name: value.format_map(secrets) for name, value in headers.items()}
        self._life: _Life | None = None
        self._log = ServerLog(self._label, self._forms)
        self._owner = os.getpid()
        self._stack = contextlib.ExitStack()
        atexit.register(self.close)

    def start(self) -> list[Any]:
        """Connects; the server's tools as the ``mcp`` package describes them.

        Raises:
            MCPUnavailable: it cannot be started or reached, or lists no tools.
        """
        self._stack.enter_context(RedactingFilter(self._forms).on_loggers("mcp", "client"))  # "client": mcp's, too
        try:
            return _run(self._list_tools())
        except BaseException:
            self.close()
            raise

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Calls a tool of the server; what it answers.

        Raises:
            ToolError: any failure, within the time limit.
        """
        if os.getpid() != self._owner:
            raise ToolError(ToolErrorKind.SANDBOX, "the tool's server was mounted in another process")
        return _run(self._call(name, encodable(arguments)))

    def close(self) -> None:
        """Ends it; the next call would start it again."""
        atexit.unregister(self.close)
        if os.getpid() == self._owner:
            _run(self._end())
            self._stack.close()

    async def _list_tools(self) -> list[Any]:
        life = await self._begun()
        tools: list[Any] = []
        cursor, pages = None, 0
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while (cursor or not pages) and max(len(tools), pages) <= MAX_TOOLS:
                    page = await life.client.result().list_tools(cursor=cursor)
                    tools, cursor, pages = [*tools, *page.tools], page.next_cursor, pages + 1
        except TimeoutError:
            raise self._unavailable(f"did not list its tools within {START_TIMEOUT_S:g} s") from None
        except Exception as error:
            reason = life.reason or self._clean(error) or type(error).__name__
            raise self._unavailable(f"does not list its tools: {reason}") from error
        if max(len(tools), pages) > MAX_TOOLS:
            raise self._unavailable(f"lists more than {MAX_TOOLS} tools")
        return tools

    async def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        try:
            life = await self._begun()
        except MCPUnavailable as error:
            raise ToolError(ToolErrorKind.SANDBOX, self._clean(error)) from error
        # Each transport marks what it knows: stdio that a call was written, HTTP that it did not arrive.
        attempt = Attempt(may_have_arrived=self._is_http and not life.over.is_set())
        current_attempt.set(attempt)
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await life.client.result().call_tool(name, arguments)
        except TimeoutError:
            self._check(life)
            message = f"the tool did not answer within {self._timeout_s:g} s and was ended"
            raise ToolError(ToolErrorKind.TIMEOUT, message) from None
        except mcp.MCPError as error:
            told, closed = self._clean(error), error.code == CONNECTION_CLOSED
            if closed and not attempt.may_have_arrived:
                self._end_life(life)
                raise CallNotSent(ToolErrorKind.SANDBOX, f"no answer of the tool's server: {told}") from error
            if life.reason == TOO_LONG:
                raise ToolError(ToolErrorKind.OUTPUT_LIMIT, f"the tool's server sent {life.reason}") from error
            self._check(life)
            if closed and (life.over.is_set() or self._is_http):  # else it is the server's own use of this code
                raise CallLost(ToolErrorKind.EXCEPTION, f"the tool's server failed: {told}") from error
            raise ToolError(ToolErrorKind.EXCEPTION, told) from error
        except Exception as error:
            self._check(life)
            raise ToolError(ToolErrorKind.EXCEPTION, f"the tool's server failed: {type(error).__name__}") from error
        text = "\n".join(block.text if block.type == "text" else f"[{block.type}]" for block in result.content)
        if result.is_error:
            raise ToolError(ToolErrorKind.EXCEPTION, text)
        return text if result.content else result.structured_content

    async def _begun(self) -> _Life:
        """The present life, or a new one."""
        if self._life is None:
            self._life = _Life()
            self._life.task = asyncio.create_task(self._live(self._life))
        life = self._life
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.shield(life.client)  # others may be waiting for it too
            return life
        except TimeoutError:
            if life.task is not None:
                life.task.cancel()
            raise self._unavailable(f"did not start within {START_TIMEOUT_S:g} s") from None

    async def _live(self, life: _Life) -> None:
        """Owns the client: the package wants it closed by the task that opened it."""
        try:
            async with self._transport(life) as transport, mcp.Client(transport, cache=None) as client:
                life.client.set_result(client)
                await life.over.wait()
        except Exception as error:
            if not life.client.done():
                said = self._log.last_words()
                reason = f"it sent {life.reason}" if life.reason else self._clean(_first(error))
                told = f"cannot be reached: {reason}{f'; it said: {said}' if said else ''}"
                life.client.set_exception(self._unavailable(told))
                life.client.exception()  # nobody may be left who waits for it
            logger.debug("MCP server %s ended: %r", self._label, type(error))
        finally:
            self._end_life(life)

    @contextlib.asynccontextmanager
    async def _transport(self, life: _Life) -> AsyncIterator[Any]:
        ended = functools.partial(self._end_life, life)
        if isinstance(self._server, str):
            async with HttpClient(self._headers, ended) as http:
                yield streamable_http_client(self._server, http_client=http, max_sse_event_size=MAX_MESSAGE_BYTES)
        else:
            yield stdio_transport(self._server, {**get_default_environment(), **self._secrets}, self._log, ended)

    def _end_life(self, life: _Life, reason: str = "") -> None:
        life.reason = life.reason or reason
        life.over.set()
        if self._life is life:
            self._life = None

    def _check(self, life: _Life) -> None:
        """Ends a life that gives no sign of life any more; the next call begins another."""

        async def check() -> None:
            try:
                async with asyncio.timeout(_LIFE_SIGN_TIMEOUT_S):
                    await life.client.result().list_tools(cache_mode="bypass")
            except Exception:
                logger.warning("MCP server %s gives no answer and is started again", self._label)
                self._end_life(life)

        if not life.over.is_set():
            checking = asyncio.create_task(check())
            _tasks.add(checking)
            checking.add_done_callback(_tasks.discard)

    async def _end(self) -> None:
        life, self._life = self._life, None
        if life is not None and life.task is not None:
            life.over.set()
            if not life.client.done():
                life.task.cancel()
            await asyncio.wait([life.task], timeout=_CLOSE_TIMEOUT_S)

    @property
    def _is_http(self) -> bool:
        return isinstance(self._server, str)

    def _unavailable(self, told: str) -> MCPUnavailable:
        return MCPUnavailable(f"MCP server {self._label} {told}")

    def _clean(self, error: object) -> str:
        return " ".join(redact(str(error), self._forms).split())[:_SHOWN_CHARS]


_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork has no thread for its parent's
_tasks: set[asyncio.Task[None]] = set()  # asyncio itself holds a task only weakly
_lock = threading.Lock()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in the event loop of all connections of this process."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="opd-env-mcp", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(work, loop).result()


def _first(error: BaseException) -> BaseException:
    """The first error in a group of errors."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
