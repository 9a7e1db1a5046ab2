"""MCP servers that die, lie or flood: a typed error on time, no call repeated that must not be, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opd_env.tools import Toolbox, ToolErrorKind
from opd_env.tools.mcp.tools import MountedServer, mount_mcp

pytest.importorskip("mcp", reason="needs the extra mcp")
from opd_env.tools.mcp import connection

ROGUE = str(Path(__file__).with_name("mcp_rogue.py"))
LIMIT = 2.0


def mount(how: str, *arguments: object, **options: Any) -> MountedServer:
    options = {"timeout_s": LIMIT, **options}
    return mount_mcp([sys.executable, "-S", ROGUE, how, *map(str, arguments)], **options)


def children() -> set[int]:
    """Processes below this one."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(status.parent.name)] = int(parent)
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before, threads = children(), threading.active_count()
    yield
    deadline = time.monotonic() + 30
    while (left := children() - before) or threading.active_count() > threads + 2:
        assert time.monotonic() < deadline, (left, threading.enumerate())  # two: the event loop's, and one worker's
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("is silent", "did not start within 1 s"),
        ("writes garbage without end", "nothing but text that is no message"),
        ("writes a line without end", "a message of more than 8 MiB"),
        ("lists without end", "lists more than 1000 tools"),
        ("lists empty pages", "lists more than 1000 tools"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_on_time(how: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "START_TIMEOUT_S", 1.0 if how == "is silent" else 100.0)
    with pytest.raises(connection.MCPUnavailable, match=told):
        mount(how)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("refers to itself", "refer to themselves without end"),
        ("refers a billion times", "hold more than 100000 schemas"),
    ],
)
def test_a_schema_that_would_never_be_checked_is_refused_at_once(how: str, told: str) -> None:
    with pytest.raises(ValueError, match=rf"'look'.*{told}"):
        mount(how)


def test_text_that_is_no_message_is_passed_over() -> None:
    with mount("prints a banner") as server:
        assert Toolbox(list(server)).call("look", {}).ok


def test_a_pattern_is_left_to_the_server() -> None:
    with mount("") as server, Toolbox(list(server)) as toolbox:
        assert toolbox.call("look", {"how": "a" * 50 + "b"}).ok
        assert "pattern" not in json.dumps(toolbox.schemas)


def pid_of(toolbox: Toolbox) -> int:
    return int(toolbox.call("add", {}).content.split()[1])


@pytest.mark.parametrize("patience", [0.0, 0.3])
def test_a_call_that_finds_the_server_dead_is_answered_by_the_next(patience: float) -> None:
    with mount("") as server, Toolbox(list(server)) as toolbox:
        for _ in range(3):
            pid = pid_of(toolbox)
            os.kill(pid, signal.SIGKILL)
            while pid in children():
                time.sleep(0.001)
            time.sleep(patience)
            answer = toolbox.call("add", {})
            assert answer.ok, answer
            assert answer.retries <= 1
            assert str(pid) not in answer.content


