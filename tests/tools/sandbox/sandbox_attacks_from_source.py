# ruff: noqa: E501 (tables of system calls, and programs on one line)
"""Attacks by somebody who has read the sandbox's source. See sandbox_attacks.py for what one is.

They aim at its own protocol, at what its processes share with each other, and at the arguments of the system
calls that its filters let through.
"""

from __future__ import annotations

from sandbox_attacks import CUT_OFF, ENDED, FAILED, TOO_MUCH, Attack

from opd_env.tools.sandbox import Limits

BRIEF = Limits(wall_s=0.3)

CHANNELS = [
    Attack(
        "writes to whatever it may have inherited",
        """
import struct
report = struct.pack('<cI??iQQ', b'D', 1, True, True, 0, 0, 0)
for number in (*range(4, 70), *(os.listdir('/proc/self/fd') if os.access('/proc/self/fd', os.R_OK) else ())):
    for message in (report, b'R', b'P', b'F', struct.pack('<cI', b'K', 1)):
        try:
            os.write(int(number), message)
        except OSError:
            continue
        print('ESCAPED wrote to', number)
""",
    ),
    Attack(
        "prints what no text is",
        "os.write(1, b'\\xff\\xfe\\x00\\x80' * 1000 + b'\\xed\\xa0\\x80\\xf8\\x88NaN Infinity \\x1b]0;title\\x07')",
    ),
    Attack("fills the whole output with broken bytes", "os.write(1, b'\\xff' * 60000); os.write(1, b'\\xff' * 5000)"),
    Attack(
        "answers for itself and hangs",
        """
import struct
try:
    os.write(3, struct.pack('<IB', 1, 0) * 3)
except OSError:
    pass
while True: time.sleep(1)
""",
        ends=CUT_OFF | ENDED,
        limits=BRIEF,
    ),
    Attack(
        "shuts its channel down in both ways",
        """
try:
    channel = socket.socket(fileno=os.dup(3))
    channel.shutdown(socket.SHUT_RD)
except OSError:
    pass
print('closed')
""",
    ),
    Attack(
        "asks the channel who is behind it",
        """
for option in (17, 31, 59, 77, 25):     # SO_PEERCRED, PEERSEC, PEERGROUPS, PEERPIDFD, ATTACH_FILTER
    def ask():
        answer = ctypes.create_string_buffer(64)
        length = ctypes.c_uint32(64)
        if kernel((55, 209), 3, 1, option, answer, ctypes.byref(length)) < 0:
            return -1
        return None if option == 17 and not any(answer.raw[:4]) else 0
    attempt(f'option {option}', ask)
""",
    ),
    Attack(
        "takes the frames of a later request",
        """
for number in range(3, 64):
    for action in (lambda: os.read(number, 64), lambda: socket.socket(fileno=number).recvmsg(64, 64, 0x40)):
        if number == 3:
            continue
        attempt(f'read {number}', action)
""",
    ),
    Attack(
        "sends its descriptors away",
        """
import array
one, other = socket.socketpair()
def passed():
    one.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0, 1]))])
    other.recvmsg(1, 64)
attempt('descriptors', passed)
attempt('many', lambda: kernel((307, 269), one.fileno(), ctypes.create_string_buffer(64), 1, 0))
attempt('receives many', lambda: kernel((299, 243), one.fileno(), ctypes.create_string_buffer(64), 1, 0, 0))
""",
    ),
    Attack(
        "ends its first thread and goes on",
        """
import threading
def live():
    time.sleep(0.05)
    os.write(1, b'alive')
    while True: time.sleep(1)
threading.Thread(target=live).start()
kernel((60, 93), 0)
""",
        ends=CUT_OFF,
        limits=BRIEF,
    ),
    Attack(
        "exits in another thread",
        "import threading\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(9)",
    ),
    Attack(
        "makes its output pipe refuse to block",
        """
import fcntl
for number in (1, 2):
    fcntl.fcntl(number, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND | 0o40000)
written = 0
while written < 1 << 24:
    try:
        written += os.write(1, b'z' * 65536)
    except OSError:
        time.sleep(0.001)
""",
        ends=TOO_MUCH | ENDED | CUT_OFF,
    ),
    Attack(
        "floods with small writes", "while True: os.write(1 + (time.monotonic_ns() & 1), b'.')", ends=TOO_MUCH | CUT_OFF
    ),
]

