"""Runs Python code that nobody has read, behind a wall that the kernel makes (docs/sandbox.md).

Worked example::

    from opd_env.tools.sandbox import open_sandbox

    with open_sandbox() as sandbox:
        sandbox.run("print(1 + 1)").output      # '2\n'

Stands on Linux: namespaces or Landlock, and seccomp. ``guest`` is what runs inside, and imports nothing from outside.
Read first: ``opening``, then ``kernel``. Who may change it: sealed; every change with all attacks of the tests, on both
levels.

Test it alone: ``pytest tests/tools/sandbox``
"""

from opd_env.tools.sandbox.base import (
    ExecResult,
    Level,
    Limits,
    Sandbox,
    SandboxUnavailable,
    Session,
    SessionEnded,
    Status,
)
from opd_env.tools.sandbox.opening import open_sandbox

__all__ = [
    "ExecResult",
    "Level",
    "Limits",
    "Sandbox",
    "SandboxUnavailable",
    "Session",
    "SessionEnded",
    "Status",
    "open_sandbox",
]
