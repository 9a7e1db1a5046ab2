"""The trainer's side of the kernel sandbox: one zygote, the slots that it forks, and one call in a slot.

Nothing here believes what the code says. How a call ended comes from the kernel, through the slot; wall time,
output and the CPU time of sessions are measured here. Nothing that comes from the far side is unpickled.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping

from opd_env.tools.sandbox.base import ExecResult, Limits, Status
from opd_env.tools.sandbox.boot import guest_command, guest_environment
from opd_env.tools.sandbox.guest import protocol
from opd_env.tools.sandbox.guest.protocol import Report, Request
from opd_env.tools.sandbox.guest.zygote import Settings
from opd_env.tools.sandbox.output import OutputReader

_START_S = 60.0
"""Seconds that a zygote may take to import its modules on a busy machine."""
_SLOT_START_S = 10.0
GRACE_S = 3.0
"""Seconds that a slot may be late with its report before it is killed and replaced."""
_CPU_SLACK_S = 0.25
NOBODY = 65534
"""The user that the code runs as, if the trainer is root."""


class SetUpFailed(RuntimeError):
    """The kernel refused a step of the set-up; the text says which and how."""


class Zygote:
    """The process that slots are forked from, as its supervisor sees it."""

    def __init__(self, backend: str, modules: list[str], packages: Mapping[str, str], libraries: list[str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            settings = Settings(
                backend=backend,
                control=theirs.fileno(),
                parent=os.getpid(),
                user=NOBODY,
                modules=modules,
                packages=dict(packages),
                libraries=libraries,
            )
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
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handle = -1
        try:
            with theirs:
                socket.send_fds(self._control, [protocol.SPAWN], [theirs.fileno()])
            handle = _expect_ready(ours, _SLOT_START_S)
            return Slot(ours, handle)
        except BaseException as error:
            ours.close()
            if handle >= 0:
                os.close(handle)
            if isinstance(error, OSError):
                raise SetUpFailed(f"the zygote is gone: {error}") from error
            raise

    def close(self) -> None:
        """Kills it, and with it all of its slots."""
        self._control.close()
        self._process.kill()
        self._process.wait()


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
                message, descriptors, _, _ = socket.recv_fds(channel, 4096, 1)
            except TimeoutError:
                raise SetUpFailed(f"no answer within {seconds:g} s") from None
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


class Slot:
    """One slot: runs a program, or holds the process of one session."""

    def __init__(self, channel: socket.socket, handle: int) -> None:
        self.channel = channel
        self._handle = handle
        self.calls = 0
        self.usable = True
        """False after any anomaly: close it, and take another one."""

    def send(self, request: Request, source: int, output: int, files: Mapping[str, bytes]) -> None:
        """Sends a request with its descriptors."""
        self.calls += 1
        with contextlib.ExitStack() as stack:
            descriptors = [source, output]
            if files:
                packed = memory_file(protocol.pack_files(dict(files)))
                stack.callback(os.close, packed)
                descriptors.append(packed)
            socket.send_fds(self.channel, [request.pack()], descriptors)

    def run(self, code: bytes, files: Mapping[str, bytes], limits: Limits, seed: int) -> ExecResult:
        """Runs a program to its end. A failure of the slot's is a ``sandbox_error``."""
        reader, write_end = _output_pipe(limits)
        try:
            self.usable = False  # until its report has come
            source = memory_file(code)
            try:
                self.send(_request(protocol.PROGRAM, limits, seed), source, write_end, files)
            finally:
                os.close(source)
                os.close(write_end)
            start = time.monotonic()
            report = self._wait(reader, start + limits.wall_s + GRACE_S)
            wall_s = time.monotonic() - start
            reader.drain()
            return _result(report, reader, wall_s, limits)
        except OSError:
            return _result(None, reader, 0.0, limits)
        finally:
            reader.close()

    def _wait(self, reader: OutputReader, deadline: float) -> Report | None:
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        poll.register(reader, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            events = dict(poll.poll(left * 1000))
            if reader.fileno() in events:
                reader.read()
                if reader.full:
                    self.channel.send(protocol.KILL)
                if reader.full or reader.ended:
                    poll.unregister(reader)
            elif self.channel.fileno() in events:
                return self.report()

    def report(self) -> Report | None:
        """Reads the slot's report, which must be there; None if the slot is gone or talks nonsense."""
        message = self.channel.recv(Report.size + 1)
        if len(message) != Report.size:
            return None
        report = Report.unpack(message)
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
            self.channel.close()


def memory_file(content: bytes) -> int:
    """A descriptor of an anonymous file in memory with this content."""
    descriptor = os.memfd_create("opd-env", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor


def _output_pipe(limits: Limits) -> tuple[OutputReader, int]:
    read_end, write_end = os.pipe()
    return OutputReader(read_end, limits.output_bytes), write_end


def session_request(limits: Limits, seed: int) -> Request:
    """The request that starts a session: its CPU limit is that of all cells together."""
    everything = dataclasses.replace(limits, cpu_s=min(limits.cpu_s * limits.session_cells, 2**31))
    return _request(protocol.SESSION, everything, seed)


def _request(kind: int, limits: Limits, seed: int) -> Request:
    return Request(
        kind=kind,
        seed=seed % 2**63,
        wall_us=round(limits.wall_s * 1e6),
        cpu_s=limits.cpu_s,
        memory_bytes=limits.memory_mb << 20,
        threads=limits.threads,
    )


def _result(report: Report | None, reader: OutputReader, wall_s: float, limits: Limits) -> ExecResult:
    status, exit_code = Status.SANDBOX_ERROR, None
    if report is not None and report.set_up:
        code = os.waitstatus_to_exitcode(report.wait_status)
        if reader.full:
            status = Status.OUTPUT_LIMIT
        elif report.timed_out:
            status = Status.TIMEOUT
        elif report.cpu_us >= (limits.cpu_s - _CPU_SLACK_S) * 1e6 and code < 0:
            status = Status.CPU_LIMIT
        elif code < 0:
            status, exit_code = Status.KILLED, code
        else:
            status, exit_code = Status.OK if code == 0 else Status.ERROR, code
    text, full = reader.take()
    cpu_us, rss = (report.cpu_us, report.max_rss_kb) if report else (0, 0)
    return ExecResult(status, text, exit_code, full, cpu_us / 1000, wall_s * 1000, rss)