PROCESSES = [
    Attack(
        "signals by every other call",
        """
buffer = ctypes.create_string_buffer(128)
for process in (1, 2, os.getppid() or 1, VICTIM, TRAINER):
    attempt('rt_sigqueueinfo', lambda: kernel((129, 138), process, 18, buffer))
    attempt('rt_tgsigqueueinfo', lambda: kernel((297, 240), process, process, 18, buffer))
    attempt('tgkill', lambda: kernel((234, 131), process, process, 18))
    attempt('tgkill of a stranger', lambda: kernel((234, 131), -1, process, 18))
    attempt('kill, wide', lambda: kernel((62, 129), ctypes.c_long(process | 1 << 32), 0))
    attempt('pidfd_send_signal', lambda: kernel((424, 424), 3, 9, 0, 0))
""",
    ),
    Attack(
        "stays hidden in a session of its own",
        """
attempt('setsid', os.setsid)
attempt('setpgid', lambda: os.setpgid(0, 0))
attempt('subreaper', lambda: kernel((157, 167), 36, 1, 0, 0, 0))
attempt('death signal', lambda: kernel((157, 167), 1, 0, 0, 0, 0))
attempt('keep capabilities', lambda: kernel((157, 167), 8, 1, 0, 0, 0))
attempt('ptracer', lambda: kernel((157, 167), 0x59616D61, -1, 0, 0, 0))
attempt('dumpable', lambda: kernel((157, 167), 4, 1, 0, 0, 0))
attempt('ambient', lambda: kernel((157, 167), 47, 2, 0, 0, 0))
attempt('speculation', lambda: kernel((157, 167), 53, 0, 2, 0, 0))
attempt('syscall dispatch', lambda: kernel((157, 167), 59, 1, 0, 0, 0))
attempt('thread area', lambda: kernel((158, 999), 0x1001, 0))
""",
    ),
    Attack(
        "starts a thread without its leash",
        """
stack = ctypes.create_string_buffer(1 << 16)
# CLONE_THREAD with namespaces, a pidfd, tracing, another parent, or a process that shares memory.
for flags in (0x10D0F00 | 0x10000000, 0x3D0F00 | 0x20000, 0x3D0F00 | 0x40000000, 0x100 | 0x8000 | 17, 0x4000 | 0x100 | 17,
              0x3D0F00 | 0x04000000, 0x800000 | 17):
    attempt(f'clone {flags:x}', lambda: kernel((56, 220), flags, 0, 0, 0, 0))
""",
    ),
    Attack(
        "watches the other processes",
        """
for process in (os.getppid() or 1, VICTIM, TRAINER):
    attempt('wait', lambda: os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT))
    attempt('robust list', lambda: kernel((274, 100), process, ctypes.byref(ctypes.c_long()), ctypes.byref(ctypes.c_long())))
    attempt('priority', lambda: os.getpriority(os.PRIO_PROCESS, process))
    attempt('scheduler', lambda: kernel((144, 119), process, 0, ctypes.byref(ctypes.c_int(0))))
    attempt('attributes', lambda: kernel((315, 275), process, ctypes.create_string_buffer(64), 48, 0))
    attempt('limits', lambda: __import__('resource').prlimit(process, 7))
    attempt('advice', lambda: kernel((440, 440), 3, 0, 0, 4, 0))
    attempt('release', lambda: kernel((448, 448), 3, 0))
""",
    ),
    Attack(
        "spawns by the libraries",
        """
import concurrent.futures, multiprocessing, pty, subprocess
def pool():
    with concurrent.futures.ProcessPoolExecutor(1) as executor:
        return executor.submit(int, '7').result(timeout=1)
def spawn():
    process = multiprocessing.get_context('spawn').Process(target=print)
    process.start()
for name, action in (('pool', pool), ('spawn', spawn), ('pty', lambda: pty.fork()),
                     ('popen', lambda: os.popen('true').close()),
                     ('daemon', lambda: subprocess.Popen(['true'], start_new_session=True)),
                     ('libc', lambda: -libc.system(b'true')), ('spawnp', lambda: os.posix_spawnp('true', ['true'], {}))):
    try:
        attempt(name, action)
    except Exception as error:
        print(name, type(error).__name__)
os._exit(0)
""",
    ),
    Attack(
        "raises SIGXCPU and goes on",
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nos.kill(os.getpid(), signal.SIGXCPU)\nprint('on')",
    ),
    Attack(
        "hides in a signal handler",
        """
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
while True: signal.pause()
""",
        ends=CUT_OFF,
        limits=BRIEF,
    ),
    Attack(
        "stops one thread for ever",
        """
import threading
threading.Thread(target=lambda: kernel((234, 131), os.getpid(), threading.get_native_id(), 19)).start()
time.sleep(9)
""",
        ends=CUT_OFF,
        limits=BRIEF,
    ),
]

