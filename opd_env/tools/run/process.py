"""Runs a tool in a child process, which is killed when the time is up.

Worked example::

    @tool(isolation="process", timeout_s=1.0)
    def search_text(pattern: str, text: str) -> bool:
        '''Whether a regular expression matches.  ...'''
        return re.search(pattern, text) is not None     # a pathological pattern ends after one second

What is covered: code that hangs anywhere (in C, with the interpreter's lock held), ends or crashes its process, or
starts further processes: its whole process group is killed. If the parent is killed first, a timer of the kernel ends
the child one second after its limit.

What is not covered: this is no sandbox. The code has the user's rights and files, and a process that leaves the group
(``setsid``) lives on. Code that a model wrote belongs into ``opd_env.tools.sandbox``.

A process starts in about 0.1 s, which is not counted as the student's time, and is used again by later episodes.
Functions and classes of a script or a notebook are copied into it (by cloudpickle), those of modules are imported.

Test it alone: ``pytest tests/tools/run/test_process.py``
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any
from weakref import WeakKeyDictionary

from opd_env.tools.contract import Tool
from opd_env.tools.run.answer import Answer, encode_error
from opd_env.tools.run.thread import CLOSE_TIMEOUT_S, Runner, ToolCode
from opd_env.tools.tool_error import ToolError, ToolErrorKind

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 60.0
"""Seconds that the start of a process may take, on a busy machine too."""
_MAX_REPLY_BYTES = 1 << 26
_LENGTH = struct.Struct("!i")
"""Comes before each message, as ``multiprocessing.connection``, the child's end, has it."""
_END_EPISODE = b"null"
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from opd_env.tools.run.process import main; main()"


def copy_of(tool: Tool) -> bytes:
    """The tool as its process receives it. Made once for each tool.

    Raises:
        ValueError: something that the function uses cannot be copied.
    """
    if tool not in _copies:
        import cloudpickle

        try:
            _copies[tool] = cloudpickle.dumps(dataclasses.replace(tool))
        except Exception as error:
            message = f"tool {tool.name!r} cannot be copied into a process ({error}); give it isolation='thread'"
            raise ValueError(message) from error
    return _copies[tool]


