"""Do slow tools hold a rollout up? Throughput with a 0.5 s tool on a quarter of the turns, against the same without.

The engine stands for a server: a step takes 40 ms for up to 64 turns, each of 48 tokens, and more episodes can be open
than run. A quarter of the turns call a tool that takes 0 s in one run and 0.5 s in the other. Sleeping costs no
processor, so that the ratio can be measured on a busy machine, too::

    OMP_NUM_THREADS=1 python benchmarks/slow_tools.py --episodes 512 --runs 3

It is measured twice, the second time with no more episodes open than the engine runs: those that wait for tools then
leave gaps.

``--model`` samples with the real local engine instead: every token is a forward pass of a model on this machine's
processors, only which token comes of it is decided by the script::

    OMP_NUM_THREADS=2 python benchmarks/slow_tools.py --model packaged:student --episodes 384 --runs 3
    OMP_NUM_THREADS=2 python benchmarks/slow_tools.py --model smollm2 --episodes 128 --runs 2

On a machine that others use, too, ``--processor_time`` counts in the CPU seconds of this process instead, the tool's as
well, and jumps to the end of the next tool where nothing is left to sample::

    OMP_NUM_THREADS=1 python benchmarks/slow_tools.py --model smollm2 --episodes 64 --runs 1 --processor_time

Two limits stand beside the ratio. A rollout takes at least as long as without the tool, and as its slowest episode
would take alone: no order of episodes beats that. Nobody knows beforehand which episode it will be: the limit of this
order counts each episode from when it was opened in the run without the tool.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_env.engines.base import Completion, Engine, Request
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import load_model
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import rollout
from opd_env.formats import ChatFormat, get_format
from opd_env.messages import ToolCall, assistant, user
from opd_env.tasks import Example, Grade, Task, grade_number
from opd_env.tools import tool

RUNNING, STEP_SECONDS, TURN_TOKENS = 64, 0.04, 48
tool_seconds = 0.0


class WallClock:
    """Time as everyone knows it."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)

    def follow(self, engine: PacedEngine | ForcedEngine) -> None:
        """Nothing to do."""


class ProcessorClock:
    """Goes on while this process computes, and jumps when every open episode sleeps."""

    def __init__(self) -> None:
        self.jumped = 0.0
        self.sleepers: list[tuple[float, int, threading.Event]] = []
        self.engine: PacedEngine | ForcedEngine | None = None
        threading.Thread(target=self._wake, daemon=True).start()

    def now(self) -> float:
        return time.process_time() + self.jumped

    def sleep(self, seconds: float) -> None:
        awake = threading.Event()
        heapq.heappush(self.sleepers, (self.now() + seconds, id(awake), awake))
        awake.wait()

    def follow(self, engine: PacedEngine | ForcedEngine) -> None:
        """Whose episodes sleep."""
        self.engine = engine

    def _wake(self) -> None:
        while True:
            time.sleep(0.005)
            sleepers, engine = self.sleepers, self.engine
            if engine is not None and sleepers and len(sleepers) == len(engine.open):
                self.jumped += max(0.0, sleepers[0][0] - self.now())
            while sleepers and sleepers[0][0] <= self.now():
                heapq.heappop(sleepers)[2].set()


clock: WallClock | ProcessorClock = WallClock()


@tool(timeout_s=600.0)
def wait(number: int) -> int:
    """Waits, then gives a number back.

    Args:
        number: any.
    """
    if tool_seconds:
        clock.sleep(tool_seconds)
    return number


class Waiting(Task):
    """Any number of episodes."""

    name = "waiting"
    version = "1"
    tools = (wait,)

    def __len__(self) -> int:
        return 1 << 16

    def example(self, index: int) -> Example:
        return Example(str(index), (user(f"Number {index}?"),), str(index))

    def grade(self, example: Example, answer: str | None, turns: Sequence[Any] = ()) -> Grade:
        return grade_number(answer, example.answer)