@pytest.mark.parametrize("first", ["the call", "the end"])
def test_a_call_that_was_never_written_is_made_again_whether_it_or_the_servers_end_comes_first(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = connection._ToServer.send

    class Lines(asyncio.StreamReader):
        async def readline(self) -> bytes:
            line = await super().readline()
            await asyncio.sleep(0 if line or first == "the end" else 0.5)
            return line

    async def send_late(self: Any, item: Any) -> None:
        if item.message.method == "tools/call" and first == "the end":
            await asyncio.sleep(0.5)
        await send(self, item)

    monkeypatch.setattr(asyncio, "StreamReader", Lines)
    monkeypatch.setattr(connection._ToServer, "send", send_late)
    with mount("") as server, Toolbox(list(server)) as toolbox:
        pid = pid_of(toolbox)
        if first == "the end":
            threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()  # the call is on its way by then
        else:
            os.kill(pid, signal.SIGKILL)
            while pid in children():
                time.sleep(0.001)
        answer = toolbox.call("add", {})
        assert (answer.ok, answer.retries) == (True, 1), answer
        assert str(pid) not in answer.content


@pytest.mark.parametrize(("name", "retries", "calls"), [("look", 0, 2), ("put", 0, 2), ("add", 0, 1), ("add", 1, 2)])
def test_a_call_during_which_the_server_dies_is_repeated_only_where_that_is_said_to_do_no_harm(
    tmp_path: Path, name: str, retries: int, calls: int
) -> None:
    file = tmp_path / "calls"
    with mount("", file, retries=retries) as server, Toolbox(list(server)) as toolbox:
        result = toolbox.call(name, {"how": "die once"})
        assert file.read_text().splitlines() == [name] * calls
        assert (result.ok, result.retries) == ((True, 1) if calls == 2 else (False, 0))
        assert result.ok or result.error is ToolErrorKind.EXCEPTION
        assert toolbox.call(name, {}).ok


def test_a_server_that_dies_at_each_call_is_an_error_after_three(tmp_path: Path) -> None:
    with mount("", tmp_path / "calls") as server, Toolbox(list(server)) as toolbox:
        result = toolbox.call("look", {"how": "die"})
    assert (result.error, result.retries) == (ToolErrorKind.EXCEPTION, 2)
    assert len((tmp_path / "calls").read_text().splitlines()) == 3


def test_a_huge_answer_is_an_output_limit_and_the_next_call_works() -> None:
    with mount("") as server, Toolbox(list(server)) as toolbox:
        assert toolbox.call("look", {"how": "huge"}).error is ToolErrorKind.OUTPUT_LIMIT
        assert toolbox.call("look", {}).ok


def test_a_server_that_does_not_read_is_a_timeout_on_time() -> None:
    with mount("") as server, Toolbox(list(server)) as toolbox:
        threading.Thread(target=toolbox.call, args=("look", {"how": "stop reading"}), daemon=True).start()
        time.sleep(0.5)
        start = time.monotonic()
        with Toolbox(list(server)) as other:
            assert other.call("look", {"how": "x" * 1_000_000}).error is ToolErrorKind.TIMEOUT
        assert time.monotonic() - start < LIMIT + 30


def test_the_tools_are_those_of_when_the_server_was_mounted(tmp_path: Path) -> None:
    with mount("changes its list", tmp_path / "calls") as server, Toolbox(list(server)) as toolbox:
        assert toolbox.call("look", {}).ok
        assert [tool.name for tool in toolbox] == ["look", "put", "add"]
        assert toolbox.call("put", {"how": "x"}).ok


def test_what_a_server_started_ends_with_it() -> None:
    with mount("") as server:
        left = int(Toolbox(list(server)).call("add", {"how": "leave a process"}).content)
        assert left in children()
    assert left not in children()


def test_half_a_surrogate_pair_of_the_student_harms_nobody() -> None:
    with mount("") as server, Toolbox(list(server)) as toolbox:
        pid = pid_of(toolbox)
        assert toolbox.call("look", {"how": "\ud83d"}).ok
        assert pid_of(toolbox) == pid


def test_a_secret_in_what_is_no_message_is_not_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROGUE_KEY", "s3cret-key")
    with caplog.at_level(logging.DEBUG), mount("", secrets=["ROGUE_KEY"]) as server:
        assert Toolbox(list(server)).call("look", {"how": "secret in garbage"}).ok
    assert "s3cret" not in caplog.text


class Sessions(BaseHTTPRequestHandler):
    """A server over HTTP whose sessions end when told to."""

    protocol_version = "HTTP/1.1"
    sessions: set[str] = set()
    calls: list[str] = []
    how = ""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method, identity = request["method"], self.headers.get("Mcp-Session-Id")
        if method == "server/discover":
            return self.answer(200, request, error={"code": -32601, "message": "no such method"})
        if method == "initialize":
            identity = f"session{time.monotonic_ns()}"
            self.sessions.add(identity)
            capabilities = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}}
            info = {"serverInfo": {"name": "sessions", "version": "1"}}
            return self.answer(200, request, {**capabilities, **info}, identity)
        if identity not in self.sessions:
            return self.answer(404, request, error={"code": -32600, "message": f"no session {identity}"})
        if method == "tools/list":
            tools = [{"name": name, "inputSchema": {"type": "object", "properties": {}}} for name in ("add", "look")]
            tools[1]["annotations"] = {"readOnlyHint": True}
            return self.answer(200, request, {"tools": tools})
        if method == "tools/call":
            self.calls.append(request["params"]["name"])
            how, type(self).how = self.how, ""
            if how == "hang up":
                self.close_connection = True
                return self.connection.close()
            if how.startswith("huge"):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream" if how == "huge event" else "application/json")
                self.end_headers()
                try:
                    self.wfile.write(b"event: message\ndata: " if how == "huge event" else b"")
                    for _ in range(20):
                        self.wfile.write(b"x" * (1 << 20))
                except OSError:
                    pass
                self.close_connection = True
                return None
            return self.answer(200, request, {"content": [{"type": "text", "text": str(len(self.sessions))}]})
        return self.answer(202, request)

    def do_GET(self) -> None:
        self.answer(405, {})

    do_DELETE = do_GET

    def answer(self, status: int, request: Any, result: Any = None, session: str | None = None, **more: Any) -> None:
        body = b"" if status in (202, 405) else json.dumps(
            {"jsonrpc": "2.0", "id": request["id"], **({"result": result} if result else {}), **more}
        ).encode()  # fmt: skip
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if session:
            self.send_header("Mcp-Session-Id", session)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[Sessions], port: int = 0) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def http() -> Iterator[tuple[Toolbox, Callable[[str], None]]]:
    Sessions.sessions, Sessions.calls, Sessions.how = set(), [], ""
    with (
        serving(Sessions) as server,
        mount_mcp(f"http://127.0.0.1:{server.server_port}/mcp", timeout_s=LIMIT) as mounted,
    ):
        yield Toolbox(list(mounted)), lambda how: setattr(Sessions, "how", how)


