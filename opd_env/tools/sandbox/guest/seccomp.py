"""The filters of system calls: what is not listed answers an error.

Two filters hold a call. The slot has the first for its whole life: an allow-list. The process that runs the
code adds the second, small one, which takes away what only the slot needs (processes, signals to others,
limits, descriptors by message). The strictest answer of the two counts.

Worked example::

    install(slot_filter(writable=True))              # cannot be undone, by anybody
    if os.fork() == 0:
        install(program_filter(os.getpid()))

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_filter.py``
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import platform
import signal
import struct
import termios
from collections.abc import Iterable
from dataclasses import dataclass

from opd_env.tools.sandbox.guest.linux import syscall
from opd_env.tools.sandbox.guest.syscall_table import AUDIT_ARCH, numbers

_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32_BIT = 0x40000000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

_READS = """
    read readv pread64 preadv write writev pwrite64 pwritev close close_range lseek dup dup2 dup3 pipe pipe2
    select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    open openat stat lstat fstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
    getcwd chdir fchdir getdents getdents64 umask readahead fadvise64 sendfile fsync fdatasync
    recvfrom shutdown getsockname getpeername
"""
_MEMORY = "mmap mprotect munmap mremap madvise msync brk"
_TIME_AND_SIGNALS = """
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getitimer setitimer alarm pause
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
"""
_SELF = """
    getpid gettid getppid getpgid getpgrp getsid getuid geteuid getgid getegid getgroups getresuid getresgid capget
    uname sysinfo getrusage getrlimit getcpu getrandom sched_yield sched_getaffinity sched_getparam
    sched_getscheduler sched_get_priority_max sched_get_priority_min
    set_robust_list set_tid_address rseq restart_syscall exit exit_group wait4 waitid
"""
# Only where all that can be reached is the call's own folder: Landlock does not cover modes and times.
_CHANGES = """
    creat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat truncate
    ftruncate chmod fchmod fchmodat utime utimes futimesat utimensat
"""
_SLOT_ONLY = "kill tgkill prlimit64 prctl seccomp recvmsg sendmsg pidfd_open"

# fcntl without F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY: they have the kernel send signals to others.
_FCNTL = (
    fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETLK, fcntl.F_SETLK,
    fcntl.F_SETLKW, fcntl.F_DUPFD_CLOEXEC,
)  # fmt: skip
_IOCTL = (
    termios.TCGETS, termios.TIOCGWINSZ, termios.FIONREAD, termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX,
)  # fmt: skip
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
# SO_TYPE, SO_ERROR, SO_SNDBUF, SO_RCVBUF, SO_PROTOCOL, SO_DOMAIN: not who is at the other end, or a handle of it.
_SOL_SOCKET, _SOCKET_OPTIONS = 1, (3, 4, 7, 8, 38, 39)
# WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET; not those that inherit priorities, the
# part of it with a history of holes. PRIVATE and CLOCK_REALTIME may be set.
_FUTEX, _FUTEX_MASK = (0, 1, 3, 4, 5, 9, 10), 0xFFFFFFFF & ~(128 | 256)
# Not SIGCONT: a session is frozen between its cells by SIGSTOP. For the same reason there is no timer_create.
_SIGNALS = tuple(number for number in range(65) if number != signal.SIGCONT)
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000
"""All CLONE_NEW… flags."""
_PR_SET_NAME, _PR_GET_NAME = 15, 16


@dataclass(frozen=True)
class _Check:
    """Holds if the lower half of an argument, masked, is one of some values (and the upper half is 0)."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    wide: bool = False
    """The kernel reads all 64 bits of this argument: a pointer."""


@dataclass(frozen=True)
class _Rule:
    """What a system call answers: the error, unless all checks hold."""

    name: str
    error: int
    checks: tuple[_Check, ...] = ()


def _instruction(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, true, false, k & 0xFFFFFFFF)


def _rule_body(rule: _Rule) -> list[bytes]:
    """Instructions from "the number matches" to a return."""
    refuse = [_instruction(_RETURN, _ERRNO | rule.error)]
    if not rule.checks:
        return refuse
    body: list[bytes] = []
    # Built from the end, so that the distance to the refusal, the last instruction, is known.
    tail = [_instruction(_RETURN, _ALLOW), *refuse]
    for check in reversed(rule.checks):
        block: list[bytes] = []
        for index, value in enumerate(check.values):
            left = len(check.values) - 1 - index
            to_refusal = len(tail) - 1
            block.append(_instruction(_JUMP_EQUAL, value, true=left, false=0 if left else to_refusal))
        if check.mask != 0xFFFFFFFF:
            block.insert(0, _instruction(_AND, check.mask))
        block.insert(0, _instruction(_LOAD, _ARGUMENTS + 8 * check.argument))
        if check.wide:
            to_refusal = len(block) + len(tail) - 1
            high = _instruction(_LOAD, _ARGUMENTS + 8 * check.argument + 4)
            block = [high, _instruction(_JUMP_EQUAL, 0, false=to_refusal), *block]
        tail = [*block, *tail]
    body += tail
    return body


