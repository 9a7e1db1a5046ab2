"""Opens the strongest sandbox that works here, and refuses where none does.

Worked example::

    with open_sandbox() as sandbox:
        print(sandbox.level)            # namespaces, else landlock, else SandboxUnavailable is raised

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_opening.py``
"""

from __future__ import annotations

import difflib
from enum import StrEnum

from opd_env.tools.sandbox.base import Level, Limits, Sandbox, SandboxUnavailable
from opd_env.tools.sandbox.unsafe import UnsafeSubprocess


class SandboxKind(StrEnum):
    """What :func:`open_sandbox` can be asked for."""

    AUTO = "auto"
    """``namespaces``, then ``landlock``, then a refusal: never silently weaker."""
    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"
    UNSAFE_SUBPROCESS = "unsafe_subprocess"
    """No sandbox: for code that you trust."""


def open_sandbox(
    kind: str = "auto",
    *,
    min_level: str = "landlock",
    limits: Limits | None = None,
    slots: int | None = None,
) -> Sandbox:
    """Opens a sandbox. Close it, or use ``with``.

    Args:
        kind: see :class:`SandboxKind`.
        min_level: for ``auto``, the weakest level that is accepted: ``namespaces`` or ``landlock``.
        limits: default limits of a call.
        slots: calls that run at the same time; by default one per CPU.

    Raises:
        SandboxUnavailable: where that kind does not work, with the reason and what to do.
        ValueError: for an unknown name.
    """
    choice = _choose("kind", kind, [str(kind) for kind in SandboxKind])
    least = _choose("min_level", min_level, [str(Level.NAMESPACES), str(Level.LANDLOCK)])
    if choice == SandboxKind.UNSAFE_SUBPROCESS:
        return UnsafeSubprocess(limits)
    raise SandboxUnavailable(
        f"No kernel sandbox (wanted: {choice}, at least {least}) works here yet.",
        'For code that you trust, ask for kind="unsafe_subprocess" by name.',
    )


def _choose(argument: str, value: str, known: list[str]) -> str:
    if value in known:
        return value
    close = difflib.get_close_matches(str(value), known, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{argument}={value!r}: expected one of {', '.join(known)}.{hint}")