def test_a_session_that_is_over_is_begun_anew_and_the_call_made_once(http: Any) -> None:
    toolbox, _ = http
    for _ in range(3):
        assert toolbox.call("add", {}).content == "1"
        Sessions.sessions.clear()
    assert toolbox.call("add", {}).retries == 1
    assert Sessions.calls == ["add"] * 4


def test_a_secret_in_a_header_is_not_logged_by_any_library(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROGUE_KEY", "s3cret-key")
    headers = {"Authorization": "Bearer {ROGUE_KEY}"}
    with caplog.at_level(logging.DEBUG), serving(Sessions) as server:
        address = f"http://127.0.0.1:{server.server_port}/mcp"
        with mount_mcp(address, headers=headers, secrets=["ROGUE_KEY"]) as mounted:
            assert Toolbox(list(mounted)).call("add", {}).ok
    assert "tools/call" in caplog.text, "something was logged"
    assert "s3cret" not in caplog.text


def test_over_http_too_a_call_that_was_lost_is_repeated_only_where_that_does_no_harm(http: Any) -> None:
    toolbox, next_call = http
    next_call("hang up")
    assert toolbox.call("add", {}).error is ToolErrorKind.EXCEPTION
    next_call("hang up")
    assert toolbox.call("look", {}).retries == 1
    assert Sessions.calls == ["add", "look", "look"]


def test_a_huge_event_over_http_is_lost_and_the_next_call_works(http: Any) -> None:
    toolbox, next_call = http
    next_call("huge event")
    assert "exceeded the 8388608 byte limit" in toolbox.call("add", {}).content
    assert toolbox.call("add", {}).ok
    assert Sessions.calls == ["add", "add"]


def test_a_huge_answer_over_http_is_an_output_limit(http: Any) -> None:
    toolbox, next_call = http
    next_call("huge")
    assert toolbox.call("look", {}).error is ToolErrorKind.OUTPUT_LIMIT
    assert toolbox.call("look", {}).ok


class OneRequestAConnection(Sessions):
    protocol_version = "HTTP/1.0"


def test_a_server_that_is_down_is_not_the_students_fault_and_may_come_back() -> None:
    with serving(OneRequestAConnection) as server:
        port = server.server_port
        mounted = mount_mcp(f"http://127.0.0.1:{port}/mcp", timeout_s=LIMIT)
    with mounted, Toolbox(list(mounted)) as toolbox:
        down = toolbox.call("add", {})
        assert down.error is ToolErrorKind.SANDBOX
        with serving(OneRequestAConnection, port):
            assert toolbox.call("add", {}).ok
