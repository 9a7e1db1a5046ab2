"""Tools of MCP servers, mounted as tools of the kit.

Stands on: ``tools.contract``, ``tools.redaction`` and the ``mcp`` package, which only ``connection`` imports.
Read first: ``tools``, then ``connection``. Who may change it: with ``tests/tools/mcp/test_mcp_rogue.py``.
"""

from __future__ import annotations

from opd_env.tools.mcp.tools import mount_mcp, register_mcp_servers

__all__ = ["mount_mcp", "register_mcp_servers"]
