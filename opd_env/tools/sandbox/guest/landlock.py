"""Landlock: what this process, and all that it starts, may still reach of the file system. For good.

Worked example::

    restrict(["/usr/lib/python3.11"])        # may be read; nothing may be written, made or executed
    open("/etc/passwd")                      # PermissionError

ABI 3 (Linux 6.2) is required: before it, a file could be truncated by opening it for reading.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_filter.py``
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable

from opd_env.tools.sandbox.guest.linux import no_new_privileges, syscall

REQUIRED_ABI = 3

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE = 1 << 1
# Rights that the kernel knows, by ABI: a ruleset handles, and so denies, all of them.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_TCP_RIGHTS, _SCOPES = 0b11, 0b11  # bind and connect (ABI 4); abstract sockets and signals (ABI 6)


def abi() -> int:
    """The Landlock version of this kernel; 0 where there is none."""
    try:
        return syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Iterable[str], listed: Iterable[str] = (), devices: Iterable[str] = ()) -> None:
    """Leaves nothing but reading below some folders, listing others, and reading and writing some devices.

    What is not there is left out: a file that vanished, a link whose target another root does not have.

    Raises:
        OSError: if Landlock is missing or too old, or a rule is refused; nothing is restricted then.
    """
    version = abi()
    if version < REQUIRED_ABI:
        raise OSError(38, f"Landlock ABI {version}; at least {REQUIRED_ABI} (Linux 6.2) is required")
    files = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    network = _TCP_RIGHTS if version >= 4 else 0
    scopes = _SCOPES if version >= 6 else 0
    # struct landlock_ruleset_attr grew with the ABI; a kernel takes a longer one if the rest is 0.
    attributes = struct.pack("<QQQ", files, network, scopes)[: 24 if scopes else 16 if network else 8]
    ruleset = syscall("landlock_create_ruleset", attributes, len(attributes), 0)
    try:
        for path in readable:
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        for path in listed:
            _allow(ruleset, path, _READ_DIR)
        for path in devices:
            _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
        no_new_privileges()
        syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= ~_READ_DIR
        # struct landlock_path_beneath_attr (packed): the rights, and the descriptor.
        syscall("landlock_add_rule", ruleset, 1, struct.pack("<Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)
