"""A tool in a process of its own ends on time whatever it does, and the next call works."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_env.tools import Tool, Toolbox, ToolErrorKind, tool
from opd_env.tools.run import process

LIMIT = 1.0
OFFSET = 40


@tool(isolation="process", timeout_s=LIMIT)
def misbehave(how: str) -> object:
    """Does something bad.

    Args:
        how: what to do.
    """
    if how == "hang in C with the lock held":
        re.match(r"(a+)+$", "a" * 40 + "b")
    elif how == "huge power":
        return len(str(9**9**9))
    elif how == "sleep":
        time.sleep(60)
    elif how == "exit":
        os._exit(3)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "crash":
        import ctypes

        ctypes.string_at(0)
    elif how == "system exit":
        sys.exit("bye")
    elif how == "close descriptors":
        os.closerange(3, 1000)
    elif how == "fork":
        return "parent" if os.fork() else "child"
    elif how.startswith("leave a process "):
        return subprocess.Popen(["sleep", "600"]).pid
    elif how == "leave a process and hang":
        time.sleep(60)
    elif how == "nan":
        return float("nan")
    return os.getpid()


@pytest.fixture(autouse=True, scope="module")
def _no_processes_left() -> Iterator[None]:
    yield
    process._idle.clear()


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ("hang in C with the lock held", ToolErrorKind.TIMEOUT, "did not answer within 1 s and was ended"),
        ("huge power", ToolErrorKind.TIMEOUT, "did not answer within 1 s and was ended"),
        ("sleep", ToolErrorKind.TIMEOUT, "did not answer within 1 s and was ended"),
        ("exit", ToolErrorKind.EXCEPTION, "the tool's process died (exit code 3)"),
        ("kill", ToolErrorKind.EXCEPTION, "the tool's process died (signal 9)"),
        ("crash", ToolErrorKind.EXCEPTION, "the tool's process died (signal 11)"),
        ("close descriptors", ToolErrorKind.EXCEPTION, "the tool's process died"),
        ("system exit", ToolErrorKind.EXCEPTION, "SystemExit: bye"),
        ("nan", ToolErrorKind.EXCEPTION, "no JSON value"),
    ],
)
def test_whatever_it_does_there_is_a_typed_error_on_time(how: str, kind: ToolErrorKind, told: str) -> None:
    toolbox = Toolbox([misbehave])
    assert toolbox.call("misbehave", {"how": "nothing"}).ok, "a process is ready"
    start = time.monotonic()
    result = toolbox.call("misbehave", {"how": how})
    assert time.monotonic() - start < LIMIT + 30, "the machine may be late, but not by as long as it would hang"
    assert result.error is kind
    assert told in result.content
    assert toolbox.call("misbehave", {"how": "nothing"}).ok


def state_of(pid: int) -> str:
    """The process's state as /proc has it; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def gone(pid: int, within: float = 30.0) -> bool:
    """Whether the process ends within so many seconds."""
    deadline = time.monotonic() + within
    while state_of(pid) not in "XZ":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_end_of_a_tool_is_the_end_of_all_that_it_started() -> None:
    toolbox = Toolbox([misbehave])
    left = int(toolbox.call("misbehave", {"how": "leave a process behind"}).content)
    worker = int(toolbox.call("misbehave", {"how": "nothing"}).content)
    assert toolbox.call("misbehave", {"how": "sleep"}).error is ToolErrorKind.TIMEOUT
    assert gone(worker)
    assert gone(left)


def test_a_tool_that_forks_answers_once() -> None:
    toolbox = Toolbox([misbehave])
    for _ in range(3):
        assert toolbox.call("misbehave", {"how": "fork"}).content == "parent"


def test_processes_are_used_again() -> None:
    toolbox = Toolbox([misbehave])
    pids = {toolbox.call("misbehave", {"how": "nothing"}).content for _ in range(5)}
    assert len(pids) == 1
    toolbox.close()
    assert Toolbox([misbehave]).call("misbehave", {"how": "nothing"}).content in pids
    assert str(os.getpid()) not in pids


def test_an_idle_process_that_dies_is_replaced() -> None:
    toolbox = Toolbox([misbehave])
    pid = int(toolbox.call("misbehave", {"how": "nothing"}).content)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert toolbox.call("misbehave", {"how": "nothing"}).ok


