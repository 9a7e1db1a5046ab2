"""Opens the strongest sandbox that works here, and refuses where none does.

Worked example::

    with open_sandbox() as sandbox:
        print(sandbox.level)            # namespaces, else landlock, else SandboxUnavailable is raised

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_opening.py``
"""

from __future__ import annotations

import logging
import platform
import sys

from opd_env.errors import did_you_mean
from opd_env.tools.sandbox.base import NOBODY, Level, Limits, Sandbox, SandboxUnavailable, SetUpFailed
from opd_env.tools.sandbox.guest.syscall_table import AUDIT_ARCH
from opd_env.tools.sandbox.selftest import self_test
from opd_env.tools.sandbox.unsafe import UnsafeSubprocess

_logger = logging.getLogger(__name__)

_OPT_IN = 'For code that you trust, ask for kind="unsafe_subprocess" by name.'
_FIXES = {
    Level.NAMESPACES: (
        "Namespaces need Linux 5.12 and user namespaces: see the sysctls user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns; in a container, "
        "its seccomp and AppArmor profiles must allow unshare and mount."
    ),
    Level.LANDLOCK: "Landlock needs Linux 6.2, and `landlock` in the kernel's list of security modules (lsm=).",
}


def open_sandbox(
    kind: str = "auto",
    *,
    min_level: str = "landlock",
    limits: Limits | None = None,
    slots: int | None = None,
    max_sessions: int = 1024,
) -> Sandbox:
    """Opens a sandbox. Close it, or use ``with``.

    Args:
        kind: ``auto`` (``namespaces``, then ``landlock``, then a refusal: never silently weaker), one of these two, or
            ``unsafe_subprocess``: no sandbox, for code that you trust.
        min_level: for ``auto``, the weakest level that is accepted: ``namespaces`` or ``landlock``.
        limits: default limits of a call.
        slots: calls that run at the same time; by default one per CPU.
        max_sessions: sessions that may be open at the same time; one more is refused. A session holds what it has
            filled, so with ``limits.memory_mb`` this bounds the memory of all together.

    Raises:
        SandboxUnavailable: where that kind does not work, with the reason and what to do.
        ValueError: for an unknown name.
    """
    choice = _choose("kind", kind, ["auto", "namespaces", "landlock", "unsafe_subprocess"])
    least = _choose("min_level", min_level, [str(Level.NAMESPACES), str(Level.LANDLOCK)])
    if choice == "unsafe_subprocess":
        return UnsafeSubprocess(limits)
    if sys.platform != "linux":
        raise SandboxUnavailable(
            f"The kernel sandbox needs Linux; this is {sys.platform}.",
            "Train in a Linux virtual machine or container. " + _OPT_IN,
        )
    if platform.machine() not in AUDIT_ARCH:
        raise SandboxUnavailable(
            f"The kernel sandbox has no table of system calls for {platform.machine()}.",
            f"Train on one of {', '.join(AUDIT_ARCH)}. {_OPT_IN}",
        )
    if choice == "auto":
        levels = [Level.NAMESPACES] if least == Level.NAMESPACES else [Level.NAMESPACES, Level.LANDLOCK]
    else:
        levels = [Level(choice)]
    reasons = []
    for level in levels:
        try:
            sandbox = _open_level(level, limits, slots, max_sessions)
        except SetUpFailed as error:
            reasons.append(f"{level}: {error}")
        else:
            _logger.info("code sandbox: level %s, self-test passed", level)
            return sandbox
    raise SandboxUnavailable(
        f"No kernel sandbox works here ({'; '.join(reasons)}).",
        " ".join([*(_FIXES[level] for level in levels), _OPT_IN]),
    )


def _open_level(level: Level, limits: Limits | None, slots: int | None, max_sessions: int) -> Sandbox:
    """Opens one level and attacks it; it is not handed out if anything gets through."""
    # Imported only here: it needs calls of the kernel that other systems do not have.
    from opd_env.tools.sandbox.kernel import KernelSandbox

    sandbox = KernelSandbox(level, limits, slots, max_sessions)
    try:
        failures = self_test(sandbox, NOBODY)
    except OSError as error:
        sandbox.close()
        raise SetUpFailed(f"the self-test could not plant its canaries: {error}") from error
    except BaseException:
        sandbox.close()
        raise
    if failures:
        sandbox.close()
        raise SetUpFailed(f"the self-test failed: {'; '.join(failures)}")
    return sandbox


def _choose(argument: str, value: str, known: list[str]) -> str:
    if value in known:
        return value
    raise ValueError(f"{argument}={value!r}: expected one of {', '.join(known)}{did_you_mean(str(value), known)}")
