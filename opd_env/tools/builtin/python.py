r"""The ``python`` tool: runs a program in the sandbox, and answers what it printed.

Worked example::

    Toolbox(["python"]).call("python", {"code": "print(6 * 7)"}).content         # '42\n'
    Toolbox([python_tool(stateful=True)])        # a REPL: variables stay for the episode
    Toolbox([python_tool(files={"prices.csv": b"pen,1.5"})])        # each program can open("prices.csv")
    written = {}
    Toolbox([python_tool(on_files=written.update)])                 # what programs write: {"plot.csv": b"x,y"}

Where no kernel sandbox works, a run is refused before its first episode (``Tool.sandbox``), and a call answers a
``sandbox`` error that says why: the code never runs without a wall unless a sandbox that has none is passed in by hand.

Test it alone: ``pytest tests/tools/builtin/test_python.py``
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from opd_env.tools.contract import Tool, tool
from opd_env.tools.sandbox import (
    ExecResult,
    Level,
    Sandbox,
    SandboxUnavailable,
    Session,
    SessionEnded,
    Status,
    open_sandbox,
)
from opd_env.tools.sandbox.base import check_files
from opd_env.tools.sandbox.read_back import shorten
from opd_env.tools.tool_error import ToolError, ToolErrorKind

MAX_OUTPUT_CHARS = 4000
"""Characters of output that the model is shown; the middle of a longer text is cut out."""
_MAX_FILES_CHARS = 400
_ANSWER_CHARS = MAX_OUTPUT_CHARS + _MAX_FILES_CHARS + 200

_FAILURES = {
    Status.ERROR: (ToolErrorKind.EXCEPTION, "the program failed"),
    Status.TIMEOUT: (ToolErrorKind.TIMEOUT, "the time was over"),
    Status.CPU_LIMIT: (ToolErrorKind.TIMEOUT, "the CPU time was over"),
    Status.OUTPUT_LIMIT: (ToolErrorKind.OUTPUT_LIMIT, "too much output"),
    Status.KILLED: (ToolErrorKind.EXCEPTION, "the interpreter died"),
    Status.SANDBOX_ERROR: (ToolErrorKind.SANDBOX, "the sandbox failed"),
}
_STATE_LOST = "The session was ended: all variables and imports are lost. "


def python_tool(
    *,
    stateful: bool = False,
    files: Mapping[str, bytes] | None = None,
    on_files: Callable[[Mapping[str, bytes]], object] | None = None,
    sandbox: Sandbox | None = None,
) -> Tool:
    """Runs Python programs in the kernel sandbox.

    Args:
        stateful: keep one interpreter for the episode, and print the value of the last expression.
        files: put into the folder of each program, by plain file names; the student is told of them. They need
            ``namespaces``, and cannot be given to a stateful tool.
        on_files: called after each call that has written or changed files in its folder, with their contents by
            name; the student is told what was kept. Needs ``namespaces``. The contents are hostile data, and names
            are plain, so that they can be joined to a folder. A stateful tool's files stay for the episode.
        sandbox: run in this one (it stays yours to close). By default all tools of this process share the
            one that ``open_sandbox()`` gives, opened at the first call.
    """

    def get_sandbox() -> Sandbox:
        found = sandbox or shared_sandbox()
        if (files or on_files) and found.level is Level.LANDLOCK:
            raise SandboxUnavailable(
                "The python tool has files, and level landlock has no folder for them.", "See what namespaces need."
            )
        return found

    if stateful and files:
        raise ValueError("files can be given to single programs only, not to stateful=True")
    if stateful:
        return _stateful_tool(get_sandbox, on_files)

    @tool(timeout_s=60.0, max_output_chars=_ANSWER_CHARS, deterministic=True, sandbox=get_sandbox)
    def python(code: str) -> str:
        """Runs a Python 3 program and returns what it prints. Nothing is kept between calls.

        Args:
            code: The program. Use print to see a result.
        """
        with _never_the_students():
            result = get_sandbox().run(code, files=files, keep_files=on_files is not None)
        return _answer(result, _hand_over(result, {}, on_files))

    if not files:
        return python
    check_files(files)
    return replace(python, description=f"{python.description} Files in its folder: {', '.join(sorted(files))}.")


class Repl:
    """The interpreter of one episode, started at its first cell, and again after it was lost."""

    def __init__(
        self, get_sandbox: Callable[[], Sandbox], on_files: Callable[[Mapping[str, bytes]], object] | None = None
    ) -> None:
        self._get_sandbox = get_sandbox
        self._on_files = on_files
        self._session: Session | None = None
        self._files: Mapping[str, bytes] = {}

    def run(self, code: str) -> str:
        """Runs one cell and gives the text for the student, who is told when the state is gone."""
        lost = ""
        if self._session is not None and not self._session.alive:
            self.close()
            lost = _STATE_LOST
        keep_files = self._on_files is not None
        with _never_the_students():
            session = self._running()
            try:
                result = session.run(code, keep_files=keep_files)
            except SessionEnded:  # it went unnoticed: on another machine, or just now
                self.close()
                lost = _STATE_LOST
                session = self._running()
                result = session.run(code, keep_files=keep_files)
        note = _hand_over(result, self._files, self._on_files)
        self._files = result.files
        if not session.alive:
            self.close()
            lost = _STATE_LOST
        return _answer(result, note + lost)

    def _running(self) -> Session:
        if self._session is None:
            self._session = self._get_sandbox().session()
        return self._session

    def close(self) -> None:
        """Ends the interpreter."""
        self._files = {}
        if self._session is not None:
            self._session.close()
            self._session = None

    def __del__(self) -> None:
        self.close()


def _stateful_tool(
    get_sandbox: Callable[[], Sandbox], on_files: Callable[[Mapping[str, bytes]], object] | None
) -> Tool:
    @tool(
        timeout_s=60.0,
        max_output_chars=_ANSWER_CHARS,
        state=lambda: Repl(get_sandbox, on_files),
        mutates_state=True,
        deterministic=True,
        sandbox=get_sandbox,
    )
    def python(code: str, state: Repl) -> str:
        """Runs Python 3 code and returns what it prints and the value of its last expression.

        Variables and imports are kept between calls.

        Args:
            code: The code of one cell.
        """
        return state.run(code)

    return python


def _hand_over(
    result: ExecResult, before: Mapping[str, bytes], on_files: Callable[[Mapping[str, bytes]], object] | None
) -> str:
    """Gives away what a call has written or changed; says so in words for the student."""
    written = {name: content for name, content in result.files.items() if before.get(name) != content}
    if written and on_files is not None:
        on_files(written)
    kept = ", ".join(f"{name} ({len(content)} bytes)" for name, content in written.items())
    notes = [f"Files written: {kept}."] if kept else []
    if result.files_omitted:
        notes.append(f"Not kept: {'; '.join(result.files_omitted)}.")
    return shorten(" ".join(notes), _MAX_FILES_CHARS) + "\n" if notes else ""


def _answer(result: ExecResult, note: str) -> str:
    output = shorten(result.output, MAX_OUTPUT_CHARS)
    if result.ok:
        return (output or "(no output: use print to see a value)\n") + note
    kind, reason = _FAILURES[result.status]
    raise ToolError(kind, f"{note}{reason}\n{output}" if output else f"{note}{reason}")


@contextlib.contextmanager
def _never_the_students() -> Iterator[None]:
    """Where the sandbox does not open, is full or closed, the episode is dropped, and the student not charged."""
    try:
        yield
    except RuntimeError as error:
        raise ToolError(ToolErrorKind.SANDBOX, str(error)) from error


_open_elsewhere: Callable[[], Sandbox] | None = None


def run_programs_by(opening: Callable[[], Sandbox] | None) -> None:
    """Lets the tools of this process share another sandbox than that of this machine; None takes it back."""
    global _open_elsewhere
    with _lock:
        _open_elsewhere = opening
        before = _shared.pop(os.getpid(), None)
    if isinstance(before, Sandbox):
        atexit.unregister(before.close)
        before.close()


_lock = threading.Lock()
_shared: dict[int, Sandbox | SandboxUnavailable] = {}  # by process: a fork must not use its parent's


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def shared_sandbox() -> Sandbox:
    """The sandbox that the tools of this process share; it is closed when the process ends.

    Raises:
        SandboxUnavailable: none works here; with the reason and what to do.
    """
    with _lock:
        found = _shared.get(os.getpid())
        if found is None:
            try:
                found = (_open_elsewhere or open_sandbox)()
                atexit.register(found.close)
            except SandboxUnavailable as error:
                found = error
            _shared[os.getpid()] = found
    if isinstance(found, SandboxUnavailable):
        raise found
    return found