class Counter:
    def __init__(self) -> None:
        self.count = OFFSET


@tool(isolation="process", timeout_s=LIMIT, state=Counter)
def count(step: int, state: Counter) -> list[int]:
    """Counts.

    Args:
        step: 0 hangs.
    """
    while step == 0:
        pass
    state.count += step
    return [state.count, os.getpid()]


def test_state_lives_in_the_process_for_one_episode() -> None:
    first, second = Toolbox([count]), Toolbox([count])
    assert json.loads(first.call("count", {"step": 1}).content)[0] == OFFSET + 1
    assert json.loads(second.call("count", {"step": 5}).content)[0] == OFFSET + 5
    number, pid = json.loads(first.call("count", {"step": 1}).content)
    assert number == OFFSET + 2
    first.reset()
    assert json.loads(first.call("count", {"step": 1}).content) == [OFFSET + 1, pid], "a new state, the same process"
    lost = first.call("count", {"step": 0})
    assert lost.error is ToolErrorKind.TIMEOUT
    assert "its state is lost" in lost.content
    assert json.loads(first.call("count", {"step": 1}).content)[0] == OFFSET + 1
    first.close()
    second.close()


def test_a_function_that_cannot_be_copied_is_refused_before_the_first_call() -> None:
    lock = threading.Lock()
    stuck = Tool(
        name="stuck",
        description="Holds a lock.",
        parameters={"type": "object"},
        function=lambda: lock.locked(),
        isolation="process",
    )
    with pytest.raises(ValueError, match=r"'stuck' cannot be copied into a process .* give it isolation='thread'"):
        Toolbox([stuck])


def work() -> int:
    return os.getpid()


def in_process() -> Tool:
    return Tool(name="w", description="W.", parameters={"type": "object"}, function=work, isolation="process")


def test_a_process_that_cannot_start_is_not_the_students_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    toolbox = Toolbox([in_process()])
    for executable in ("/no/such/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        result = toolbox.call("w", {})
        assert result.error is ToolErrorKind.SANDBOX
        assert "the tool's process did not start" in result.content
    monkeypatch.undo()
    assert toolbox.call("w", {}).ok


def test_a_process_ends_with_the_last_reference_to_its_tool() -> None:
    toolbox = Toolbox([in_process()])
    pid = int(toolbox.call("w", {}).content)
    assert not gone(pid, within=0.1)
    del toolbox
    gc.collect()
    assert gone(pid)


def test_a_fork_of_the_parent_leaves_the_processes_alone() -> None:
    toolbox = Toolbox([in_process()])
    pid = toolbox.call("w", {}).content
    child = os.fork()
    if child == 0:
        try:
            del toolbox
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert toolbox.call("w", {}).content == pid


def test_a_script_without_a_main_guard_may_define_such_a_tool(tmp_path: Path) -> None:
    program = tmp_path / "script.py"
    program.write_text(
        "from opd_env.tools import Tool, Toolbox\n"
        "print('once')\n"
        "two = 2\n"
        "def double(n): return n * two\n"
        "schema = {'type': 'object', 'properties': {'n': {'type': 'integer'}}}\n"
        "tool = Tool(name='d', description='D.', parameters=schema, function=double, isolation='process')\n"
        "print(Toolbox([tool]).call('d', {'n': 21}).content)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, env=environment)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("once\n42\n", "", 0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_process_ends_when_its_parent_is_killed_idle_or_hanging(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import os, sys, time\n"
        "from opd_env.tools import Tool, Toolbox\n"
        "schema = {'type': 'object', 'properties': {'hang': {'type': 'boolean'}}}\n"
        "def work(hang):\n"
        "    while hang: time.sleep(0.01)\n"
        "    return os.getpid()\n"
        "tool = Tool(name='w', description='W.', parameters=schema, function=work, timeout_s=1.0,\n"
        "            isolation='process')\n"
        "toolbox = Toolbox([tool])\n"
        "print(toolbox.call('w', {'hang': False}).content, flush=True)\n"
        "toolbox.call('w', {'hang': sys.argv[1] == 'hanging'})\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for when in ("idle", "hanging"):
        parent = subprocess.Popen([sys.executable, program, when], stdout=subprocess.PIPE, text=True, env=environment)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert gone(pid), when
