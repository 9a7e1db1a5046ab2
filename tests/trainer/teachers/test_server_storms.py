"""A whole run on several pools of servers, in calm and in a storm: the same student comes out, bit for bit."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from opd_env.tasks import register_task
from opd_env.trainer.run.learner import read_metrics
from opd_env.trainer.run.loop import OPDTrainer
from tests.engines.fake_vllm import FakeVLLM
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.toy import ToySums, loaded, toy_config

IN_A_STEP = re.compile(r"What is \d{1,2} \+")
"""Of the problems that are trained on; the evaluated ones have larger numbers."""
TIMES = re.compile(r"^time/|seconds|tokens_per_s|memory")


@register_task("toy_sums_by_heart")
class ByHeart(ToySums):
    """The same without a tool, for another teacher."""

    tools = ()

    def expert(self, example):
        return super().expert(example)[2:]


class Pools:
    """Two servers for the student, two for the teacher, and two for the teacher of problems with a calculator."""

    def __init__(self, stack: ExitStack) -> None:
        def pool(seed: int, spread: float) -> list[FakeVLLM]:
            models = [lambda: tiny_llama(seed=seed, initializer_range=spread)] * 2
            return [stack.enter_context(FakeVLLM(model)) for model in models]

        self.students, self.teachers, self.calculators = pool(9, 0.02), pool(2, 0.3), pool(3, 0.3)
        self.troubles: list[str] = []
        """What went wrong."""

    def train(self, folder: Path, storm: Callable[[Pools], None] | None = None) -> tuple[OPDTrainer, list[Any]]:
        def urls(pool: list[FakeVLLM]) -> str:
            return ",".join(server.url for server in pool)

        config = toy_config(
            folder, steps=2, episodes_per_step=8, estimator="sampled", learning_rate=0.05, task="mixture",
            task_options={"tasks": [{"task": "toy_sums"}, {"task": "toy_sums_by_heart"}]},
            engine=urls(self.students), teacher=urls(self.teachers),
            teacher_routes={"calculator": urls(self.calculators)},
        )  # fmt: skip
        trainer = OPDTrainer(config, student=loaded(1, "student"), console=Console(file=StringIO()))
        if storm is not None:
            storm(self)
        trainer.train()
        return trainer, read_metrics(folder / "metrics.jsonl")


def a_storm(pools: Pools) -> None:
    """One server of each kind crashes, or is always broken; the other is slow, or broken now and then."""

    def trouble(name: str, server: FakeVLLM, fault: Callable[[int], str | None]) -> None:
        def noted(number: int) -> str | None:
            found = fault(number)
            if found:
                pools.troubles.append(f"{name} {found}")
            if found == "crash":
                threading.Thread(target=crash, args=(server,)).start()
                time.sleep(0.05)  # what is answered now is lost on its way
            return found

        in_steps(server, noted)

    now_and_then = ["slow", None, "500", None, "garbage", None, None]
    trouble("first student", pools.students[0], lambda number: "crash" if number in (2, 9) else None)
    trouble("second student", pools.students[1], lambda number: now_and_then[number % 7])
    trouble("first teacher", pools.teachers[0], lambda number: "500")
    trouble("second teacher", pools.teachers[1], lambda number: "truncated" if number in (0, 3) else None)
    trouble("first calculator", pools.calculators[0], lambda number: "crash" if number == 1 else None)
    trouble("second calculator", pools.calculators[1], lambda number: "slow" if number < 2 else None)


def crash(server: FakeVLLM) -> None:
    server.kill()
    time.sleep(0.1)
    server.start()


def in_steps(server: FakeVLLM, trouble: Callable[[int], str | None]) -> None:
    """Asks for the fault of each request of a training step by its number."""
    complete, count = server._complete, itertools.count()

    def troubled(handler: Any, body: dict[str, Any], fault: str | None) -> None:
        if IN_A_STEP.search(tiny_tokenizer().decode(body["prompt"])):
            fault = trouble(next(count))
        complete(handler, body, fault)

    server._complete = troubled  # type: ignore[method-assign]


def test_in_a_storm_no_episode_is_lost_or_counted_twice_and_every_weight_is_the_same(tmp_path: Path) -> None:
    with ExitStack() as stack:
        calm, calm_metrics = Pools(stack).train(tmp_path / "calm")
        pools = Pools(stack)
        stormy, stormy_metrics = pools.train(tmp_path / "stormy", a_storm)
    assert {
        "first student crash", "second student slow", "second student 500", "second student garbage",
        "first teacher 500", "second teacher truncated", "first calculator crash", "second calculator slow",
    } <= set(pools.troubles)  # fmt: skip
    assert len(stormy_metrics) == len(calm_metrics)
    for ours, theirs in zip(calm_metrics, stormy_metrics, strict=True):
        timeless = {name: value for name, value in ours.items() if not TIMES.search(name)}
        assert timeless == {name: theirs[name] for name in timeless}
        assert theirs.get("rollout/failed_episodes", 0) == 0
    for name, weight in calm.parts.student.model.state_dict().items():
        assert torch.equal(weight, stormy.parts.student.model.state_dict()[name]), name
