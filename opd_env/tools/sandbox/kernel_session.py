"""A session of the kernel sandbox: one process in a slot of its own, frozen between its cells.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_sessions.py``
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from opd_env.tools.sandbox.base import ExecResult, Limits, Session, SessionEnded, SetUpFailed, Status, sandbox_failure
from opd_env.tools.sandbox.cells import CellChannel
from opd_env.tools.sandbox.kernel_slot import Slot, session_request
from opd_env.tools.sandbox.modules import Tier, tier_of
from opd_env.tools.sandbox.output import OutputReader, check_code, check_folder
from opd_env.tools.sandbox.pool import SlotPool
from opd_env.tools.sandbox.turnstile import Turnstile
from opd_env.tools.sandbox.written_files import NOTHING, read_folder


class KernelSession(Session):
    """The process is started by the first cell, whose imports choose its tier.

    Args:
        pool: where the slot comes from, and goes back to.
        turnstile: passed by every cell.
        limits: of each cell, and of the session.
        seed: for ``random`` and numpy.
    """

    def __init__(self, pool: SlotPool, turnstile: Turnstile, limits: Limits, seed: int) -> None:
        self._pool = pool
        self._owner = os.getpid()
        self._turnstile = turnstile
        self._limits = limits
        self._seed = seed
        self._ends_at = time.monotonic() + limits.session_s
        self._cells = 0
        self._ended = False
        self._process: _Process | None = None
        self._give_back: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        """See :attr:`Session.alive`."""
        return not self._ended and self._cells < self._limits.session_cells and time.monotonic() < self._ends_at

    @property
    def closed(self) -> bool:
        """Whether nothing of it is left."""
        return self._ended

    def run(self, cell: str, *, keep_files: bool = False) -> ExecResult:
        """See :meth:`Session.run`."""
        source = check_code(cell, self._limits)
        if keep_files:
            check_folder(self._pool.level)
        with self._lock, self._turnstile:
            if not self.alive:
                self._end()
                raise SessionEnded("the session's process is gone, and its variables with it; open a new one")
            self._cells += 1
            try:
                if self._process is None:
                    self._process = self._start(cell)
                result, goes_on = self._process.run(self._cells, source, keep_files)
            except (SetUpFailed, OSError) as error:
                result, goes_on = sandbox_failure(f"{type(error).__name__}: {error}"), False
            except BaseException:
                self._end()
                raise
            if not goes_on:
                self._end()
            return result

    def _start(self, cell: str) -> _Process:
        """Starts the process; once more in a new slot if that fails."""
        tier = tier_of(cell)
        try:
            return self._start_in(tier, self._pool.take(tier))
        except OSError:
            return self._start_in(tier, self._pool.take(tier, fresh=True))

    def _start_in(self, tier: Tier, slot: Slot) -> _Process:
        self._give_back = functools.partial(self._pool.give_back, tier, slot)
        try:
            return _Process(slot, self._limits, self._seed)
        except BaseException:
            self._give_back()
            raise

    def _end(self) -> None:
        self._ended = True
        process, self._process = self._process, None
        if process is not None and os.getpid() == self._owner:  # a fork must leave its parent's alone
            process.close()
            self._give_back()

    def close(self) -> None:
        """See :meth:`Session.close`."""
        with self._lock:
            self._end()


class _Process:
    """The process of a session, by its pidfd, its CPU clock, and its channel."""

    def __init__(self, slot: Slot, limits: Limits, seed: int) -> None:
        self._slot = slot
        self._limits = limits
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
                slot.send(session_request(limits, seed), theirs.fileno(), write_end, {})
            self._handle = slot.process_handle()
            self._stack.callback(os.close, self._handle)
            self._stack.callback(self._kill, wait=False)
            self._cpu_clock = _cpu_clock(self._handle)
        except BaseException:
            self._stack.close()
            raise

    def run(self, number: int, source: bytes, keep_files: bool) -> tuple[ExecResult, bool]:
        """Runs a cell; also says whether the process can go on."""
        written = NOTHING

        def read_files() -> None:
            nonlocal written
            if keep_files:
                written = read_folder(self._folder, {}, self._limits)

        if keep_files and self._folder < 0:
            self._folder = self._slot.open_folder()
            self._stack.callback(os.close, self._folder)
        start = time.monotonic()
        self._cpu_before = self._cpu_s()
        status = self._cells.run(number, source, self._limits.wall_s, self._look, self._wake)
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
        result = ExecResult(
            status, text, self._exit_code, full, cpu_s * 1000, wall_ms, 0, written.files, written.omitted
        )
        return result, goes_on

    def _wake(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> bool:
        """Sends a signal; says whether the process was still there."""
        try:
            signal.pidfd_send_signal(self._handle, number)
        except ProcessLookupError:
            return False
        return True

    def _look(self) -> Status | None:
        if self._cpu_s() - self._cpu_before > self._limits.cpu_s:
            return Status.CPU_LIMIT
        gone = select.select([self._handle], [], [], 0)[0]
        return Status.KILLED if gone else None

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
                select.select([self._slot], [], [], 1.0)
            self._slot.kill()
            report = self._slot.report(read_files)
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
