"""Tools in a cluster of two nodes behave as without it, and a worker or a node that dies loses no episode."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_env.engines.base import Request, ScriptedEngine
from opd_env.episode.rollouts import rollout
from opd_env.messages import assistant
from opd_env.tools import Toolbox, ToolErrorKind, tool
from tests.episode.test_rollouts import CHAT, Doubles
from tests.plugins.ray.ray_cluster import two_nodes

pytest.importorskip("ray", reason="needs the extra ray: make test-ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as cluster:
        yield cluster


@tool(isolation="process", timeout_s=1.0)
def work(how: str) -> list[int]:
    """Works.

    Args:
        how: what to do.
    """
    if how == "hang":
        time.sleep(60)
    if how == "die":
        os._exit(3)
    if how == "raise":
        raise ValueError("no")
    if how == "slow":
        time.sleep(0.3)
    return [os.getpid(), os.getppid()]


@tool(isolation="process", timeout_s=5.0, state=list, deterministic=True)
def count(step: int, state: list[int]) -> int:
    """Counts.

    Args:
        step: how far.
    """
    time.sleep(0.05)
    state.append(step)
    return sum(state)


def test_answers_errors_and_limits_are_those_of_a_process_and_the_next_call_works(cluster: Any) -> None:
    with Toolbox([work]) as toolbox:
        here = toolbox.call("work", {"how": "well"}).content
        assert str(os.getpid()) not in here
        start = time.monotonic()
        assert toolbox.call("work", {"how": "hang"}).error is ToolErrorKind.TIMEOUT
        assert time.monotonic() - start < 2
        died = toolbox.call("work", {"how": "die"})
        assert died.error is ToolErrorKind.EXCEPTION
        assert "exit code 3" in died.content
        assert "ValueError: no" in toolbox.call("work", {"how": "raise"}).content
        assert toolbox.call("work", {"how": "well"}).ok


def test_calls_at_one_time_are_spread_over_both_nodes(cluster: Any) -> None:
    workers: list[int] = []
    together = threading.Barrier(4)

    def call() -> None:
        with Toolbox([work]) as toolbox:
            together.wait()
            workers.append(eval(toolbox.call("work", {"how": "slow"}).content)[1])

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raylets = {Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] for pid in workers}
    assert len(raylets) == 2, "one for each node"


def test_state_lives_with_its_episode_and_survives_the_death_of_its_worker(cluster: Any) -> None:
    where = replace(count, function=lambda step, state: [state.append(step) or sum(state), os.getppid()])
    with Toolbox([where]) as toolbox:
        total, worker = eval(toolbox.call("count", {"step": 1}).content)
        assert eval(toolbox.call("count", {"step": 2}).content) == [3, worker]
        os.kill(worker, signal.SIGKILL)
        total, other = eval(toolbox.call("count", {"step": 3}).content)
        assert (total, other != worker) == (6, True)
        toolbox.reset()
        assert eval(toolbox.call("count", {"step": 1}).content) == [1, other]


def test_a_call_that_must_not_be_repeated_is_no_fault_of_the_student(cluster: Any) -> None:
    def die(how: str) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    for changes, told in (({"mutates_state": True}, "the worker of the tool died"), ({}, "3 workers of the tool died")):
        with Toolbox([replace(work, function=die, timeout_s=30.0, **changes)]) as toolbox:
            result = toolbox.call("work", {"how": ""})
            assert result.error is ToolErrorKind.SANDBOX
            assert told in result.content


def test_a_node_that_dies_amid_a_rollout_loses_no_episode(cluster: Any) -> None:
    turns = 8

    def respond(request: Request, turn: int) -> list[int]:
        name = "count" if request.episode % 2 else "work"
        arguments = '{"step": 1}' if request.episode % 2 else '{"how": "slow"}'
        text = f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>' if turn < turns else "6"
        return CHAT.render_assistant(assistant(text))

    (node,) = cluster.worker_nodes
    killer = threading.Timer(2.0, lambda: cluster.remove_node(node, allow_graceful=False))
    killer.start()
    result = rollout(
        Doubles(),
        ScriptedEngine(respond, CHAT.stop_token_ids),
        CHAT,
        indices=range(16),
        tools=[work, count],
        tool_workers=8,
    )
    killer.join()
    assert result.errors == []
    assert len(result.trajectories) == 16
    for one in result.trajectories:
        assert [call.error for call in one.calls] == [None] * turns
        if int(one.example_id) % 2:
            assert [call.output for call in one.calls] == [str(number + 1) for number in range(turns)]
    assert not cluster.worker_nodes


def test_an_address_without_a_cluster_is_refused() -> None:
    from opd_env.plugins.ray import RayUnavailable, connect_ray

    with pytest.raises(RayUnavailable, match="ray start --head"):
        connect_ray("127.0.0.1:1")
