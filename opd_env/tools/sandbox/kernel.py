"""The kernel sandbox: programs and sessions in slots, behind the interface of :class:`Sandbox`.

Worked example::

    with KernelSandbox(Level.NAMESPACES) as sandbox:
        sandbox.run("print(1 + 1)").output          # '2\n'

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_supervisor.py tests/tools/sandbox/test_sandbox_sessions.py``
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from opd_env.tools.sandbox.base import (
    ExecResult,
    Level,
    Limits,
    Program,
    Sandbox,
    Session,
    SetUpFailed,
    Status,
    sandbox_failure,
)
from opd_env.tools.sandbox.cells import CellChannel, LocalSession
from opd_env.tools.sandbox.interpreter import Tier, tier_of
from opd_env.tools.sandbox.pool import SlotPool, Turnstile
from opd_env.tools.sandbox.read_back import NOTHING, OutputReader, read_folder
from opd_env.tools.sandbox.slots import Slot, session_job

_MAX_WAITING = 10_000


class KernelSandbox(Sandbox):
    """Opened through ``open_sandbox``, which also tests that it holds.

    Args:
        level: ``namespaces`` or ``landlock``.
        limits: default limits of a call.
        slots: programs and cells that run at the same time; by default one per CPU.
        max_sessions: sessions that may be open at the same time.

    Raises:
        SetUpFailed: if the kernel refuses a step.
    """

    def __init__(
        self, level: Level, limits: Limits | None = None, slots: int | None = None, max_sessions: int = 1024
    ) -> None:
        places = slots or os.cpu_count() or 1
        super().__init__(limits, places)
        self._owner = os.getpid()
        self._turnstile = Turnstile(places, _MAX_WAITING)
        self._pool = SlotPool(level)
        self._sessions: set[_KernelSession] = set()
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        try:
            self._pool.give_back(Tier.STDLIB, self._pool.take(Tier.STDLIB))
        except SetUpFailed:
            self._pool.close()
            raise

    @property
    def level(self) -> Level:
        return self._pool.level

    def execute(self, program: Program) -> ExecResult:
        program.check_folder(self.level)
        tier = tier_of(program.code)
        result = sandbox_failure("")
        with self._turnstile:
            for fresh in (False, True):  # a failure of ours is tried once more, in a new slot
                try:
                    slot = self._pool.take(tier, fresh)
                except SetUpFailed as error:
                    result = sandbox_failure(str(error))
                    continue
                try:
                    result = slot.run(program)
                finally:
                    self._pool.give_back(tier, slot)
                if result.status is not Status.SANDBOX_ERROR:
                    break
        return result

    def open_session(self, limits: Limits, seed: int) -> Session:
        self._pool.check_open()
        with self._lock:
            self._sessions = {session for session in self._sessions if not session.closed}
            if len(self._sessions) >= self._max_sessions:
                raise RuntimeError(
                    f"{self._max_sessions} sessions are open; close those that have ended, or raise max_sessions"
                )
            session = _KernelSession(self._pool, self._turnstile, limits, seed)
            self._sessions.add(session)
        return session

    def close(self) -> None:
        if os.getpid() != self._owner:
            return  # a fork must leave its parent's alone
        with self._lock:
            sessions, self._sessions = self._sessions, set()
        self._pool.close()  # first, so that cells that are running end now
        for session in sessions:
            session.close()
        self._threads.shutdown()


class _KernelSession(LocalSession):
    """The process is started by the first cell, whose imports choose its tier."""

    def __init__(self, pool: SlotPool, turnstile: Turnstile, limits: Limits, seed: int) -> None:
        super().__init__(pool.level, limits, turnstile)
        self._pool = pool
        self._owner = os.getpid()
        self._seed = seed
        self._process: _SessionProcess | None = None
        self._tier = Tier.STDLIB

    def _run_cell(self, number: int, program: Program) -> tuple[ExecResult, bool]:
        try:
            if self._process is None:
                self._tier = tier_of(program.code)
                self._process = self._start()
            return self._process.run(number, program)
        except (SetUpFailed, OSError) as error:
            return sandbox_failure(f"{type(error).__name__}: {error}"), False

    def _start(self) -> _SessionProcess:
        """Starts the process; once more in a new slot if that fails."""
        try:
            return self._start_in(self._pool.take(self._tier))
        except OSError:
            return self._start_in(self._pool.take(self._tier, fresh=True))

    def _start_in(self, slot: Slot) -> _SessionProcess:
        try:
            return _SessionProcess(slot, self._limits, self._seed)
        except BaseException:
            self._pool.give_back(self._tier, slot)
            raise

    def _end(self) -> None:
        super()._end()
        process, self._process = self._process, None
        if process is not None and os.getpid() == self._owner:  # a fork must leave its parent's alone
            process.close()
            self._pool.give_back(self._tier, process.slot)


class _SessionProcess:
    """The process of a session in a slot, by its pidfd, its CPU clock, and its channel. Frozen between cells."""

    def __init__(self, slot: Slot, limits: Limits, seed: int) -> None:
        self.slot = slot
        self._exit_code: int | None = None
        self._cpu_before = 0.0
        self._folder = -1
        self._stack = contextlib.ExitStack()
        ours, theirs = socket.socketpair()
        try:
            read_end, write_end = os.pipe()
        except OSError:
            ours.close()
            theirs.close()
            raise
        self._cells = CellChannel(ours, OutputReader(read_end, limits.output_bytes))
        self._stack.callback(self._cells.close)
        try:
            with theirs, os.fdopen(write_end, "wb", buffering=0):
                slot.send(session_job(limits, seed), theirs.fileno(), write_end, {})
            self._handle = slot.process_handle()
            self._stack.callback(os.close, self._handle)
            self._stack.callback(self._kill, wait=False)
            self._cpu_clock = _cpu_clock(self._handle)
        except BaseException:
            self._stack.close()
            raise

    def run(self, number: int, program: Program) -> tuple[ExecResult, bool]:
        """Runs a cell; also says whether the process can go on."""
        written = NOTHING

        def read_files() -> None:
            nonlocal written
            if program.keep_files:
                written = read_folder(self._folder, {}, program.limits)

        def look() -> Status | None:
            if self._cpu_s() - self._cpu_before > program.limits.cpu_s:
                return Status.CPU_LIMIT
            gone = select.select([self._handle], [], [], 0)[0]
            return Status.KILLED if gone else None

        if program.keep_files and self._folder < 0:
            self._folder = self.slot.open_folder()
            self._stack.callback(os.close, self._folder)
        start = time.monotonic()
        self._cpu_before = self._cpu_s()
        status = self._cells.run(number, program, look, lambda: self._signal(signal.SIGCONT))
        cpu_s = self._cpu_s() - self._cpu_before
        # Threads that it left behind stand still until the next cell.
        goes_on = status in (Status.OK, Status.ERROR) and not self._cells.exited and self._signal(signal.SIGSTOP)
        if goes_on:
            read_files()
        elif not self._kill(self._cells.exited, read_files):
            status = Status.SANDBOX_ERROR
        self._cells.reader.drain()
        text, full = self._cells.reader.take()
        wall_ms = (time.monotonic() - start) * 1000
        return ExecResult(status, text, self._exit_code, full, cpu_s * 1000, wall_ms, 0, *written), goes_on

    def _signal(self, number: signal.Signals) -> bool:
        """Sends a signal; says whether the process was still there."""
        try:
            signal.pidfd_send_signal(self._handle, number)
        except ProcessLookupError:
            return False
        return True

    def _cpu_s(self) -> float:
        try:
            return time.clock_gettime(self._cpu_clock)
        except OSError:
            return self._cpu_before  # the process is gone

    def _kill(self, wait: bool, read_files: Callable[[], None] = lambda: None) -> bool:
        """Ends the process, if it is not yet; says whether it had come as far as its first cell."""
        if self._exit_code is not None:
            return True
        try:
            if wait:  # it exits by itself: give it the time to
                select.select([self.slot], [], [], 1.0)
            self.slot.kill()
            report = self.slot.report(read_files)
        except OSError:
            return False
        if report is None:
            return False
        self._exit_code = os.waitstatus_to_exitcode(report.wait_status)
        return report.set_up

    def close(self) -> None:
        """Kills the process and closes all descriptors."""
        self._stack.close()


def _cpu_clock(handle: int) -> int:
    """The CPU clock of the process behind a pidfd: what clock_getcpuclockid gives for its number."""
    with open(f"/proc/self/fdinfo/{handle}") as info:
        number = next(int(line.split()[1]) for line in info if line.startswith("Pid:"))
    return (~number << 3) | 2
