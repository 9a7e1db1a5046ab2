"""Which example of which task a trajectory was played on.

Worked example::

    find = ExampleLookup([task, eval_task])
    task, example = find(trajectory)

Test it alone: ``pytest tests/trainer/teachers/test_routing.py tests/trainer/teachers/test_prompts.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opd_env.episode.trajectory import Trajectory
from opd_env.tasks import Example, Task


class ExampleLookup:
    """Finds the example of a trajectory by its id and question (two splits may use one id for different questions).

    Args:
        tasks: where the trajectories come from: the training task, and the one that is evaluated on. They are read
            only as far as a search has to go.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._names = " and ".join(f"{task.name!r} ({task.split})" for task in tasks)
        self._known: dict[tuple[str, str], tuple[Task, Example]] = {}
        self._rest: Iterator[tuple[Task, Example]] = ((task, example) for task in tasks for example in task)

    def __call__(self, trajectory: Trajectory) -> tuple[Task, Example]:
        """The task and the example.

        Raises:
            ValueError: the trajectory is not of these tasks.
        """
        key = (trajectory.example_id, trajectory.question)
        while key not in self._known:
            found = next(self._rest, None)
            if found is None:
                raise ValueError(f"task {self._names} has no example {trajectory.example_id!r} with this question")
            self._known[found[1].id, found[1].messages[-1]["content"]] = found
        return self._known[key]
