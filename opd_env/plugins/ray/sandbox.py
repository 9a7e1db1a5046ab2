"""The code sandbox on the nodes of a Ray cluster, behind the interface of any other.

Worked example::

    connect_ray("auto")                                             # see opd_env.plugins.ray.workers
    Toolbox(["python"]).call("python", {"code": "print(6 * 7)"})    # runs in the kernel sandbox of some node

One actor on each node opens a sandbox there and keeps it. Where a node refuses, opening fails and says which node and
why: a run never begins with nodes that cannot do their part. ``level`` is the weakest of all nodes.

An actor or node that dies loses no episode. A program, and the first cell of a session, is run again on another node:
nothing of it can have had an effect. A later cell raises ``SessionEnded``, as it does after a time-out: the variables
are gone, and the ``python`` tool tells the student so and goes on in a new session.

Test it alone: ``make test-ray``
"""

from __future__ import annotations

import logging
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_env.tools.sandbox import (
    ExecResult,
    Level,
    Limits,
    Sandbox,
    SandboxUnavailable,
    Session,
    SessionEnded,
    open_sandbox,
)
from opd_env.tools.sandbox.base import Program, sandbox_failure

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0
"""Seconds that the sandbox of a node may take to open, and a call to wait for its turn there."""
_ATTEMPTS = 3
"""Nodes that a program is given one after the other, if they die."""
_AT_ONE_TIME = 64
"""Calls that wait or run in one actor; how many run is for its sandbox to say."""
_FAILED = sandbox_failure(f"no node of the Ray cluster could run it, in {_ATTEMPTS} attempts; see `ray status`")


@dataclass(eq=False)
class _Place:
    """A node with its actor."""

    node: str
    name: str
    actor: Any
    level: Level = Level.NONE
    calls: int = 0


