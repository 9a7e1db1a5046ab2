"""Attacks a sandbox that was just opened, with canaries in place, and says what was not held.

It shows that the layers are in force on this kernel and in this container, not that there is no hole: the
whole list of attacks is in the tests.

Worked example::

    failures = self_test(sandbox, user=65534)       # [] or sentences

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_opening.py``
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import select
import socket
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from opd_env.tools.sandbox.base import ExecResult, Limits, Sandbox, Status
from opd_env.tools.sandbox.guest.syscall_table import AUDIT_ARCH
from opd_env.tools.sandbox.interpreter import installed_packages

_PRELUDE = """
import ctypes, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
SECRET, OWN, FOLDER, ABSTRACT, TCP, UDP, TRAINER, COLUMN, VISIBLE = {facts!r}
def refused(what, action):
    try:
        answer = action()
    except (OSError, ValueError, MemoryError):
        return
    if not isinstance(answer, int) or answer >= 0:
        print('ESCAPED', what)
def call(what, numbers, *arguments):
    refused(what, lambda: libc.syscall(numbers[COLUMN], *arguments))
"""

_ATTACKS = {
    "read files": """
for path in (SECRET, '/etc/passwd', '/proc/self/environ', '/proc/1/cmdline', f'/proc/{TRAINER}/environ'):
    refused(path, lambda: open(path))
""",
    "list folders": """
for path in (FOLDER, '/proc', '/root/.ssh'):
    refused(path, lambda: os.listdir(path))
# The interpreter and its packages may lie in these: the way to them is seen, and nothing else.
def strangers(path):
    names = os.listdir(path)
    return [name for name in names if not any(f'{own}/'.startswith(f'{path}/{name}/') for own in VISIBLE)] or -1
for path in ('/home', '/tmp'):
    refused(path, lambda: strangers(path))
""",
    "change files": """
refused('write', lambda: open(OWN, 'w'))
refused('chmod', lambda: os.chmod(OWN, 0o600))
refused('utime', lambda: os.utime(OWN, (0, 0)))
refused('truncate', lambda: os.truncate(OWN, 0))
refused('truncate by open', lambda: os.open(OWN, os.O_RDONLY | os.O_TRUNC))
refused('unlink', lambda: os.unlink(OWN))
refused('mkdir', lambda: os.mkdir(FOLDER + '/new'))
refused('link', lambda: os.link(SECRET, FOLDER + '/link'))
refused('xattr', lambda: os.setxattr(OWN, 'user.a', b'1'))
refused('interpreter', lambda: open(os.__file__, 'ab'))
for folder in ('/tmp', '/var/tmp', '/dev/shm', '/', '/run'):
    refused(folder, lambda: open(folder + '/opd-env-escape', 'w'))
""",
    "environment": """
known = {'PYTHONHASHSEED', 'LANG', 'TZ', 'HOME', 'TMPDIR', 'GLIBC_TUNABLES', 'LC_CTYPE'}
extra = {name for name in os.environ if name not in known and not name.endswith('_NUM_THREADS')}
if extra:
    print('ESCAPED', extra)
""",
    "network": """
refused('TCP', lambda: socket.create_connection(('127.0.0.1', TCP), 1))
refused('UDP', lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP)))
refused('IPv6', lambda: socket.socket(socket.AF_INET6).bind(('::', 0)))
refused('netlink', lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
def stream():
    socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)
refused('abstract stream', stream)
def datagram():
    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0' + ABSTRACT + '-dgram')
refused('abstract datagram', datagram)
""",
    "signals": """
for process in (os.getppid() or 1, 1, TRAINER, -1):
    refused(f'signal {process}', lambda: os.kill(process, 0))
import fcntl
refused('F_SETOWN', lambda: fcntl.fcntl(os.pipe()[0], 8, TRAINER))
""",
    "other processes": """
for process in (os.getppid() or 1, TRAINER):
    call('ptrace', (101, 117), 16, process, 0, 0)
    refused('affinity', lambda: os.sched_setaffinity(process, [0]))
    refused('priority', lambda: os.setpriority(os.PRIO_PROCESS, process, 15))
    refused('prlimit', lambda: resource.prlimit(process, resource.RLIMIT_NOFILE, (3, 3)))
    call('pidfd_open', (434, 434), process, 0)
""",
    "start processes": """
def started(action):
    child = action()
    if child == 0:
        os._exit(0)
    return child
refused('fork', lambda: started(os.fork))
refused('vfork', lambda: started(lambda: libc.syscall((58, 220)[COLUMN], 0x4111, 0, 0, 0, 0)))
refused('exec', lambda: os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED']))
refused('spawn', lambda: os.posix_spawn('/bin/sh', ['sh', '-c', 'echo ESCAPED'], {}))
""",
    "privileges": """
refused('setuid', lambda: os.setuid(0))
refused('setgroups', lambda: os.setgroups([0]))
for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000):
    call('unshare', (272, 97), flag)
call('mount', (165, 40), b'none', b'/', b'tmpfs', 0, 0)
call('chroot', (161, 51), b'/')
refused('hostname', lambda: socket.sethostname('escaped'))
if os.getuid() == 0 or os.geteuid() == 0:
    print('ESCAPED as root')
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.syscall((125, 90)[COLUMN], header, data)
if any(data):
    print('ESCAPED with capabilities')
""",
    "kernel interfaces": """
