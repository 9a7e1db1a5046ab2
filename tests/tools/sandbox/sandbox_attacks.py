"""Hostile programs, each with what it must not achieve. See test_sandbox_attacks.py, which runs them.

Every program prints ESCAPED and what it got if it gets anything. That it prints nothing proves little, so the
harness looks at the canaries, at a victim process and for processes left behind after each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_env.tools.sandbox import Limits, Status

# Facts that the harness fills in, and a few words that most attacks use.
PRELUDE = """
import ctypes, os, signal, socket, sys, time
SECRET, OWN, FOLDER, WRITABLE, ABSTRACT, TCP, UDP, FREE_PORT, VICTIM, TRAINER, COLUMN = @FACTS@
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, action):
    try:
        answer = action()
    except (OSError, ValueError, MemoryError, RuntimeError, AttributeError) as error:
        print(what, 'refused:', type(error).__name__)
        return None
    if isinstance(answer, int) and not isinstance(answer, bool) and answer < 0:
        print(what, 'refused')
        return None
    print('ESCAPED', what)
    return answer
def kernel(numbers, *arguments):
    return libc.syscall(numbers[COLUMN], *arguments)
"""

ENDED = frozenset({Status.OK, Status.ERROR, Status.KILLED})
CUT_OFF = frozenset({Status.TIMEOUT, Status.CPU_LIMIT, Status.KILLED})
TOO_MUCH = frozenset({Status.OUTPUT_LIMIT})
FAILED = frozenset({Status.ERROR, Status.KILLED})
SHORT = Limits(wall_s=0.3)


@dataclass(frozen=True)
class Attack:
    """One program, or two where the second looks for traces of the first."""

    name: str
    code: str
    ends: frozenset[Status] = ENDED
    """How it may end."""
    then: str = ""
    """Run as the next call (or in the next session) in the same slot."""
    then_prints: str = ""
    """What that must print, if anything."""
    then_ends: frozenset[Status] = ENDED
    limits: Limits = field(default_factory=lambda: Limits(wall_s=60.0))
    prelude: bool = True


ATTACKS = [
    # Secrets.
    Attack("reads the password file", "attempt('passwd', lambda: open('/etc/passwd').read())"),
    Attack("reads the secret", "attempt('secret', lambda: open(SECRET).read())"),
    Attack(
        "finds the trainer's environment",
        """
getenv = libc.getenv
getenv.restype = ctypes.c_char_p
for name in ('OPD_ENV_CANARY', 'SSH_AUTH_SOCK', 'HF_TOKEN', 'PATH', 'USER'):
    if name in os.environ or getenv(name.encode()):
        print('ESCAPED', name)
""",
    ),
    Attack(
        "walks /proc",
        """
processes = [name for name in os.listdir('/proc') if name.isdigit()] if os.access('/proc', os.R_OK) else []
for process in {*processes, '1', 'self', str(TRAINER), str(VICTIM)}:
    for name in ('environ', 'cmdline', 'maps', 'mem', 'root/etc/passwd', 'cwd', 'fd/0'):
        attempt(f'{process}/{name}', lambda: open(f'/proc/{process}/{name}', 'rb').read(1))
""",
    ),
    Attack("links the secret into its folder", "attempt('link', lambda: os.link(SECRET, 'here'))"),
    Attack("renames the secret", "attempt('rename', lambda: os.rename(SECRET, FOLDER + '/other'))"),
    Attack(
        "climbs out with .. and descriptors",
        """
attempt('dots', lambda: open('../' * 40 + SECRET.lstrip('/')).read())
def climb():
    root = os.open('/', os.O_PATH)
    for _ in range(20):
        root = os.open('..', os.O_PATH, dir_fd=root)
    return os.read(os.open(SECRET.lstrip('/'), os.O_RDONLY, dir_fd=root), 100)
attempt('descriptor', climb)
""",
    ),
    Attack(
        "finds inherited descriptors",
        """
for number in range(4, 1024):   # 3 is the channel of a session
    attempt(f'inherited descriptor {number}', lambda: os.fstat(number))
