"""What a tool's author may ask for beside the function: injected values, async code, retries, turns."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Any

import pytest

from opd_env.tools import Injected, Tool, Toolbox, ToolErrorKind, tool
from opd_env.tools.run import process

NO_ARGUMENTS = {"type": "object", "properties": {}}
LATE = 30.0
"""Seconds that a busy machine may be late. What hangs here hangs for longer."""


@pytest.fixture(autouse=True, scope="module")
def _no_processes_left() -> Iterator[None]:
    yield
    process._idle.clear()


def plain(function: Any, **options: Any) -> Tool:
    return Tool(name="t", description="T.", parameters=NO_ARGUMENTS, function=function, **options)


class Connection:
    """Something that must be opened and closed in one event loop."""

    log: list[str] = []

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[int] = asyncio.Queue()
        self.background = self.loop.create_task(self.fill())

    async def fill(self) -> None:
        for number in range(100):
            await self.queue.put(number)
            await asyncio.sleep(0)

    async def close(self) -> None:
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("another loop")
        Connection.log.append("closed")


async def connect() -> Connection:
    await asyncio.sleep(0)
    return Connection()


@tool(timeout_s=0.5)
async def take(wait_s: float, connection: Annotated[Connection, Injected(connect)]) -> int:
    """Takes the next number.

    Args:
        wait_s: seconds to wait before.
    """
    await asyncio.sleep(wait_s)
    return await connection.queue.get()


@pytest.fixture(autouse=True)
def _nothing_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "log", [])


def test_injected_values_are_hidden_made_once_an_episode_and_closed_in_their_event_loop() -> None:
    assert list(take.parameters["properties"]) == ["wait_s"]
    with Toolbox([take]) as toolbox:
        assert [toolbox.call("take", {"wait_s": 0}).content for _ in range(3)] == ["0", "1", "2"]
        toolbox.reset()
        assert Connection.log == ["closed"]
        assert toolbox.call("take", {"wait_s": 0}).content == "0"
        refused = toolbox.call("take", {"wait_s": 0, "connection": 1})
        assert refused.error is ToolErrorKind.SCHEMA
    assert Connection.log == ["closed", "closed"]


def test_an_async_tool_that_waits_too_long_is_cancelled_and_the_next_call_starts_anew() -> None:
    with Toolbox([take]) as toolbox:
        assert toolbox.call("take", {"wait_s": 0}).content == "0"
        start = time.monotonic()
        late = toolbox.call("take", {"wait_s": 60})
        assert time.monotonic() - start < 0.5 + LATE
        assert late.error is ToolErrorKind.TIMEOUT
        assert "its state is lost" in late.content
        assert Connection.log == ["closed"]
        assert toolbox.call("take", {"wait_s": 0}).content == "0"


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_an_async_tool_that_blocks_its_loop_is_a_timeout_all_the_same(isolation: str) -> None:
    async def block() -> None:
        while True:
            pass

    with Toolbox([plain(block, timeout_s=0.3, isolation=isolation)]) as toolbox:
        start = time.monotonic()
        assert toolbox.call("t", {}).error is ToolErrorKind.TIMEOUT
        assert time.monotonic() - start < LATE


def test_tasks_that_an_async_tool_leaves_behind_end_with_its_episode() -> None:
    ended = threading.Event()

    async def leave() -> str:
        async def forever() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        task.set(asyncio.get_running_loop().create_task(forever()))
        await asyncio.sleep(0)
        return "left"

    task: contextvars.ContextVar[asyncio.Task[None]] = contextvars.ContextVar("task")
    toolbox = Toolbox([plain(leave)])
    assert toolbox.call("t", {}).content == "left"
    assert not ended.is_set()
    toolbox.close()
    assert ended.is_set()


def test_a_state_and_injected_values_live_side_by_side() -> None:
    @tool(state=list, injected={"offset": lambda: 40})
    def count(state: list[int], offset: int, log: Annotated[dict[str, int], Injected(dict)]) -> list[int]:
        """Counts."""
        state.append(1)
        log["calls"] = log.get("calls", 0) + 1
        return [offset + len(state), log["calls"]]

    assert count.parameters["properties"] == {}
    with Toolbox([count]) as toolbox:
        assert [toolbox.call("count", {}).content for _ in range(2)] == ["[41,1]", "[42,2]"]


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize(("failures", "answered", "retries"), [(0, True, 0), (2, True, 2), (3, False, 2)])
def test_errors_that_may_pass_are_tried_again_and_counted(
    failures: int, answered: bool, retries: int, isolation: str
) -> None:
    def flaky(state: list[int]) -> int:
        state.append(1)
        if len(state) <= failures:
            raise ConnectionResetError("try again")
        return len(state)

    unsteady = plain(flaky, state=list, retry_on=[ConnectionError], retries=2, isolation=isolation)
    with Toolbox([unsteady]) as toolbox:
        result = toolbox.call("t", {})
    assert (result.ok, result.retries) == (answered, retries)
    assert result.content == (str(failures + 1) if answered else json.dumps(
        {"error": "exception", "message": "ConnectionResetError: try again"}, separators=(",", ":")))  # fmt: skip


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def wrong() -> None:
        calls.append(1)
        raise ValueError("no")

    with Toolbox([plain(wrong, retry_on=[ConnectionError], retries=5)]) as toolbox:
        assert toolbox.call("t", {}).retries == 0
    assert calls == [1]


def test_retries_stay_within_the_time_limit() -> None:
    def down() -> None:
        raise ConnectionError("down")

    start = time.monotonic()
    with Toolbox([plain(down, retry_on=[ConnectionError], retries=1000, timeout_s=0.5)]) as toolbox:
        assert toolbox.call("t", {}).error is ToolErrorKind.TIMEOUT
    assert 0.5 <= time.monotonic() - start < 0.5 + LATE


def test_no_more_calls_run_at_once_than_a_tool_allows_and_waiting_costs_no_time_limit() -> None:
    running: list[int] = []
    most: list[int] = []

    def work() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.15)
        running.pop()

    limited = plain(work, max_concurrent=2, timeout_s=1.5)
    boxes = [Toolbox([limited]) for _ in range(24)]
    results: list[bool] = []
    threads = [threading.Thread(target=lambda box=box: results.append(box.call("t", {}).ok)) for box in boxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 24, "twelve rounds of 0.15 s, each within its 1.5 s"
    assert max(most) == 2


def test_a_call_that_hangs_gives_its_turn_back() -> None:
    def hang() -> None:
        while True:
            time.sleep(0.01)

    slow = plain(hang, max_concurrent=1, timeout_s=0.1)
    with Toolbox([slow]) as toolbox:
        assert [toolbox.call("t", {}).error for _ in range(3)] == [ToolErrorKind.TIMEOUT] * 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"retries": 2}, "retries=2 and retry_on=(), expected both or neither"),
        ({"retry_on": [ConnectionError]}, "expected both or neither"),
        ({"retry_on": ["ConnectionError"], "retries": 1}, "expected exception classes"),
        ({"retry_on": [KeyboardInterrupt], "retries": 1}, "expected exception classes"),
        ({"retries": -1, "retry_on": [OSError]}, "retries=-1"),
        ({"max_concurrent": 0}, "max_concurrent=0, expected a whole number of at least 1"),
        ({"secrets": "SHOP_KEY"}, "secrets='SHOP_KEY', expected names of environment variables"),
        ({"injected": {"client": 3}}, "client=3, expected a callable"),
        ({"injected": {"x": dict}, "parameters": {"type": "object", "properties": {"x": {}}}}, "name 'x', which the"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:
        Tool(**{"name": "t", "description": "T.", "parameters": NO_ARGUMENTS, "function": int, **options})
    assert told in str(caught.value)