def _assemble(rules: Iterable[_Rule], allowed: Iterable[str], default: int) -> bytes:
    machine = platform.machine()
    table = numbers(machine)
    program = [
        _instruction(_LOAD, _ARCH),
        _instruction(_JUMP_EQUAL, AUDIT_ARCH[machine], true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        program += [_instruction(_JUMP_GREATER_EQUAL, _X32_BIT, false=1), _instruction(_RETURN, _KILL_PROCESS)]
    for name in allowed:
        if name in table:
            program += [_instruction(_JUMP_EQUAL, table[name], false=1), _instruction(_RETURN, _ALLOW)]
    for rule in rules:
        if rule.name in table:
            body = _rule_body(rule)
            program += [_instruction(_JUMP_EQUAL, table[rule.name], false=len(body)), *body]
    program.append(_instruction(_RETURN, default))
    return b"".join(program)


def slot_filter(writable: bool) -> bytes:
    """The allow-list.

    Args:
        writable: allow what changes files: only in a mount namespace where everything else is read-only.
    """
    allowed = (_READS + _MEMORY + _TIME_AND_SIGNALS + _SELF + _SLOT_ONLY).split()
    if writable:
        allowed += _CHANGES.split()
    rules = [
        _Rule("fcntl", errno.EPERM, (_Check(1, _FCNTL),)),
        _Rule("ioctl", errno.EPERM, (_Check(1, _IOCTL),)),
        # For asyncio. Not SOCK_DGRAM, which could send to any named socket of the machine.
        _Rule(
            "socketpair",
            errno.EPERM,
            (_Check(0, (_AF_UNIX,)), _Check(1, (_SOCK_STREAM,), _SOCK_TYPE_MASK)),
        ),
        _Rule("getsockopt", errno.EPERM, (_Check(1, (_SOL_SOCKET,)), _Check(2, _SOCKET_OPTIONS))),
        _Rule("futex", errno.EPERM, (_Check(1, _FUTEX, _FUTEX_MASK),)),
        _Rule("sendto", errno.EPERM, (_Check(4, (0,), wide=True),)),
        _Rule("clone", errno.EPERM, (_Check(0, (0,), _CLONE_NEW),)),
        # Its flags are in memory, where a filter cannot see them; libraries then use clone.
        _Rule("clone3", errno.ENOSYS),
    ]
    # shutil.copy2 takes this answer, and no other, as "there are none".
    xattr = [prefix + kind + "xattr" for prefix in ("", "l", "f") for kind in ("list", "get", "set")]
    rules += [_Rule(name, errno.ENOTSUP) for name in xattr]
    return _assemble(rules, allowed, _ERRNO | errno.EPERM)


def program_filter(process: int) -> bytes:
    """What the process that runs the code gives up on top.

    Args:
        process: its own number: the only one that it may send signals to.
    """
    return _program_filter().replace(struct.pack("<I", _SOME_PROCESS), struct.pack("<I", process))


_SOME_PROCESS = 0x7EADBEE5
"""Stands for the process's number in the filter that is assembled once."""


@functools.cache
def _program_filter() -> bytes:
    rules = [
        _Rule("clone", errno.EPERM, (_Check(0, (_CLONE_THREAD,), _CLONE_THREAD),)),
        _Rule("fork", errno.EPERM),
        _Rule("vfork", errno.EPERM),
        _Rule("kill", errno.EPERM, (_Check(0, (_SOME_PROCESS,)), _Check(1, _SIGNALS))),
        _Rule("tgkill", errno.EPERM, (_Check(0, (_SOME_PROCESS,)), _Check(2, _SIGNALS))),
        _Rule("prlimit64", errno.EPERM, (_Check(0, (0, _SOME_PROCESS)), _Check(2, (0,), wide=True))),
        _Rule("prctl", errno.EPERM, (_Check(0, (_PR_SET_NAME, _PR_GET_NAME)),)),
        _Rule("seccomp", errno.EPERM),
        _Rule("recvmsg", errno.EPERM),
        _Rule("sendmsg", errno.EPERM),
        _Rule("pidfd_open", errno.EPERM),
    ]
    return _assemble(rules, (), _ALLOW)


def install(program: bytes) -> None:
    """Puts a filter on this process, for good. Needs :func:`~linux.no_new_privileges` first."""
    buffer = ctypes.create_string_buffer(program, len(program))
    syscall("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _filter_header(buffer), 0, 0)


class ProgramFilter:
    """:func:`program_filter`, assembled before the fork: installing it then touches little memory."""

    def __init__(self) -> None:
        program = _program_filter()
        marker = struct.pack("<I", _SOME_PROCESS)
        self._positions = [at for at in range(0, len(program), 4) if program[at : at + 4] == marker]
        self._buffer = ctypes.create_string_buffer(program, len(program))
        self._header = _filter_header(self._buffer)

    def install(self, process: int) -> None:
        """Puts the filter on this process, whose number is ``process``."""
        for position in self._positions:
            struct.pack_into("<I", self._buffer, position, process)
        syscall("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._header, 0, 0)


def _filter_header(program: ctypes.Array[ctypes.c_char]) -> bytes:
    """struct sock_fprog: the number of instructions, and where they are."""
    return struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(program))
