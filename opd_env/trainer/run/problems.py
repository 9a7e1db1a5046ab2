"""The order of problems: an endless row of shuffled passes, known by its seed alone.

Because the problem at any place can be computed, a run that continues needs no record of what it has seen::

    [problem_at(place, size=3, seed=0) for place in range(6)]     # every problem once, then every problem again
    StepProblems(task, per_step=2, samples=4, seed=0).of_step(7)  # what the eighth step plays

Test it alone: ``pytest tests/trainer/run/test_problems.py``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opd_env.episode.trajectory import Trajectory
from opd_env.tasks import Task


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
