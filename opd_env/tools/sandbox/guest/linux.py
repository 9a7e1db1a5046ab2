"""Linux system calls that the standard library does not have, by ctypes; each raises OSError when it fails.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_filter.py``
"""

from __future__ import annotations

import ctypes
import os

from opd_env.tools.sandbox.guest.syscall_table import numbers

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_numbers = numbers()

_libc_with_gil = ctypes.PyDLL(None)

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4


def syscall(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """One system call by its name."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _libc.syscall(ctypes.c_long(_numbers[name]), *values)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def bare_fork() -> int:
    """fork(2) without what Python does in the child: locks made new, a hundred functions of modules called.

    Only for a process without threads, whose locks nobody holds. The lock of the interpreter stays with the
    caller. Random states stay, too: two children draw the same numbers unless they are seeded.
    """
    child: int = _libc_with_gil.fork()
    if child < 0:
        raise OSError(11, "fork failed")
    return child


def unshare(flags: int) -> None:
    """Leaves the namespaces of the given kinds for new ones."""
    syscall("unshare", flags)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    syscall("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())


def open_tree(path: str) -> int:
    """A detached copy of the mounts at ``path``, as a descriptor."""
    open_tree_clone, cloexec = 1, os.O_CLOEXEC
    return syscall("open_tree", _AT_FDCWD, path.encode(), open_tree_clone | cloexec | _AT_RECURSIVE)


def move_mount(tree: int, target: str) -> None:
    """Attaches a detached tree at ``target``."""
    move_mount_f_empty_path = 4
    syscall("move_mount", tree, b"", _AT_FDCWD, target.encode(), move_mount_f_empty_path)


def restrict_mounts(tree: int, path: str, attributes: int) -> None:
    """Sets attributes on a tree (with an empty path) or a path, and on all mounts below."""
    flags = _AT_RECURSIVE | (0 if path else _AT_EMPTY_PATH)
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attr = attributes.to_bytes(8, "little") + bytes(24)
    syscall("mount_setattr", tree if not path else _AT_FDCWD, path.encode(), flags, attr, len(attr))


def pivot_into(path: str) -> None:
    """Makes ``path`` the root, and detaches the old one."""
    os.chdir(path)
    syscall("pivot_root", b".", b".")
    syscall("umount2", b".", MNT_DETACH)
    os.chdir("/")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends."""
    syscall("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same user may look into this one, and own its files in /proc."""
    syscall("prctl", _PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)


def no_new_privileges() -> None:
    """From here on nothing that is executed gains rights; what unprivileged filters require."""
    syscall("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_bounding_set() -> None:
    """Empties the capability bounding set; needs CAP_SETPCAP."""
    capability = 0
    while True:
        try:
            syscall("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError as error:
            if capability and error.errno == 22:  # EINVAL: the kernel knows no more of them
                return
            raise
        capability += 1


def drop_capabilities() -> None:
    """Drops all capabilities, ambient ones included."""
    syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    version_3 = 0x20080522
    syscall("capset", version_3.to_bytes(4, "little") + bytes(4), bytes(24))


def map_one_user(proc: int, inside: int, user: int, group: int) -> None:
    """In a user namespace that was just made: the one user and group that exist there.

    Args:
        proc: descriptor of the folder /proc.
        inside: their number inside; never 0.
        user: number of the user outside.
        group: number of the group outside.
    """
    lines = [
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {user} 1"),
        ("gid_map", f"{inside} {group} 1"),
    ]
    for name, line in lines:
        descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
