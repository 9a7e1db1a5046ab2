"""Mounts the tools of an MCP server (Model Context Protocol), over stdio or HTTP: ``pip install 'opd-env[mcp]'``.

Worked example::

    with mount_mcp(["python", "shop.py"], secrets=["SHOP_KEY"]) as shop:
        Toolbox(["calculator", *shop]).call("price", {"item": "pen"})
    mount_mcp("https://maps.example/mcp", headers={"Authorization": "Bearer {MAPS_KEY}"}, secrets=["MAPS_KEY"])

and in a settings file, where the tools are then named like any other::

    mcp_servers: {shop: {server: [python, shop.py], secrets: [SHOP_KEY]}}
    tools: [calculator, price]

Names, descriptions and schemas are the server's. Calls end like those of any tool: in text, or in a typed error within
the time limit. After a time-out the server is asked for a sign of life, and started again if it gives none; so is one
that died. A server that cannot be started is no fault of the student (kind ``sandbox``).

One server serves all episodes of this process: what it remembers, it remembers across episodes.

Test it alone: ``pytest tests/tools/test_mcp.py``
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
from types import TracebackType
from typing import Any, TypeVar

from opd_env.errors import UserError
from opd_env.tools.base import Tool
from opd_env.tools.errors import ToolError, ToolErrorKind
from opd_env.tools.redaction import forms_of, redact, secret_values
from opd_env.tools.registry import register_tool

T = TypeVar("T")
logger = logging.getLogger(__name__)
START_TIMEOUT_S = 60.0
"""Seconds that a server may take to start and to list its tools."""
_LIFE_SIGN_TIMEOUT_S = 2.0
_CLOSE_TIMEOUT_S = 5.0
_MARGIN_S = 1.0
_SHOWN_CHARS = 500


class MCPUnavailable(UserError):
    """A server could not be started or reached, or the extra is not installed."""


def mount_mcp(
    server: str | Sequence[str],
    *,
    prefix: str = "",
    timeout_s: float = 30.0,
    max_output_chars: int = 4000,
    max_concurrent: int | None = None,
    secrets: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> MountedServer:
    """Starts or reaches an MCP server; its tools.

    Args:
        server: the command of a stdio server, as a list; or the URL of an HTTP server.
        prefix: put before the name of each tool, to tell two servers apart.
        timeout_s: seconds of wall time for one call; starting a server again is not counted.
        max_output_chars, max_concurrent: as in ``Tool``, for each tool.
        secrets: environment variables, see ``Tool.secrets``. They are the only ones of ours that a stdio server gets,
            beside the likes of PATH and HOME.
        headers: of each HTTP request; ``{NAME}`` stands for the secret of that name.

    Raises:
        MCPUnavailable: the server cannot be started or reached; or ``mcp`` is not installed.
        SecretMissing: a variable is not set.
        ValueError: a tool's name or schema is no use.
    """
    connection = _Connection(server, timeout_s, secret_values(secrets, f"MCP server {_label(server)}"), headers or {})
    listed = connection.start()
    try:
        tools = [
            Tool(
                name=f"{prefix}{one.name}",
                description=one.description or one.title or one.name,
                # A schema that names no argument says nothing about them.
                parameters=one.input_schema | ({} if "properties" in one.input_schema else _ANY_ARGUMENT),
                function=functools.partial(connection.call, one.name),
                timeout_s=START_TIMEOUT_S + timeout_s + _MARGIN_S,  # the connection itself keeps to the limits
                max_output_chars=max_output_chars,
                max_concurrent=max_concurrent,
                secrets=secrets,
                mutates_state=not (one.annotations and one.annotations.read_only_hint),
            )
            for one in listed
        ]
    except BaseException:
        connection.close()
        raise
    return MountedServer(tools, connection)


_ANY_ARGUMENT = {"additionalProperties": True}
_registered: dict[str, MountedServer] = {}


def register_mcp_servers(servers: Mapping[str, Mapping[str, Any]]) -> None:
    """Mounts servers for the rest of the program and registers their tools; those of a known name are kept.

    Args:
        servers: the options of ``mount_mcp`` for each, by a name of one's choice.

    Raises:
        ValueError: an unknown option, or a tool's name is taken; and what ``mount_mcp`` raises.
    """
    for name, options in servers.items():
        if name in _registered:
            continue
        try:
            mounted = mount_mcp(**options)
        except TypeError as error:
            raise ValueError(f"mcp_servers.{name}: {error}; the options are those of mount_mcp") from error
        for tool in mounted:
            register_tool(tool)
        _registered[name] = mounted


class MountedServer(Sequence[Tool]):
    """The tools of a server, which runs until ``close`` or the end of the program."""

    def __init__(self, tools: Sequence[Tool], connection: _Connection) -> None:
        self._tools = tuple(tools)
        self._connection = connection

    def close(self) -> None:
        """Ends a stdio server, and the session with an HTTP server."""
        self._connection.close()

    def __getitem__(self, index: Any) -> Any:
        return self._tools[index]

    def __len__(self) -> int:
        return len(self._tools)

    def __enter__(self) -> MountedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Life:
    """From one start of the server to its end."""

    def __init__(self) -> None:
        self.ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.over = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class _Connection:
    """A client and, with stdio, its server. The ``async`` methods run in an event loop that all connections share."""

    def __init__(
        self, server: str | Sequence[str], timeout_s: float, secrets: Mapping[str, str], headers: Mapping[str, str]
    ) -> None:
        self._server = server
        self._label = _label(server)
        self._timeout_s = timeout_s
        self._secrets = secrets
        self._forms = forms_of(secrets.values())
        self._headers = {name: value.format_map(secrets) for name, value in headers.items()}
        self._life: _Life | None = None
        self._log = _ServerLog(self._label, self._forms)
        self._owner = os.getpid()
        atexit.register(self.close)

    def start(self) -> list[Any]:
        """Connects; the server's tools as the ``mcp`` package describes them."""
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise MCPUnavailable("MCP servers need the package mcp: pip install 'opd-env[mcp]'") from error
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
        return _run(self._call(name, arguments))

    def close(self) -> None:
        """Ends it; the next call would start it again."""
        atexit.unregister(self.close)
        if os.getpid() == self._owner:
            _run(self._end())

    async def _list_tools(self) -> list[Any]:
        try:
            client = await self._client()
            async with asyncio.timeout(START_TIMEOUT_S):
                tools, cursor = [], None
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if not cursor:
                        return tools
        except MCPUnavailable:
            raise
        except Exception as error:
            reason = self._clean(error) or type(error).__name__
            raise MCPUnavailable(f"MCP server {self._label} does not list its tools: {reason}") from error

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        from mcp import MCPError

        life = self._life
        try:
            client = await self._client()
            life = self._life
            async with asyncio.timeout(self._timeout_s):
                result = await client.call_tool(name, dict(arguments))
        except TimeoutError:
            self._check(life)
            message = f"the tool did not answer within {self._timeout_s:g} s and was ended"
            raise ToolError(ToolErrorKind.TIMEOUT, message) from None
        except MCPUnavailable as error:
            raise ToolError(ToolErrorKind.SANDBOX, self._clean(error)) from error
        except MCPError as error:
            self._check(life)
            raise ToolError(ToolErrorKind.EXCEPTION, self._clean(error.message)) from error
        except Exception as error:
            self._check(life)
            raise ToolError(ToolErrorKind.EXCEPTION, f"the tool's server failed: {type(error).__name__}") from error
        if result.is_error:
            raise ToolError(ToolErrorKind.EXCEPTION, _text_of(result.content))
        return _text_of(result.content) if result.content else result.structured_content

    async def _client(self) -> Any:
        if self._life is None:
            self._life = _Life()
            self._life.task = asyncio.create_task(self._live(self._life))
        life = self._life
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return await asyncio.shield(life.ready)  # others may be waiting for it too
        except TimeoutError:
            if life.task is not None:
                life.task.cancel()
            message = f"MCP server {self._label} did not start within {START_TIMEOUT_S:g} s"
            raise MCPUnavailable(message) from None

    async def _live(self, life: _Life) -> None:
        """Owns the client: the package wants it closed by the task that opened it."""
        import mcp

        try:
            async with self._transport() as transport, mcp.Client(transport, cache=None) as client:
                life.ready.set_result(client)
                await life.over.wait()
        except Exception as error:
            if not life.ready.done():
                said = self._log.last_words()
                reason = f"{self._clean(_first(error))}{f'; it said: {said}' if said else ''}"
                life.ready.set_exception(MCPUnavailable(f"MCP server {self._label} cannot be reached: {reason}"))
                life.ready.exception()  # nobody may be left who waits for it
            logger.debug("MCP server %s ended: %r", self._label, type(error))
        finally:
            if self._life is life:
                self._life = None

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        from mcp import StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        if isinstance(self._server, str):
            async with create_mcp_http_client(headers=self._headers) as http:
                yield streamable_http_client(self._server, http_client=http)
        else:
            command, *arguments = self._server
            parameters = StdioServerParameters(command=command, args=arguments, env=dict(self._secrets))
            async with self._log.open() as log:
                yield stdio_client(parameters, errlog=log)

    def _check(self, life: _Life | None) -> None:
        """Ends a life that gives no sign of life any more; the next call begins another."""

        async def check() -> None:
            if life is None or not life.ready.done():
                return
            try:
                async with asyncio.timeout(_LIFE_SIGN_TIMEOUT_S):
                    await life.ready.result().list_tools(cache_mode="bypass")
            except Exception:
                logger.warning("MCP server %s gives no answer and is started again", self._label)
                if self._life is life:
                    self._life = None
                life.over.set()

        checking = asyncio.create_task(check())
        _tasks.add(checking)
        checking.add_done_callback(_tasks.discard)

    async def _end(self) -> None:
        life, self._life = self._life, None
        if life is not None and life.task is not None:
            life.over.set()
            if not life.ready.done():
                life.task.cancel()
            await asyncio.wait([life.task], timeout=_CLOSE_TIMEOUT_S)

    def _clean(self, error: object) -> str:
        return redact(" ".join(str(error).split()), self._forms)[:_SHOWN_CHARS]


