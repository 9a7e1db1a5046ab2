"""One slot, as the trainer sees it: one call in it, or the process of one session.

Nothing here believes what the code says. How a call ended comes from the kernel, through the slot; wall time,
output and files are measured and read here. Nothing that comes from the far side is unpickled.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping

from opd_env.tools.sandbox.base import ExecResult, Limits, OutOfDescriptors, Status, sandbox_failure
from opd_env.tools.sandbox.guest import protocol
from opd_env.tools.sandbox.guest.protocol import Report, Request
from opd_env.tools.sandbox.output import OutputReader
from opd_env.tools.sandbox.written_files import NOTHING, WrittenFiles, read_folder

GRACE_S = 3.0
"""Seconds that a slot may be late with its report before it is killed and replaced."""
_CPU_SLACK_S = 0.25


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

    def send(self, request: Request, source: int, output: int, files: Mapping[str, bytes]) -> None:
        """Sends a request with its descriptors to the process that waits in the slot."""
        self.calls += 1
        self.usable = False  # until its report has come
        with contextlib.ExitStack() as stack:
            descriptors = [source, output]
            if files:
                packed = memory_file(protocol.pack_files(dict(files)))
                stack.callback(os.close, packed)
                descriptors.append(packed)
            socket.send_fds(self._requests, [request.pack()], descriptors)

    def run(
        self, code: bytes, files: Mapping[str, bytes], limits: Limits, seed: int, keep_files: bool = False
    ) -> ExecResult:
        """Runs a program to its end. A failure of the slot's is a ``sandbox_error``."""
        written, folder = NOTHING, -1

        def read_files() -> None:
            nonlocal written
            written = read_folder(folder, files, limits)

        try:
            read_end, write_end = os.pipe()
        except OSError as error:
            return sandbox_failure(str(OutOfDescriptors(error)))
        reader = OutputReader(read_end, limits.output_bytes)
        try:
            with os.fdopen(write_end, "wb", buffering=0):
                if keep_files:
                    folder = self.open_folder()
                source = memory_file(code)
                try:
                    self.send(_request(protocol.PROGRAM, limits, seed), source, write_end, files)
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
        """A pidfd of the process that runs, owned by the caller.

        Raises:
            OSError: if the slot does not answer.
        """
        return self._ask(protocol.PIDFD)

    def open_folder(self) -> int:
        """A descriptor of the working folder, owned by the caller. It is emptied after :meth:`report` has read it.

        Raises:
            OSError: if the slot does not answer.
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
        message = self._control.recv(Report.size + 1)
        if message == protocol.HELD:
            read_files()
            self._control.send(protocol.RELEASE)
            message = self._control.recv(Report.size + 1)
        if len(message) != Report.size:
            return None
        report = Report.unpack(message)
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


def session_request(limits: Limits, seed: int) -> Request:
    """The request that starts a session: its CPU limit is that of all cells together."""
    everything = dataclasses.replace(limits, cpu_s=min(limits.cpu_s * limits.session_cells, 2**31))
    return _request(protocol.SESSION, everything, seed)


def _request(kind: int, limits: Limits, seed: int) -> Request:
    return Request(
        kind=kind,
        seed=seed % 2**63,
        cpu_s=limits.cpu_s,
        memory_bytes=limits.memory_mb << 20,
        threads=limits.threads,
    )


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
    return ExecResult(status, text, exit_code, full, cpu_us / 1000, wall_s * 1000, rss, written.files, written.omitted)
