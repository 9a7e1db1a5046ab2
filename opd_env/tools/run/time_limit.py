"""Runs a function in a worker thread and comes back on time.

Worked example::

    run_with_limit(lambda: 6 * 7, timeout_s=1.0)          # 42
    run_with_limit(lambda: time.sleep(60), timeout_s=0.1)  # TimeoutError after 0.1 s

What is covered: the caller has its TimeoutError on time. Python code ends at its next bytecode, where an exception is
raised in it. Code that waits in C and lets other threads run (sleep, sockets, files, locks, subprocesses) is left
behind, and ends once that wait is over. Code inside logging, an import or a lock's own methods is ended later, since
what it holds there would stay locked for all. ``threads_left_behind()`` counts what has not ended yet.

What is not covered: a loop that catches ``BaseException`` and goes on; C code that keeps the interpreter's lock (a
huge integer power, a pathological regular expression), which stops the caller too; code that ends the whole process.
Tools that could do any of this take ``isolation="process"`` (``opd_env.tools.run.process``), which ends everything.

One call costs about 15 µs: threads are kept and used again.

Test it alone: ``pytest tests/tools/run/test_limits.py``
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)
WARN_EVERY = 10
"""Threads left behind for each warning in the log."""
_LOCKING = frozenset({"logging", "threading", "queue", "importlib", "_frozen_importlib"})


class TimeUp(BaseException):
    """Raised inside a function whose time is up."""


class _ToolThread(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="opd-env-tool", daemon=True)
        self.jobs: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[tuple[bool, Any]]]] = SimpleQueue()
        self.ended = False
        self.start()

    def run(self) -> None:
        with suppress(TimeUp):  # told to end between two functions
            self._work()

    def _work(self) -> None:
        owner = os.getpid()
        while not self.ended:
            function, reply = self.jobs.get()
            try:
                answer = (True, function())
            except BaseException as error:
                answer = (False, error)
            if os.getpid() != owner:
                os._exit(1)  # the function forked and this is the child: it must not go on as if it were us
            reply.put(answer)
            del function, reply, answer  # an idle thread keeps nothing alive

    def end(self) -> None:
        """Raises ``TimeUp`` at the thread's next bytecode, unless it may hold a lock that others need."""
        import ctypes

        self.ended = True
        self.jobs.put((int, SimpleQueue()))  # wakes it in case it had just finished
        if self.ident is not None and not _may_hold_a_lock(self.ident):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(TimeUp))


def _may_hold_a_lock(thread: int) -> bool:
    """Whether the function that runs in a worker is inside a module whose locks an exception could leave locked."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not _ToolThread._work.__code__:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _LOCKING:
            return True
        frame = frame.f_back
    return False


_idle: list[_ToolThread] = []
_ending: list[_ToolThread] = []
os.register_at_fork(after_in_child=_idle.clear)  # a fork has one thread: the others' names are stale
os.register_at_fork(after_in_child=_ending.clear)


def run_with_limit(function: Callable[[], T], timeout_s: float) -> T:
    """Calls ``function`` in a worker thread and returns what it returns.

    Args:
        function: what to run. What it raises, even ``SystemExit`` or ``KeyboardInterrupt``, is raised here.
        timeout_s: seconds of wall time.

    Raises:
        TimeoutError: the time was up; the function was ended as far as the module's docstring says.
        KeyboardInterrupt: the user pressed Ctrl-C while this waited; the function was ended likewise.
    """
    if _ending:
        threads_left_behind()
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _ToolThread()
    reply: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
    worker.jobs.put((function, reply))
    try:
        returned, value = reply.get(timeout=timeout_s)
    except BaseException as error:
        worker.end()
        _ending.append(worker)
        if len(_ending) % WARN_EVERY == 0:
            logger.warning("%d tool threads go on after their time; give such tools isolation='process'", len(_ending))
        if isinstance(error, Empty):
            raise TimeoutError(f"no answer within {timeout_s:g} s") from None
        raise
    _idle.append(worker)
    if not returned:
        raise value
    result: T = value
    return result


def threads_left_behind() -> int:
    """Worker threads whose time was up and that have not ended yet. Each is told again to end."""
    for worker in list(_ending):
        if worker.is_alive():
            worker.end()
        elif worker in _ending:
            _ending.remove(worker)
    return len(_ending)
