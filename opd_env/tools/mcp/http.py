"""The HTTP client of an MCP server: says which requests did not reach it, and keeps its answers within bounds.

Test it alone: ``pytest tests/tools/mcp/test_mcp_rogue.py``
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from opd_env.tools.mcp.stdio import MAX_MESSAGE_BYTES, NOT_SENT, TOO_LONG

LOST = -31_002
"""Code of our own error about a request whose answer was lost on the way."""
_TIMEOUT_S = 30.0
_STREAM_TIMEOUT_S = 300.0


def http_client(headers: Mapping[str, str], ended: Callable[[str], None]) -> Any:
    """An ``httpx2.AsyncClient`` for the ``mcp`` package's own transport.

    Args:
        headers: sent with each request.
        ended: called with the reason when a message is too long.
    """
    import httpx2

    class BoundedStream(httpx2.AsyncByteStream):
        """A body that ends in an error when it is too long."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._stream:
                size += len(chunk)
                if size > MAX_MESSAGE_BYTES:
                    ended(TOO_LONG)
                    raise httpx2.StreamError(TOO_LONG)
                yield chunk

        async def aclose(self) -> None:
            await self._stream.aclose()

    class Client(httpx2.AsyncClient):
        """Turns failures of the connection, which would end all calls under way, into errors of the one request."""

        async def send(self, request: Any, **options: Any) -> Any:
            try:
                response = await super().send(request, **options)
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
                return failed(request, NOT_SENT, str(error))
            except httpx2.TransportError as error:
                return failed(request, LOST, f"{type(error).__name__}: {error}")
            if response.status_code == 404 and "mcp-session-id" in request.headers:
                await response.aclose()  # the protocol: nothing was done, begin a new session
                return failed(request, NOT_SENT, "the session is over")
            # What nobody asked for is not unpacked: a few bytes could become gigabytes.
            response.headers.pop("content-encoding", None)
            if request.method == "POST":
                response.stream = BoundedStream(response.stream)
            return response

    def failed(request: Any, code: int, message: str) -> Any:
        body = {"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": message}}
        return httpx2.Response(503, json=body, request=request)

    return Client(
        headers={**headers, "accept-encoding": "identity"},
        timeout=httpx2.Timeout(_TIMEOUT_S, read=_STREAM_TIMEOUT_S),
    )
