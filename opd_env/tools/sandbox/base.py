r"""What a sandbox is: its limits, its results, and the interface that every kind of it has.

Worked example::

    from opd_env.tools.sandbox import Limits, open_sandbox

    with open_sandbox() as sandbox:
        result = sandbox.run("print(6 * 7)", limits=Limits(wall_s=2))
        result.status, result.output                 # Status.OK, '42\n'
        with sandbox.session() as session:           # one process: variables stay
            session.run("x = 41")
            session.run("x + 1").output              # '42\n'

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import TracebackType
from typing import Self

from opd_env.errors import UserError
from opd_env.tools.sandbox.guest.protocol import FILE_BYTES, FOLDER_BYTES

NOBODY = 65534
"""The user that the code runs as, if the trainer is root."""


class Status(StrEnum):
    """How a call ended, as measured from outside the process that ran the code."""

    OK = "ok"
    """The code ran to its end. It proves no more than that: ``os._exit(0)`` ends with it, too."""
    ERROR = "error"
    """An exception that nobody caught, or an exit code other than 0."""
    TIMEOUT = "timeout"
    """The wall time was over; the code was killed."""
    CPU_LIMIT = "cpu_limit"
    """The CPU time was over; the code was killed."""
    OUTPUT_LIMIT = "output_limit"
    """It wrote more than is kept; the code was killed."""
    KILLED = "killed"
    """It died of a signal: a crash of the interpreter, or a system call that is not allowed."""
    SANDBOX_ERROR = "sandbox_error"
    """The sandbox itself failed. Never the student's doing: drop the episode and count it."""


class Level(StrEnum):
    """What keeps the code in. It belongs in the log and the manifest of every run."""

    NAMESPACES = "namespaces"
    """Own user, mount, pid, net, ipc, uts and cgroup namespaces, seccomp, rlimits."""
    LANDLOCK = "landlock"
    """Landlock, seccomp, rlimits. Names, sizes and times of the machine's files stay visible."""
    NONE = "none"
    """Nothing but rlimits: the code can do what the user can do."""


@dataclass(frozen=True)
class Limits:
    """What one call, or one cell of a session, may use."""

    wall_s: float = 6.0
    """Seconds by the clock; waiting for a free slot does not count."""
    cpu_s: int = 5
    """Seconds of CPU, of all threads together."""
    memory_mb: int = 512
    """MiB of address space on top of what the interpreter itself has mapped."""
    output_bytes: int = 65_536
    """Bytes of output that are kept; more than that ends the call."""
    code_bytes: int = 262_144
    """Bytes of code; more than that is refused."""
    threads: int = 50
    """Threads at one time, beside the first; processes are never allowed.

    With ``landlock`` about 1,000 more are possible: the kernel counts all threads of the user together, and those of
    the trainer may grow in number.
    """
    kept_files: int = 100
    """Files that are given back, where they are asked for."""
    kept_bytes: int = 8_388_608
    """Bytes of them all together."""
    session_s: float = 600.0
    """Seconds that a session may live."""
    session_cells: int = 100
    """Cells that a session may run."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not value > 0:
                raise ValueError(f"Limits.{limit.name}={value!r}: every limit must be greater than 0")


def check_files(files: Mapping[str, bytes]) -> None:
    """Raises ValueError if a name is not a plain file name, or the files need more room than the folder has."""
    total = 0
    for name, content in files.items():
        total += len(content)
        if len(content) > FILE_BYTES or total > FOLDER_BYTES // 2:
            raise ValueError(
                f"files[{name!r}] has {len(content)} bytes, and with those before it {total}; "
                f"at most {FILE_BYTES} each and {FOLDER_BYTES // 2} together are accepted"
            )
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode()) > 255:
            raise ValueError(f"files[{name!r}]: expected a plain file name without a folder")


@dataclass(frozen=True)
class Program:
    """One call, or one cell of a session, with all that belongs to it. Checked when it is made.

    Raises:
        ValueError: the code is longer than ``limits.code_bytes``, or see :func:`check_files`.
    """

    code: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Put into the working folder first: content by plain name."""
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    """For ``random``, and numpy where it is loaded."""
    keep_files: bool = False
    """Give back the files that lie in the working folder afterwards."""

    def __post_init__(self) -> None:
        if (size := len(self.source)) > self.limits.code_bytes:
            raise ValueError(f"the code has {size} bytes; at most {self.limits.code_bytes} are accepted")
        check_files(self.files)

    @property
    def source(self) -> bytes:
        """The code's bytes. Lone surrogates are kept: the interpreter is to complain about them, not we."""
        return self.code.encode("utf-8", "surrogatepass")

    def check_folder(self, level: Level) -> None:
        """Raises ValueError if this has to do with files, and the level has no folder for them."""
        if level is Level.LANDLOCK and (self.files or self.keep_files):
            raise ValueError("level landlock has no folder for files to lie in; they need level namespaces")


