"""Ctrl-C and a polite kill: stop at once where nothing is lost, otherwise at the end of the update.

Worked example::

    with Interruption() as interruption:
        trajectories = rollout(…)               # Ctrl-C here raises KeyboardInterrupt at once
        with interruption.postponed():
            updater.update(…)                   # Ctrl-C here raises after the update

A second Ctrl-C, while the first is postponed, raises at once.

Processes that train together must stop at the same moment, or one would wait for the others for ever: with ``agree``
every signal waits for the end of the next postponed block, where all of them ask each other. A second one raises
``StoppedAtOnce``: this process has left the others, and can do nothing more that takes all of them.

Test it alone: ``pytest tests/trainer/run/test_interruption.py``
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StoppedAtOnce(KeyboardInterrupt):
    """One of several processes stops without the others, somewhere: nothing that takes all of them can follow."""


class Interruption:
    """Turns SIGINT and SIGTERM into ``KeyboardInterrupt`` at a moment when the run can be continued.

    Outside the main thread, where Python has no signals, it does nothing.

    Args:
        agree: whether any process was asked to stop, given whether this one was; None when there is only one.
        ended: whether one of the others has ended, so that there is nobody to agree with.
    """

    def __init__(self, agree: Callable[[bool], bool] | None = None, ended: Callable[[], bool] = lambda: False) -> None:
        self._agree, self._ended = agree, ended
        self._postponing = self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Within, the first signal waits for the end of the block. All processes go through the same blocks."""
        self._postponing = True
        try:
            yield
        finally:
            self._postponing = False
        if self._agree is not None:
            self._requested = self._agree(self._requested)
        if self._requested:
            self._requested = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: Any) -> None:
        if self._agree is None and (self._requested or not self._postponing):
            raise KeyboardInterrupt
        if self._agree is not None and (self._requested or self._ended()):
            raise StoppedAtOnce
        self._requested = True