""",
    ),
    Attack(
        "searches the heap for earlier code",
        "planted = '''" + "HEAPMARK-4e1b77c0a95d " * 400 + "'''\nprint(len(planted))",
        then="""
import ctypes, hashlib, os
libc = ctypes.CDLL(None)
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_long]
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
reading, writing = os.pipe()
found = 0
def scan(low, high):
    global found
    for address in range(low & ~4095, high, 4096):
        # Not a whole page: of these Linux 6.12 keeps an empty one in the pipe for each that it could not read, until
        # the pipe is full and this waits for ever.
        if libc.write(writing, address, 4095) != 4095:
            continue
        page = os.read(reading, 4095)
        at = page.find(b'HEAPMARK')
        while at >= 0:
            # By its digest: this program does not hold the text that it looks for.
            found += hashlib.sha256(page[at + 8 : at + 21]).hexdigest()[:16] == '@DIGEST@'
            at = page.find(b'HEAPMARK', at + 1)
top = libc.sbrk(0)
scan(top - (24 << 20), top)
here = id([])
scan(here - (4 << 20), here + (4 << 20))
print('ESCAPED' if found else 'nothing', found)
""",
        prelude=False,
    ),
    # Writing.
    Attack(
        "writes wherever it can",
        """
for folder in ('/tmp', '/var/tmp', '/dev/shm', '/root', '/run', '/home', '/', '/etc', '/usr/local', FOLDER, WRITABLE):
    try:
        open(folder + '/@MARK@', 'w').write('x')
    except OSError:
        pass
print('done')
""",
    ),
    Attack(
        "writes through links",
        """
try:
    os.symlink(WRITABLE, 'folder')
    os.symlink(OWN, 'file')
    os.mkdir('deep')
    os.symlink(WRITABLE, 'deep/folder')
except OSError:
    pass
attempt('folder', lambda: open('folder/new', 'w').write('x'))
attempt('file', lambda: open('file', 'r+').write('x'))
""",
    ),
    Attack(
        "changes a file that belongs to its user",
        """
attempt('chmod', lambda: os.chmod(OWN, 0o777))
attempt('utime', lambda: os.utime(OWN, (0, 0)))
attempt('chown', lambda: os.chown(OWN, os.getuid(), os.getgid()))
attempt('truncate', lambda: os.truncate(OWN, 0))
attempt('truncate by opening', lambda: os.open(OWN, os.O_RDONLY | os.O_TRUNC))
attempt('unlink', lambda: os.unlink(OWN))
attempt('xattr', lambda: os.setxattr(OWN, 'user.a', b'1'))
attempt('fchmod', lambda: os.fchmod(os.open(OWN, os.O_PATH), 0o777))
attempt('chmod of the library', lambda: os.chmod(os.__file__, 0o777))
""",
    ),
    Attack(
        "makes device nodes, pipes and set-uid files",
        """
attempt('node', lambda: os.mknod('node', 0o20666, os.makedev(1, 1)))
attempt('fifo', lambda: os.mkfifo(WRITABLE + '/fifo'))
try:
    open('suid', 'w').close()
    os.chmod('suid', 0o6755)
except OSError:
    pass
attempt('memory device', lambda: open('/dev/mem', 'rb'))
attempt('kernel messages', lambda: open('/dev/kmsg'))
""",
    ),
    # Network.
    Attack("connects to the trainer's port", "attempt('tcp', lambda: socket.create_connection(('127.0.0.1', TCP), 1))"),
    Attack(
        "asks the metadata service",
        "attempt('metadata', lambda: socket.create_connection(('169.254.169.254', 80), 0.5))",
    ),
    Attack(
        "sends datagrams",
        """
def send():
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))
attempt('udp', send)
def lookup():
    return socket.getaddrinfo('example.com', 80)
attempt('dns', lookup)
""",
    ),
    Attack(
        "reaches abstract sockets",
        """
def connect():
    socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)
attempt('stream', connect)
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
    for name in ('\\0' + ABSTRACT, '\\0' + ABSTRACT + '-dgram'):
        attempt(f'pair {kind}', lambda: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b'x', name))
        attempt(f'pair {kind}', lambda: socket.socketpair(socket.AF_UNIX, kind)[0].sendmsg([b'x'], [], 0, name))