STATE = [
    Attack(
        "marks the standard input that all share",
        """
import fcntl
fcntl.fcntl(0, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)
""",
        then="import fcntl, os\nprint('ESCAPED' if fcntl.fcntl(0, fcntl.F_GETFL) & (os.O_APPEND | os.O_NONBLOCK) else 'clean')",
        then_prints="clean\n",
    ),
    Attack(
        "leaves a date on its folder",
        """
try:
    os.utime('.', (7, 7))
except OSError:
    pass
""",
        then="import os\nprint('ESCAPED' if int(os.stat('.').st_mtime) == 7 or int(os.stat('.').st_atime) == 7 else 'clean')",
        then_prints="clean\n",
    ),
    Attack(
        "leaves umask, folder, limits and masks changed",
        """
import locale, random, resource, threading
os.umask(0o777)
os.chdir('/')
os.environ['LEFT'] = 'left'
libc.setenv(b'LEFT', b'left', 1)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.setitimer(signal.ITIMER_REAL, 3600)
for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_STACK):
    attempt('limit', lambda: resource.setrlimit(kind, (5, 5)))
random.seed(99)
sys.setswitchinterval(9)
sys.setrecursionlimit(50)
threading.stack_size(1 << 20)
""",
        then="""
import os, random, resource, signal, sys, threading
values = [os.umask(0o22), 'LEFT' in os.environ, signal.pthread_sigmask(0, []), signal.getsignal(17), signal.getitimer(0),
          resource.getrlimit(7)[0], sys.getswitchinterval(), sys.getrecursionlimit(), threading.stack_size(), os.getcwd() in ('/', '/w')]
print(*values, round(random.random(), 6))
""",
        then_prints="18 False set() 0 (0.0, 0.0) 64 0.005 1000 0 True 0.844422\n",
    ),
    Attack(
        "leaves something in shared memory",
        """
import mmap
from multiprocessing import shared_memory
attempt('posix', lambda: shared_memory.SharedMemory('left', create=True, size=10))
attempt('sysv', lambda: kernel((29, 194), 77, 4096, 0o1666))
attempt('queue', lambda: kernel((240, 180), b'/left', 0o102, 0o600, 0))
attempt('memory file', lambda: os.memfd_create('left'))
for path in ('/dev/shm', '/dev', '/dev/mqueue', '/run', '/var/tmp', '/proc/self'):
    attempt(path, lambda: open(path + '/@MARK@', 'w'))
shared = mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)
shared[:4] = b'left'
private = mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED)
private[:4] = b'left'
""",
        then="""
import mmap, os
print('ESCAPED' if mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)[:4] == b'left' else 'clean')
""",
        then_prints="clean\n",
    ),
    Attack(
        "writes into the pages of the interpreter",
        """
# What is mapped from files is private to the process: changing it must not change the file, or the next call.
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
address = ctypes.cast(ctypes.pythonapi.Py_GetVersion, ctypes.c_void_p).value
if libc.mprotect(address & ~4095, 8192, 7) == 0:
    ctypes.memset(address, 0xC3, 1)
os._exit(0)
""",
        then="import ctypes\nctypes.pythonapi.Py_GetVersion.restype = ctypes.c_char_p\nprint(ctypes.pythonapi.Py_GetVersion()[:2].decode())",
        then_prints="3.\n",
    ),
    Attack(
        "maps the interpreter's files to write them",
        """
import mmap
for path in (os.__file__, sys.executable, ctypes.__file__, '/etc/ld.so.cache'):
    def change():
        with open(path, 'rb') as file:
            view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
            address = libc.mmap(None, 4096, 1, 1, file.fileno(), 0)
            return libc.mprotect(address, 4096, 3)
    attempt(path, change)
""",
    ),
    Attack(
        "poisons the import system",
        """
class Finder:
    def find_spec(self, name, path=None, target=None): print('ESCAPED imported', name)
sys.meta_path.insert(0, Finder())
sys.path.insert(0, '/w')
sys.path_hooks.insert(0, lambda path: 1 / 0)
import builtins, importlib, linecache
builtins.__import__ = lambda *a, **k: print('ESCAPED')
linecache.cache.clear()
importlib._bootstrap._find_and_load = None
""",
        then="import wave, colorsys\nprint(wave.__name__)",
        then_prints="wave\n",
    ),
    Attack(
        "leaves modules for the next start",
        """
for name in ('sitecustomize.py', 'usercustomize.py', 'left.pth', 'json.py', 'random.py', 'ctypes.py', 'numbers.py', '__main__.py'):
    try:
        open(name, 'w').write("print('ESCAPED by a module')")
    except OSError:
        pass
os.environ.update(PYTHONSTARTUP='/w/json.py', PYTHONPATH='/w', PYTHONINSPECT='1', LD_PRELOAD='/w/x.so')
""",
        then="import json, random, numbers, wave\nprint('clean')",
        then_prints="clean\n",
    ),
    Attack(
        "hooks everything that runs later",
        """
import atexit, codecs, gc, threading
sys.addaudithook(lambda *a: None)
gc.callbacks.append(lambda *a: print('ESCAPED collector'))
sys.unraisablehook = threading.excepthook = sys.displayhook = lambda *a: None
codecs.register(lambda name: None)
sys.setprofile(lambda *a: None)
threading.settrace(lambda *a: None)
atexit._clear()
""",
        then="import gc\ngc.collect()\nprint('clean')",
        then_prints="clean\n",
    ),
    Attack(
        "looks for secrets in the objects of its ancestors",
        """
import gc
for thing in gc.get_objects():
    if isinstance(thing, dict):
        for key, value in list(thing.items()):
            if isinstance(value, str) and any(word in value for word in ('CANARY-', 'in the environment', 'SSH_', 'TOKEN=')):
                if not value.startswith('\\nimport gc') and 'CANARY-' not in repr(key) and 'word in value' not in value:
                    print('ESCAPED', key)
        kind = type(thing.get('control')).__name__
        if kind == 'socket' and thing['control'].fileno() >= 0:
            attempt('control socket', lambda: thing['control'].send(b'D'))
""",
    ),
    Attack(
        "learns who and where it is",
        """
import getpass, platform, pwd
for name in ('getlogin',):
    attempt(name, getattr(os, name))
def account(): return pwd.getpwuid(os.getuid()).pw_name
def user(): return getpass.getuser()
for action in (account, user):
    try:
        action()
        print('ESCAPED', action.__name__)
    except (KeyError, OSError, ImportError):
        pass
for path in ('/etc/hostname', '/etc/machine-id', '/proc/version', '/proc/cmdline', '/sys/class/dmi/id/product_uuid',
             '/proc/net/tcp', '/proc/mounts', '/proc/sys/kernel/random/boot_id', '/etc/resolv.conf', '/var/log', '/.dockerenv'):
    attempt(path, lambda: open(path).read(1))
""",
    ),
    Attack(
        "passes a note by the random numbers",
        "import random\nrandom.seed(); print(random.random() < 2)\nrandom.setstate(random.getstate())",
        then="import random, secrets\nprint(round(random.random(), 6), secrets.token_hex(4) != '00000000')",
        then_prints="0.844422 True\n",
    ),
    Attack(
        "leaves locks on shared files",
        """
import fcntl
for path in (os.__file__, '/dev/null', '/dev/zero', '/etc/ld.so.cache'):
    try:
        file = open(path, 'rb')
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        pass
attempt('flock', lambda: fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB))
attempt('open file lock', lambda: fcntl.fcntl(0, 37, bytes(32)))
""",
        then="""
import fcntl, os
try:
    fcntl.lockf(os.open('/dev/null', os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print('clean')
except OSError:
    print('ESCAPED')
""",
        then_prints="clean\n",
    ),
]

