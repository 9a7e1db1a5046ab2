"""A slot: forks a process for each job, and leaves nothing of it behind.

The slot never reads a job, or the code: they go straight to the process that runs it, so that no later
process, a fork of the same slot, can find them in its memory.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import fcntl
import itertools
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
from opd_env.tools.sandbox.guest.protocol import Job, Report
from opd_env.tools.sandbox.guest.world import WORK_FOLDER

DESCRIPTORS, STACK_BYTES = 64, 8 << 20


@dataclass(frozen=True)
class Surroundings:
    """What a slot knows of where it is."""

    own_namespaces: bool
    """Own pid namespace and working folder: everything but the slot can be killed and removed."""
    base_bytes: int
    """Address space that the interpreter has mapped without any code."""
    base_threads: int
    """Threads that count against the limit although they are not the call's."""
    namespace: dict[str, object]
    """Of the programs' ``__main__``, from ``runner.prepare``."""


def serve(control: socket.socket, requests: socket.socket, here: Surroundings) -> NoReturn:
    """Keeps one process waiting for a job, until the supervisor closes the sockets.

    The process is forked before the job comes, so that a call does not wait for it.
    """
    # One byte that a process sets when it is set up; it unmaps it before the code runs.
    set_up = mmap.mmap(-1, mmap.PAGESIZE)
    last_filter = seccomp.ProgramFilter()
    slot = os.getpid()
    _limit_for_good()
    folder = os.open(WORK_FOLDER, os.O_RDONLY | os.O_DIRECTORY) if here.own_namespaces else -1
    runner.seed_all(0)  # `random` drew a new seed when this process was forked
    control.send(protocol.READY)
    for number in itertools.count(1):
        set_up[0] = 0
        child = linux.bare_fork()
        if child == 0:
            _be_child(requests, slot, set_up, last_filter, here)
        handle = os.pidfd_open(child)
        held = _wait(control, child, handle, number, folder)
        os.close(handle)
        _, wait_status, usage = os.wait4(child, 0)
        if held:
            _end_all()
            control.send(protocol.HELD)
            while (message := control.recv(protocol.KILL.size)) != protocol.RELEASE:
                if not message:
                    os._exit(0)
        report = Report(
            number=number,
            set_up=set_up[0] == 1,
            clean=not here.own_namespaces or _clean(),
            wait_status=wait_status,
            cpu_us=round((usage.ru_utime + usage.ru_stime) * 1e6),
            max_rss_kb=usage.ru_maxrss,
        )
        control.send(protocol.REPORT.pack(*report))
        if not report.clean:
            break
    os._exit(1)


def _wait(control: socket.socket, child: int, handle: int, number: int, folder: int) -> bool:
    """Waits for the process's end, and kills it when the supervisor says so; says if its files are wanted."""
    held = False
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(handle, select.POLLIN)
    while handle not in (events := dict(poll.poll())):
        if control.fileno() not in events:
            continue
        message = control.recv(protocol.KILL.size)
        if not message:
            os._exit(0)  # the supervisor is gone, and what runs here goes with the slot
        if message == protocol.PIDFD:
            socket.send_fds(control, [protocol.PIDFD], [handle])
        elif message == protocol.FOLDER:
            socket.send_fds(control, [protocol.FOLDER], [folder])
            held = True
        elif message == protocol.KILL.pack(b"K", number):  # else it came too late for an earlier call
            os.kill(child, signal.SIGKILL)
    return held


def _end_all() -> None:
    """Kills and reaps every other process of the namespace."""
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _clean() -> bool:
    """Ends every other process of the namespace, and empties the folder; says if all is gone."""
    _end_all()
    try:
        os.chmod(WORK_FOLDER, 0o700)
        _empty(WORK_FOLDER)
        os.utime(WORK_FOLDER, (0, 0))  # a date would be a note to the next program
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
    requests: socket.socket,
    slot: int,
    set_up: mmap.mmap,
    last_filter: seccomp.ProgramFilter,
    here: Surroundings,
) -> NoReturn:
    """The process that runs the code. Whatever fails, it ends here and never returns to the slot's loop."""
    try:
        if not here.own_namespaces:
            linux.die_with_parent()
            if os.getppid() != slot:
                os._exit(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        message, descriptors, _, _ = socket.recv_fds(requests, protocol.JOB.size, 3)
        if not message:
            os._exit(0)
        job = Job(*protocol.JOB.unpack(message))
        source, output, *files = descriptors
        # Of its own: flags of an open file are shared by all that have inherited it, and stay.
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # They may have any numbers; from here on they are 3 and 4, and nothing else is open.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (source, *files)]
        for number, descriptor in enumerate(high, 3):
            os.dup2(descriptor, number)
        os.closerange(3 + len(high), 1 << 20)
        if files:
            for name, content in protocol.unpack_files(_read_all(4)).items():
                with open(name, "xb") as file:
                    file.write(content)
            os.close(4)
        code = ""
        if job.kind == protocol.PROGRAM:
            code = _read_all(3).decode("utf-8", "surrogatepass")
            os.close(3)
        _limit(job, here)

        def before_code() -> None:
            set_up[0] = 1
            set_up.close()
            last_filter.install(os.getpid())

        if job.kind == protocol.PROGRAM:
            os._exit(runner.run_program(code, job.seed, here.namespace, before_code))
        os._exit(runner.run_cells(3, job.seed, here.namespace, before_code))
    finally:
        os._exit(70)


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0)


def _limit(job: Job, here: Surroundings) -> None:
    space = here.base_bytes + job.memory_bytes
    threads = here.base_threads + job.threads
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    # One second to notice SIGXCPU, then SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (job.cpu_s, job.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))


def _limit_for_good() -> None:
    """Limits that are the same for all, and that the slot itself can live with."""
    for kind, limit in (
        (resource.RLIMIT_FSIZE, protocol.FILE_BYTES),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(kind, (limit, limit))
