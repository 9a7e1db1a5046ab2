"""Who runs where, and when: slots are made when they are needed, kept while they are sound, replaced when not;
callers pass a turnstile that lets a few in at a time.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_supervisor.py``
"""

from __future__ import annotations

import os
import threading
from collections import deque
from types import TracebackType

from opd_env.tools.sandbox.base import Level, OutOfDescriptors, SetUpFailed
from opd_env.tools.sandbox.interpreter import Tier
from opd_env.tools.sandbox.slots import Slot, Zygote

_CALLS_PER_SLOT = 1000
_MAX_IDLE = 64
"""Free slots that a tier keeps: sessions, of which there may be more at a time, use slots, too."""


class SlotPool:
    """Free slots by tier. Safe to share between threads, not between processes.

    Args:
        level: the backend: ``namespaces`` or ``landlock``.
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._starting = {tier: threading.Lock() for tier in Tier}
        self._zygotes: dict[Tier, Zygote] = {}
        self._idle: dict[Tier, list[Slot]] = {tier: [] for tier in Tier}
        self._closed = False

    def check_open(self) -> None:
        """Raises RuntimeError if this is closed, or a copy that a fork made."""
        if os.getpid() != self._owner:
            raise RuntimeError("this sandbox was opened by another process, before a fork; open one in this one")
        if self._closed:
            raise RuntimeError("this sandbox is closed; open another one")

    def take(self, tier: Tier, fresh: bool = False) -> Slot:
        """A free slot, or a new one; with ``fresh`` a new one in any case.

        Raises:
            SetUpFailed: if none can be made, even by a new zygote.
        """
        self.check_open()
        with self._lock:
            if self._idle[tier] and not fresh:
                return self._idle[tier].pop()
        zygote = self._zygote(tier)
        try:
            return zygote.spawn()
        except OutOfDescriptors:
            raise
        except SetUpFailed:
            self._forget(tier, zygote)
            return self._zygote(tier).spawn()

    def give_back(self, tier: Tier, slot: Slot) -> None:
        """Keeps a slot for the next call, or ends it if it is worn or anything about it was odd."""
        with self._lock:
            keep = slot.usable and slot.calls < _CALLS_PER_SLOT and not self._closed
            keep = keep and len(self._idle[tier]) < _MAX_IDLE
            if keep:
                self._idle[tier].append(slot)
        if not keep:
            slot.close()

    def _zygote(self, tier: Tier) -> Zygote:
        with self._starting[tier]:
            if tier not in self._zygotes:
                started = Zygote(self.level, tier)
                with self._lock:
                    self._zygotes[tier] = started
                    if self._closed:
                        started.close()
            return self._zygotes[tier]

    def _forget(self, tier: Tier, zygote: Zygote) -> None:
        """Ends a zygote that no longer makes slots, with those that it has made."""
        with self._starting[tier]:
            if self._zygotes.get(tier) is not zygote:
                return  # another thread was first
            with self._lock:
                del self._zygotes[tier]
                idle, self._idle[tier] = self._idle[tier], []
        for slot in idle:
            slot.close()
        zygote.close()

    def close(self) -> None:
        """Kills every zygote and slot. In a fork of the owner: nothing, they are not its own."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._closed = True
            idle = [slot for slots in self._idle.values() for slot in slots]
            zygotes = list(self._zygotes.values())
            self._idle = {tier: [] for tier in Tier}
        for slot in idle:
            slot.close()
        for zygote in zygotes:
            zygote.close()


class Turnstile:
    """A fair semaphore with a bounded queue: ``with turnstile: …`` waits for a place, in order of arrival.

    Args:
        places: callers inside at the same time.
        queue: callers that may wait; more are refused.
    """

    def __init__(self, places: int, queue: int) -> None:
        self._free = places
        self._queue = queue
        self._waiting: deque[threading.Lock] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._free and not self._waiting:
                self._free -= 1
                return
            if len(self._waiting) >= self._queue:
                raise RuntimeError(
                    f"{self._queue} calls wait for the sandbox already; start fewer at once or open more slots"
                )
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # KeyboardInterrupt: leave the queue, or pass on the place that was just given
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._leave()

    def _leave(self) -> None:
        if self._waiting:
            self._waiting.popleft().release()
        else:
            self._free += 1