RESOURCES = [
    Attack(
        "fills every pipe and socket",
        """
held = []
try:
    while True:
        pair = socket.socketpair()
        held.append(pair)
        pair[0].setblocking(False)
        while True:
            try:
                pair[0].send(bytes(65536))
            except BlockingIOError:
                break
except OSError:
    pass
attempt('bigger buffer', lambda: held[0][0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 28))
attempt('forced buffer', lambda: held[0][0].setsockopt(socket.SOL_SOCKET, 32, 1 << 28))
print('ESCAPED' if len(held) > 40 else 'held')
""",
    ),
    Attack(
        "writes sparse giants",
        """
def giant():
    with open('giant', 'wb') as file:
        file.truncate(1 << 40)
def far():
    with open('far', 'wb') as file:
        os.pwrite(file.fileno(), b'x', 1 << 35)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
attempt('truncate', giant)
attempt('far write', far)
attempt('allocate', lambda: os.posix_fallocate(os.open('new', os.O_CREAT | os.O_RDWR), 0, 1 << 30))
""",
    ),
    Attack(
        "fills the folder through maps",
        """
import mmap
total = 0
try:
    for number in range(100):
        with open(f'm{number}', 'w+b') as file:
            file.truncate(16 << 20)
            view = mmap.mmap(file.fileno(), 16 << 20)
            for at in range(0, 16 << 20, 4096):
                view[at] = 1
                total += 4096
            view.close()
except (OSError, ValueError):
    pass
print('ESCAPED' if total > 65 << 20 else 'held')
""",
        ends=ENDED | CUT_OFF,
    ),
    Attack(
        "adds links without end",
        """
made = 0
try:
    open('one', 'w').close()
    for number in range(100_000):
        os.link('one', f'link{number}')
        made += 1
except OSError:
    pass
try:
    for number in range(100_000):
        os.symlink('x' * 4000, f'symbolic{number}')
        made += 1
except OSError:
    pass
print('ESCAPED' if made > 2000 else 'held')
""",
    ),
    Attack(
        "deletes a file and keeps its room",
        """
try:
    for number in range(4):
        held = os.open('room', os.O_CREAT | os.O_RDWR)
        os.write(held, bytes(15 << 20))
        os.unlink('room')
except OSError:
    pass
print('kept')
""",
        then="""
import os
try:
    total = 0
    for number in range(3):
        with open(f'file{number}', 'wb') as file:
            total += file.write(bytes(15 << 20))
    print(total >> 20)
except OSError as error:
    print(45 if error.errno in (13, 30, 1) else error)
""",
        then_prints="45\n",
    ),
    Attack(
        "asks for more memory than there is",
        """
import mmap
for size in (1 << 62, 1 << 46, 1 << 40, 1 << 35, 1 << 30):
    attempt(f'map {size:x}', lambda: mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000))
    attempt(f'bytes {size:x}', lambda: len(bytearray(size)))
libc.mmap.restype = ctypes.c_long
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
attempt('huge page', lambda: libc.mmap(None, 1 << 30, 3, 0x40022 | 30 << 26, -1, 0))
attempt('locked', lambda: libc.mmap(None, 1 << 20, 3, 0x2022, -1, 0))
attempt('mlock', lambda: kernel((149, 228), id(None) & ~4095, 4096))
attempt('mlockall', lambda: kernel((151, 230), 3))
attempt('secret memory', lambda: kernel((447, 447), 0))
attempt('poison', lambda: kernel((28, 233), id(None) & ~4095, 4096, 100))
""",
    ),
    Attack(
        "unpacks a bomb",
        "import zlib\nbomb = zlib.compress(bytes(1 << 24))\nfor _ in range(3): bomb = zlib.compress(bomb)\nprint(len(zlib.decompress(zlib.decompress(zlib.decompress(zlib.decompress(bomb)))) * 64))",
        ends=FAILED,
    ),
    Attack("breaks the parser", "exec('(' * 9_000)", ends=FAILED),
    Attack(
        "breaks the compiler", "exec('x = ' + '+'.join(['1'] * 60_000))\nexec('-' * 60_000 + '1')", ends=FAILED | ENDED
    ),
    Attack(
        "overflows the stack of C",
        "sys.setrecursionlimit(1 << 30)\nclass C:\n    def __getattr__(self, name): return getattr(self, name + 'x')\nC().a",
        ends=FAILED | CUT_OFF,
    ),
    Attack(
        "has no outputs at all",
        "sys.stdout = sys.stderr = sys.stdin = None\nos.close(0); os.close(1); os.close(2)\nraise ValueError('unseen')",
        ends=FAILED,
    ),
    Attack(
        "takes locks without end",
        """
import fcntl, struct
try:
    file = open('locked', 'w+b')
except OSError:
    file = open(os.__file__, 'rb')
try:
    for number in range(2_000):
        fcntl.fcntl(file, fcntl.F_SETLK, struct.pack('hhqqi4x', 0 if not file.writable() else 1, 0, number * 2, 1, 0))
except OSError:
    pass
""",
        ends=ENDED | CUT_OFF,
    ),
    Attack(
        "sets a timer of the kernel", "attempt('timer', lambda: kernel((222, 107), 1, 0, ctypes.byref(ctypes.c_int())))"
    ),
]

