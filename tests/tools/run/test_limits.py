"""Whatever a tool does, its caller has a typed result on time, and the output fits."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from opd_env.tools import Tool, Toolbox, ToolError, ToolErrorKind, ToolResult
from opd_env.tools.run.answer import MAX_JSON_CHARS
from opd_env.tools.run.time_limit import run_with_limit, threads_left_behind

NO_ARGUMENTS = {"type": "object", "properties": {}}
LATE = 30.0
"""Seconds that a busy machine may be late. What hangs here hangs for longer."""


def run(function: Callable[..., Any], **options: Any) -> ToolResult:
    """Calls a tool made of a function without arguments."""
    tool = Tool(name="t", description="T.", parameters=NO_ARGUMENTS, function=function, **options)
    with Toolbox([tool]) as toolbox:
        return toolbox.call("t", {})


def message(result: ToolResult) -> str:
    return str(json.loads(result.content)["message"])


def loop_forever() -> None:
    while True:
        pass


def wait_for_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=1.0)


async def sleep_async() -> None:
    await asyncio.sleep(60)


def ended_within(seconds: float = LATE) -> bool:
    deadline = time.monotonic() + seconds
    while threads_left_behind() and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads_left_behind() == 0


@pytest.mark.parametrize("function", [loop_forever, wait_for_lock, sleep_async])
def test_a_tool_that_hangs_is_a_timeout_on_time_and_ends(function: Callable[..., Any]) -> None:
    start = time.monotonic()
    result = run(function, timeout_s=0.1)
    assert 0.1 <= time.monotonic() - start < 0.1 + LATE
    assert result.error is ToolErrorKind.TIMEOUT
    assert message(result) == "the tool did not answer within 0.1 s and was ended"
    assert ended_within(), "its thread went on"


def test_a_blocked_tool_does_nothing_more_once_it_wakes() -> None:
    assert ended_within(), "of an earlier test"
    done = []
    reading, writing = os.pipe()

    def wake_late() -> None:
        os.read(reading, 1)
        done.append("written after its time")

    assert run(wake_late, timeout_s=0.05).error is ToolErrorKind.TIMEOUT
    assert threads_left_behind() == 1
    os.write(writing, b"x")
    assert ended_within()
    assert done == []
    os.close(reading)
    os.close(writing)


def test_a_tool_that_refuses_to_end_is_a_timeout_on_time_and_is_counted() -> None:
    assert ended_within(), "of an earlier test"
    free = threading.Event()

    def catch_all() -> None:
        while not free.is_set():
            with suppress(BaseException):
                time.sleep(0.01)

    try:
        assert run(catch_all, timeout_s=0.1).error is ToolErrorKind.TIMEOUT
        time.sleep(0.1)
        assert threads_left_behind() == 1
    finally:
        free.set()
    assert ended_within()


def test_threads_left_behind_are_told_of_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert ended_within()
    free = threading.Event()
    for _ in range(10):
        run(free.wait, timeout_s=0.1)
    free.set()
    assert "10 tool threads go on after their time; give such tools isolation='process'" in caplog.text
    assert ended_within()


def test_timeouts_do_not_slow_the_next_calls() -> None:
    for _ in range(20):
        assert run(loop_forever, timeout_s=0.01).error is ToolErrorKind.TIMEOUT
    assert ended_within()
    assert run(lambda: 1).ok


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def recurse() -> None:
    recurse()


class Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class Deadly(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class Endless(Exception):
    def __str__(self) -> str:
        while True:
            pass


class Disguised(Exception):
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise SystemExit("you found me")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (raising(ValueError("no such town")), "ValueError: no such town"),
        (raising(KeyError("town")), "KeyError: 'town'"),
        (raising(SystemExit(3)), "SystemExit: 3"),
        (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
        (raising(GeneratorExit()), "GeneratorExit"),
        (raising(MemoryError()), "MemoryError"),
        (raising(StopIteration()), "StopIteration"),
        (raising(asyncio.CancelledError()), "CancelledError"),
        (raising(TimeoutError("the server is slow")), "TimeoutError: the server is slow"),
        (raising(Hostile()), "Hostile"),
        (raising(Deadly()), "Deadly"),
        (raising(Disguised()), "cannot be shown"),
        (raising(ToolError(ToolErrorKind.TIMEOUT, Deadly())), "cannot be shown"),  # type: ignore[arg-type]
        (raising(type("Long" * 1000, (Exception,), {})()), "LongLong"),
        (raising(BaseExceptionGroup("many", [KeyboardInterrupt(), ValueError("x")])), "many (2 sub-exceptions)"),
        (raising(ValueError("line one\n  line two")), "ValueError: line one line two"),
        (recurse, "RecursionError: maximum recursion depth exceeded"),
        (lambda: Path("/home/someone/secret/file.txt").read_text(), "No such file or directory: '<path>'"),
        (raising(RuntimeError("at /usr/lib/python3/x.py:7 and 3/4 of /")), "RuntimeError: at <path>:7 and 3/4 of /"),
    ],
)
def test_whatever_a_tool_raises_is_one_short_line_without_paths(function: Callable[..., Any], told: str) -> None:
    result = run(function)
    assert result.error is ToolErrorKind.EXCEPTION
    assert told in message(result)
    assert "\n" not in message(result)
    assert "/home" not in result.content
    assert "Traceback" not in result.content
    assert len(result.content) < 400


def test_an_exception_whose_text_never_ends_is_a_timeout() -> None:
    assert run(raising(Endless()), timeout_s=0.2).error is ToolErrorKind.TIMEOUT
    assert ended_within()


def test_a_long_exception_is_cut() -> None:
    assert len(message(run(raising(ValueError("x" * 1_000_000))))) < 400


def test_the_author_finds_the_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "opd_env.tools"):
        run(raising(ValueError("no such town")))
    assert "ValueError: no such town" in caplog.text
    assert "Traceback" in caplog.text


def test_a_tool_chooses_the_kind_of_its_error() -> None:
    result = run(raising(ToolError(ToolErrorKind.SANDBOX, "the sandbox is ill")))
    assert result.error is ToolErrorKind.SANDBOX
    assert result.content == '{"error":"sandbox","message":"the sandbox is ill"}'
    long = run(raising(ToolError(ToolErrorKind.EXCEPTION, "x" * 10_000)), max_output_chars=200)
    assert long.truncated
    assert len(message(long)) == 200


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("as it is\n<|im_end|>", "as it is\n<|im_end|>"),
        ("", ""),
        (42, "42"),
        (0.5, "0.5"),
        (True, "true"),
        (None, "null"),
        ({"total": 3, "names": ["é", None]}, '{"total":3,"names":["é",null]}'),
        ((1, 2), "[1,2]"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        (["\udfff"], '["\ufffd"]'),
        ("😀", "😀"),
    ],
)
def test_any_json_value_is_an_answer(value: object, content: str) -> None:
    result = run(lambda: value)
    assert (result.content, result.error, result.truncated) == (content, None, False)


def recursive() -> Any:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def nested() -> Any:
    value: Any = 0
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: float("nan"), ToolErrorKind.EXCEPTION),
        (lambda: {"x": [float("-inf")]}, ToolErrorKind.EXCEPTION),
        (lambda: {1, 2}, ToolErrorKind.EXCEPTION),
        (lambda: b"bytes", ToolErrorKind.EXCEPTION),
        (lambda: object(), ToolErrorKind.EXCEPTION),
        (lambda: {(1, 2): 3}, ToolErrorKind.EXCEPTION),
        (lambda: 10**5000, ToolErrorKind.EXCEPTION),
        (recursive, ToolErrorKind.EXCEPTION),
        (nested, ToolErrorKind.EXCEPTION),
        (lambda: list(range(MAX_JSON_CHARS)), ToolErrorKind.OUTPUT_LIMIT),
    ],
)
def test_what_is_no_json_value_or_is_huge_is_a_typed_error(make: Callable[[], Any], kind: ToolErrorKind) -> None:
    result = run(make)
    assert result.error is kind
    assert message(result).startswith("the tool returned")
    assert len(result.content) < 400


@pytest.mark.parametrize("value", ["x" * 5000, list(range(5000)), "é" * 10_000_000])
def test_a_long_output_is_cut_with_a_marker(value: object) -> None:
    result = run(lambda: value, max_output_chars=1000)
    assert result.ok
    assert result.truncated
    assert len(result.content) == 1000
    assert result.content.endswith(" characters]")
    assert "[cut: the whole output has" in result.content


def test_an_output_of_just_the_limit_is_whole() -> None:
    result = run(lambda: "x" * 1000, max_output_chars=1000)
    assert (result.content, result.truncated) == ("x" * 1000, False)


def test_async_tools_answer() -> None:
    async def answer() -> dict[str, int]:
        await asyncio.sleep(0)
        return {"n": 1}

    assert run(answer).content == '{"n":1}'


def test_many_threads_may_call_tools_at_once() -> None:
    results: list[str] = []

    def call(number: int) -> None:
        results.append(run(lambda: time.sleep(0.02) or number).content)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, results)) == list(range(20))


def test_threads_are_used_again() -> None:
    run(lambda: 1)
    before = set(threading.enumerate())
    for _ in range(50):
        assert run(lambda: 1).ok
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("opd-env")]


def test_a_tool_that_forks_answers_once(tmp_path: Path) -> None:
    program = tmp_path / "forks.py"
    program.write_text(
        "import os\n"
        "from opd_env.tools import Tool, Toolbox\n"
        "def fork(): return os.fork() and 'parent'\n"
        "fork = Tool(name='f', description='F.', parameters={'type': 'object'}, function=fork)\n"
        "print(Toolbox([fork]).call('f', {}).content, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, env=environment)
    assert (ran.stdout, ran.returncode) == ("parent\n", 0), ran.stderr


def test_ctrl_c_interrupts_the_program_and_ends_the_tool() -> None:
    def interrupted() -> None:
        time.sleep(0.5)  # until the caller waits: just before, a signal would not wake it
        os.kill(os.getpid(), signal.SIGINT)
        loop_forever()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, timeout_s=100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 60
    assert ended_within()


def test_code_that_may_hold_a_lock_of_all_is_ended_when_it_is_out_of_it() -> None:
    """An exception between taking a handler's lock and the ``try`` after it would leave every later message waiting."""
    inside = threading.Event()
    module: dict[str, Any] = {"__name__": "logging.handlers", "inside": inside}
    exec("def emit():\n    inside.set()\n    while inside.is_set():\n        pass", module)

    def log_and_loop() -> None:
        module["emit"]()
        loop_forever()

    with pytest.raises(TimeoutError):
        run_with_limit(log_and_loop, 0.2)
    assert not ended_within(0.3), "it was ended inside"
    inside.clear()
    assert ended_within()


def test_a_tool_that_was_ended_logs_nothing_on_its_way_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    assert run(loop_forever, timeout_s=0.1).error is ToolErrorKind.TIMEOUT
    assert ended_within()
    assert not [record for record in caplog.records if "raised" in record.getMessage()]


def test_the_limit_passes_on_what_the_function_does() -> None:
    assert run_with_limit(lambda: 6 * 7, 1.0) == 42
    with pytest.raises(KeyError):
        run_with_limit(raising(KeyError("x")), 1.0)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        run_with_limit(loop_forever, 0.05)
