"""A plain subprocess: no wall at all, for code that you wrote or read yourself.

What is covered: time, CPU time and memory (rlimits), output, a working folder of its own that is removed,
the process group is killed, nothing of the environment is inherited.

What is not covered: everything else. The code can read and write what the user can, use the network,
start processes (which may outlive the call in a process group of their own) and kill the trainer.

Worked example::

    with open_sandbox("unsafe_subprocess") as sandbox:      # by name only, with a warning in the log
        sandbox.run("print(1 + 1)").output                  # '2\n'

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_unsafe.py``
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from opd_env.tools.sandbox.base import ExecResult, Level, Limits, Program, Sandbox, Session, Status
from opd_env.tools.sandbox.cells import CellChannel, LocalSession
from opd_env.tools.sandbox.interpreter import guest_command, guest_environment
from opd_env.tools.sandbox.read_back import NOTHING, OutputReader, WrittenFiles, read_folder

_logger = logging.getLogger(__name__)


class UnsafeSubprocess(Sandbox):
    """Runs each call, or each session, in ``python -P -s -S`` with rlimits. See the module's docstring."""

    def __init__(self, limits: Limits | None = None) -> None:
        _logger.warning(
            "unsafe_subprocess: code runs WITHOUT a sandbox, with the rights of this user. "
            "Use it for code that you trust, never for what a model wrote."
        )
        super().__init__(limits, os.cpu_count() or 1)
        self._closed = False

    @property
    def level(self) -> Level:
        return Level.NONE

    def execute(self, program: Program) -> ExecResult:
        self._check_open()
        limits = program.limits
        with contextlib.ExitStack() as stack:
            folder, descriptor = _working_folder(stack)
            for name, content in program.files.items():
                (folder / name).write_bytes(content)
            source = stack.enter_context(tempfile.TemporaryFile())
            source.write(program.source)
            source.seek(0)
            process = _Subprocess("program", source.fileno(), folder, program.seed, limits)
            stack.callback(process.output.close)
            stack.callback(process.kill)
            start = time.monotonic()
            while process.poll() is None:
                if process.output.full or time.monotonic() - start > limits.wall_s:
                    break
                process.output.wait(min(0.05, limits.wall_s))
            wall_s = time.monotonic() - start
            ended = process.poll() is not None
            process.kill()
            process.output.drain()
            written = read_folder(descriptor, program.files, limits) if program.keep_files else NOTHING
            return process.result(ended, wall_s, written)

    def open_session(self, limits: Limits, seed: int) -> Session:
        self._check_open()
        return _UnsafeSession(limits, seed)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this sandbox is closed; open another one")

    def close(self) -> None:
        """Ends the threads of :meth:`arun`; every call has killed its own process already."""
        self._closed = True
        self._threads.shutdown()


class _Subprocess:
    """One interpreter with its output pipe."""

    def __init__(self, kind: str, descriptor: int, folder: Path, seed: int, limits: Limits) -> None:
        read_end, write_end = os.pipe()
        self.output = OutputReader(read_end, limits.output_bytes)
        self._limits = limits
        self._usage = (0.0, 0)
        arguments = [kind, descriptor, seed, limits.cpu_s, limits.memory_mb << 20]
        try:
            self._popen = subprocess.Popen(
                [*guest_command("unsafe_main"), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                cwd=folder,
                env=guest_environment(str(folder)),
                pass_fds=(descriptor,),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        self.exit_code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Reaps the process, with what it has used."""
        if self.exit_code is None:
            pid, wait_status, usage = os.wait4(self._popen.pid, os.WNOHANG)
            if pid:
                self.exit_code = self._popen.returncode = os.waitstatus_to_exitcode(wait_status)
                self._usage = (usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
        return self.exit_code

    def kill(self) -> None:
        """Kills the process group and reaps its leader."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.0005)

    def result(self, ended: bool, wall_s: float, written: WrittenFiles) -> ExecResult:
        """The result of a one-shot call, after :meth:`kill`."""
        cpu_s, rss = self._usage
        exit_code = self.exit_code if ended else None
        if self.output.full:
            status = Status.OUTPUT_LIMIT
        elif not ended:
            status = Status.TIMEOUT
        elif exit_code == -signal.SIGXCPU or cpu_s > self._limits.cpu_s + 0.5:
            status = Status.CPU_LIMIT
        elif exit_code is not None and exit_code < 0:
            status = Status.KILLED
        else:
            status = Status.OK if exit_code == 0 else Status.ERROR
        text, full = self.output.take()
        return ExecResult(status, text, exit_code, full, cpu_s * 1000, wall_s * 1000, rss, *written)


class _UnsafeSession(LocalSession):
    def __init__(self, limits: Limits, seed: int) -> None:
        super().__init__(Level.NONE, limits)
        self._stack = contextlib.ExitStack()
        folder, self._folder = _working_folder(self._stack)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _Subprocess("session", theirs.fileno(), folder, seed, limits)
        self._channel = CellChannel(ours, self._process.output)
        self._stack.callback(self._channel.close)
        self._stack.callback(self._process.kill)

    def _run_cell(self, number: int, program: Program) -> tuple[ExecResult, bool]:
        start = time.monotonic()
        status = self._channel.run(number, program, self._look)
        goes_on = status in (Status.OK, Status.ERROR) and not self._channel.exited
        if not goes_on:
            self._process.kill()
        wall_ms = (time.monotonic() - start) * 1000
        self._process.output.drain()
        text, full = self._process.output.take()
        written = read_folder(self._folder, {}, program.limits) if program.keep_files else NOTHING
        return ExecResult(status, text, self._process.exit_code, full, 0.0, wall_ms, 0, *written), goes_on

    def _look(self) -> Status | None:
        if self._process.poll() is None:
            return None
        return Status.CPU_LIMIT if self._process.exit_code == -signal.SIGXCPU else Status.KILLED

    def _end(self) -> None:
        super()._end()
        self._stack.close()


def _working_folder(stack: contextlib.ExitStack) -> tuple[Path, int]:
    """A new folder and a descriptor of it, opened before any code can change its mode."""
    folder = tempfile.TemporaryDirectory(prefix="opd-env-unsafe-", ignore_cleanup_errors=True)
    path = Path(stack.enter_context(folder))
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    return path, descriptor