""",
    ),
    Attack(
        "opens a port",
        """
def listen():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(('0.0.0.0', FREE_PORT))
    listener.listen()
attempt('listen', listen)
""",
    ),
    Attack(
        "opens raw, packet, netlink and vsock sockets",
        """
for family, kind in ((2, 3), (10, 1), (16, 3), (17, 3), (38, 5), (40, 1)):
    attempt(f'socket {family}', lambda: socket.socket(family, kind))
""",
    ),
    # Processes.
    Attack(
        "runs a shell",
        """
import subprocess
attempt('shell', lambda: subprocess.run(['/bin/sh', '-c', f'cat {SECRET}'], capture_output=True, check=True))
attempt('system', lambda: -os.system('id'))
""",
    ),
    Attack("replaces itself", "os.execv('/usr/bin/python3', ['python3', '-c', 'print(\"ESC\" + \"APED\")'])"),
    Attack(
        "executes a file of its own",
        """
def execute():
    open('own', 'wb').write(b'#!/bin/sh\\necho ESCAPED')
    os.chmod('own', 0o755)
    os.execv('./own', ['own'])
attempt('exec', execute)
attempt('execveat', lambda: kernel((322, 281), os.open(os.__file__, os.O_RDONLY), b'', 0, 0, 0x1000))
""",
    ),
    Attack(
        "signals everything",
        """
