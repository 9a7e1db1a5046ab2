"""The connection to an MCP server: starts or reaches it, calls its tools, and starts it again when it is gone.

A **life** is the time from one start of the server (or session with it) to its end. A call that finds no life begins
one. Of a call that failed with its server, the connection says whether it had reached it:

* ``CallNotSent``: it had not (the server had ended while idle, its session was over, nobody listened). It is safe to
  make again, for any tool.
* ``CallLost``: it had, or may have. It is made again only if the tool says that this does no harm.

``Tool.retry_on`` does the rest (``opd_env.tools.mcp.tools``), so these retries are counted like any others.

The transports are for servers that nobody vouches for. The ``mcp`` package has a child process and HTTP too; these keep
no message of more than ``MAX_MESSAGE_BYTES``, give up on a server that writes no messages, log nothing that they could
not read, know of each call whether it may have reached the server (``Attempt``), and kill the whole process group of a
child at the end.

Test it alone: ``pytest tests/tools/mcp``
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import httpx2
import mcp
from anyio.abc import ObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp.types import CONNECTION_CLOSED, jsonrpc_message_adapter

from opd_env.errors import UserError
from opd_env.tools.redaction import RedactingFilter, forms_of, redact
from opd_env.tools.run.answer import encodable
from opd_env.tools.tool_error import ToolError, ToolErrorKind

T = TypeVar("T")
logger = logging.getLogger(__name__)
START_TIMEOUT_S = 60.0
"""Seconds that a server may take to start, and to list its tools."""
MAX_TOOLS = 1000
"""Tools of one server; one that lists more, or lists without end, is refused."""
MAX_MESSAGE_BYTES = 8 << 20
"""Bytes of one message; a server that sends more is ended."""
MAX_UNREADABLE_BYTES = 1 << 20
"""Bytes that are no messages, from one start of the server, before it is ended: some print to their standard output."""
TOO_LONG = f"a message of more than {MAX_MESSAGE_BYTES >> 20} MiB"
NO_MESSAGES = "nothing but text that is no message"
_LIFE_SIGN_TIMEOUT_S = 2.0
_CLOSE_TIMEOUT_S = 5.0
_LEAVE_S = 1.0
_HTTP_TIMEOUT = httpx2.Timeout(30.0, read=300.0)
_SHOWN_CHARS = 500
_MAX_LINE_BYTES = 10_000


class MCPUnavailable(UserError):
    """A server could not be started or reached."""


class CallNotSent(ToolError):
    """The call did not reach the server."""


class CallLost(ToolError):
    """The server or the connection failed during the call."""


@dataclass
class Attempt:
    """One attempt of one call. A transport finds it in the context of the task that sends the call."""

    may_have_arrived: bool


_current_attempt: ContextVar[Attempt | None] = ContextVar("current_attempt", default=None)


def _mark(may_have_arrived: bool) -> None:
    if (attempt := _current_attempt.get()) is not None:
        attempt.may_have_arrived = may_have_arrived


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
        _current_attempt.set(attempt)
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
        return _one_line(str(error), self._forms)


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


def _one_line(text: str, secrets: Sequence[str]) -> str:
    return " ".join(redact(text, secrets).split())[:_SHOWN_CHARS]


class ServerLog(asyncio.Protocol):
    """What a server writes to its standard error: for our log, and its last words for an error message."""

    def __init__(self, label: str, forms: Sequence[str]) -> None:
        self._label = label
        self._forms = forms
        self._unfinished = b""
        self._lines: deque[str] = deque(maxlen=10)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop. Waits for the ends of lines, since a secret may come in two pieces."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            self._lines.append(self._clean(line))
            logger.debug("MCP server %s: %s", self._label, self._lines[-1])
        if len(self._unfinished) > _MAX_LINE_BYTES:
            self._unfinished = b"(the start of a long line is left out) "

    def last_words(self) -> str:
        """The end of what it wrote, without secrets."""
        return " ".join([*self._lines, self._clean(self._unfinished)]).strip()[-_SHOWN_CHARS:]

    def _clean(self, line: bytes) -> str:
        return _one_line(line.decode(errors="replace"), self._forms)


@contextlib.asynccontextmanager
async def stdio_transport(
    command: Sequence[str], environment: Mapping[str, str], log: ServerLog, ended: Callable[[str], None]
) -> AsyncIterator[Any]:
    """Starts a server; streams of messages from and to it, for ``mcp.Client``.

    Args:
        command: the program and its arguments.
        environment: all its variables.
        log: gets its standard error.
        ended: called when no more messages can come, with the reason if it is not the server's own end.

    Raises:
        OSError: the program cannot be started.
    """
    process = subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(environment), start_new_session=True,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(MAX_MESSAGE_BYTES)
    to_client, from_server = anyio.create_memory_object_stream[Any](0)
    pipes: list[Any] = []
    try:
        pipes.append((await loop.connect_write_pipe(asyncio.BaseProtocol, process.stdin))[0])
        pipes.append((await loop.connect_read_pipe(lambda: log, process.stderr))[0])
        pipes.append((await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), process.stdout))[0])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, lines, to_client, ended)
            yield from_server, _ToServer(process, pipes[0])
            tasks.cancel_scope.cancel()
    finally:
        if pipes:
            pipes[0].close()  # its standard input: the way to ask a server to leave
        with anyio.CancelScope(shield=True):
            await _end(process)
        for pipe in (*pipes, to_client, from_server):
            pipe.close()


async def _read(lines: asyncio.StreamReader, to_client: Any, ended: Callable[[str], None]) -> None:
    unreadable = 0
    with to_client:
        while True:
            try:
                line = await lines.readline()
            except ValueError:
                return ended(TOO_LONG)
            if not line:
                return ended("")
            try:
                message = jsonrpc_message_adapter.validate_json(line, by_name=False)
            except ValueError:
                unreadable += len(line)
                if unreadable > MAX_UNREADABLE_BYTES:
                    return ended(NO_MESSAGES)
                continue
            await to_client.send(SessionMessage(message))


class _ToServer(ObjectSendStream[Any]):
    """Writes in the task of the caller, so that each call learns whether it was written to a server that was there.

    It never waits: a server that does not read holds nobody up, and is ended after the time limit of the call.
    """

    def __init__(self, process: subprocess.Popen[bytes], pipe: asyncio.WriteTransport) -> None:
        self._process = process
        self._pipe = pipe

    async def send(self, item: Any) -> None:
        """Writes a message."""
        if self._process.poll() is not None or self._pipe.is_closing():
            raise anyio.ClosedResourceError
        _mark(may_have_arrived=True)
        self._pipe.write(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")

    async def aclose(self) -> None:
        """Leaves the pipe to ``stdio_transport``."""


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Waits a little for the server to leave by itself; then kills it, and in any case all that it started."""
    deadline = time.monotonic() + _LEAVE_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class HttpClient(httpx2.AsyncClient):
    """For the ``mcp`` package's transport over HTTP.

    Failures of the connection would there end all calls under way; here they are errors of the one request.

    Args:
        headers: sent with each request.
        ended: called with the reason when a message is too long.
    """

    def __init__(self, headers: Mapping[str, str], ended: Callable[[str], None]) -> None:
        super().__init__(headers={**headers, "accept-encoding": "identity"}, timeout=_HTTP_TIMEOUT)
        self._ended = ended

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends a request. Reads the answer within bounds; events are left to the package, which bounds each."""
        try:
            response = await super().send(request, **options)
            # What nobody asked for is not unpacked: a few bytes could become gigabytes.
            response.headers.pop("content-encoding", None)
            if response.status_code == 404 and "mcp-session-id" in request.headers:
                await response.aclose()  # the protocol: nothing was done, begin a new session
                _mark(may_have_arrived=False)
                return _failure(request, "the session is over")
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                return response
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_MESSAGE_BYTES:
                    await response.aclose()
                    self._ended(TOO_LONG)
                    return _failure(request, TOO_LONG)
        except httpx2.TransportError as error:
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout):
                _mark(may_have_arrived=False)
            return _failure(request, f"{type(error).__name__}: {error}")
        return httpx2.Response(response.status_code, headers=response.headers, content=bytes(body), request=request)


def _failure(request: httpx2.Request, message: str) -> httpx2.Response:
    error = {"code": CONNECTION_CLOSED, "message": message}
    return httpx2.Response(503, json={"jsonrpc": "2.0", "id": None, "error": error}, request=request)
