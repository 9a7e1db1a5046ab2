"""Tools of MCP servers, mounted as tools of the kit.

Stands on: ``tools.contract`` and the ``mcp`` package. Read first: ``tools``, then ``connection``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.tools.mcp.tools import mount_mcp as mount_mcp
    from opd_env.tools.mcp.tools import register_mcp_servers as register_mcp_servers

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "tools": ("mount_mcp", "register_mcp_servers"),
    },
)
