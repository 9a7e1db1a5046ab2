"""Do slow tools hold a rollout up? Throughput with a 0.5 s tool on a quarter of the turns, against the same without.

Plays the same scripted episodes twice: the packaged student's model samples turns of fixed length, a quarter of which
end in a call of a tool that takes 0 s in one run and 0.5 s in the other. Ratios are what counts; run it on a quiet
machine::

    OMP_NUM_THREADS=1 python benchmarks/slow_tools.py --episodes 256 --runs 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from opd_env.engine import Completion
from opd_env.formats import get_format
from opd_env.limits import RolloutLimits
from opd_env.local_engine import LocalEngine
from opd_env.messages import ToolCall, assistant, user
from opd_env.models import load_model
from opd_env.rollouts import rollout
from opd_env.tasks import Example, Grade, Task, grade_number
from opd_env.tools import tool

SECONDS = 0.0


@tool(timeout_s=5.0)
def wait(number: int) -> int:
    """Waits, then gives a number back.

    Args:
        number: any.
    """
    time.sleep(SECONDS)
    return number


class Waiting(Task):
    """Four turns, one of which calls the tool."""

    name = "waiting"
    version = "1"
    tools = (wait,)

    def __len__(self) -> int:
        return 1 << 16

    def example(self, index: int) -> Example:
        return Example(str(index), (user(f"Number {index}?"),), str(index))

    def grade(self, example: Example, answer: str | None, turns: Sequence[object] = ()) -> Grade:
        return grade_number(answer, example.answer)


class Puppet(LocalEngine):
    """Samples as ever, and then says what the script says: real work, known turns."""

    def __init__(self, *arguments: object, call: list[int], answer: list[int], every: int) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.call, self.answer, self.every = call, answer, every
        self.turns = 0

    def step(self) -> list[Completion]:
        completions = []
        for one in super().step():
            self.turns += 1
            ids = self.call if self.turns % self.every == 0 else self.answer
            completions.append(Completion(one.episode, ids, [-1.0] * len(ids), truncated=False))
        return completions


def measure(seconds: float, episodes: int, workers: int, capacity: int) -> tuple[float, float]:
    """Turns per second, and the share of the time spent in the engine."""
    global SECONDS
    SECONDS = seconds
    loaded = load_model("packaged:student")
    chat = get_format(loaded.tokenizer)
    engine = Puppet(
        loaded.model, (), chat.vocab_size, capacity,
        call=chat.render_assistant(assistant("", [ToolCall("wait", {"number": 1})])),
        answer=chat.render_assistant(assistant("1")), every=4,
    )  # fmt: skip
    result = rollout(
        Waiting(), engine, chat, indices=range(episodes), limits=RolloutLimits(max_turns=8, max_turn_tokens=48),
        tool_workers=workers,
    )  # fmt: skip
    if result.errors:
        raise RuntimeError(result.errors[0].message)
    return engine.turns / result.seconds, result.generate_seconds / result.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of rollouts with a slow tool, against a quick one.")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--capacity", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    ratios = []
    for run in range(args.runs):
        quick, quick_share = measure(0.0, args.episodes, args.workers, args.capacity)
        slow, share = measure(0.5, args.episodes, args.workers, args.capacity)
        ratios.append(slow / quick)
        print(
            f"run {run + 1}: {quick:.1f} turns/s without, {slow:.1f} with the 0.5 s tool: {slow / quick:.1%}; "
            f"engine busy {quick_share:.1%} and {share:.1%} of the time"
        )
    print(f"median ratio {statistics.median(ratios):.1%}")


if __name__ == "__main__":
    main()
