"""``slow_tools.py`` with a real vLLM in this process: throughput with a 0.5 s tool on a quarter of the turns.

Run it in the environment that ``make test-vllm`` builds::

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/slow_tools_vllm.py --episodes 512 --runs 3

vLLM samples as many tokens as the script has, then the script's stand in their place. Time is that of a machine with
one idle core: the CPU seconds of this process, which jump to the end of the next tool where nothing is left to sample.
So a machine that others use, too, changes nothing; on the wall clock its tools would look quick beside its sampling.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections import deque
from dataclasses import replace

import slow_tools
from slow_tools import RUNNING

from opd_env.engines.base import Completion, Engine, Request
from opd_env.engines.models import load_tokenizer
from opd_env.engines.vllm import VLLMEngine
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import rollout
from opd_env.formats import ChatFormat, get_format

TOOL_SECONDS = 0.5


class Clock:
    """CPU seconds of this process, and tools that sleep by it."""

    def __init__(self) -> None:
        self.jumped = 0.0
        self.sleeping: deque[tuple[float, threading.Event]] = deque()
        """In the order of their ends, for all sleep equally long."""

    def now(self) -> float:
        return time.process_time() + self.jumped

    def sleep(self, seconds: float) -> None:
        awake = threading.Event()
        self.sleeping.append((self.now() + seconds, awake))
        awake.wait()

    def wake(self, idle: bool) -> None:
        """Ends the sleep of all that have slept enough; an idle engine has nothing to do until one has."""
        if idle and self.sleeping:
            self.jumped += max(0.0, self.sleeping[0][0] - self.now())
        while self.sleeping and self.sleeping[0][0] <= self.now():
            self.sleeping.popleft()[1].set()


slow_tools.clock = clock = Clock()


class ForcedVLLM(VLLMEngine):
    """Works as hard as vLLM and says what the script says: in a quarter of the turns, a call."""

    def __init__(self, model: str, chat: ChatFormat) -> None:
        # No token ends a turn, so that it is as long as the script.
        super().__init__(model, (), chat.vocab_size, capacity=RUNNING, max_context=1024, enforce_eager=True)
        self.scripts = slow_tools.scripts(chat)
        self.saying: dict[int, list[int]] = {}

    def submit(self, request: Request) -> None:
        script = self.saying[request.episode] = self.scripts[random.Random(request.seed).random() < 0.25]
        super().submit(replace(request, params=replace(request.params, max_tokens=len(script))))

    def step(self) -> list[Completion]:
        ended = super().step()
        clock.wake(idle=False)
        return [replace(one, token_ids=self.saying[one.episode], truncated=False) for one in ended]

    @property
    def busy(self) -> bool:
        working = super().busy
        clock.wake(idle=not working)
        return working


def measure(engine: Engine, chat: ChatFormat, seconds: float, episodes: int) -> float:
    """Turns per second with a tool that takes so long."""
    slow_tools.tool_seconds = seconds
    started, jumped = clock.now(), clock.jumped
    result = rollout(
        slow_tools.Waiting(), engine, chat, indices=range(episodes), tool_workers=2 * RUNNING,
        limits=RolloutLimits(max_turns=8, max_turn_tokens=64, max_seconds=86400.0),
    )  # fmt: skip
    if result.errors:
        raise RuntimeError(result.errors[0].message)
    taken, idle = clock.now() - started, clock.jumped - jumped
    turns = sum(len(one.turns) for one in result.trajectories)
    print(f"    {seconds:.1f} s tool: {turns} turns in {taken:.2f} s, of which {idle:.2f} s idle", flush=True)
    return turns / taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of vLLM's rollouts with a slow tool, against a quick one.")
    parser.add_argument("--model", default="packaged:student")
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    chat = get_format(load_tokenizer(args.model))
    engine = ForcedVLLM(args.model, chat)
    measure(engine, chat, 0.0, RUNNING)  # what is made at the first call is not timed
    for engine.capacity in (2 * RUNNING, RUNNING):
        label = f"{engine.capacity} episodes open"
        ratios = []
        for _ in range(args.runs):
            quick, slow = (measure(engine, chat, seconds, args.episodes) for seconds in (0.0, TOOL_SECONDS))
            ratios.append(slow / quick)
            print(f"{label}: {quick:.1f} turns/s without, {slow:.1f} with the tool: {slow / quick:.1%}")
        print(f"{label}: median ratio {statistics.median(ratios):.1%}", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
