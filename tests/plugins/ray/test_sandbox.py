"""Programs in a cluster of two nodes: the contract of the local sandbox, and what dies loses no episode."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd_env.engines.base import Request, ScriptedEngine
from opd_env.episode.rollouts import rollout
from opd_env.messages import assistant
from opd_env.plugins.ray import sandbox as ray_sandbox
from opd_env.plugins.ray.sandbox import RaySandbox
from opd_env.tools import Toolbox, ToolErrorKind, get_tool
from opd_env.tools.builtin.python import shared_sandbox
from opd_env.tools.sandbox import Limits, Sandbox, SandboxUnavailable, SessionEnded, Status, open_sandbox
from tests.episode.test_rollouts import CHAT, Doubles
from tests.plugins.ray.ray_cluster import two_nodes

ray = pytest.importorskip("ray", reason="needs the extra ray: make test-ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    try:
        open_sandbox().close()
    except SandboxUnavailable as error:
        pytest.skip(error.reason)
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def here() -> Iterator[Sandbox]:
    with open_sandbox() as sandbox:
        yield sandbox


@pytest.fixture(params=["here", "cluster"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, Sandbox) else shared_sandbox()


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("print(6 * 7)", Status.OK, "42\n"),
        ("import random; print(random.random())", Status.OK, "0.8444218515250481\n"),
        ("import numpy; print(numpy.arange(3).sum())", Status.OK, "3\n"),
        ("raise SystemExit(3)", Status.ERROR, ""),
        ("while True: pass", Status.TIMEOUT, ""),
        ("import os; os.abort()", Status.KILLED, ""),
        ("open('/etc/passwd')", Status.ERROR, None),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", Status.ERROR, None),
    ],
)
def test_a_program_ends_in_the_cluster_as_it_does_here(
    sandbox: Sandbox, code: str, status: Status, output: str | None
) -> None:
    result = sandbox.run(code, limits=Limits(wall_s=1.0))
    assert result.status is status
    assert output in (None, result.output)


def test_what_cannot_be_run_is_refused_in_the_same_words(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="at most 10 are accepted"):
        sandbox.run("print('too long')", limits=Limits(code_bytes=10))
    with pytest.raises(ValueError, match="plain file name"):
        sandbox.run("1", files={"../a": b""})


def test_files_go_into_the_folder_of_a_program_and_come_out(sandbox: Sandbox) -> None:
    if sandbox.level == "landlock":
        pytest.skip("landlock has no folder")
    assert sandbox.run("print(open('a.txt').read())", files={"a.txt": b"here"}).output == "here\n"
    assert sandbox.run("open('b.txt', 'w').write('there')", keep_files=True).files == {"b.txt": b"there"}
    with sandbox.session() as session:
        assert session.run("open('c.txt', 'w').write('1')", keep_files=True).files == {"c.txt": b"1"}


def test_a_session_keeps_its_variables_and_ends_with_a_cell_that_never_does(sandbox: Sandbox) -> None:
    with sandbox.session(limits=Limits(wall_s=1.0)) as session, sandbox.session() as other:
        session.run("x = 41")
        other.run("x = 1")
        assert session.run("x + 1").output == "42\n"
        assert session.run("while True: pass").status is Status.TIMEOUT
        assert not session.alive
        with pytest.raises(SessionEnded, match="open a new one"):
            session.run("x")
        assert other.run("x").output == "1\n"


def workers() -> list[int]:
    """Processes of this cluster that hold a sandbox."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = command.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text.startswith(b"ray::SandboxActor"):
            found.append(int(command.parent.name))
    return found


def kill_workers() -> None:
    for pid in workers():
        os.kill(pid, signal.SIGKILL)


