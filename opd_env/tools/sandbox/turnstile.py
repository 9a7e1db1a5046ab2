"""Lets a few callers in at a time, the others in the order in which they came.

Worked example::

    turnstile = Turnstile(places=2, queue=100)
    with turnstile:
        ...

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_supervisor.py``
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turnstile:
    """A fair semaphore with a bounded queue.

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
