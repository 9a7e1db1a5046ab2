"""Processes that train together end together: one that fails tells the others, one that is gone is missed.

Worked example::

    heartbeat = Heartbeat(accelerator)         # a thread, in every process
    with heartbeat:                            # whatever ends this block here ends it everywhere
        train()
    heartbeat.stop()                           # this process may be silent from now on

A collective waits for every process, so one that raises alone, is killed, or is stopped by a second Ctrl-C would leave
the others waiting. Here every process writes once a second that it lives, into the key-value store that the processes
met at, and reads there whether one has ended. Then the others leave the block too, with ``EndedByAnother``: within
about a second after an error, and within ``SILENCE_S`` after a machine is lost without a word. One that waits in a
collective, and so cannot leave the block, is ended after ``GRACE_S``. An error is shown by the process that it arose
in; the others are silent, but for one on every other machine.

Test it alone: ``pytest tests/trainer/run/test_heartbeat.py``
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store, _set_pg_timeout

from opd_env.errors import TrainingError
from opd_env.trainer.run.interruption import StoppedAtOnce
from opd_env.trainer.run.processes import AnotherFailed

INTERVAL_S = 1.0
"""Between two signs of life."""
SILENCE_S = 120.0
"""A process of which nothing is heard for so long is given up."""
GRACE_S = 10.0
"""What a process may take to leave the block when another has ended."""
COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long processes wait for one that lives: it may play a whole evaluation. PyTorch's own is 10 or 30 minutes."""
_END, _LEFT = "end", "left"


@dataclass(frozen=True)
class End:
    """Why a run of several processes ends; the first to tell is believed."""

    reason: str
    error: str
    """Of the process that failed; empty when it cannot tell."""
    author: int
    """The process that tells it."""
    machine: str


class EndedByAnother(TrainingError):
    """This process ends because another one did.

    Args:
        end: what that one told.
        shown: whether it is for this process to tell the user.
    """

    def __init__(self, end: End, shown: bool) -> None:
        super().__init__(f"{end.reason}; so all processes end; start the same command again to continue")
        self.shown = shown


