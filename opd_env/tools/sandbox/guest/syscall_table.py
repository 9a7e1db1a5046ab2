"""Numbers of the system calls that the sandbox names, for the two architectures that it knows.

An architecture that is not here has no sandbox: a filter with wrong numbers would allow anything. The numbers
are those of the kernel's ``unistd_64.h`` (x86_64) and ``asm-generic/unistd.h`` (aarch64); a test compares them
with the headers where these are installed.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_filter.py``
"""

from __future__ import annotations

import platform

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""How seccomp names an architecture; a call by another one (32-bit) is killed."""


def numbers(machine: str = "") -> dict[str, int]:
    """Number by name on an architecture, by default this one; calls that it does not have are left out.

    Raises:
        NotImplementedError: on an unknown architecture.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        known = ", ".join(AUDIT_ARCH)
        raise NotImplementedError(f"no table of system calls for {machine!r}; known: {known}")
    column = list(AUDIT_ARCH).index(machine)
    return {name: number for name, row in _TABLE.items() if (number := row[column]) is not None}


_TABLE: dict[str, tuple[int | None, int | None]] = {  # name: (x86_64, aarch64)
    "access": (21, None), "alarm": (37, None), "brk": (12, 214), "capget": (125, 90), "capset": (126, 91),
    "chdir": (80, 49), "chmod": (90, None), "clock_getres": (229, 114), "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115), "clone": (56, 220), "clone3": (435, 435), "close": (3, 57),
    "close_range": (436, 436), "creat": (85, None), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22), "epoll_wait": (232, None), "execve": (59, 221), "execveat": (322, 281),
    "exit": (60, 93), "exit_group": (231, 94), "faccessat": (269, 48), "faccessat2": (439, 439),
    "fadvise64": (221, 223), "fchdir": (81, 50), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fcntl": (72, 25), "fdatasync": (75, 83), "fgetxattr": (193, 10), "flistxattr": (196, 13),
    "fork": (57, None), "fsetxattr": (190, 7), "fstat": (5, 80), "fstatfs": (138, 44), "fsync": (74, 82),
    "ftruncate": (77, 46), "futex": (202, 98), "futimesat": (261, None), "getcpu": (309, 168),
    "getcwd": (79, 17), "getdents": (78, None), "getdents64": (217, 61), "getegid": (108, 177),
    "geteuid": (107, 175), "getgid": (104, 176), "getgroups": (115, 158), "getitimer": (36, 102),
    "getpeername": (52, 205), "getpgid": (121, 155), "getpgrp": (111, None), "getpid": (39, 172),
    "getppid": (110, 173), "getrandom": (318, 278), "getresgid": (120, 150), "getresuid": (118, 148),
    "getrlimit": (97, 163), "getrusage": (98, 165), "getsid": (124, 156), "getsockname": (51, 204),
    "getsockopt": (55, 209), "gettid": (186, 178), "gettimeofday": (96, 169), "getuid": (102, 174),
    "getxattr": (191, 8), "io_uring_setup": (425, 425), "ioctl": (16, 29), "kill": (62, 129),
    "landlock_add_rule": (445, 445), "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446), "lgetxattr": (192, 9), "link": (86, None), "linkat": (265, 37),
    "listxattr": (194, 11), "llistxattr": (195, 12), "lseek": (8, 62), "lsetxattr": (189, 6),
    "lstat": (6, None), "madvise": (28, 233), "mkdir": (83, None), "mkdirat": (258, 34), "mmap": (9, 222),
    "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429), "mprotect": (10, 226),
    "mremap": (25, 216), "msync": (26, 227), "munmap": (11, 215), "nanosleep": (35, 101),
    "newfstatat": (262, 79), "open": (2, None), "open_tree": (428, 428), "openat": (257, 56),
    "pause": (34, None), "pidfd_open": (434, 434), "pipe": (22, None), "pipe2": (293, 59),
    "pivot_root": (155, 41), "poll": (7, None), "ppoll": (271, 73), "prctl": (157, 167),
    "pread64": (17, 67), "preadv": (295, 69), "prlimit64": (302, 261), "pselect6": (270, 72),
    "pwrite64": (18, 68), "pwritev": (296, 70), "read": (0, 63), "readahead": (187, 213),
    "readlink": (89, None), "readlinkat": (267, 78), "readv": (19, 65), "recvfrom": (45, 207),
    "recvmsg": (47, 212), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "restart_syscall": (219, 128), "rmdir": (84, None), "rseq": (334, 293), "rt_sigaction": (13, 134),
    "rt_sigpending": (127, 136), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_yield": (24, 124), "seccomp": (317, 277), "select": (23, None),
    "sendfile": (40, 71), "sendmsg": (46, 211), "sendto": (44, 206), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "setitimer": (38, 103), "setxattr": (188, 5), "shutdown": (48, 210),
    "sigaltstack": (131, 132), "socketpair": (53, 199), "stat": (4, None), "statfs": (137, 43),
    "statx": (332, 291), "symlink": (88, None), "symlinkat": (266, 36), "sysinfo": (99, 179),
    "tgkill": (234, 131), "time": (201, None),
    "times": (100, 153), "truncate": (76, 45), "umask": (95, 166), "umount2": (166, 39), "uname": (63, 160),
    "unlink": (87, None), "unlinkat": (263, 35), "unshare": (272, 97), "utime": (132, None),
    "utimensat": (280, 88), "utimes": (235, None), "vfork": (58, None), "wait4": (61, 260),
    "waitid": (247, 95), "write": (1, 64), "writev": (20, 66),
}  # fmt: skip
