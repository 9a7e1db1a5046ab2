"""The two ways to an MCP server, a child process and HTTP, for servers that nobody vouches for.

The ``mcp`` package has such transports too. These keep no message of more than ``MAX_MESSAGE_BYTES``, give up on a
server that writes no messages, log nothing that they could not read, know of each call whether it may have reached the
server (``Attempt``), and kill the whole process group of a child at the end.

Test it alone: ``pytest tests/tools/mcp/test_mcp_rogue.py``
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2
from mcp.shared.message import SessionMessage
from mcp.types import CONNECTION_CLOSED, jsonrpc_message_adapter

from opd_env.tools.redaction import redact

logger = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 8 << 20
"""Bytes of one message; a server that sends more is ended."""
MAX_UNREADABLE_BYTES = 1 << 20
"""Bytes that are no messages, from one start of the server, before it is ended: some print to their standard output."""
TOO_LONG = f"a message of more than {MAX_MESSAGE_BYTES >> 20} MiB"
NO_MESSAGES = "nothing but text that is no message"
_LEAVE_S = 1.0
_SHOWN_CHARS = 500
_MAX_LINE_BYTES = 10_000
_HTTP_TIMEOUT = httpx2.Timeout(30.0, read=300.0)


@dataclass
class Attempt:
    """One attempt of one call. A transport finds it in the context of the task that sends the call."""

    may_have_arrived: bool


current_attempt: ContextVar[Attempt | None] = ContextVar("current_attempt", default=None)


def _mark(may_have_arrived: bool) -> None:
    if (attempt := current_attempt.get()) is not None:
        attempt.may_have_arrived = may_have_arrived


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
        return " ".join(redact(line.decode(errors="replace"), self._forms).split())[:_SHOWN_CHARS]


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


class _ToServer(anyio.abc.ObjectSendStream[Any]):
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