class _ServerLog(asyncio.Protocol):
    """What a stdio server writes to its standard error: for our log, and its last words for an error message."""

    def __init__(self, label: str, forms: Sequence[str]) -> None:
        self._label = label
        self._forms = forms
        self._tail = b""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        """The end that the server writes to."""
        self._tail = b""
        read_end, write_end = os.pipe()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: self, os.fdopen(read_end, "rb"))
        try:
            with os.fdopen(write_end, "wb", buffering=0) as log:
                yield log
        finally:
            transport.close()

    def data_received(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-4 * _SHOWN_CHARS :]
        logger.debug("MCP server %s: %s", self._label, redact(data.decode(errors="replace"), self._forms))

    def last_words(self) -> str:
        """The end of what it wrote, without secrets."""
        return redact(" ".join(self._tail.decode(errors="replace").split()), self._forms)[-_SHOWN_CHARS:]


_loops: dict[int, asyncio.AbstractEventLoop] = {}
_tasks: set[asyncio.Task[None]] = set()
_lock = threading.Lock()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in the event loop of all connections of this process."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="opd-env-mcp", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(work, loop).result()


def _text_of(blocks: Sequence[Any]) -> str:
    """The text of an answer; of anything else only what it is."""
    return "\n".join(block.text if block.type == "text" else f"[{block.type}]" for block in blocks)


def _first(error: BaseException) -> BaseException:
    """The first error in a group of errors."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _label(server: str | Sequence[str]) -> str:
    return repr(server if isinstance(server, str) else " ".join(server))
