"""Tools in processes of a Ray cluster: ``pip install 'opd-env[ray]'``.

Worked example::

    connect_ray("auto")                        # or "ray://head:10001", or ray_address: … in a settings file
    Toolbox([tool(isolation="process")(simulate)]).call("simulate", {"steps": 5})      # runs somewhere in the cluster

From then on, each tool with ``isolation="process"`` runs in the same child processes as without Ray, with the same
limits and errors, but each behind an actor, which Ray puts on the nodes in turn. The nodes need the same Python
environment. Values of a tool's ``secrets`` are sent to its actors. Programs of the ``python`` tool run in the kernel
sandboxes of the nodes (``opd_env.plugins.ray.sandbox``).

An actor or a node that dies loses no episode: the call is made again elsewhere, after the earlier calls of the
episode where the tool has state. That needs a tool that may be called again: one that has no state and no
``mutates_state``, or is ``deterministic``. Of any other the call is an error of kind ``sandbox``.

Actors take no CPUs of Ray's account, since most tools wait more than they compute: the number of calls at one time is
bounded by ``tool_workers`` of the rollout and ``max_concurrent`` of the tool.

Test it alone: ``make test-ray``
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from opd_env.errors import UserError
from opd_env.plugins.ray.sandbox import RaySandbox
from opd_env.tools.builtin.python import run_programs_by
from opd_env.tools.contract import Tool
from opd_env.tools.redaction import secret_values
from opd_env.tools.run.answer import Answer
from opd_env.tools.run.process import START_TIMEOUT_S, ProcessRunner, copy_of, run_processes_by
from opd_env.tools.run.thread import CLOSE_TIMEOUT_S
from opd_env.tools.tool_error import ToolError, ToolErrorKind

_ATTEMPTS = 3
"""Actors that a call is given one after the other, if they die."""


class RayUnavailable(UserError):
    """The cluster cannot be reached, or the extra is not installed."""


def connect_ray(address: str) -> None:
    """Runs the processes of all tools in a Ray cluster, until the end of this program.

    Args:
        address: of the cluster, as ``ray.init`` takes it: ``"auto"``, ``"host:port"`` or ``"ray://host:port"``.

    Raises:
        RayUnavailable: ``ray`` is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise RayUnavailable("tools in a cluster need the package ray: pip install 'opd-env[ray]'") from error
    try:
        if found := re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address):
            socket.create_connection((found[1], int(found[2])), timeout=10).close()  # Ray would try for minutes
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="warning")
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise RayUnavailable(f"no Ray cluster at {address!r} ({error}); start one with: ray start --head") from error
    run_processes_by(RayRunner)
    run_programs_by(RaySandbox)


class RayRunner:
    """Runs a tool behind actors. One with state keeps its actor for the whole episode."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._actor: Any = None
        self._calls: list[Mapping[str, Any]] = []

    def call(self, arguments: Mapping[str, Any]) -> Answer:
        """Where no actor can work it is a ToolError of kind ``sandbox``."""
        import ray

        repeatable = self._tool.deterministic or not (self._tool.injected or self._tool.mutates_state)
        for _ in range(_ATTEMPTS):
            actor, replay = self._actor, []
            if actor is None:
                actor, replay = _take(self._tool), self._calls
            self._actor = None
            try:
                for earlier in replay:
                    _ask(actor.call.remote(earlier), self._tool)
                reply = _ask(actor.call.remote(arguments), self._tool)
            except ray.exceptions.RayActorError:
                if repeatable:
                    continue
                raise ToolError(ToolErrorKind.SANDBOX, "the worker of the tool died") from None
            if self._tool.injected:
                self._actor = actor
                # After a time-out or the death of its process the state is given up.
                self._calls = [*self._calls, arguments] if isinstance(reply, Answer) else []
            else:
                _give_back(self._tool, actor)
            if reply is None:
                raise TimeoutError(f"no answer within {self._tool.timeout_s:g} s")
            if isinstance(reply, ToolError):
                raise reply
            return reply
        raise ToolError(ToolErrorKind.SANDBOX, f"{_ATTEMPTS} workers of the tool died")

    def end_episode(self) -> None:
        import ray

        actor, self._actor, self._calls = self._actor, None, []
        if actor is None:
            return
        try:
            ray.get(actor.end_episode.remote(), timeout=2 * CLOSE_TIMEOUT_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return  # it is gone, or let go here and ended by Ray
        _give_back(self._tool, actor)


class ToolActor:
    """The runner of a tool on some node."""

    def __init__(self, tool: bytes, secrets: Mapping[str, str], path: Sequence[str]) -> None:
        os.environ.update(secrets)
        sys.path += [folder for folder in path if folder not in sys.path]
        self._runner = ProcessRunner(pickle.loads(tool))

    def call(self, arguments: Mapping[str, Any]) -> Answer | ToolError | None:
        """What the call gave; None when its time was up."""
        try:
            return self._runner.call(arguments)
        except TimeoutError:
            return None
        except ToolError as error:
            return error

    def end_episode(self) -> None:
        self._runner.end_episode()


_idle: WeakKeyDictionary[Tool, list[Any]] = WeakKeyDictionary()
_turn = itertools.count()


def _take(tool: Tool) -> Any:
    import ray
    import ray.util.scheduling_strategies

    waiting = _idle.get(tool, [])
    while waiting:
        actor = waiting.pop()
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(actor.__ray_ready__.remote(), timeout=START_TIMEOUT_S)  # it may have died since
            return actor
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    # Ray's own strategy spreads by CPUs taken, of which these take none.
    place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(nodes[next(_turn) % len(nodes)], soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=place)(ToolActor)
    return actor.remote(copy_of(tool), secret_values(tool.secrets, f"tool {tool.name!r}"), sys.path)


def _give_back(tool: Tool, actor: Any) -> None:
    _idle.setdefault(tool, []).append(actor)


def _ask(reference: Any, tool: Tool) -> Answer | ToolError | None:
    import ray

    limit_s = tool.timeout_s + 2 * START_TIMEOUT_S
    try:
        reply: Answer | ToolError | None = ray.get(reference, timeout=limit_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ToolError(ToolErrorKind.SANDBOX, f"the cluster gave no answer within {limit_s:g} s") from error
    return reply