class RaySandbox(Sandbox):
    """Runs programs on all nodes of the cluster that ``ray.init`` has connected to.

    Args:
        limits: default limits of a call.

    Raises:
        SandboxUnavailable: a node refuses; which one, and why.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits, _AT_ONE_TIME)
        self._lock = threading.Lock()
        self._places: list[_Place] = []
        refusals = self._open_missing()
        if refusals or not self._places:
            self.close()
            name, refusal = next(iter(refusals.items()), ("all", SandboxUnavailable("No node is alive.", "Start one.")))
            raise SandboxUnavailable(f"Ray node {name}: {refusal.reason}", refusal.how_to_fix)

    def _open_missing(self) -> dict[str, SandboxUnavailable]:
        """Opens a sandbox on each node that has none; the refusals by node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        refusals: dict[str, SandboxUnavailable] = {}
        with self._lock:
            known = {place.node for place in self._places}
            opening = []
            for node in ray.nodes():
                if node["Alive"] and node["NodeID"] not in known:
                    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    options = {"max_concurrency": _AT_ONE_TIME, "scheduling_strategy": there}
                    actor = ray.remote(num_cpus=0, max_restarts=0, **options)(SandboxActor).remote(sys.path)
                    name = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
                    opening.append((_Place(node["NodeID"], name, actor), actor.open.remote()))
            for place, answer in opening:
                try:
                    found = ray.get(answer, timeout=START_TIMEOUT_S)
                except (ray.exceptions.RayError, TimeoutError) as error:
                    found = SandboxUnavailable(f"It did not start ({type(error).__name__}).", "See its logs.")
                if isinstance(found, SandboxUnavailable):
                    refusals[place.name] = found
                else:
                    place.level = found
                    self._places.append(place)
                    logger.info("code sandbox on Ray node %s: level %s", place.name, found)
        return refusals

    @property
    def level(self) -> Level:
        """The weakest level of all nodes."""
        with self._lock:
            return max((place.level for place in self._places), key=list(Level).index, default=Level.NONE)

    @property
    def nodes(self) -> Mapping[str, Level]:
        with self._lock:
            return {place.name: place.level for place in self._places}

    def execute(self, program: Program) -> ExecResult:
        for _ in range(_ATTEMPTS):
            place = self.choose()
            if place is None:
                break
            try:
                result: ExecResult = self.ask(place, "execute", program)
            except PlaceLost:
                continue
            return result
        return _FAILED

    def open_session(self, limits: Limits, seed: int) -> Session:
        return _RaySession(self, limits, seed)

    def choose(self) -> _Place | None:
        """The node with the fewest calls; None if there is none left."""
        with self._lock:
            return min(self._places, key=lambda place: place.calls, default=None)

    def ask(self, place: _Place, method: str, *arguments: Any) -> Any:
        """What a method of a node's actor answers.

        Raises:
            PlaceLost: the actor has died; it is replaced if its node is still there.
        """
        import ray

        with self._lock:
            place.calls += 1
        try:
            return ray.get(getattr(place.actor, method).remote(*arguments), timeout=START_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            ray.kill(place.actor)  # it may only be late
            with self._lock:
                if place in self._places:
                    self._places.remove(place)
            for name, refusal in self._open_missing().items():
                logger.warning("Ray node %s goes on without a sandbox: %s", name, refusal)
            raise PlaceLost(place.name) from error
        finally:
            with self._lock:
                place.calls -= 1

    def close(self) -> None:
        import ray

        with self._lock:
            places, self._places = self._places, []
        if ray.is_initialized():
            for place in places:
                ray.kill(place.actor)
        self._threads.shutdown(wait=False)


class PlaceLost(RuntimeError):
    """The actor of a node has died."""


class _RaySession(Session):
    """A session on the node that answered its first cell."""

    def __init__(self, sandbox: RaySandbox, limits: Limits, seed: int) -> None:
        self._sandbox = sandbox
        self._ask_for = (uuid.uuid4().hex, limits, seed)
        self._place: _Place | None = None
        self._ended = False
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return not self._ended

    def run(self, cell: str, *, keep_files: bool = False) -> ExecResult:
        with self._lock:
            for _ in range(_ATTEMPTS):
                place = self._place or self._sandbox.choose()
                if self._ended or place is None:
                    break
                try:
                    answer = self._sandbox.ask(place, "run_cell", *self._ask_for, cell, keep_files)
                except PlaceLost:
                    self._ended = self._place is not None
                    continue
                self._place = place
                result, self._ended = answer
                if result is None:
                    break
                return result  # type: ignore[no-any-return]
            if self._ended:
                raise SessionEnded
            self._ended = True
            return _FAILED

    def close(self) -> None:
        import ray

        with self._lock:
            self._ended = True
            place, self._place = self._place, None
        if place is not None and ray.is_initialized():
            place.actor.end.remote(self._ask_for[0])


class SandboxActor:
    """On each node: a sandbox, and the sessions in it."""

    def __init__(self, path: Sequence[str]) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        self._sandbox: Sandbox | None = None
        self._sessions: dict[str, Session] = {}

    def open(self) -> Level | SandboxUnavailable:
        """The level of the sandbox that was opened, or why there is none."""
        try:
            self._sandbox = open_sandbox()
        except SandboxUnavailable as error:
            return error
        return self._sandbox.level

    def execute(self, program: Program) -> ExecResult:
        return self._opened.execute(program)

    def run_cell(
        self, key: str, limits: Limits, seed: int, cell: str, keep_files: bool
    ) -> tuple[ExecResult | None, bool]:
        """Runs a cell; its result (None if the session was gone), and whether the session has ended."""
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = self._opened.session(limits=limits, seed=seed)
        try:
            result = session.run(cell, keep_files=keep_files)
        except SessionEnded:
            return None, True
        return result, not session.alive

    def end(self, key: str) -> None:
        if (session := self._sessions.pop(key, None)) is not None:
            session.close()

    @property
    def _opened(self) -> Sandbox:
        if self._sandbox is None:
            raise RuntimeError("the sandbox of this node is not open")
        return self._sandbox
