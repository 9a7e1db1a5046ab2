"""Tools that attack the kit itself: the caller has a typed error on time, the next call works, and nothing is left."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd_env.tools import Tool, Toolbox, ToolErrorKind, tool
from opd_env.tools.run import process
from tests.tools.run.test_process import gone, state_of

LIMIT = 1.0
LATE = 30.0
"""Seconds that a busy machine may be late. What hangs here hangs for longer."""


@pytest.fixture(autouse=True, scope="module")
def _no_processes_left() -> Iterator[None]:
    yield
    process._idle.clear()


def sockets() -> list[int]:
    """Descriptors of this process that are sockets: the way to the parent."""
    found = []
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                found.append(descriptor)
    return found


@tool(isolation="process", timeout_s=LIMIT)
def attack(how: str) -> object:
    """Attacks.

    Args:
        how: in which way.
    """
    signal.setitimer(signal.ITIMER_REAL, 0)  # nothing in the process itself ends it any more
    channel = sockets()[0]
    if how == "half a message and silence":
        os.write(channel, struct.pack("!i", 1000) + b"[")
        time.sleep(60)
    elif how == "a message byte by byte":
        os.write(channel, struct.pack("!i", 1000))
        for _ in range(1000):
            os.write(channel, b" ")
            time.sleep(0.1)
    elif how == "a message of 2 GB":
        os.write(channel, struct.pack("!i", 0x7FFFFFFF) + b"x" * 1000)
    elif how == "no JSON":
        os.write(channel, struct.pack("!i", 3) + b"{x}")
    elif how == "JSON of another form":
        os.write(channel, struct.pack("!i", 4) + b"[{}]")
    elif how == "an unknown error":
        answer = b'["x","hunger",false,0]'
        os.write(channel, struct.pack("!i", len(answer)) + answer)
    elif how == "no text":
        answer = b"[1,null,false,0]"
        os.write(channel, struct.pack("!i", len(answer)) + answer)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "ignore signals":
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        time.sleep(60)
    elif how == "recursion limit":
        sys.setrecursionlimit(1)
    elif how == "no exit from threads":
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise SystemExit
    elif how == "standard output":
        os.write(1, b'["forged",null,false,0]\n')
        print("noise", file=sys.stderr)
        os.close(1)
        os.close(2)
        return "well"
    elif how == "elsewhere":
        os.chdir("/")
        os.environ.clear()
        sys.path.clear()
        return "well"
    elif how == "fork many":
        for _ in range(20):
            if os.fork() == 0:
                time.sleep(60)
        return "well"
    return os.getpid()


def call(how: str) -> Any:
    with Toolbox([attack]) as toolbox:
        return toolbox.call("attack", {"how": how})


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("half a message and silence", ToolErrorKind.TIMEOUT),
        ("a message byte by byte", ToolErrorKind.TIMEOUT),
        ("a message of 2 GB", ToolErrorKind.EXCEPTION),
        ("no JSON", ToolErrorKind.EXCEPTION),
        ("JSON of another form", ToolErrorKind.EXCEPTION),
        ("an unknown error", ToolErrorKind.EXCEPTION),
        ("no text", ToolErrorKind.EXCEPTION),
        ("stop", ToolErrorKind.TIMEOUT),
        ("ignore signals", ToolErrorKind.TIMEOUT),
        ("recursion limit", ToolErrorKind.EXCEPTION),
        ("no exit from threads", ToolErrorKind.EXCEPTION),
    ],
)
def test_a_process_that_attacks_its_parent_is_a_typed_error_on_time(how: str, kind: ToolErrorKind) -> None:
    assert call("nothing").ok, "a process is ready"
    start = time.monotonic()
    result = call(how)
    assert time.monotonic() - start < LIMIT + LATE
    assert result.error is kind
    assert call("nothing").ok


@pytest.mark.parametrize("how", ["standard output", "elsewhere"])
def test_what_a_process_prints_and_changes_of_itself_is_its_own_affair(how: str) -> None:
    before = (os.getcwd(), dict(os.environ), list(sys.path))
    assert call(how).content == "well"
    assert call("nothing").ok
    assert (os.getcwd(), dict(os.environ), list(sys.path)) == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_what_a_process_forked_is_gone_with_it() -> None:
    assert call("fork many").content == "well"
    (worker,) = [one._process.pid for one in process._idle[attack]]
    family = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session_of(pid) == worker]
    assert len(family) == 21
    process._idle.clear()
    gc.collect()
    assert all(gone(pid) for pid in family)


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_process_that_does_not_read_a_long_call_is_an_error_on_time() -> None:
    def stop_later(text: str) -> str:
        pid = os.getpid()
        threading.Timer(0.2, lambda: os.kill(pid, signal.SIGSTOP)).start()
        return str(pid)

    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    lazy = Tool(
        name="t", description="T.", parameters=schema, function=stop_later, isolation="process", timeout_s=LIMIT
    )
    with Toolbox([lazy]) as toolbox:
        worker = toolbox.call("t", {"text": ""}).content
        while state_of(int(worker)) != "T":
            time.sleep(0.01)
        start = time.monotonic()
        assert toolbox.call("t", {"text": "x" * 5_000_000}).error is ToolErrorKind.TIMEOUT
        assert time.monotonic() - start < LIMIT + LATE
        assert toolbox.call("t", {"text": ""}).ok


class Items(dict[str, object]):
    def items(self) -> Any:
        raise KeyboardInterrupt


class Text(str):
    def __str__(self) -> str:
        raise SystemExit

    __repr__ = __str__

    def __len__(self) -> int:
        raise SystemExit


class Unshowable:
    def __repr__(self) -> str:
        while True:
            pass

    __str__ = __repr__


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize(
    ("make", "content"),
    [
        (lambda: Items(a=1), "KeyboardInterrupt"),
        (lambda: Text("as it is"), "as it is"),
        (lambda: Unshowable(), "Object of type Unshowable is not JSON"),
        (lambda: {Unshowable(): 1}, "keys must be"),
        (lambda: [Unshowable()] * 100_000, "Object of type Unshowable"),
        (lambda: bytearray(b"x"), "Object of type bytearray"),
        (lambda: (number for number in range(3)), "Object of type generator"),
        (lambda: {"a": {"b": float("inf")}}, "no JSON value"),
        (lambda: True, "true"),
    ],
)
def test_a_value_with_methods_that_attack_is_text_or_a_typed_error(make: Any, content: str, isolation: str) -> None:
    odd = Tool(name="t", description="T.", parameters={"type": "object"}, function=make, timeout_s=LIMIT,
               isolation=isolation)  # fmt: skip
    with Toolbox([odd]) as toolbox:
        result = toolbox.call("t", {})
    process._idle.pop(odd, None)
    assert content in result.content
    assert result.error in (None, ToolErrorKind.EXCEPTION)


def test_a_tool_in_a_thread_cannot_set_signal_handlers() -> None:
    def seize() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    before = signal.getsignal(signal.SIGINT)
    with Toolbox([Tool(name="t", description="T.", parameters={"type": "object"}, function=seize)]) as toolbox:
        assert "signal only works in main thread" in toolbox.call("t", {}).content
    assert signal.getsignal(signal.SIGINT) is before


def test_a_batch_of_tools_that_die_leaves_no_process(tmp_path: Path) -> None:
    program = tmp_path / "batch.py"
    program.write_text(
        "import os, signal, sys, threading\n"
        "from opd_env.tools import Tool, Toolbox\n"
        "def die(how):\n"
        "    if how % 3 == 0: os._exit(3)\n"
        "    if how % 3 == 1:\n"
        "        while True: pass\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "schema = {'type': 'object', 'properties': {'how': {'type': 'integer'}}}\n"
        "tool = Tool(name='d', description='D.', parameters=schema, function=die, timeout_s=1.5, isolation='process')\n"
        "errors = []\n"
        "def play(number): errors.append(str(Toolbox([tool]).call('d', {'how': number}).error))\n"
        "threads = [threading.Thread(target=play, args=(number,)) for number in range(9)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(*sorted(errors))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment)
    out, _ = ran.communicate(timeout=60)
    assert out.split() == ["exception"] * 3 + ["timeout"] * 6
    assert not [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(pid) == ran.pid]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