@dataclass(frozen=True)
class ExecResult:
    """How a call ended, and what it left."""

    status: Status
    output: str
    """Standard output and error in the order of writing, decoded, without control characters,
    with addresses of objects rewritten so that they do not differ from run to run. A byte that is no UTF-8
    becomes four characters."""
    exit_code: int | None
    """As the kernel reported it; negative for a signal; None if the process did not end by itself."""
    truncated: bool
    """The output was cut at ``Limits.output_bytes``."""
    cpu_ms: float
    wall_ms: float
    max_rss_kb: int
    """Peak of the resident memory; 0 where it is not known (cells of a session)."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """With ``keep_files``: the plain files that lie in the working folder, by name, but for given ones that are
    unchanged. Hostile data, as the output is."""
    files_omitted: tuple[str, ...] = ()
    """With ``keep_files``: what else lies there, and why it is not given back."""

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end."""
        return self.status is Status.OK


def sandbox_failure(reason: str) -> ExecResult:
    """The result of a call that the sandbox itself could not run; ``reason`` is its output."""
    return ExecResult(Status.SANDBOX_ERROR, reason, None, False, 0.0, 0.0, 0)


class SandboxUnavailable(UserError):
    """No sandbox of the wanted strength works here.

    Args:
        reason: what is missing, in one sentence.
        how_to_fix: what the user can do about it.
    """

    def __init__(self, reason: str, how_to_fix: str) -> None:
        super().__init__(reason, how_to_fix)
        self.reason = reason
        self.how_to_fix = how_to_fix

    def __str__(self) -> str:
        return f"{self.reason} {self.how_to_fix}"


class SetUpFailed(RuntimeError):
    """The kernel refused a step of the set-up; the text says which and how."""


class OutOfDescriptors(SetUpFailed):
    """This process has no room for another slot; those that it has are sound.

    Args:
        error: what the kernel said.
    """

    def __init__(self, error: object) -> None:
        super().__init__(f"{error}; raise the limit of open files (`ulimit -n`) or close sessions")


class SessionEnded(RuntimeError):
    """The session's process is gone, and its variables with it. Open a new one."""

    def __init__(
        self, message: str = "the session's process is gone, and its variables with it; open a new one"
    ) -> None:
        super().__init__(message)


class _Closed(ABC):
    """What is closed at the end of a ``with`` block."""

    @abstractmethod
    def close(self) -> None:
        """Kills everything that was started. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session(_Closed):
    """One interpreter that lives for an episode: variables, imports and files stay from cell to cell.

    The value of a cell's last expression is printed, as a REPL does. Where a cell ends with another
    status than ``ok`` or ``error``, its process is gone (see :attr:`alive`).
    """

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether another cell can be run."""

    @abstractmethod
    def run(self, cell: str, *, keep_files: bool = False) -> ExecResult:
        """Runs one cell.

        Whether a cell is ``ok`` or ``error`` is what its own process says of itself, since that process
        goes on; time, CPU time, output and death are measured from outside.

        Args:
            cell: the code.
            keep_files: give back the files that lie in the working folder after it, those of earlier cells included.

        Raises:
            SessionEnded: if the session's process is gone.
            ValueError: with ``keep_files``, if this level has no writable folder.
        """


class Sandbox(_Closed):
    """Runs Python code that nobody has read. Safe to share between threads and tasks.

    A kind of sandbox implements :meth:`execute`, :meth:`open_session` and ``level``.

    Args:
        limits: of a call, where it brings none.
        threads: calls of :meth:`arun` at the same time.
    """

    def __init__(self, limits: Limits | None, threads: int) -> None:
        self._limits = limits or Limits()
        self._threads = ThreadPoolExecutor(threads, "sandbox")

    @property
    @abstractmethod
    def level(self) -> Level:
        """What keeps the code in."""

    @property
    def nodes(self) -> Mapping[str, Level]:
        """The level on each node of a cluster; empty where all code runs on this machine."""
        return {}

    def run(
        self,
        code: str,
        *,
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        keep_files: bool = False,
    ) -> ExecResult:
        """Runs a program in a fresh interpreter.

        Args:
            code: the program, at most ``limits.code_bytes`` of UTF-8.
            files: files to put into the working folder first: plain names and their content.
            limits: other limits than the sandbox's own.
            seed: seeds ``random``, and numpy where it is loaded.
            keep_files: give back the files that it leaves in the working folder.

        Raises:
            ValueError: if ``files`` has a name with a folder in it or is too big, or this level has no writable folder.
            RuntimeError: if the sandbox is closed, or too many calls wait already.
        """
        return self.execute(Program(code, files or {}, limits or self._limits, seed, keep_files))

    async def arun(
        self,
        code: str,
        *,
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        keep_files: bool = False,
    ) -> ExecResult:
        """:meth:`run` for asyncio: waits without holding the event loop."""
        call = functools.partial(self.run, code, files=files, limits=limits, seed=seed, keep_files=keep_files)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def session(self, *, limits: Limits | None = None, seed: int = 0) -> Session:
        """Starts an interpreter that keeps its state from cell to cell. Close it, or use ``with``.

        Raises:
            RuntimeError: if the sandbox is closed, or as many sessions as may be are open already.
        """
        return self.open_session(limits or self._limits, seed)

    @abstractmethod
    def execute(self, program: Program) -> ExecResult:
        """:meth:`run`, with everything in one record."""

    @abstractmethod
    def open_session(self, limits: Limits, seed: int) -> Session:
        """:meth:`session`, with nothing left open."""
