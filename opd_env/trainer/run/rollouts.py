"""The episodes of a step: which problems, which seeds, where they are stored; in turn with training, or one step ahead.

The order of problems is an endless row of shuffled passes, known by its seed alone: the problem at any place can be
computed, so that a run that continues needs no record of what it has seen.

Worked example::

    rollouts = StepRollouts(config, parts, engine, problems, updater, folder.path / "trajectories")
    played = rollouts.take(step)              # this process's share of the step's episodes
    with rollouts.ahead(step + 1):            # rollout_ahead: a thread plays the next ones, with the weights of now
        learner.learn(step, played)
    engine.update_weights(model)              # no rollout is under way here

The thread lives only as long as the block: whatever ends the block, an error or Ctrl-C too, ends and joins it. So an
evaluation, new weights and a checkpoint never meet a running rollout. A checkpoint holds the episodes that are waiting
to be learnt from, since the student that sampled them is gone.

Test it alone: ``pytest tests/trainer/run/test_rollout_ahead.py``
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from opd_env.engines.base import Engine, SamplingParams
from opd_env.episode.files import StoreError
from opd_env.episode.rollouts import EpisodeError, RolloutResult, rollout
from opd_env.episode.store import TrajectoryWriter, load_trajectories, save_trajectories
from opd_env.episode.trajectory import Trajectory
from opd_env.errors import TrainingError, UserError
from opd_env.tasks import Task
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run.checkpoint import Checkpoint
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.setup import Parts


class StepProblems:
    """Which problems a step plays, and which update learns from which.

    Args:
        task: to train on.
        per_step: problems of one step.
        samples: episodes of each problem.
        seed: of the order, where the task has none of its own.
    """

    def __init__(self, task: Task, *, per_step: int, samples: int, seed: int) -> None:
        self._task = task
        self._per_step = per_step
        self._samples = samples
        self._seed = seed

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """Index in the task of each of a step's problems, and how often it stood in the step before.

        A problem stands twice where a step reaches into the next pass over the task, or is larger than the task.
        """
        places = range(step * self._per_step, (step + 1) * self._per_step)
        seen: Counter[int] = Counter()
        problems = []
        size = len(self._task)
        for place in places:
            index = place % size if self._task.ordered else problem_at(place, size, self._seed)
            problems.append((index, seen[index]))
            seen[index] += 1
        return problems

    def shares(self, step: int, trajectories: Sequence[Trajectory], updates: int) -> list[list[Trajectory]]:
        """A step's episodes by update: blocks of its problems, the same for any number of processes."""
        problems = self.of_step(step)
        offsets = {(self._task[index].id, before): offset for offset, (index, before) in enumerate(problems)}
        shares: list[list[Trajectory]] = [[] for _ in range(updates)]
        for trajectory in trajectories:
            offset = offsets[trajectory.example_id, trajectory.sample // self._samples]
            shares[offset * updates // len(problems)].append(trajectory)
        return shares


def problem_at(place: int, size: int, seed: int) -> int:
    """Index of the problem at ``place`` (from 0) of the endless order of ``size`` problems."""
    epoch, offset = divmod(place, size)
    return int(_epoch(size, seed, epoch)[offset])


@lru_cache(maxsize=4)
def _epoch(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)


_EPISODES, _HEAD = "rollout.parquet", "rollout.json"


@dataclass
class StepEpisodes(RolloutResult):
    """This process's episodes of one step."""

    step: int = 0
    """Finished steps before it."""
    policy: int = 0
    """Updates that the student which sampled them had taken."""


class StepRollouts:
    """Plays the episodes of one step after the other.

    Args:
        config: all settings.
        parts: task and format.
        engine: samples the student's turns. With ``rollout_ahead`` it does not share weights with the updater.
        problems: what a step plays.
        updater: how often the student was updated, and which share of the processes' work is this one's.
        folder: where the episodes are stored.
    """

    def __init__(
        self,
        config: OPDConfig,
        parts: Parts,
        engine: Engine,
        problems: StepProblems,
        updater: Updater,
        folder: Path,
    ) -> None:
        self._config = config
        self._parts = parts
        self._engine = engine
        self._problems = problems
        self._updater = updater
        self._folder = folder
        self._waiting: StepEpisodes | None = None
        self.waited_seconds = 0.0
        """How long the step since the last ``take`` waited for rollouts."""

    def take(self, step: int) -> StepEpisodes:
        """The episodes after ``step`` finished steps: those that were played ahead, else played now."""
        self.waited_seconds = 0.0
        if self._waiting is not None and self._waiting.step == step:
            return self._waiting
        played = self.play(step, self._updater.updates)
        self.waited_seconds = played.seconds
        return played

    @contextmanager
    def ahead(self, step: int) -> Iterator[None]:
        """While the block runs, plays the episodes of ``step``, if ``rollout_ahead`` is set and the run has that step.

        Raises:
            TrainingError: the rollout failed as a whole; raised at the end of the block.
        """
        if not self._config.sampling.rollout_ahead or step >= self._config.run.steps:
            yield
            return
        cancel = threading.Event()
        device = self._updater.accelerator.device
        with ThreadPoolExecutor(1, "opd-env-rollout", initializer=_compute_on, initargs=(device,)) as thread:
            future = thread.submit(self.play, step, self._updater.updates, cancel)
            try:
                yield
                began = time.perf_counter()
                self._waiting = future.result()
                self.waited_seconds += time.perf_counter() - began
            except BaseException as error:
                cancel.set()
                self._engine.wake()
                if future.done() and future.exception() is error:
                    error.add_note(f"raised by the rollout of step {step + 1}, which ran one step ahead")
                    if isinstance(error, UserError | StoreError):
                        raise TrainingError(f"the rollout of step {step + 1} failed: {error}") from error
                raise

    def play(self, step: int, policy: int, cancel: threading.Event | None = None) -> StepEpisodes:
        """Plays this process's share of the episodes after ``step`` finished steps, with the engine's weights.

        Args:
            step: finished steps.
            policy: updates that the student with these weights has taken; it may be updated while this runs.
            cancel: see ``rollout``.
        """
        config, samples = self._config, self._config.sampling.samples_per_problem
        with self._writer(step) as writer:
            result = rollout(
                self._parts.task,
                self._engine,
                self._parts.chat,
                episodes=[(index, before * samples + n) for index, before in self._mine(step) for n in range(samples)],
                tools=config.tools,
                limits=config.sampling.limits,
                sampling=SamplingParams(temperature=config.sampling.temperature),
                seed=config.run.seed * 1_000_003 + step,
                tool_workers=config.sampling.tool_workers,
                on_finished=writer.append,
                cancel=cancel,
            )
        return StepEpisodes(**vars(result), step=step, policy=policy)

    def files(self, step: int) -> dict[str, Callable[[Path], Any]]:
        """What a checkpoint after ``step`` steps holds of the next one's episodes. Every process calls it."""
        waiting = self._waiting
        if waiting is None or waiting.step != step:
            return {}
        everyone: list[StepEpisodes] = gather_object([waiting])
        trajectories = [trajectory for one in everyone for trajectory in one.trajectories]
        errors = [error for one in everyone for error in one.errors]
        head = asdict(replace(waiting, trajectories=[], errors=errors))
        return {
            _EPISODES: lambda path: save_trajectories(trajectories, path),
            _HEAD: lambda path: path.write_text(json.dumps(head), encoding="utf-8"),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up, and stores again, this process's share of the episodes that a checkpoint holds."""
        if not (checkpoint.folder / _HEAD).exists():
            return
        head = json.loads((checkpoint.folder / _HEAD).read_text(encoding="utf-8"))
        first = self._updater.accelerator.process_index == 0
        errors = [EpisodeError(**error) for error in head["errors"]] if first else []
        task, samples = self._parts.task, self._config.sampling.samples_per_problem
        mine = {(task[index].id, before) for index, before in self._mine(checkpoint.step)}
        stored = load_trajectories(checkpoint.folder / _EPISODES)
        trajectories = [one for one in stored if (one.example_id, one.sample // samples) in mine]
        self._waiting = StepEpisodes(**head | {"trajectories": trajectories, "errors": errors})
        with self._writer(checkpoint.step) as writer:
            for trajectory in trajectories:
                writer.append(trajectory)

    def _mine(self, step: int) -> list[tuple[int, int]]:
        accelerator = self._updater.accelerator
        return self._problems.of_step(step)[accelerator.process_index :: accelerator.num_processes]

    def _writer(self, step: int) -> TrajectoryWriter:
        process = self._updater.accelerator.process_index
        name = f"step_{step + 1:08d}" + (f"_process_{process}" if process else "")
        return TrajectoryWriter(self._folder, name, overwrite=True)


def _compute_on(device: torch.device) -> None:
    """A new thread begins on device 0 also where the process computes on another; kernels of vLLM go to that."""
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)