class Heartbeat:
    """Tells the other processes of a run that this one lives, and how it ended. One process needs none of it.

    Args:
        accelerator: of ``accelerate``; every process makes a ``Heartbeat`` at the same point.
    """

    def __init__(self, accelerator: Any) -> None:
        self._rank: int = accelerator.process_index
        self._is_local_main: bool = accelerator.is_local_main_process
        self._machine = f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}"
        self._end: End | None = None
        self._working = self._inside = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._store: Store | None = None
        if accelerator.num_processes == 1 or not dist.is_initialized():
            return
        _set_pg_timeout(COLLECTIVE_TIMEOUT)
        store = PrefixStore("opd_env", _get_default_store().clone())  # type: ignore[attr-defined]
        store.set(_beat(self._rank), "0")
        self._hosts: list[str] = gather_object([socket.gethostname()])  # from here on all have given a sign of life
        self._store = store
        self._reached = time.monotonic()
        # Two, since a store whose machine is lost keeps whoever asks it waiting.
        for work in (partial(self._give_signs, store), self._watch):
            threading.Thread(target=work, name="opd-env-heartbeat", daemon=True).start()
        atexit.register(self.stop)  # before the interpreter takes down what the threads use

    @property
    def ended(self) -> bool:
        """Whether the run ends because of one process."""
        return self._end is not None

    def stop(self) -> None:
        """Gives no more signs of life, and misses none."""
        if self._store is None or self._stopped.is_set():
            return
        self._stopped.set()
        if self._end is None:
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it everyone who would look
                self._store.set(_beat(self._rank), _LEFT)

    def __enter__(self) -> Heartbeat:
        if self._end is not None:
            raise EndedByAnother(self._end, self._shows(self._end))
        with self._lock:
            self._working = self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._working = False
        try:
            if self._store is not None and error is not None:
                self._conclude(self._store, error)
        finally:
            self._inside = False

    def _conclude(self, store: Store, error: BaseException) -> None:
        """Tells the others of the error. Raises ``EndedByAnother`` where it only follows from what another one told."""
        agreed = isinstance(error, KeyboardInterrupt) and not isinstance(error, StoppedAtOnce)
        if isinstance(error, EndedByAnother) or (agreed and self._end is None):
            return
        told, lost = f"{type(error).__name__}: {error}", _is_lost_connection(error)
        follows = lost or isinstance(error, KeyboardInterrupt | AnotherFailed)
        if isinstance(error, AnotherFailed):
            self._wait_for_end()
        if self._end is None:
            name = self._name(self._rank)
            if isinstance(error, KeyboardInterrupt):
                reason = f"{name} was stopped by a second signal"
            else:
                reason = self._gone(store) if lost else f"{name} failed: {told}"
            self._end = self._tell(store, reason, "" if follows else told)
        if self._rank == self._end.author == 0:
            time.sleep(2 * INTERVAL_S)  # the store may live in this process, and the others have to read it before
        if isinstance(error, StoppedAtOnce) and self._end.author == self._rank:
            return
        if follows or (self._end.author != self._rank and self._end.error == told):
            raise EndedByAnother(self._end, self._shows(self._end)) from None

    def _give_signs(self, store: Store) -> None:
        """Gives signs of life, and looks for those of the others."""
        heard: dict[int, tuple[bytes, float]] = {}
        watched = range(1, len(self._hosts)) if self._rank == 0 else [0]
        beats, end = 0, None
        while end is None and not self._stopped.wait(INTERVAL_S):
            beats += 1
            try:
                store.set(_beat(self._rank), str(beats))
                end = End(**json.loads(store.get(_END))) if store.check([_END]) else None
                silent = [] if end else self._silent(store, watched, heard)
            except RuntimeError:
                return  # the store is gone, which the other thread notices
            if silent:
                end = self._tell(store, f"{self._names(silent)} gave no sign of life for {SILENCE_S:.0f} s", "")
            self._reached = time.monotonic()
        self._end = self._end or end

    def _watch(self) -> None:
        """Makes the main thread leave the block when another process has ended; ends this one if that does not help."""
        while self._end is None and not self._stopped.wait(INTERVAL_S / 2):
            if time.monotonic() - self._reached > SILENCE_S:
                self._end = End(f"{self._name(0)} cannot be reached any more", "", self._rank, self._machine)
        if self._end is None:
            return
        with self._lock:
            if self._working:
                _thread.interrupt_main()
        deadline = time.monotonic() + GRACE_S
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._inside:
            if self._shows(self._end):
                print(f"opd-env: {EndedByAnother(self._end, True)}", file=sys.stderr, flush=True)
            os._exit(2)

    def _silent(self, store: Store, watched: Iterable[int], heard: dict[int, tuple[bytes, float]]) -> list[int]:
        """Those of ``watched`` whose last sign of life is too long ago."""
        now = time.monotonic()
        for rank, beat in zip(watched, store.multi_get([_beat(rank) for rank in watched]), strict=True):
            if rank not in heard or heard[rank][0] != beat or beat == _LEFT.encode():
                heard[rank] = beat, now
        return [rank for rank, (_, when) in heard.items() if now - when > SILENCE_S]

    def _gone(self, store: Store) -> str:
        """Who has gone without a word: those who now give no sign of life."""
        keys = [_beat(rank) for rank in range(len(self._hosts))]
        try:
            before = store.multi_get(keys)
            time.sleep(3 * INTERVAL_S)
            pairs = list(zip(before, store.multi_get(keys), strict=True))
        except RuntimeError:
            return f"{self._name(0)} cannot be reached any more"
        gone = [n for n, (one, other) in enumerate(pairs) if one == other != _LEFT.encode() and n != self._rank]
        return f"{self._names(gone) if gone else 'another process'} is gone: killed, or its machine is lost"

    def _tell(self, store: Store, reason: str, error: str) -> End:
        """Tells it, unless another one has told something before; returns what was told first."""
        mine = End(reason, error, self._rank, self._machine)
        try:
            return End(**json.loads(store.compare_set(_END, "", json.dumps(asdict(mine)))))
        except RuntimeError:
            return mine

    def _wait_for_end(self) -> None:
        deadline = time.monotonic() + GRACE_S
        while self._end is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def _shows(self, end: End) -> bool:
        return end.author == self._rank or (end.machine != self._machine and self._is_local_main)

    def _name(self, rank: int) -> str:
        return f"process {rank} on {self._hosts[rank]}"

    def _names(self, ranks: list[int]) -> str:
        more = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
        return self._name(ranks[0]) + more


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _is_lost_connection(error: BaseException) -> bool:
    """Whether it is how a collective ends when another process is gone."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words)