class ToolProcess:
    """One child process, for one tool. Used by one caller at a time; killed when nobody holds it any more.

    Raises:
        ToolError: kind ``sandbox``: the process could not be started.
    """

    def __init__(self, tool: Tool) -> None:
        code = copy_of(tool)
        try:
            self._socket, childs = socket.socketpair()
            with childs:
                command = [sys.executable, "-c", _START, json.dumps(sys.path), str(childs.fileno())]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[childs.fileno()], start_new_session=True
                )
            self._end = weakref.finalize(self, _kill, self._process, self._socket, os.getpid())
            started = self.ask(code, START_TIMEOUT_S)
        except (OSError, ToolError) as error:
            raise ToolError(ToolErrorKind.SANDBOX, f"the tool's process did not start: {error}") from error
        if started.error is not None:
            self.kill()
            raise ToolError(ToolErrorKind.SANDBOX, f"the tool's process did not start: {started.content}")

    def ask(self, request: bytes, timeout_s: float) -> Answer:
        """Sends a request and returns the answer.

        Raises:
            TimeoutError: no whole answer in time; the process was killed.
            ToolError: the process died, or its answer is none.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(_LENGTH.pack(len(request)) + request)
            (length,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline))
            if not 0 <= length <= _MAX_REPLY_BYTES:
                raise ValueError(f"a reply of {length} bytes")
            return _answer_of(json.loads(self._receive(length, deadline)))
        except TimeoutError:
            self.kill()
            raise TimeoutError(f"no answer within {timeout_s:g} s") from None
        except (OSError, EOFError):
            raise ToolError(ToolErrorKind.EXCEPTION, f"the tool's process died ({self._cause_of_death()})") from None
        except (ValueError, TypeError):
            self.kill()
            raise ToolError(ToolErrorKind.EXCEPTION, "the tool's process wrote over its own answer") from None
        except BaseException:  # Ctrl-C while waiting
            self.kill()
            raise

    def _receive(self, size: int, deadline: float) -> bytes:
        """So many bytes, by the deadline however slowly they come."""
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
            chunk = self._socket.recv(min(size - len(received), 1 << 16))
            if not chunk:
                raise EOFError
            received += chunk
        return bytes(received)

    def kill(self) -> None:
        """Kills the process and all others of its group."""
        self._end()

    def _cause_of_death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.1)  # the end of the connection may arrive before the end of the process
        self.kill()
        code = self._process.returncode
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class ProcessRunner:
    """Runs a tool in child processes. One with state keeps its process for the whole episode."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._process: ToolProcess | None = None

    def call(self, arguments: Mapping[str, Any]) -> Answer:
        """Runs one call; a process that dies is a ToolError of kind ``exception``."""
        process, self._process = self._process or _take(self._tool), None
        answer = process.ask(json.dumps(arguments).encode(), self._tool.timeout_s)
        if self._tool.injected:
            self._process = process
        else:
            _give_back(self._tool, process)
        return answer

    def end_episode(self) -> None:
        """Closes the state; the process may serve another episode."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.ask(_END_EPISODE, CLOSE_TIMEOUT_S)
        except (TimeoutError, ToolError) as error:
            logger.warning("closing the state of tool %s failed: %s", self._tool.name, error)
        else:
            _give_back(self._tool, process)


_make_runner: Callable[[Tool], Runner] = ProcessRunner


def process_runner(tool: Tool) -> Runner:
    """What runs the tool in a process, here or in a cluster."""
    return _make_runner(tool)


def run_processes_by(make: Callable[[Tool], Runner] | None) -> None:
    """Lets something else run the tools that ask for a process, such as a cluster; None takes it back."""
    global _make_runner
    _make_runner = make or ProcessRunner


_copies: WeakKeyDictionary[Tool, bytes] = WeakKeyDictionary()
_idle: WeakKeyDictionary[Tool, list[ToolProcess]] = WeakKeyDictionary()
os.register_at_fork(after_in_child=_idle.clear)  # the processes are the parent's


def _take(tool: Tool) -> ToolProcess:
    waiting = _idle.get(tool, [])
    while waiting:
        process = waiting.pop()
        if process._process.poll() is None:
            return process
        process.kill()
    return ToolProcess(tool)


def _give_back(tool: Tool, process: ToolProcess) -> None:
    _idle.setdefault(tool, []).append(process)


def _answer_of(reply: object) -> Answer:
    """Checks a reply, which the tool may have written itself."""
    match reply:
        case [str() as content, str() | None as kind, bool() as truncated, int() as retries]:
            return Answer(content, None if kind is None else ToolErrorKind(kind), truncated, retries)
    raise ValueError("this is no reply of the child's main")


def _kill(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    channel.close()
    if os.getpid() != owner:
        return  # a fork of the owner dropped its copy
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """The child: ``python -c … PATHS DESCRIPTOR``. Reads the tool, then answers until the parent is gone."""
    descriptor = int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    connection, owner = Connection(descriptor), os.getpid()

    def reply(answer: Answer) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != owner:
            os._exit(1)  # the tool forked and this is the child: it must not answer too
        connection.send_bytes(json.dumps(dataclasses.astuple(answer)).encode())

    try:
        tool: Tool = pickle.loads(connection.recv_bytes())
    except Exception as error:
        reply(encode_error(error))
        return
    code = ToolCode(tool)
    reply(Answer(""))
    while True:
        try:
            arguments = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, tool.timeout_s + 1)  # ends this process even when the parent cannot
        if arguments is None:
            code.close()
            reply(Answer(""))
        else:
            reply(code.call(arguments))
            if not tool.injected:
                code.close()  # the next call may be another episode's
