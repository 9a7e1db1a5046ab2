"""The kernel sandbox's processes, as the trainer sees them: a zygote, and the slots that it is told to make.

A slot runs one program at a time, or the process of one session. Nothing here believes what the code says. How a call
ended comes from the kernel, through the slot; wall time, output and files are measured and read here. Nothing that
comes from the far side is unpickled.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping

from opd_env.tools.sandbox.base import (
    NOBODY,
    ExecResult,
    Level,
    Limits,
    OutOfDescriptors,
    Program,
    SetUpFailed,
    Status,
    sandbox_failure,
)
from opd_env.tools.sandbox.guest import protocol
from opd_env.tools.sandbox.guest.protocol import Job, Report
from opd_env.tools.sandbox.guest.zygote import Settings
from opd_env.tools.sandbox.interpreter import Tier, guest_command, guest_environment, installed_packages
from opd_env.tools.sandbox.read_back import NOTHING, OutputReader, WrittenFiles, read_folder

GRACE_S = 3.0
"""Seconds that a slot may be late with its report before it is killed and replaced."""
_CPU_SLACK_S = 0.25
_START_S = 60.0
"""Seconds that a zygote may take to import its modules on a busy machine."""
_SLOT_START_S = 10.0


class Slot:
    """One slot: runs a program, or holds the process of one session."""

    def __init__(self, control: socket.socket, requests: socket.socket, handle: int) -> None:
        self._control = control
        self._requests = requests
        self._handle = handle
        self.calls = 0
        self.usable = True
        """False after any anomaly: close it, and take another one."""

    def fileno(self) -> int:
        """Readable when the call's process has ended."""
        return self._control.fileno()

    def send(self, job: Job, source: int, output: int, files: Mapping[str, bytes]) -> None:
        """Sends a job with its descriptors to the process that waits in the slot."""
        self.calls += 1
        self.usable = False  # until its report has come
        with contextlib.ExitStack() as stack:
            descriptors = [source, output]
            if files:
                packed = memory_file(protocol.pack_files(dict(files)))
                stack.callback(os.close, packed)
                descriptors.append(packed)
            socket.send_fds(self._requests, [protocol.JOB.pack(*job)], descriptors)

    def run(self, program: Program) -> ExecResult:
        """Runs a program to its end. A failure of the slot's is a ``sandbox_error``."""
        written, folder, limits = NOTHING, -1, program.limits

        def read_files() -> None:
            nonlocal written
            written = read_folder(folder, program.files, limits)

        try:
            read_end, write_end = os.pipe()
        except OSError as error:
            return sandbox_failure(str(OutOfDescriptors(error)))
        reader = OutputReader(read_end, limits.output_bytes)
        try:
            with os.fdopen(write_end, "wb", buffering=0):
                if program.keep_files:
                    folder = self.open_folder()
                source = memory_file(program.source)
                try:
                    self.send(_job(protocol.PROGRAM, limits, program.seed), source, write_end, program.files)
                finally:
                    os.close(source)
            start = time.monotonic()
            timed_out = not self._wait(reader, start + limits.wall_s)
            if timed_out or reader.full:
                self.kill()
            report = self.report(read_files)
            wall_s = time.monotonic() - start
            reader.drain()
            return _result(report, timed_out, reader, wall_s, limits, written)
        except OSError as error:
            return sandbox_failure(f"{type(error).__name__}: {error}")
        finally:
            reader.close()
            if folder >= 0:
                os.close(folder)

    def _wait(self, reader: OutputReader, deadline: float) -> bool:
        """Reads output until the process has ended or written too much; False if the time is over first."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        poll.register(reader, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            events = dict(poll.poll(left * 1000))
            if reader.fileno() in events:
                reader.read()
                if reader.full:
                    return True
                if reader.ended:
                    poll.unregister(reader)
            elif self.fileno() in events:
                return True
        return False

    def process_handle(self) -> int:
        """A pidfd of the process that runs, owned by the caller; OSError if the slot does not answer."""
        return self._ask(protocol.PIDFD)

    def open_folder(self) -> int:
        """A descriptor of the working folder, owned by the caller; OSError if the slot does not answer.

        The folder is emptied after :meth:`report` has read it.
        """
        return self._ask(protocol.FOLDER)

    def _ask(self, what: bytes) -> int:
        self._control.settimeout(GRACE_S)
        self._control.send(what)
        message, descriptors, _, _ = socket.recv_fds(self._control, len(what), 1)
        if message != what or not descriptors:
            raise ConnectionError("the slot sent no descriptor")
        return descriptors[0]

    def kill(self) -> None:
        """Has the slot kill what runs; the report says when that is done."""
        self._control.send(protocol.KILL.pack(b"K", self.calls))

    def report(self, read_files: Callable[[], None] = lambda: None) -> Report | None:
        """Waits for the report on the call; None if the slot is gone, is silent or talks nonsense.

        Args:
            read_files: called when everything has ended and the folder is not yet emptied, if it was opened.
        """
        self._control.settimeout(GRACE_S)
        message = self._control.recv(protocol.REPORT.size + 1)
        if message == protocol.HELD:
            read_files()
            self._control.send(protocol.RELEASE)
            message = self._control.recv(protocol.REPORT.size + 1)
        if len(message) != protocol.REPORT.size:
            return None
        report = Report(*protocol.REPORT.unpack(message))
        if report.number != self.calls:
            return None
        self.usable = report.set_up and report.clean
        return report

    def close(self) -> None:
        """Kills the slot and all that runs in it. Safe to call twice."""
        self.usable = False
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            os.close(self._handle)
            self._handle = -1
            self._control.close()
            self._requests.close()


def memory_file(content: bytes) -> int:
    """A descriptor of an anonymous file in memory with this content."""
    descriptor = os.memfd_create("opd-env", os.MFD_CLOEXEC)
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def session_job(limits: Limits, seed: int) -> Job:
    """What starts a session: its CPU limit is that of all cells together."""
    everything = dataclasses.replace(limits, cpu_s=min(limits.cpu_s * limits.session_cells, 2**31))
    return _job(protocol.SESSION, everything, seed)


def _job(kind: int, limits: Limits, seed: int) -> Job:
    return Job(kind, seed % 2**63, limits.cpu_s, limits.memory_mb << 20, limits.threads)


def _result(
    report: Report | None,
    timed_out: bool,
    reader: OutputReader,
    wall_s: float,
    limits: Limits,
    written: WrittenFiles,
) -> ExecResult:
    status, exit_code = Status.SANDBOX_ERROR, None
    if report is not None and report.set_up:
        code = os.waitstatus_to_exitcode(report.wait_status)
        if reader.full:
            status = Status.OUTPUT_LIMIT
        elif timed_out and code == -signal.SIGKILL:
            status = Status.TIMEOUT
        elif report.cpu_us >= (limits.cpu_s - _CPU_SLACK_S) * 1e6 and code < 0:
            status = Status.CPU_LIMIT
        elif code < 0:
            status, exit_code = Status.KILLED, code
        else:
            status, exit_code = Status.OK if code == 0 else Status.ERROR, code
    text, full = reader.take()
    cpu_us, rss = (report.cpu_us, report.max_rss_kb) if report else (0, 0)
    return ExecResult(status, text, exit_code, full, cpu_us / 1000, wall_s * 1000, rss, *written)


class Zygote:
    """The process that slots are forked from: one for a level and a tier."""

    def __init__(self, level: Level, tier: Tier) -> None:
        installed = installed_packages()
        try:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise _set_up_failure(error) from error
        with theirs:
            settings = Settings(
                backend=level.value,
                control=theirs.fileno(),
                parent=os.getpid(),
                user=NOBODY,
                modules=installed.preloaded(tier),
                packages=installed.folders,
                libraries=installed.libraries,
            )
            try:
                self._process = subprocess.Popen(
                    [*guest_command("zygote"), json.dumps(dataclasses.asdict(settings))],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=guest_environment("/w"),
                    cwd="/",
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                self._control.close()
                raise _set_up_failure(error) from error
        try:
            _expect_ready(self._control, _START_S)
        except SetUpFailed:
            self.close()
            raise

    def spawn(self) -> Slot:
        """A new slot.

        Raises:
            SetUpFailed: if the zygote is gone or a step was refused.
        """
        with contextlib.ExitStack() as if_it_fails:
            try:
                control, their_control, requests, their_requests = (
                    if_it_fails.enter_context(end)
                    for _ in range(2)
                    for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                )
                socket.send_fds(self._control, [protocol.SPAWN], [their_control.fileno(), their_requests.fileno()])
                their_control.close()
                their_requests.close()
                handle = _expect_ready(control, _SLOT_START_S)
            except OSError as error:
                raise _set_up_failure(error) from error
            if_it_fails.pop_all()
            return Slot(control, requests, handle)

    def close(self) -> None:
        """Kills it, and with it all of its slots."""
        self._control.close()
        self._process.kill()
        self._process.wait()


def _set_up_failure(error: OSError) -> SetUpFailed:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return OutOfDescriptors(error)
    return SetUpFailed(f"start a process: {error}")


def _expect_ready(channel: socket.socket, seconds: float) -> int:
    """Waits for READY; returns the pidfd that came before it, or -1.

    Raises:
        SetUpFailed: if the other side says why it failed, ends, or is silent.
    """
    handle = -1
    deadline = time.monotonic() + seconds
    try:
        ready = False
        # The handle of a slot comes from another process than its READY: in either order.
        while True:
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                message, descriptors, flags, _ = socket.recv_fds(channel, 4096, 1)
            except TimeoutError:
                raise SetUpFailed(f"no answer within {seconds:g} s") from None
            if flags & socket.MSG_CTRUNC:
                raise OutOfDescriptors("a descriptor could not be received")
            if descriptors:
                handle = descriptors[0]
            if message.startswith(protocol.FAILED):
                raise SetUpFailed(message[1:].decode("utf-8", "replace"))
            if not message:
                raise SetUpFailed("the process ended without a word")
            ready = ready or message == protocol.READY
            if ready and (handle >= 0 or seconds == _START_S):
                channel.settimeout(None)
                return handle
    except BaseException:
        if handle >= 0:
            os.close(handle)
        raise
