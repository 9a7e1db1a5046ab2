"""Processes that train together: what one does for all is known to all, and when one ends, all end.

Worked example::

    heartbeat = Heartbeat(accelerator)                                  # every process makes one
    with heartbeat:                                                     # what ends this block here ends it everywhere
        train()
        on_main(accelerator, lambda: checkpoints.save(step, files))     # every process calls it, one saves
    heartbeat.stop()                                                    # this process may be silent from now on

A collective waits for every process, so one that raises alone, is killed, or is stopped by a second Ctrl-C would leave
the others waiting. So each process has a connection to process 0, on which both say once a second that they live. An
error goes to process 0, which tells all. A process that is killed is missed at once, as its connection closes, and one
whose machine is lost after ``SILENCE_S``. The others then leave the block with ``EndedByAnother``. One that waits in a
collective, and so cannot leave, is ended after ``GRACE_S``. An error is shown by the process that it arose in; the
others are silent, but for one on every other machine.

Test it alone: ``pytest tests/trainer/run/test_processes.py tests/trainer/run/test_heartbeat.py``
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from accelerate.utils import gather_object

from opd_env.errors import TrainingError
from opd_env.trainer.run.interruption import StoppedAtOnce

INTERVAL_S = 1.0
"""Between two signs of life."""
SILENCE_S = 120.0
"""A process of which nothing is heard for so long is given up."""
GRACE_S = 10.0
"""What a process may take to leave the block when another has ended."""
_BEAT, _LEFT = b"\n", b"left\n"
"""Lines of a connection; any other is an ``End`` in JSON."""
_GONE = "is gone: killed, or its machine is lost"
Result = TypeVar("Result")


class AnotherFailed(TrainingError):
    """Another process failed at what it does for all, or beside this one, which ends with it."""


class EndedByAnother(TrainingError):
    """This process ends because another one did; ``shown``: it is for this process to tell the user."""

    def __init__(self, reason: str, shown: bool) -> None:
        super().__init__(f"{reason}; so all processes end; start the same command again to continue")
        self.shown = shown


def on_main(accelerator: Any, function: Callable[[], Result]) -> Result:
    """Calls ``function`` in the main process; returns what it returned, which can be pickled, in every process.

    Every process calls this at the same point. Where it fails, the error itself is raised; in the others:

    Raises:
        AnotherFailed: it failed in the main process.
    """
    return on_each(lambda: function() if accelerator.is_main_process else None)[0]  # type: ignore[return-value]


def on_each(function: Callable[[], Result]) -> list[Result]:
    """Calls ``function`` in every process; returns what it returned in each of them. Otherwise as ``on_main``."""
    outcome: tuple[Any, str] = None, ""
    error = None
    try:
        outcome = function(), ""
    except Exception as raised:
        error, outcome = raised, (None, f"{type(raised).__name__}: {raised}")
    everyone: list[tuple[Result, str]] = gather_object([outcome])  # one that failed takes part too, or all would wait
    if error is not None:
        raise error
    for number, (_, failure) in enumerate(everyone):
        if failure:
            raise AnotherFailed(f"{f'process {number}' if number else 'the main process'} failed: {failure}")
    return [result for result, _ in everyone]


class End(NamedTuple):
    """Why a run of several processes ends; the first that process 0 hears of is believed."""

    author: int
    """The process that tells it."""
    reason: str


class Heartbeat:
    """Tells the other processes of a run that this one lives, and how it ended. A process alone does nothing.

    Args:
        accelerator: of ``accelerate``; every process makes a ``Heartbeat`` at the same point.

    Raises:
        TrainingError: the processes cannot connect to the first.
    """

    def __init__(self, accelerator: Any) -> None:
        self._rank: int = accelerator.process_index
        self._is_local_main: bool = accelerator.is_local_main_process
        self._end: End | None = None
        self._over = threading.Event()  # the end is known, or this process has left
        self._working = self._inside = False
        self._lock = threading.Lock()
        self._peers: dict[int, socket.socket] = {}  # of process 0 all others, of these process 0
        if accelerator.num_processes == 1:
            return
        self._connect()
        for rank, peer in self._peers.items():
            # A copy in a child that lives on would keep the connection of a killed process open.
            os.register_at_fork(after_in_child=partial(_close_copy, peer))
            threading.Thread(target=self._listen, args=(rank, peer), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        atexit.register(self.stop)

    @property
    def ended(self) -> bool:
        """Whether the run ends because of one process."""
        return self._end is not None

    def stop(self) -> None:
        """Gives no more signs of life, and misses none."""
        if not self._over.is_set():
            self._over.set()
            self._send(_LEFT)

    def __enter__(self) -> Heartbeat:
        if self._end is not None:
            raise self._ended_by(self._end)
        with self._lock:
            self._working = self._inside = True
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with self._lock:
                self._working = False
            if error is not None and (self._peers or self._end):
                self._conclude(error)
        finally:
            self._inside = False

    def _conclude(self, error: BaseException) -> None:
        """Tells the others of the error. Raises ``EndedByAnother`` where it only follows from what another one told."""
        at_once = isinstance(error, StoppedAtOnce) and self._end is None  # else ``_settle`` interrupted the main thread
        if isinstance(error, EndedByAnother) or (isinstance(error, KeyboardInterrupt) and not (at_once or self._end)):
            return  # all know: process 0 told them, or they agreed to stop
        told, lost = f" failed: {type(error).__name__}: {error}", _is_lost_connection(error)
        if lost or isinstance(error, AnotherFailed):
            self._over.wait(GRACE_S)  # the process that failed first tells why
        reason = self._name(self._rank) + (" was stopped by a second signal" if at_once else told)
        end = self._tell(End(self._rank, f"another process {_GONE}" if lost else reason))
        if at_once and end.author == self._rank:
            return
        follows = lost or isinstance(error, KeyboardInterrupt | AnotherFailed)
        if follows or (end.author != self._rank and end.reason.endswith(told)):  # the same error is shown once
            raise self._ended_by(end) from None

    def _tell(self, end: End) -> End:
        """Tells it, unless another one has told something before; returns what was told first."""
        if self._rank and self._end is None:
            self._send(_line(end))
            self._over.wait(GRACE_S)
        self._settle(end)
        deadline = time.monotonic() + 2 * INTERVAL_S
        while self._rank == 0 and self._peers and time.monotonic() < deadline:
            time.sleep(0.01)  # those who have read it close their connections
        return self._end or end

    def _settle(self, end: End) -> None:
        """Takes ``end`` for that of the run, if it is the first; the main thread then leaves the block."""
        with self._lock:
            if self._over.is_set():
                return
            self._end = end
            self._over.set()
            if self._rank == 0:
                self._send(_line(end))
            if self._working:
                _thread.interrupt_main()

    def _connect(self) -> None:
        """Connects every process to the first, which knows them by a secret: any machine can reach its port."""
        server, port = None, 0
        if self._rank == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
            server.settimeout(SILENCE_S)
            port = server.getsockname()[1]
        machine = socket.gethostname(), os.environ.get("GROUP_RANK", "")
        everyone = gather_object([(machine, port, secrets.token_hex(16))])
        self._machines: list[tuple[str, str]] = [machine for machine, _, _ in everyone]
        _, port, secret = everyone[0]
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")  # where the processes met: the machine of process 0
        try:
            if server is None:
                self._peers[0] = peer = socket.create_connection((address, port), timeout=SILENCE_S)
                peer.sendall(f"{secret} {self._rank}\n".encode())
                return
            with server:
                while len(self._peers) < len(everyone) - 1:
                    peer, _ = server.accept()
                    peer.settimeout(SILENCE_S)
                    # Unbuffered, since another reader needs what follows the first line.
                    told, _, rank = peer.makefile("rb", buffering=0).readline(99).decode("latin-1").partition(" ")
                    if secrets.compare_digest(told.encode(), secret.encode()):
                        self._peers[int(rank)] = peer
        except OSError as error:
            raise TrainingError(
                f"{self._name(self._rank)} did not meet the others at {address}, port {port}: {error}; the machines of "
                "a run must reach one another at every port"
            ) from error

    def _beat(self) -> None:
        """Gives signs of life until the run ends; then ends this process if it does not leave the block by itself."""
        while not self._over.wait(INTERVAL_S):
            self._send(_BEAT)
        deadline = time.monotonic() + GRACE_S
        while self._end is not None and self._inside:
            if time.monotonic() > deadline:
                error = self._ended_by(self._end)
                if error.shown:
                    print(f"opd-env: {error}", file=sys.stderr, flush=True)
                os._exit(2)
            time.sleep(0.1)

    def _listen(self, rank: int, peer: socket.socket) -> None:
        """Hears process ``rank`` until it leaves, tells an end, closes the connection or is silent for too long."""
        fate = _GONE
        try:
            with peer, peer.makefile("rb") as lines:
                for line in lines:
                    if line == _LEFT:
                        return
                    if line != _BEAT:
                        self._settle(End(*json.loads(line)))
                    if self._rank and self.ended:
                        return  # process 0 hears on, so that it knows who has read the end
        except TimeoutError:
            fate = f"gave no sign of life for {SILENCE_S:.0f} s"
        except (OSError, ValueError):  # a process that dies may leave half a line
            pass
        finally:
            del self._peers[rank]
        self._settle(End(self._rank, f"{self._name(rank)} {fate}"))

    def _send(self, line: bytes) -> None:
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # its listener notices
                peer.sendall(line)

    def _ended_by(self, end: End) -> EndedByAnother:
        elsewhere = self._machines[end.author] != self._machines[self._rank]
        return EndedByAnother(end.reason, end.author == self._rank or (elsewhere and self._is_local_main))

    def _name(self, rank: int) -> str:
        return f"process {rank} on {self._machines[rank][0]}"


def _close_copy(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        os.close(peer.detach())  # ``close`` would wait for the listener's file


def _line(end: End) -> bytes:
    return json.dumps(end).encode() + b"\n"


def _is_lost_connection(error: BaseException) -> bool:
    """Whether it is how a collective ends when another process is gone."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words)
