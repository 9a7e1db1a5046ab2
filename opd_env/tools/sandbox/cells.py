"""A session on this machine, seen from outside: its cells are counted, sent, timed, and answers read without trust.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_sessions.py``
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable

from opd_env.tools.sandbox.base import ExecResult, Level, Limits, Program, Session, SessionEnded, Status
from opd_env.tools.sandbox.guest.runner import CELL_ERROR, CELL_EXIT, CELL_HEADER, CELL_REPLY
from opd_env.tools.sandbox.read_back import OutputReader

_LOOK_EVERY_S = 0.1
_STAY_AWAKE_S = 0.0003
"""To fall asleep and be woken by the answer, maybe on another CPU, takes longer than most cells run."""


class LocalSession(Session):
    """What sessions on this machine share: a number of cells, a time to live, and one end.

    Args:
        level: of the sandbox.
        limits: of each cell, and of the session.
        turn: entered for each cell.
    """

    def __init__(
        self, level: Level, limits: Limits, turn: contextlib.AbstractContextManager[object] | None = None
    ) -> None:
        self._level = level
        self._limits = limits
        self._turn = turn or contextlib.nullcontext()
        self._ends_at = time.monotonic() + limits.session_s
        self._cells = 0
        self._lock = threading.Lock()
        self.closed = False
        """Nothing of it is left."""

    @property
    def alive(self) -> bool:
        return not self.closed and self._cells < self._limits.session_cells and time.monotonic() < self._ends_at

    def run(self, cell: str, *, keep_files: bool = False) -> ExecResult:
        program = Program(cell, limits=self._limits, keep_files=keep_files)
        program.check_folder(self._level)
        with self._lock, self._turn:
            if not self.alive:
                self._end()
                raise SessionEnded
            self._cells += 1
            goes_on = False
            try:
                result, goes_on = self._run_cell(self._cells, program)
            finally:
                if not goes_on:
                    self._end()
            return result

    def close(self) -> None:
        with self._lock:
            self._end()

    @abstractmethod
    def _run_cell(self, number: int, program: Program) -> tuple[ExecResult, bool]:
        """Runs a cell; also says whether the session can go on."""

    def _end(self) -> None:
        """Kills the process. Called with the lock held, maybe more than once."""
        self.closed = True


class CellChannel:
    """The socket to a session's process, and the pipe that its output comes from.

    Args:
        channel: a stream socket, owned from now on.
        reader: the output, owned from now on.
    """

    def __init__(self, channel: socket.socket, reader: OutputReader) -> None:
        channel.setblocking(False)
        self._channel = channel
        self.reader = reader
        self.exited = False
        """The last cell asked for the process's end."""

    def run(
        self,
        number: int,
        program: Program,
        look: Callable[[], Status | None],
        wake: Callable[[], object] = lambda: None,
    ) -> Status:
        """Runs a cell and says how it ended. After anything but OK or ERROR the process must be killed.

        Args:
            number: of the cell, counted from 1: an answer to another one is not believed.
            program: the cell.
            look: called now and then: a status if the process must not go on.
            wake: called when the cell is on its way: a process that is woken after that is not woken twice.
        """
        if select.select([self._channel], [], [], 0)[0]:  # it said what nobody asked for, or has closed its end
            return Status.KILLED
        deadline = time.monotonic() + program.limits.wall_s
        source = program.source
        message = self._send(memoryview(CELL_HEADER.pack(len(source)) + source))
        wake()
        reply = b"" if message else self._receive_soon(CELL_REPLY.size)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN | (select.POLLOUT if message else 0))
        if not self.reader.ended:
            poll.register(self.reader, select.POLLIN)
        while len(reply) < CELL_REPLY.size:
            left = deadline - time.monotonic()
            if left <= 0:
                return Status.TIMEOUT
            events = dict(poll.poll(min(left, _LOOK_EVERY_S) * 1000))
            if self.reader.fileno() in events:
                self.reader.read()
                if self.reader.full:
                    return Status.OUTPUT_LIMIT
                if self.reader.ended:
                    poll.unregister(self.reader)
            event = events.get(self._channel.fileno(), 0)
            if event & select.POLLOUT and message:
                message = self._send(message)
                if not message:
                    poll.modify(self._channel, select.POLLIN)
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                part = self._receive(CELL_REPLY.size - len(reply))
                if not part:
                    return look() or Status.KILLED
                reply += part
            elif not events and (status := look()) is not None:
                return status
        self.reader.drain()
        got, outcome = CELL_REPLY.unpack(reply)
        if got != number or message:
            return Status.KILLED
        if self.reader.full:
            return Status.OUTPUT_LIMIT
        self.exited = outcome == CELL_EXIT
        return Status.ERROR if outcome == CELL_ERROR else Status.OK

    def _send(self, message: memoryview) -> memoryview:
        """Sends as much as there is room for; what is left."""
        with contextlib.suppress(OSError):  # full, or gone: the next read says so
            return message[self._channel.send(message) :]
        return message

    def _receive_soon(self, size: int) -> bytes:
        """What arrives in the next moment; nothing if it takes longer, or the channel is closed."""
        end = time.monotonic() + _STAY_AWAKE_S
        while time.monotonic() < end:
            os.sched_yield()
            try:
                return self._channel.recv(size)
            except BlockingIOError:
                continue
            except OSError:
                break
        return b""

    def _receive(self, size: int) -> bytes:
        try:
            return self._channel.recv(size)
        except OSError:
            return b""

    def close(self) -> None:
        """Closes both."""
        self._channel.close()
        self.reader.close()