def scripts(chat: ChatFormat) -> list[list[int]]:
    """Two turns of about ``TURN_TOKENS`` tokens: an answer, and one with a call."""
    return [
        list(chat.render_assistant(assistant("1 " * count, calls)))
        for calls in ([], [ToolCall("wait", {"number": 1})])
        for count in [(TURN_TOKENS - len(chat.render_assistant(assistant("", calls)))) // 2]
    ]


class Watched(Engine):
    """Notes when episodes are opened, and which are open."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.opened: dict[int, float] = {}
        self.open: set[int] = set()

    def submit(self, request: Request) -> None:
        self.opened.setdefault(request.episode, clock.now())
        self.open.add(request.episode)
        super().submit(request)

    def release(self, episode: int) -> None:
        self.open.discard(episode)
        super().release(episode)


class PacedSampler(Engine):
    """Takes the time of a server and says what the script says: in a quarter of the turns, a call."""

    def __init__(self, chat: ChatFormat, capacity: int) -> None:
        self.capacity = capacity
        self.call = chat.render_assistant(assistant("", [ToolCall("wait", {"number": 1})]))
        self.answer = chat.render_assistant(assistant("1"))
        self.queue: deque[Request] = deque()
        self.running: dict[int, list[Any]] = {}
        self.due = 0.0

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def step(self) -> list[Completion]:
        while self.queue and len(self.running) < RUNNING:
            request = self.queue.popleft()
            self.running[request.episode] = [TURN_TOKENS, random.Random(request.seed).random() < 0.25]
        now = time.perf_counter()
        self.due = max(self.due + STEP_SECONDS, now)  # catches up: the caller's work runs beside a server's
        time.sleep(self.due - now)
        ended = []
        for episode, state in list(self.running.items()):
            state[0] -= 1
            if not state[0]:
                del self.running[episode]
                ids = self.call if state[1] else self.answer
                ended.append(Completion(episode, ids, [-1.0] * len(ids), truncated=False))
        return ended

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.running)

    def release(self, episode: int) -> None:
        self.running.pop(episode, None)


class PacedEngine(Watched, PacedSampler):
    """The same, watched."""


class ForcedEngine(Watched, LocalEngine):
    """Works as hard as the local engine and says what the script says, in turns of about ``TURN_TOKENS`` tokens."""

    def __init__(self, model: Any, chat: ChatFormat, capacity: int) -> None:
        super().__init__(model, chat.stop_token_ids, chat.vocab_size, capacity)
        self.scripts = scripts(chat)

    def _forward(self, first: int, new: list[list[int]]) -> None:
        super()._forward(first, new)
        for row in self._rows[first : first + len(new)]:
            script = self.scripts[random.Random(row.turn.seed).random() < 0.25]
            row.ids[-1] = script[len(row.ids) - 1]


@dataclass(frozen=True)
class Measured:
    """One rollout."""

    turns_E: list[int]
    """Of each episode."""
    calls_E: list[int]
    opened_E: list[float]
    """Seconds from the start of the rollout to the first turn's request."""
    seconds: float

    @property
    def speed(self) -> float:
        """Turns per second."""
        return sum(self.turns_E) / self.seconds


def measure(engine: PacedEngine | ForcedEngine, chat: ChatFormat, seconds: float, episodes: int) -> Measured:
    """Plays episodes with a tool that takes so long."""
    global tool_seconds
    tool_seconds = seconds
    clock.follow(engine)
    started = clock.now()
    result = rollout(
        Waiting(), engine, chat, indices=range(episodes), tool_workers=2 * RUNNING,
        limits=RolloutLimits(max_turns=8, max_turn_tokens=64, max_seconds=86400.0),
    )  # fmt: skip
    seconds_taken = clock.now() - started
    if result.errors:
        raise RuntimeError(result.errors[0].message)
    played = Measured(
        [len(one.turns) for one in result.trajectories],
        [len(one.calls) for one in result.trajectories],
        [engine.opened[episode] - started for episode in range(episodes)],
        seconds_taken,
    )
    engine_share, tail = result.generate_seconds / result.seconds, result.tail_seconds / result.seconds
    print(
        f"    {seconds:.1f} s tool: {played.speed:.2f} turns/s, {seconds_taken:.1f} s, of which {engine_share:.0%} in "
        f"the engine and {tail:.0%} in the tail",
        flush=True,
    )
    return played


def limits(quick: Measured, alone: float) -> tuple[float, float]:
    """The highest ratios that any order, and this one, could reach; a turn of an episode alone takes ``alone``."""
    chains_E = [turns * alone + 0.5 * calls for turns, calls in zip(quick.turns_E, quick.calls_E, strict=True)]
    ends_E = [opened + chain for opened, chain in zip(quick.opened_E, chains_E, strict=True)]
    return tuple(quick.seconds / max(quick.seconds, *least_E) for least_E in (chains_E, ends_E))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of rollouts with a slow tool, against a quick one.")
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", help="sample with this model here, instead of an engine that stands for a server")
    parser.add_argument("--processor_time", action="store_true", help="count CPU seconds; with --model only")
    args = parser.parse_args()
    if args.processor_time:
        if not args.model:
            parser.error("--processor_time: an engine that sleeps takes none; give --model")
        global clock
        clock = ProcessorClock()
    loaded = load_model(args.model or "packaged:student")
    chat = get_format(loaded.tokenizer)

    def engine(capacity: int) -> PacedEngine | ForcedEngine:
        return ForcedEngine(loaded.model, chat, capacity) if args.model else PacedEngine(chat, capacity)

    alone = min(1 / measure(engine(1), chat, 0.0, 2).speed for _ in range(2))
    for capacity in [RUNNING] if args.model else [2 * RUNNING, RUNNING]:
        label = f"{capacity} turns side by side" if args.model else f"{capacity} episodes open"
        rows = []
        for _ in range(args.runs):
            quick, slow = (measure(engine(capacity), chat, seconds, args.episodes) for seconds in (0.0, 0.5))
            ratio, bounds = slow.speed / quick.speed, limits(quick, alone)
            rows.append((ratio, ratio / bounds[0], ratio / bounds[1]))
            print(
                f"{label}: {quick.speed:.2f} turns/s without, {slow.speed:.2f} with the 0.5 s tool: "
                f"{ratio:.1%} (limit of any order {bounds[0]:.1%}, of this order {bounds[1]:.1%})"
            )
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"{label}: median ratio {medians[0]:.1%}; {medians[1]:.1%} of the limit of any order, "
              f"{medians[2]:.1%} of the limit of this order")  # fmt: skip


if __name__ == "__main__":
    main()
