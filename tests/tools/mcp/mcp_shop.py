"""A real MCP server for the tests: ``python mcp_shop.py`` (stdio), or with a port for HTTP."""

import asyncio
import os
import sys
import time
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

server = MCPServer("shop")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def price(item: Annotated[str, Field(description="what to buy")], count: int = 1) -> dict[str, float]:
    """Says what something costs."""
    if item == "unicorn":
        raise ToolError(f"no {item} on sale, says {os.environ.get('SHOP_KEY')}")
    return {"total": 1.5 * count}


@server.tool()
def misbehave(how: str) -> str:
    """Misbehaves."""
    if how == "die":
        os._exit(3)
    if how == "block":
        time.sleep(60)
    return {"long": "x" * 10_000, "key": os.environ.get("SHOP_KEY", ""), "pid": str(os.getpid())}.get(how, how)


@server.tool()
async def hang(server_too: bool) -> str:
    """Hangs."""
    if server_too:
        time.sleep(60)
    await asyncio.sleep(60)
    return "late"


if __name__ == "__main__":
    print("the shop is open, key", os.environ.get("SHOP_KEY"), file=sys.stderr)
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