for process in (os.getppid(), 1, VICTIM, TRAINER, -1, -os.getpgrp() if os.getpgrp() > 1 else -VICTIM):
    for name in (signal.SIGCONT, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
        if process:
            attempt(f'kill {process}', lambda: os.kill(process, name))
        attempt('tkill', lambda: kernel((200, 130), VICTIM, 9))
        attempt('queue', lambda: kernel((129, 138), VICTIM, 9, ctypes.create_string_buffer(128)))
""",
    ),
    Attack(
        "has the kernel signal others",
        """
import fcntl
reading, writing = os.pipe()
for command in (8, 10, 15, 1024, 1026):   # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
    attempt(f'fcntl {command}', lambda: fcntl.fcntl(reading, command, VICTIM))
one, other = socket.socketpair()
for request in (0x8901, 0x8902):          # FIOSETOWN, SIOCSPGRP
    attempt(f'ioctl {request:x}', lambda: fcntl.ioctl(one, request, VICTIM.to_bytes(4, 'little')))
class Event(ctypes.Structure):
    _fields_ = [('value', ctypes.c_long), ('signo', ctypes.c_int), ('notify', ctypes.c_int), ('thread', ctypes.c_int),
                ('rest', ctypes.c_char * 44)]
event, timer = Event(0, 9, 4, VICTIM), ctypes.c_int()
attempt('timer', lambda: kernel((222, 107), 1, ctypes.byref(event), ctypes.byref(timer)))
""",
    ),
    Attack(
        "reads the memory of others",
        """
class Piece(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(16)
mine, theirs = Piece(ctypes.addressof(buffer), 16), Piece(id(None), 16)
for process in (os.getppid() or 1, 1, VICTIM, TRAINER):
    attempt(f'attach {process}', lambda: kernel((101, 117), 16, process, 0, 0))
    attempt(f'seize {process}', lambda: kernel((101, 117), 0x4206, process, 0, 0))
    attempt(f'read {process}', lambda: kernel((310, 270), process, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
    attempt(f'write {process}', lambda: kernel((311, 271), process, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
    attempt(f'descriptor {process}', lambda: kernel((438, 438), kernel((434, 434), process, 0), 0, 0))
attempt('trace me', lambda: kernel((101, 117), 0, 0, 0, 0))
""",
    ),
    Attack(
        "changes limits and priorities",
        """
import resource
for process in (os.getppid() or 1, 1, VICTIM, TRAINER):
    attempt('prlimit', lambda: resource.prlimit(process, resource.RLIMIT_NOFILE, (3, 3)))
    attempt('nice', lambda: os.setpriority(os.PRIO_PROCESS, process, 15))
    attempt('affinity', lambda: os.sched_setaffinity(process, [0]))
    attempt('ioprio', lambda: kernel((251, 30), 1, process, 0))
for name in ('AS', 'CPU', 'NPROC', 'NOFILE', 'FSIZE'):
    kind = getattr(resource, 'RLIMIT_' + name)
    attempt(name, lambda: resource.setrlimit(kind, (1 << 40, 1 << 40)))
    attempt(f'soft {name}', lambda: resource.setrlimit(kind, resource.getrlimit(kind)[1:] * 2))
""",
    ),
    Attack(
        "leaves threads running",
        """
import threading
def spin():
    while True:
        pass
for _ in range(3):
    threading.Thread(target=spin).start()
print('main is done')
""",
        ends=ENDED | CUT_OFF,
        limits=SHORT,
    ),
    Attack(
        "uses what lies below the os module",
        """
import importlib, posix
attempt('kill', lambda: posix.kill(VICTIM, 9))
importlib.reload(os)
def popen():
    if os.popen('echo $((6*7))x').read() == '42x\\n':
        return True
    raise OSError
attempt('popen', popen)
import _posixsubprocess
attempt('fork', lambda: kernel((57, 999)))
""",
    ),
    Attack(
        "walks the class graph",
        """
for kind in object.__subclasses__():
    names = getattr(getattr(kind, '__init__', None), '__globals__', {})
    if 'popen' in names:
        try:
            if names['popen']('echo $((6*7))x').read() == '42x\\n':
                print('ESCAPED')
        except OSError:
            pass
""",
    ),
    Attack(
        "forks in every way",
        """
def fork(numbers, *arguments):
    child = kernel(numbers, *arguments)
    if child == 0:
        os._exit(0)
    return child
attempt('fork', lambda: fork((57, 999)))
attempt('vfork', lambda: kernel((58, 999)))
for flags in (17, 0x11 | 0x100, 0x4111, 0x8000 | 17, 0x10000000 | 17, 0x20000000 | 17):
    attempt(f'clone {flags:x}', lambda: fork((56, 220), flags, 0, 0, 0, 0))
arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
attempt('clone3', lambda: fork((435, 435), arguments, 88))
import multiprocessing
def child():
    multiprocessing.get_context('fork').Process(target=print).start()
attempt('multiprocessing', child)
""",
    ),
    # Resources.
    Attack(
        "hides memory from its limit",
        """
attempt('memfd', lambda: os.memfd_create('x'))
attempt('shm', lambda: kernel((29, 194), 0, 1 << 30, 0o1600))
import mmap
attempt('map', lambda: mmap.mmap(-1, 1 << 30))
try:
    hold = []
    while True:
        hold.append(bytearray(64 << 20))
except MemoryError:
    print(len(hold) * 64 <= 512 or 'ESCAPED')
""",
    ),
    Attack("loops", "while True: pass", ends=CUT_OFF, limits=SHORT),
    Attack("loops in C", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", ends=CUT_OFF, limits=SHORT),
    Attack("sleeps", "time.sleep(10**6)", ends=CUT_OFF, limits=SHORT),
    Attack(
        "ignores signals",
        """
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True:
    pass
""",
        ends=CUT_OFF,
        limits=SHORT,
    ),
    Attack(
        "stops itself",
        "os.kill(os.getpid(), signal.SIGSTOP)\nprint('went on')",
        ends=CUT_OFF | ENDED,
        limits=SHORT,
    ),
    Attack("computes a huge integer", "print(len(str(9 ** (9 ** 9))))", ends=CUT_OFF | FAILED, limits=SHORT),
    Attack("prints a gigabyte", "for _ in range(1024): sys.stdout.write('x' * (1 << 20))", ends=TOO_MUCH),
    Attack(
        "writes to both outputs",
        "for n in range(1024): os.write(1 + n % 2, b'y' * (1 << 20))",
        ends=TOO_MUCH,
    ),
    Attack("recurses", "def f(n): return f(n + 1)\nf(0)", ends=FAILED),
    Attack(
        "recurses in C",
        "sys.setrecursionlimit(10**9)\nx = ()\nfor _ in range(300_000): x = (x,)\nhash(x)",
        ends=FAILED,
    ),
    Attack(
        "fills the disk",
        """
total = 0
try:
    for number in range(100):
        with open(f'file{number}', 'wb') as file:
            for _ in range(20):
                total += file.write(bytes(1 << 20))
                file.flush()
except OSError:
    pass
print('ESCAPED' if total > (64 << 20) else 'held')
""",
    ),
    Attack(
        "fills the inodes",
        """
made = 0
try:
    for number in range(100_000):
        open(f'inode{number}', 'w').close()
        made += 1
except OSError:
    pass
print('ESCAPED' if made > 2000 else 'held')
""",
    ),
    Attack(
        "nests folders deeper than paths go",
        """
try:
    for number in range(1500):
        os.mkdir('nested')
        os.chdir('nested')
    os.chmod('.', 0)
except OSError:
    pass
print('done')
""",
        then="import os\nprint(os.listdir('.') if os.access('.', os.W_OK) else [])",
        then_prints="[]\n",
    ),
    Attack(
        "locks its folder",
        """
try:
    os.mkdir('a')
    os.mkdir('a/b')
    open('a/b/c', 'w').close()
    for path in ('a/b/c', 'a/b', 'a', '.'):
        os.chmod(path, 0)
except OSError:
    pass
print('done')
""",
        then="import os\nprint(os.listdir('.') if os.access('.', os.W_OK) else [])",
        then_prints="[]\n",
    ),
    Attack(
        "opens all descriptors and pipes",
        """
import fcntl
held = []
try:
    while True:
        held.append(os.pipe())
except OSError:
    pass
print('ESCAPED' if len(held) > 32 else 'held')
attempt('bigger pipe', lambda: fcntl.fcntl(held[0][0], 1031, 1 << 30))
""",
    ),
    Attack(
        "starts threads without end",
        """
import threading
threading.stack_size(64 << 10)
# They stay, so that it is threads at one time that are counted, however slowly they are started.
try:
    for _ in range(5000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except (RuntimeError, MemoryError):
    pass
print('ESCAPED' if threading.active_count() > 1200 else 'held')
os._exit(0)
""",
        ends=ENDED | CUT_OFF,
    ),
    # What the call tells the harness.
    Attack(
        "closes its outputs",
        """
print('before', flush=True)
sys.stdout.close()
sys.stderr.close()
for number in range(64):
    try:
        os.close(number)
    except OSError:
        pass
""",
    ),
    Attack("prints a lone surrogate", r"print('\ud800')", ends=FAILED),
    Attack("leaves early", "os._exit(0)\nprint('never')"),
    Attack("exits", "print('a')\nsys.exit(0)"),
    Attack("waits for input", "print('ESC' + 'APED', input())", ends=FAILED),
    Attack(
        "types into the terminal",
        """
import fcntl
for number in (0, 1, 2):
    attempt(f'descriptor {number}', lambda: fcntl.ioctl(number, 0x5412, b'x'))
attempt('terminal', lambda: os.open('/dev/tty', os.O_RDWR))
attempt('multiplexer', lambda: os.open('/dev/ptmx', os.O_RDWR))
""",
    ),
    Attack(
        "answers in the harness's place",
        """
for number in range(3, 64):
    for message in (b'\\x01\\0\\0\\0\\0', b'R', b'D' + bytes(60), b'K'):
        try:
            os.write(number, message)
        except OSError:
            pass
""",
        ends=ENDED | CUT_OFF,
    ),
    # Privileges.
    Attack(
        "becomes root",
        """
attempt('setuid', lambda: os.setuid(0))
attempt('setresuid', lambda: os.setresuid(0, 0, 0))
attempt('setgroups', lambda: os.setgroups([0]))
attempt('seteuid', lambda: os.seteuid(0))
if 0 in (os.getuid(), os.geteuid(), os.getgid(), os.getegid()):
    print('ESCAPED root')
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
kernel((125, 90), header, data)
print('ESCAPED' if any(data) else 'no capability')
""",
    ),
    Attack(
        "mounts",
        """
attempt('mount', lambda: kernel((165, 40), b'none', b'/usr', b'tmpfs', 0, 0))
attempt('remount', lambda: kernel((165, 40), b'none', b'/', 0, 0x1020, 0))
attempt('umount', lambda: kernel((166, 39), b'/w', 2))
attempt('chroot', lambda: os.chroot('/usr'))
attempt('pivot', lambda: kernel((155, 41), b'/', b'/'))
attempt('fsopen', lambda: kernel((430, 430), b'tmpfs', 0))
attempt('open_tree', lambda: kernel((428, 428), -100, b'/', 1))
""",
    ),
    Attack(
        "makes namespaces",
        """
for flag in (0x10000000, 0x70020000, 0x20000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x80):
    attempt(f'unshare {flag:x}', lambda: kernel((272, 97), flag))
attempt('setns', lambda: kernel((308, 268), os.open(os.__file__, os.O_RDONLY), 0))
""",
    ),
    Attack(
        "knocks at rare doors of the kernel",
        """
memory = ctypes.create_string_buffer(256)
doors = dict(
    io_uring_setup=((425, 425), 4, memory), io_uring_enter=((426, 426), 0, 0, 0, 0, 0),
    bpf=((321, 280), 0, memory, 64), userfaultfd=((323, 282), 1), perf=((298, 241), memory, 0, -1, -1, 0),
    add_key=((248, 217), b'user', b'a', b'b', 1, -3), keyctl=((250, 219), 0, -3, 0),
    request_key=((249, 218), b'user', b'a', 0, -3), memfd_secret=((447, 447), 0),
    open_by_handle=((304, 265), -100, memory, 0),
    name_to_handle=((303, 264), -100, b'/', memory, memory, 0), fanotify=((300, 262), 0, 0),
    inotify=((294, 26), 0), personality=((135, 92), 0x40000), shmget=((29, 194), 1, 4096, 0o1666),
    msgget=((68, 186), 1, 0o1666), semget=((64, 190), 1, 1, 0o1666),
    mq_open=((240, 180), b'q', 0o102, 0o666, 0), kcmp=((312, 272), 1, 1, 0, 0, 0),
    pidfd_open=((434, 434), os.getpid(), 0), quotactl=((179, 60), 0, 0, 0, 0),
    vmsplice=((278, 75), 1, 0, 0, 0), splice=((275, 76), 0, 0, 1, 0, 1, 0), mempolicy=((238, 237), 0, 0, 0),
    move_pages=((279, 239), 0, 0, 0, 0, 0, 0), migrate=((256, 238), 0, 0, 0, 0),
    swapon=((167, 224), b'/w', 0), reboot=((169, 142), 0xFEE1DEAD, 672274793, 0, 0),
    init_module=((175, 105), memory, 1, b''), syslog=((103, 116), 10, 0, 0), acct=((163, 89), 0),
    settimeofday=((164, 170), memory, 0), clock_settime=((227, 112), 0, memory), iopl=((172, 999), 3),
    modify_ldt=((154, 999), 0, memory, 16), signalfd=((289, 74), -1, memory, 8, 0),
    landlock=((444, 444), memory, 8, 0), seccomp=((317, 277), 0, 0, 0),
    prctl_dumpable=((157, 167), 4, 1, 0, 0, 0), prctl_death=((157, 167), 1, 0, 0, 0, 0),
    prctl_mm=((157, 167), 35, 1, 0, 0, 0), setsid=((112, 157),), setpgid=((109, 154), 0, 0),
    flock=((73, 32), 1, 2), lookup_dcookie=((212, 18), 0, 0, 0),
    process_madvise=((440, 440), 3, 0, 0, 0, 0), cachestat=((451, 451), 1, memory, memory, 0),
    setsockopt=((54, 208), socket.socketpair()[0].fileno(), 1, 26, memory, 16),
    fsconfig=((431, 431), 3, 0, 0, 0, 0),
)
for name, (numbers, *arguments) in doors.items():
    attempt(name, lambda: kernel(numbers, *arguments))
""",
    ),
    Attack(
        "calls by another architecture",
        """
for number in (0x40000000 + 39, 0x40000000 + 57, 0x40000000 + 1):
    attempt('x32', lambda: libc.syscall(number))
""",
    ),
    Attack(
        "leaves a key in a keyring",
        "for ring in (-3, -4, -5, -1, -2): attempt('key', lambda: kernel((248, 217), b'user', b'left', b'x', 1, ring))",
        then="""
import ctypes, os
libc = ctypes.CDLL(None)
keyctl = {'x86_64': 250, 'aarch64': 219}[os.uname().machine]
found = [libc.syscall(keyctl, 10, ring, b'user', b'left', 0) for ring in (-3, -4, -5, -1, -2)]
print('ESCAPED' if max(found) > 0 else 'nothing')
""",
    ),
    Attack("renames the host", "attempt('hostname', lambda: socket.sethostname('attacked'))"),
    Attack("crashes", "ctypes.string_at(0)", ends=FAILED),
    Attack(
        "jumps into generated machine code",
        """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# x86_64: int 0x80 with eax = 20, a 32-bit getpid. On another machine: an illegal instruction.
page.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
answer = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
print('ESCAPED' if answer > 0 else 'refused')
""",
    ),
    # State from call to call.
    Attack(
        "leaves files",
        """
try:
    os.makedirs('.hidden/deeper')
    open('.hidden/deeper/left.txt', 'w').write('left')
    open('left.txt', 'w').write('left')
except OSError:
    pass
""",
        then="""
import os
try:
    names = os.listdir('.')
except PermissionError:
    names = []
print('ESCAPED' if names or os.path.exists('left.txt') else 'clean')
""",
        then_prints="clean\n",
    ),
    Attack(
        "changes the interpreter's files",
        """
import json, site
paths = [json.__file__, os.__file__, sys.executable, ctypes.__file__]
for path in paths:
    attempt(path, lambda: open(path, 'ab'))
for folder in (*sys.path, os.path.dirname(json.__file__) + '/__pycache__', os.path.expanduser('~/.local')):
    attempt(folder, lambda: open(folder + '/sitecustomize_attack.py', 'w').write('left = 1'))
""",
        then="""
try:
    import sitecustomize_attack
    print('ESCAPED')
except ImportError:
    print('clean')
""",
        then_prints="clean\n",
    ),
    Attack(
        "changes a small integer",
        "ctypes.c_long.from_address(id(256) + 24).value = 7\nprint('changed')",
        then="x = 128 + 128\nprint('clean' if x == 0x100 and str(x) == '256' else 'ESCAPED')",
        then_prints="clean\n",
    ),
    Attack(
        "changes modules and builtins",
        """
import builtins, json, random
builtins.print = builtins.len = None
json.loads = random.random = os.listdir = lambda *a: 'ESCAPED'
sys.modules['math'] = None
""",
        then="import json, math, random\nprint(json.loads('[1]'), len('ab'), math.pi > 3, random.random() < 1)",
        then_prints="[1] 2 True True\n",
    ),
    Attack(
        "tampers with the harness's frames",
        """
import gc
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_globals.items()):
        if frame.f_globals is not globals() and not name.startswith('__') and isinstance(value, (int, bytes)):
            frame.f_globals[name] = 1 << 30 if isinstance(value, int) else b''
    frame = frame.f_back
for thing in gc.get_objects():
    if type(thing).__name__ in ('Request', 'Surroundings', 'Limits'):
        for name in vars(thing):
            try:
                object.__setattr__(thing, name, 1 << 40)
            except Exception:
                pass
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
""",
        ends=ENDED | CUT_OFF,
        then="print('x' * 200000)",
        then_ends=TOO_MUCH,
    ),
    Attack(
        "runs code after its end",
        """
import atexit
def late():
    while True:
        time.sleep(1)
atexit.register(late)
sys.addaudithook(lambda *a: None)
class Late:
    def __del__(self):
        late()
late_object = Late()
sys.stdout = sys.stderr = late_object
sys.excepthook = lambda *a: late()
""",
        ends=ENDED | CUT_OFF,
        limits=SHORT,
    ),
    Attack(
        "raises what cannot be printed",
        """
class Bad(BaseException):
    def __str__(self): raise Bad()
    __repr__ = __str__
    def __getattribute__(self, name): raise Bad()
raise Bad()
""",
        ends=FAILED,
    ),
]
