"""The kernel sandbox: zygotes and slots behind the interface of :class:`Sandbox`.

Worked example::

    with KernelSandbox(Level.NAMESPACES) as sandbox:
        sandbox.run("print(1 + 1)").output          # '2\n'

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_supervisor.py``
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

from opd_env.tools.sandbox.base import (
    MAX_SESSIONS,
    ExecResult,
    Level,
    Limits,
    Sandbox,
    Session,
    SetUpFailed,
    Status,
    sandbox_failure,
)
from opd_env.tools.sandbox.kernel_session import KernelSession
from opd_env.tools.sandbox.modules import Tier, tier_of
from opd_env.tools.sandbox.output import check_code, check_files, check_folder
from opd_env.tools.sandbox.pool import SlotPool
from opd_env.tools.sandbox.turnstile import Turnstile

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
        self, level: Level, limits: Limits | None = None, slots: int | None = None, max_sessions: int = MAX_SESSIONS
    ) -> None:
        self._limits = limits or Limits()
        places = slots or os.cpu_count() or 1
        self._owner = os.getpid()
        self._turnstile = Turnstile(places, _MAX_WAITING)
        self._pool = SlotPool(level)
        self._sessions: set[KernelSession] = set()
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        try:
            self._pool.give_back(Tier.STDLIB, self._pool.take(Tier.STDLIB))
        except SetUpFailed:
            self._pool.close()
            raise
        self._threads = ThreadPoolExecutor(places, "sandbox")

    @property
    def level(self) -> Level:
        """``namespaces`` or ``landlock``."""
        return self._pool.level

    def _executor(self) -> Executor:
        return self._threads

    def run(
        self,
        code: str,
        *,
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        keep_files: bool = False,
    ) -> ExecResult:
        """See :meth:`Sandbox.run`."""
        limits = limits or self._limits
        source = check_code(code, limits)
        if files or keep_files:
            check_folder(self.level)
        named = check_files(files)
        tier = tier_of(code)
        result = sandbox_failure("")
        with self._turnstile:
            for fresh in (False, True):  # a failure of ours is tried once more, in a new slot
                try:
                    slot = self._pool.take(tier, fresh)
                except SetUpFailed as error:
                    result = sandbox_failure(str(error))
                    continue
                try:
                    result = slot.run(source, named, limits, seed, keep_files)
                finally:
                    self._pool.give_back(tier, slot)
                if result.status is not Status.SANDBOX_ERROR:
                    break
        return result

    def session(self, *, limits: Limits | None = None, seed: int = 0) -> Session:
        """See :meth:`Sandbox.session`."""
        self._pool.check_open()
        with self._lock:
            self._sessions = {session for session in self._sessions if not session.closed}
            if len(self._sessions) >= self._max_sessions:
                raise RuntimeError(
                    f"{self._max_sessions} sessions are open; close those that have ended, or raise max_sessions"
                )
            session = KernelSession(self._pool, self._turnstile, limits or self._limits, seed)
            self._sessions.add(session)
        return session

    def close(self) -> None:
        """See :meth:`Sandbox.close`. In a fork of the process that opened it: nothing."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            sessions, self._sessions = self._sessions, set()
        self._pool.close()  # first, so that cells that are running end now
        for session in sessions:
            session.close()
        self._threads.shutdown()