def test_levels_are_known_by_node_and_programs_run_on_both(cluster: Any) -> None:
    sandbox = shared_sandbox()
    assert len(sandbox.nodes) == 2
    assert set(sandbox.nodes.values()) == {sandbox.level}
    with Toolbox(["python"]) as toolbox:
        assert toolbox.sandbox_levels() == {"python": str(sandbox.level)}
        assert list(toolbox.sandbox_nodes()) == list(sandbox.nodes)
    results: list[Status] = []
    threads = [
        threading.Thread(target=lambda: results.append(sandbox.run("import time; time.sleep(1)").status))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.4)
    assert sorted(place.calls for place in sandbox._places) == [1, 1]  # type: ignore[attr-defined]
    for thread in threads:
        thread.join()
    assert results == [Status.OK] * 2


def test_a_program_whose_worker_dies_is_run_on_another(cluster: Any) -> None:
    with Toolbox(["python"]) as toolbox:
        kill_workers()
        assert toolbox.call("python", {"code": "print(6 * 7)"}).content == "42\n"
        killer = threading.Timer(0.7, kill_workers)
        killer.start()
        slow = toolbox.call("python", {"code": "import time; time.sleep(2); print('done')"})
        killer.join()
        assert slow.content == "done\n"
    assert len(shared_sandbox().nodes) == 2, "they were opened again"


def test_a_session_whose_worker_dies_tells_that_its_state_is_gone_and_goes_on(cluster: Any) -> None:
    with Toolbox([get_tool("python", stateful=True)]) as toolbox:
        kill_workers()
        assert toolbox.call("python", {"code": "x = 41; x"}).content == "41\n", "nothing was lost with the first cell"
        kill_workers()
        lost = toolbox.call("python", {"code": "x"})
        assert lost.error is ToolErrorKind.EXCEPTION
        assert "all variables and imports are lost" in lost.content
        assert "NameError" in lost.content
        killer = threading.Timer(0.7, kill_workers)
        killer.start()
        again = toolbox.call("python", {"code": "import time; time.sleep(2); print('slept')"})
        killer.join()
        assert again.content == "slept\nThe session was ended: all variables and imports are lost. "
        assert toolbox.call("python", {"code": "7"}).content == "7\n"


def test_a_node_that_refuses_is_named_before_the_first_call(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(ray_sandbox.SandboxActor):
        def open(self) -> Any:
            return SandboxUnavailable("No kernel sandbox works here.", "Allow user namespaces.")

    monkeypatch.setattr(ray_sandbox, "SandboxActor", Refusing)
    with pytest.raises(
        SandboxUnavailable, match=r"Ray node [\d.]+ \(\w{8}\): No kernel sandbox.* Allow user namespaces"
    ):
        RaySandbox()


def test_workers_and_a_node_that_die_amid_a_rollout_lose_no_episode(cluster: Any) -> None:
    turns = 6

    def respond(request: Request, turn: int) -> list[int]:
        code = '{"code": "import time; time.sleep(0.2); print(6)"}'
        text = f'<tool_call>{{"name": "python", "arguments": {code}}}</tool_call>' if turn < turns else "6"
        return CHAT.render_assistant(assistant(text))

    (node,) = cluster.worker_nodes
    killers = [
        threading.Timer(1.0, kill_workers),
        threading.Timer(4.0, lambda: cluster.remove_node(node, allow_graceful=False)),
    ]
    for killer in killers:
        killer.start()
    engine = ScriptedEngine(respond, CHAT.stop_token_ids)
    result = rollout(Doubles(), engine, CHAT, indices=range(12), tools=["python"], tool_workers=6)
    for killer in killers:
        killer.join()
    assert result.errors == []
    assert [[call.output for call in one.calls] for one in result.trajectories] == [["6\n"] * turns] * 12
    deadline = time.monotonic() + 30
    while len(shared_sandbox().nodes) > 1 and time.monotonic() < deadline:
        shared_sandbox().run("1")
    assert len(shared_sandbox().nodes) == 1


def test_nothing_is_left_of_the_sandboxes_when_they_are_closed(cluster: Any) -> None:
    shared_sandbox().close()
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers() == []
