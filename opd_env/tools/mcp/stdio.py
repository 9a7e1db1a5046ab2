"""Starts an MCP server as a child process and carries messages to and from it.

Worked example::

    async with stdio_transport(["python", "shop.py"], environment, log, ended, wrote) as streams: ...  # for mcp.Client

The ``mcp`` package has such a transport too. This one is for servers that nobody vouches for: it keeps no more than
``MAX_MESSAGE_BYTES`` of a line and gives up on a server that writes no messages, knows of a request whether it reached
the server, logs nothing that it could not read, and kills the server's whole process group at the end.

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
from typing import Any

from opd_env.tools.redaction import redact

logger = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 8 << 20
"""Bytes of one message; a server that sends more is ended."""
MAX_UNREADABLE_BYTES = 1 << 20
"""Bytes that are no messages, from one start of the server, before it is ended: some print to their standard output."""
NOT_SENT = -31_001
"""Code of our own error about a request that did not reach the server (JSON-RPC keeps -32768 to -32000 for itself)."""
TOO_LONG = f"a message of more than {MAX_MESSAGE_BYTES >> 20} MiB"
NO_MESSAGES = "nothing but text that is no message"
_LEAVE_S = 1.0
_WAITING_MESSAGES = 1000
_SHOWN_CHARS = 500
_MAX_LINE_BYTES = 10_000


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
    command: Sequence[str],
    environment: Mapping[str, str],
    log: ServerLog,
    ended: Callable[[str], None],
    wrote: Callable[[], None],
) -> AsyncIterator[Any]:
    """Streams of messages from and to a server.

    Args:
        command: the program and its arguments.
        environment: all its variables.
        log: gets its standard error.
        ended: called when no more messages can come, with the reason if it is not the server's own end.
        wrote: called before a message is written to a server that is there.

    Raises:
        OSError: the program cannot be started.
    """
    import anyio

    process = subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(environment), start_new_session=True,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(MAX_MESSAGE_BYTES)
    to_client, from_server = anyio.create_memory_object_stream[Any](0)
    # A server that does not read must not hold its caller up.
    to_server, from_client = anyio.create_memory_object_stream[Any](_WAITING_MESSAGES)
    transports: list[Any] = []
    try:
        out, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), process.stdout)
        transports.append(out)
        transports.append((await loop.connect_read_pipe(lambda: log, process.stderr))[0])
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
        into, _ = await loop.connect_write_pipe(lambda: protocol, process.stdin)
        transports.append(into)
        writer = asyncio.StreamWriter(into, protocol, None, loop)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, lines, to_client, ended)
            tasks.start_soon(_write, process, writer, from_client, to_client, wrote)
            yield from_server, to_server
            tasks.cancel_scope.cancel()
    finally:
        if transports:
            transports[-1].close()  # its standard input: the way to ask a server to leave
        with anyio.CancelScope(shield=True):
            await _end(process)
        for transport in transports:
            transport.close()
        for stream in (to_client, from_server, to_server, from_client):
            stream.close()


async def _read(lines: asyncio.StreamReader, to_client: Any, ended: Callable[[str], None]) -> None:
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

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


async def _write(
    process: subprocess.Popen[bytes],
    writer: asyncio.StreamWriter,
    from_client: Any,
    to_client: Any,
    wrote: Callable[[], None],
) -> None:
    import anyio
    from mcp.shared.message import SessionMessage
    from mcp.types import ErrorData, JSONRPCError, JSONRPCRequest

    async for item in from_client:
        message = item.message
        if process.poll() is None:
            wrote()
            with contextlib.suppress(OSError):  # then the server's end is read as well
                writer.write(message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
                await writer.drain()
        elif isinstance(message, JSONRPCRequest):
            error = ErrorData(code=NOT_SENT, message="the server has ended")
            with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
                await to_client.send(SessionMessage(JSONRPCError(jsonrpc="2.0", id=message.id, error=error)))


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
