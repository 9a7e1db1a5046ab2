"""Mounts the tools of an MCP server (Model Context Protocol), over stdio or HTTP: ``pip install 'opd-env[mcp]'``.

Worked example::

    with mount_mcp(["python", "shop.py"], secrets=["SHOP_KEY"]) as shop:
        Toolbox(["calculator", *shop]).call("price", {"item": "pen"})
    mount_mcp("https://maps.example/mcp", headers={"Authorization": "Bearer {MAPS_KEY}"}, secrets=["MAPS_KEY"])

and in a settings file, where the tools are then named like any other::

    mcp_servers: {shop: {server: [python, shop.py], secrets: [SHOP_KEY]}}
    tools: [calculator, price]

Names, descriptions and schemas are the server's, as it lists them when it is mounted. Calls end like those of any tool:
in text, or in a typed error within the time limit. ``docs/tools.md`` says when a server is started again, and which
calls are made again. One server serves all episodes of this process, and may remember across them.

Test it alone: ``pytest tests/tools/mcp/test_mcp.py``
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opd_env.tools.catalogue import register_tool
from opd_env.tools.contract import Tool
from opd_env.tools.redaction import secret_values

if TYPE_CHECKING:
    from opd_env.tools.mcp.connection import Connection

_MARGIN_S = 1.0
_RETRIES = 2
"""Further attempts of a call that did not reach its server, or that may be repeated."""
# Keywords that hold schemas by names of the author's, and keywords that hold no schemas.
_BY_NAME = ("properties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("enum", "const", "default", "examples")
_registered: dict[str, MountedServer] = {}


class MountedServer(Sequence[Tool]):
    """The tools of a server, which runs until ``close`` or the end of the program."""

    def __init__(self, tools: Sequence[Tool], connection: Connection) -> None:
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

    def __exit__(self, *_: object) -> None:
        self.close()


def mount_mcp(
    server: str | Sequence[str],
    *,
    prefix: str = "",
    timeout_s: float = 30.0,
    max_output_chars: int = 4000,
    max_concurrent: int | None = None,
    retries: int = 0,
    secrets: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> MountedServer:
    """Starts or reaches an MCP server; its tools.

    Args:
        server: the command of a stdio server, as a list; or the URL of an HTTP server.
        prefix: put before the name of each tool, to tell two servers apart.
        timeout_s: seconds of wall time for one call; starting a server again is not counted.
        max_output_chars, max_concurrent: as in ``Tool``, for each tool.
        retries: further attempts of a call during which the server died, for every tool; a tool that says that it is
            read-only or idempotent has 2 in any case.
        secrets: environment variables (``Tool.secrets``). A stdio server gets no others, but PATH, HOME and the like.
        headers: of each HTTP request; ``{NAME}`` stands for the secret of that name.

    Raises:
        MCPUnavailable: the server cannot be started or reached.
        ImportError: ``mcp`` is not installed.
        SecretMissing: a variable is not set.
        ValueError: a tool's name or schema cannot be used.
    """
    try:
        from opd_env.tools.mcp.connection import START_TIMEOUT_S, CallLost, CallNotSent, Connection
    except ImportError as error:
        raise ImportError("MCP servers need the package mcp: pip install 'opd-env[mcp]'") from error
    connection = Connection(server, timeout_s, secret_values(secrets, f"MCP server {server!r}"), headers or {})
    listed = connection.start()

    def mounted(one: Any) -> Tool:
        hints = one.annotations
        read_only = bool(hints and hints.read_only_hint)
        repeatable = retries > 0 or read_only or bool(hints and hints.idempotent_hint)
        return Tool(
            name=f"{prefix}{one.name}",
            description=one.description or one.title or one.name,
            parameters=_parameters(one.input_schema),
            function=functools.partial(connection.call, one.name),
            timeout_s=START_TIMEOUT_S + timeout_s + _MARGIN_S,  # the connection itself keeps to the limits
            max_output_chars=max_output_chars,
            max_concurrent=max_concurrent,
            retry_on=[CallNotSent, CallLost] if repeatable else [CallNotSent],
            retries=max(retries, _RETRIES),
            secrets=secrets,
            mutates_state=not read_only,
        )

    try:
        return MountedServer([mounted(one) for one in listed], connection)
    except BaseException:
        connection.close()
        raise


def _parameters(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A server's schema, made safe to check calls by: it may name no argument, and hold patterns that never end."""
    open_end = {} if "properties" in schema else {"additionalProperties": True}
    return dict(_without_patterns({**schema, **open_end}))


def _without_patterns(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_patterns(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _without_patterns(one) for name, one in value.items()}
        elif key not in ("pattern", "patternProperties"):
            kept[key] = value if key in _VALUES else _without_patterns(value)
    return kept if "patternProperties" not in schema else {**kept, "additionalProperties": True}


def register_mcp_servers(servers: Mapping[str, Mapping[str, Any]]) -> None:
    """Mounts servers for the rest of the program and registers their tools; those of a known name are kept.

    Args:
        servers: the options of ``mount_mcp`` for each, by a name of your choice.

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