memory = ctypes.create_string_buffer(256)
for name, numbers, *arguments in (
    ('io_uring_setup', (425, 425), 4, memory), ('bpf', (321, 280), 0, memory, 64), ('keyctl', (250, 219), 0, -3, 0),
    ('userfaultfd', (323, 282), 1), ('perf_event_open', (298, 241), memory, 0, -1, -1, 0),
    ('memfd_create', (319, 279), b'x', 0), ('shmget', (29, 194), 0x1234, 4096, 0o1666),
    ('inotify_init1', (294, 26), 0), ('seccomp', (317, 277), 0, 0, 0),
    ('open_by_handle_at', (304, 265), -100, memory, 0),
    ('prctl', (157, 167), 1, 0, 0, 0, 0), ('personality', (135, 92), 0x40000), ('setns', (308, 268), 3, 0),
):
    call(name, numbers, *arguments)
""",
    "memory": """
refused('a gigabyte', lambda: len(bytearray(1 << 30)))
refused('limits', lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)))
""",
}


class Canaries(contextlib.ExitStack):
    """What hostile code would like to touch: a folder open to all, with a secret in it, and four sockets that listen.

    Args:
        user: whom one of the files is given to, if this process is root: the user that the code runs as.
    """

    def __init__(self, user: int) -> None:
        super().__init__()
        self.token = secrets.token_hex(8)
        """What must never be seen."""
        self.folder = self.enter_context(tempfile.TemporaryDirectory(prefix="opd-env-canary-"))
        self.secret = f"{self.folder}/secret.txt"
        self.own = f"{self.folder}/own.txt"
        """Belongs to the user that the code runs as."""
        self.writable = f"{self.folder}/writable"
        os.chmod(self.folder, 0o777)
        Path(self.secret).write_text(f"CANARY-{self.token}")
        os.chmod(self.secret, 0o644)
        Path(self.own).write_text("untouched")
        os.chmod(self.own, 0o666)
        if os.geteuid() == 0:
            os.chown(self.own, user, user)
        os.mkdir(self.writable)
        os.chmod(self.writable, 0o777)
        self._files_before = self._files()

        self.abstract = f"opd-env-canary-{self.token}"
        self._sockets: dict[socket.socket, str] = {}
        local = "127.0.0.1", 0
        self.tcp_port = int(self._listen("TCP port", socket.AF_INET, socket.SOCK_STREAM, local)[1])
        self.udp_port = int(self._listen("UDP port", socket.AF_INET, socket.SOCK_DGRAM, local)[1])
        self._listen("abstract stream socket", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.abstract}")
        self._listen("abstract datagram socket", socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{self.abstract}-dgram")

    def _listen(self, name: str, family: int, kind: int, address: Any) -> Any:
        sock = self.enter_context(socket.socket(family, kind))
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        self._sockets[sock] = name
        return sock.getsockname()

    def touched(self) -> list[str]:
        """What was reached, in words; empty if nothing was."""
        found = []
        if (files := self._files()) != self._files_before:
            found.append(f"files: {files} instead of {self._files_before}")
        return found + [self._sockets[sock] for sock in select.select(list(self._sockets), [], [], 0)[0]]

    def _files(self) -> dict[str, tuple[int, ...]]:
        """Mode, owner, links, size and times of all files."""
        found: dict[str, tuple[int, ...]] = {}
        for path in [self.folder, *sorted(str(path) for path in Path(self.folder).rglob("*"))]:
            info = os.lstat(path)
            found[path] = (
                info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_size, info.st_mtime_ns, info.st_ino,
            )  # fmt: skip
        return found


def self_test(sandbox: Sandbox, user: int) -> list[str]:
    """Runs the attacks; returns what was not held, and what plainly does not work.

    Args:
        sandbox: a kernel sandbox.
        user: the user that its code runs as, if this process is root.
    """
    failures: list[str] = []

    def check(name: str, held: bool, result: ExecResult) -> None:
        if not held:
            failures.append(f"{name}: {result.status}, {result.output.strip()[:300]!r}")

    library = os.path.realpath(sysconfig.get_path("stdlib"))
    # The folders that hold the packages: a package's own name in the code would choose the tier that imports it.
    visible = sorted({library, *map(os.path.dirname, installed_packages().folders.values())})
    with Canaries(user) as canaries:
        facts = (
            canaries.secret, canaries.own, canaries.folder, canaries.abstract, canaries.tcp_port, canaries.udp_port,
            os.getpid(), list(AUDIT_ARCH).index(platform.machine()), visible,
        )  # fmt: skip
        prelude = _PRELUDE.format(facts=facts)
        for name, code in _ATTACKS.items():
            result = sandbox.run(f"{prelude}{code}\nprint('held')")
            check(name, result.status is Status.OK and result.output == "held\n", result)
        result = sandbox.run("while True: pass", limits=Limits(wall_s=0.5))
        check("time limit", result.status is Status.TIMEOUT, result)
        result = sandbox.run("while True: print('x' * 100)", limits=Limits(output_bytes=1000))
        check("output limit", result.status is Status.OUTPUT_LIMIT and len(result.output) <= 1000, result)
        result = sandbox.run("print(6 * 7)")
        check("a plain program", result.status is Status.OK and result.output == "42\n", result)
        failures += [f"canary touched: {what}" for what in canaries.touched()]
    return failures
