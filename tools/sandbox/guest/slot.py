"""A slot: takes one request after the other, forks a process for each, and leaves nothing of it behind.

The slot never reads the code: it goes straight to the process that runs it, as a descriptor, so that no later
process, a fork of the same slot, can find it in its memory.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import time
from dataclasses import dataclass
from typing import NoReturn

from opd_env.tools.sandbox.guest import linux, protocol, runner, seccomp
from opd_env.tools.sandbox.guest.protocol import Report, Request
from opd_env.tools.sandbox.guest.world import WORK_FOLDER

FILE_BYTES, DESCRIPTORS, STACK_BYTES = 16 << 20, 64, 8 << 20


@dataclass(frozen=True)
class Surroundings:
    """What a slot knows of where it is."""

    own_namespaces: bool
    """Own pid namespace and working folder: everything but the slot can be killed and removed."""
    base_bytes: int
    """Address space that the interpreter has mapped without any code."""
    base_threads: int
    """Threads that count against the limit although they are not the call's."""
    null: int
    """Descriptor of /dev/null."""
    namespace: dict[str, object]
    """Of the programs' ``__main__``, from ``runner.prepare``."""


def serve(channel: socket.socket, here: Surroundings) -> NoReturn:
    """Answers requests until the supervisor closes the channel."""
    # One byte that a new process sets when it is set up; it unmaps it before the code runs.
    set_up = mmap.mmap(-1, mmap.PAGESIZE)
    last_filter = seccomp.ProgramFilter()
    _limit_for_good()
    channel.send(protocol.READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, Request.size, 3)
        if not message:
            os._exit(0)
        if message == protocol.KILL:
            continue  # it came too late: what it was for has ended
        set_up[0] = 0
        request = Request.unpack(message)
        child = linux.bare_fork()
        if child == 0:
            _be_child(request, descriptors, set_up, last_filter, here)
        report = _attend(channel, child, request, descriptors, set_up, here)
        channel.send(report.pack())
        if not report.clean:
            os._exit(1)


def _attend(
    channel: socket.socket,
    child: int,
    request: Request,
    descriptors: list[int],
    set_up: mmap.mmap,
    here: Surroundings,
) -> Report:
    """Waits for the end of a process, ends it if need be, and tells what the kernel says of it."""
    for descriptor in descriptors:
        os.close(descriptor)
    handle = os.pidfd_open(child)
    if request.kind == protocol.SESSION:
        socket.send_fds(channel, [protocol.PIDFD], [handle])
    timed_out = _wait(channel, child, handle, request)
    os.close(handle)
    _, wait_status, usage = os.wait4(child, 0)
    return Report(
        set_up=set_up[0] == 1,
        timed_out=timed_out,
        clean=not here.own_namespaces or _clean(),
        wait_status=wait_status,
        cpu_us=round((usage.ru_utime + usage.ru_stime) * 1e6),
        max_rss_kb=usage.ru_maxrss,
    )


def _wait(channel: socket.socket, process: int, handle: int, request: Request) -> bool:
    """Waits for the process's end, and kills it when its time is over or the supervisor says so."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.register(handle, select.POLLIN)
    # A session ends when the supervisor says so.
    deadline = time.monotonic() + request.wall_us / 1e6 if request.kind == protocol.PROGRAM else None
    timed_out = False
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        events = dict(poll.poll(left))
        if handle in events:
            return timed_out
        if channel.fileno() in events:
            if not channel.recv(len(protocol.KILL)):
                os._exit(0)  # the supervisor is gone; in its own namespace the slot takes everything along
        else:
            timed_out = True
        os.kill(process, signal.SIGKILL)
        poll.unregister(channel)
        deadline = None


def _clean() -> bool:
    """Kills and reaps every other process of the namespace, and empties the folder; says if all is gone."""
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    try:
        os.chmod(WORK_FOLDER, 0o700)
        _empty(WORK_FOLDER)
        return not os.listdir(WORK_FOLDER)
    except OSError:
        return False


def _empty(folder: str) -> None:
    """Empties a folder without recursion: what lies in a subfolder is moved up first.

    However deep a program nests its folders, this needs neither stack nor long paths nor many descriptors.
    """
    number = 0
    while names := os.listdir(folder):
        for name in names:
            path = f"{folder}/{name}"
            if os.path.islink(path) or not os.path.isdir(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                number += 1
                source = f"{path}/{inner}"
                if os.path.isdir(source) and not os.path.islink(source):
                    os.chmod(source, 0o700)  # moving a folder rewrites its "..", which needs write access
                    os.rename(source, f"{folder}/.moved-{number}-{time.monotonic_ns()}")
                else:
                    os.unlink(source)
            os.rmdir(path)


def _be_child(
    request: Request,
    descriptors: list[int],
    set_up: mmap.mmap,
    last_filter: seccomp.ProgramFilter,
    here: Surroundings,
) -> NoReturn:
    """The process that runs the code. Whatever fails, it ends here and never returns to the slot's loop."""
    try:
        source, output, *files = descriptors
        if not here.own_namespaces:
            linux.die_with_parent()
        os.dup2(here.null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # They may have any numbers; from here on they are 3 and 4, and nothing else is open.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in (source, *files)]
        for number, descriptor in enumerate(high, 3):
            os.dup2(descriptor, number)
        os.closerange(3 + len(high), 1 << 20)
        if files:
            for name, content in protocol.unpack_files(_read_all(4)).items():
                with open(name, "xb") as file:
                    file.write(content)
            os.close(4)
        code = ""
        if request.kind == protocol.PROGRAM:
            code = _read_all(3).decode("utf-8", "surrogatepass")
            os.close(3)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _limit(request, here)

        def before_code() -> None:
            set_up[0] = 1
            set_up.close()
            last_filter.install(os.getpid())

        if request.kind == protocol.PROGRAM:
            os._exit(runner.run_program(code, request.seed, here.namespace, before_code))
        os._exit(runner.run_cells(3, request.seed, here.namespace, before_code))
    finally:
        os._exit(70)


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0)


def _limit(request: Request, here: Surroundings) -> None:
    space = here.base_bytes + request.memory_bytes
    threads = here.base_threads + request.threads
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    # One second to notice SIGXCPU, then SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (request.cpu_s, request.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def _limit_for_good() -> None:
    """Limits that are the same for all, and that the slot itself can live with."""
    for kind, limit in (
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(kind, (limit, limit))