KERNEL = [
    Attack(
        "knocks at newer doors of the kernel",
        """
memory = ctypes.create_string_buffer(4096)
for name, number, *arguments in (
    ('landlock_add_rule', 445, 3, 1, memory, 0), ('landlock_restrict_self', 446, 3, 0), ('fsmount', 432, 3, 0, 0),
    ('fspick', 433, -100, b'/', 0), ('mount_setattr', 442, -100, b'/', 0x8000, memory, 32), ('move_mount', 429, 3, b'', -100, b'/', 4),
    ('quotactl_fd', 443, 3, 0, 0, 0), ('process_mrelease', 448, 3, 0), ('futex_waitv', 449, memory, 1, 0, 0, 0),
    ('set_mempolicy_home_node', 450, 0, 4096, 0, 0), ('fchmodat2', 452, -100, OWN.encode(), 0o777, 0),
    ('map_shadow_stack', 453, 0, 4096, 0), ('statmount', 457, memory, memory, 4096, 0), ('listmount', 458, memory, memory, 10, 0),
    ('lsm_get_self_attr', 459, 100, memory, memory, 0), ('lsm_list_modules', 461, memory, memory, 0), ('mseal', 462, 0, 4096, 0),
    ('setxattrat', 463, -100, OWN.encode(), 0, b'user.a', memory, 16), ('open_tree_attr', 467, -100, b'/', 1, memory, 32),
    ('io_uring_register', 427, 3, 0, 0, 0), ('pidfd_getfd', 438, 3, 0, 0), ('openat2', 437, -100, SECRET.encode(), memory, 24),
    ('epoll_pwait2', 441, 3, memory, 1, 0, 0, 0), ('uretprobe', 335), ('uprobe', 336),
):
    attempt(name, lambda: libc.syscall(number, *arguments))
""",
    ),
    Attack(
        "knocks at older doors of the kernel",
        """
memory = ctypes.create_string_buffer(4096)
for name, numbers, *arguments in (
    ('uselib', (134, 999), b'/w/x'), ('sysfs', (139, 999), 3), ('ustat', (136, 999), 0, memory), ('_sysctl', (156, 999), memory),
    ('nfsservctl', (180, 42), 0, 0, 0), ('ioperm', (173, 999), 0x80, 1, 1), ('vhangup', (153, 58)), ('getpmsg', (181, 999), 0, 0, 0, 0, 0),
    ('remap_file_pages', (216, 234), 0, 4096, 0, 0, 0), ('get_mempolicy', (239, 236), memory, memory, 8, 0, 0),
    ('mbind', (237, 235), 0, 4096, 1, memory, 8, 0), ('io_setup', (206, 0), 4, memory), ('eventfd2', (290, 19), 0, 0),
    ('timerfd', (283, 85), 1, 0), ('inotify_add', (254, 27), 3, b'/', 2), ('fallocate', (285, 47), 1, 0, 0, 100),
    ('sync', (162, 81)), ('syncfs', (306, 267), 1), ('sync_file_range', (277, 84), 1, 0, 0, 0), ('tee', (276, 77), 1, 1, 1, 0),
    ('copy_file_range', (326, 285), 0, 0, 1, 0, 1, 0), ('pkey_alloc', (330, 289), 0, 0), ('membarrier', (324, 283), 0, 0, 0),
    ('setrlimit', (160, 164), 7, memory), ('adjtimex', (159, 171), memory), ('clock_adjtime', (305, 266), 0, memory),
    ('setdomainname', (171, 162), b'x', 1), ('setfsuid', (122, 151), 0), ('setreuid', (113, 145), 0, 0), ('swapoff', (168, 225), b'/w'),
    ('kexec_load', (246, 104), 0, 0, 0, 0), ('kexec_file_load', (320, 294), 0, 0, 0, 0, 0), ('delete_module', (176, 106), b'x', 0),
    ('finit_module', (313, 273), 0, b'', 0), ('mincore', (27, 232), id(None) & ~4095, 4096, memory), ('lookup', (303, 264), -100, b'.', memory, memory, 0),
    ('sched_setscheduler', (144, 119), 0, 1, memory), ('sched_setattr', (314, 274), 0, memory, 0), ('bind', (49, 200), 3, memory, 2),
    ('listen', (50, 201), 3, 1), ('accept4', (288, 242), 3, 0, 0, 0), ('connect', (42, 203), 3, memory, 16), ('socket', (41, 198), 1, 1, 0),
):
    if COLUMN == 0 or numbers[1] != 999:
        attempt(name, lambda: kernel(numbers, *arguments))
""",
    ),
    Attack(
        "tries every number that it can think of",
        """
unassigned = (range(335, 424), (*range(244, 260), *range(295, 424)))[COLUMN]
for number in (*unassigned, *range(500, 600), *range(1024, 1200), 4096, 65535, 0x3fffffff):
    libc.syscall.restype = ctypes.c_long
    ctypes.set_errno(0)
    answer = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    if answer >= 0 or ctypes.get_errno() not in (1, 38):
        print('ESCAPED', number, answer, ctypes.get_errno())
print('done')
""",
    ),
    Attack(
        "calls the kernel in the vsyscall page",
        """
if COLUMN == 0:
    for address in (0xffffffffff600000, 0xffffffffff600400, 0xffffffffff600800):
        ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(address)(0)
print('survived')
""",
    ),
    Attack(
        "calls the kernel from its own machine code",
        """
import mmap
# A fork, beyond every hook of Python and libc. x86_64: mov eax, 57; syscall; ret. aarch64: mov x8, 220; svc 0; ret
code = ('b8390000000f05c3', '881b80d2010000d4c0035fd6')[COLUMN]
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
page.write(bytes.fromhex(code))
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
answer = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 5)(address)(signal.SIGCHLD, 0, 0, 0, 0)
if answer == 0:
    os._exit(0)
print('ESCAPED' if answer > 0 else 'refused')
""",
    ),
    Attack(
        "calls by way of 32-bit code",
        """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# x86_64: mov eax, 11; int 0x80; ret (32-bit execve), then a negative number and one above 32 bits.
page.write(b'\\xb8\\x0b\\x00\\x00\\x00\\xcd\\x80\\xc3')
answer = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('ESCAPED' if answer >= 0 else 'refused')
""",
        ends=FAILED | ENDED,
    ),
    Attack(
        "calls a negative number",
        "for number in (-1, -57, -(1 << 31)): attempt(str(number), lambda: libc.syscall(ctypes.c_long(number)))",
        ends=FAILED | ENDED,
    ),
    Attack(
        "hides a number in the upper half",
        """
libc.syscall.restype = ctypes.c_long
# fork, exec, socket: the kernel takes the lower 32 bits, and so does the filter
for numbers, *arguments in (((57, 220), signal.SIGCHLD, 0, 0), ((59, 221), 0, 0, 0), ((41, 198), 1, 1, 0)):
    def call():
        answer = libc.syscall(ctypes.c_long(numbers[COLUMN] | 1 << 32), *arguments, 0, 0)
        if answer == 0 and numbers[0] == 57:
            os._exit(0)
        return answer
    attempt(f'number {numbers}', call)
""",
        ends=FAILED | ENDED,
    ),
    Attack(
        "locks with priorities of the kernel",
        """
word = ctypes.c_int(0)
for operation in (6, 7, 8, 11, 12, 13, 6 | 128, 6 | 256):
    attempt(f'futex {operation}', lambda: kernel((202, 98), ctypes.byref(word), operation, 0, 0, ctypes.byref(word), 0))
""",
        ends=ENDED | CUT_OFF,
        limits=Limits(wall_s=1.0),
    ),
    Attack(
        "waits for pages and moves them",
        """
reading, writing = os.pipe()
buffer = ctypes.create_string_buffer(64)
attempt('splice', lambda: os.splice(reading, writing, 1))
attempt('vmsplice', lambda: kernel((278, 75), writing, buffer, 1, 0))
attempt('tee', lambda: kernel((276, 77), reading, writing, 1, 0))
attempt('copy', lambda: os.copy_file_range(0, writing, 1))
attempt('preadv2', lambda: kernel((327, 286), 0, buffer, 1, 0, 0, 0))
attempt('pwritev2', lambda: kernel((328, 287), 1, buffer, 1, 0, 0, 0))
""",
    ),
    Attack(
        "asks devices for more",
        """
import fcntl
for path in ('/dev/null', '/dev/zero', '/dev/urandom', '/dev/random', os.__file__, '.', '/'):
    try:
        device = os.open(path, os.O_RDONLY)
    except OSError:
        continue
    for request in (0x5203, 0x40085203, 0x5207, 0xC0045877, 0x6601, 0x40086602, 0x80086601, 0xC0481273, 0x801C581F, 0x40049409,
                    0x5412, 0x541C, 0xB701, 0x0F, 0x5420, 0x5452):
        attempt(f'{path} {request:x}', lambda: fcntl.ioctl(device, request, bytes(64)))
""",
    ),
    Attack(
        "opens what lies beside the interpreter",
        """
folder = os.path.dirname(os.__file__)
# With landlock their names can be listed (a right to list a folder goes for all below it), their text not read.
for packages in (f'{folder}/site-packages', f'{folder}/dist-packages'):
    for name in ('pip/__init__.py', 'setuptools/__init__.py', 'jsonschema/__init__.py', 'README.txt', 'typing_extensions.py'):
        attempt(name, lambda: open(f'{packages}/{name}').read())
for name in ('pip', 'torch', 'opd_env', 'requests', 'hypothesis'):
    try:
        __import__(name)
        if name != 'opd_env':
            print('ESCAPED imported', name)
    except ImportError:
        pass
attempt('own source', lambda: open(FOLDER + '/../' + 'opd_env/__init__.py').read())
""",
    ),
    Attack(
        "goes through the magic links",
        """
for path in ('/proc/self/root', '/proc/1/root', f'/proc/{TRAINER}/root', f'/proc/{TRAINER}/cwd', f'/proc/{VICTIM}/exe',
             f'/proc/{TRAINER}/fd/1', '/proc/thread-self/root', '/dev/core'):
    attempt(f'open {path}', lambda: os.open(path, os.O_RDONLY))
for path in (f'/proc/{TRAINER}/exe', f'/proc/{TRAINER}/cwd', f'/proc/{TRAINER}/root', f'/proc/{VICTIM}/exe', f'/proc/{TRAINER}/fd/0',
             f'/proc/{TRAINER}/ns/net'):
    attempt(f'read {path}', lambda: os.readlink(path) and 0)
for path in ('/proc/self/mem', '/proc/self/clear_refs', '/proc/self/oom_score_adj', '/proc/self/coredump_filter', '/proc/self/uid_map',
             '/proc/sys/kernel/core_pattern', '/sys/kernel/uevent_helper', '/sys/fs/cgroup/cgroup.procs', '/proc/sysrq-trigger',
             '/proc/self/attr/current', '/proc/self/timerslack_ns', '/proc/self/comm'):
    attempt(f'write {path}', lambda: os.open(path, os.O_WRONLY))
""",
    ),
    Attack(
        "renames and links across",
        """
try:
    open('mine', 'w').write('x')
    os.mkdir('folder')
except OSError:
    pass
attempt('rename out', lambda: os.rename('mine', WRITABLE + '/mine'))
attempt('link out', lambda: os.link('mine', WRITABLE + '/mine'))
attempt('link of another', lambda: os.link(OWN, 'other'))
attempt('exchange', lambda: kernel((316, 276), -100, OWN.encode(), -100, b'mine', 2))
kernel((316, 276), -100, b'mine', -100, b'gone', 4)     # leaves a character device in place of the file
attempt('whiteout', lambda: open('mine'))
attempt('link by descriptor', lambda: kernel((265, 37), os.open(OWN, os.O_PATH), b'', -100, b'stolen', 0x1000))
attempt('temporary file', lambda: os.open(WRITABLE, os.O_TMPFILE | os.O_RDWR))
attempt('folder out', lambda: os.mkdir(WRITABLE + '/new'))
attempt('remove', lambda: os.rmdir(WRITABLE))
attempt('fifo', lambda: os.mkfifo('fifo') if os.access('.', os.W_OK) else os.open(FOLDER, os.O_RDONLY))
attempt('times by descriptor', lambda: os.utime(os.open(OWN, os.O_PATH), (0, 0)))
attempt('mode by link', lambda: os.chmod(OWN, 0o777, follow_symlinks=True))
attempt('owner', lambda: os.lchown(OWN, os.getuid(), -1))
attempt('append', lambda: os.open(OWN, os.O_WRONLY | os.O_APPEND))
""",
    ),
    Attack(
        "connects to sockets by their path",
        """
def connect(path, kind):
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(path)
for path in ('/run/docker.sock', '/var/run/dbus/system_bus_socket', '/run/systemd/notify', '/tmp/.X11-unix/X0', FOLDER + '/socket'):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        attempt(path, lambda: connect(path, kind))
attempt('alg', lambda: socket.socket(38, 5))
attempt('can', lambda: socket.socket(29, 3, 1))
attempt('tipc', lambda: socket.socketpair(30, 1))
attempt('xdp', lambda: socket.socket(44, 3))
attempt('packet', lambda: socket.socket(17, 2))
attempt('seqpacket', lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
attempt('addressed', lambda: socket.socketpair()[0].sendto(b'x', '\\0' + ABSTRACT))
""",
    ),
]

ATTACKS_FROM_SOURCE = [*CHANNELS, *PROCESSES, *STATE, *RESOURCES, *KERNEL]
