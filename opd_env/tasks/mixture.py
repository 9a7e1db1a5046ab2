"""Tasks made of tasks: a mixture by weights, and a curriculum from easy to hard.

Worked example::

    load_task("mixture", tasks=[
        {"task": "arithmetic", "weight": 3, "levels": [1, 2]},
        {"task": "country_search", "label": "search"},
    ])                                                          # three of four problems are arithmetic, evenly spread
    load_task("curriculum", task="arithmetic", levels=[1, 2, 3])  # all of level 1, then of level 2, then of level 3

A problem keeps its tools, its grader and its expert. In a mixture its id and its category (for accuracy per category
in every report) begin with the label of its task.

Test it alone: ``pytest tests/tasks/test_mixture.py``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opd_env.messages import Message
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.splits import SPLITS
from opd_env.tasks.registry import load_task
from opd_env.tools import Tool

_PLACE = "mixture"


class Mixture(Task):
    """Several tasks in turn, as often as their weights say; no problem stands twice.

    Args:
        split: of every task, unless an entry has a ``split`` of its own.
        tasks: one mapping a task: ``task`` (name or YAML file), and optionally ``weight`` (1), ``label`` (the task's
            name), ``split``; further keys are the task's own options.
        size: problems; None takes as many as there are before the first task runs out.

    Raises:
        ValueError: no tasks, two of one label, a weight that is not positive, or a size that the tasks cannot give.
    """

    splits = SPLITS

    def __init__(self, split: str = "train", *, tasks: Sequence[Mapping[str, Any]], size: int | None = None) -> None:
        super().__init__(split)
        self._tasks: dict[str, Task] = {}
        weights = []
        for entry in tasks:
            if not isinstance(entry, Mapping) or "task" not in entry:
                raise ValueError(f"tasks: got {entry!r}, expected {{task: name, weight: 1, …}}")
            options = dict(entry)
            name, weight = options.pop("task"), options.pop("weight", 1)
            part = load_task(name, options.pop("split", split), **{k: v for k, v in options.items() if k != "label"})
            label = options.get("label", part.name)
            if label in self._tasks:
                raise ValueError(f"tasks: two are called {label!r}; give one a label of its own: label: …")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"tasks: {label}: weight={weight!r}, expected a number above 0")
            self._tasks[label] = part
            weights.append(weight)
        if not weights:
            raise ValueError("tasks is empty; name at least one, such as {task: arithmetic}")
        self._task_M, self._index_M = schedule([len(part) for part in self._tasks.values()], weights, size)

    @property
    def version(self) -> str:  # type: ignore[override]
        """Follows the versions of its tasks."""
        return "1 (" + ", ".join(f"{label} {part.version}" for label, part in self._tasks.items()) + ")"

    @property
    def licence(self) -> str:  # type: ignore[override]
        """Those of its tasks."""
        return ", ".join(dict.fromkeys(part.licence for part in self._tasks.values()))

    @property
    def train_allowed(self) -> bool:
        """Whether every task may be trained on."""
        return all(part.train_allowed for part in self._tasks.values())

    def __len__(self) -> int:
        return len(self._task_M)

    def example(self, index: int) -> Example:
        """The example at ``index``."""
        label = list(self._tasks)[self._task_M[index]]
        place = int(self._index_M[index])
        inner = self._tasks[label].example(place)
        kind = inner.metadata.get("category", "")
        return replace(
            inner,
            id=f"{label}/{inner.id}",
            metadata={**inner.metadata, "category": f"{label}/{kind}" if kind else label, _PLACE: [label, place]},
        )

    def tools_of(self, example: Example) -> Sequence[str | Tool]:
        """Those of the example's task."""
        part, inner = self._inner(example)
        return part.tools_of(inner)

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """By the example's task."""
        part, inner = self._inner(example)
        return part.grade(inner, answer, turns)

    def next_user(self, example: Example, turns: Sequence[Message]) -> Message | None:
        """As the example's task has it."""
        part, inner = self._inner(example)
        return part.next_user(inner, turns)

    def expert(self, example: Example) -> list[Message] | None:
        """That of the example's task."""
        part, inner = self._inner(example)
        return part.expert(inner)

    def _inner(self, example: Example) -> tuple[Task, Example]:
        label, place = example.metadata[_PLACE]
        return self._tasks[label], self._tasks[label].example(place)


class Curriculum(Task):
    """One task's problems from easy to hard, each once; of one difficulty, in an order that the seed decides.

    Training takes the problems in this order, where it shuffles those of other tasks.

    Args:
        split: of the task.
        task: its name or YAML file.
        seed: of the order.
        options: the task's own.

    Raises:
        ValueError: as the task does.
    """

    ordered: ClassVar[bool] = True
    splits = SPLITS

    def __init__(self, split: str = "train", *, task: str, seed: int = 0, **options: Any) -> None:
        super().__init__(split)
        self._task = load_task(task, split, **options)
        self._seed = seed
        self.tools = self._task.tools

    @cached_property
    def _order_M(self) -> NDArray[np.int64]:
        mixed_M = np.random.default_rng(self._seed).permutation(len(self._task))
        level_M = np.array([self._task.example(int(index)).difficulty for index in mixed_M], dtype=np.int64)
        return mixed_M[np.argsort(level_M, kind="stable")]

    @property
    def version(self) -> str:  # type: ignore[override]
        """Follows the version of its task."""
        return f"1 ({self._task.name} {self._task.version})"

    @property
    def licence(self) -> str:  # type: ignore[override]
        """That of its task."""
        return self._task.licence

    @property
    def train_allowed(self) -> bool:
        """Whether its task may be trained on."""
        return self._task.train_allowed

    def __len__(self) -> int:
        return len(self._task)

    def example(self, index: int) -> Example:
        """The example at ``index``, the easy ones first."""
        return self._task.example(int(self._order_M[index]))

    def tools_of(self, example: Example) -> Sequence[str | Tool]:
        """See ``Task``."""
        return self._task.tools_of(example)

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """See ``Task``."""
        return self._task.grade(example, answer, turns)

    def next_user(self, example: Example, turns: Sequence[Message]) -> Message | None:
        """See ``Task``."""
        return self._task.next_user(example, turns)

    def expert(self, example: Example) -> list[Message] | None:
        """See ``Task``."""
        return self._task.expert(example)


def schedule(
    lengths: Sequence[int], weights: Sequence[float], size: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which task each place of a mixture belongs to, and which of its problems stands there.

    The k-th problem of a task with weight w is due at time (k + 1/2) / w; all are taken in the order of their times.
    So among the first n places a task of share s has n·s, but for less than one (two tasks) or a few (more tasks).

    Args:
        lengths: problems of each task.
        weights: of each task, above 0.
        size: places; None takes as many as there are before the first task runs out.

    Returns:
        Two arrays of shape ``[size]``: the task's number, and the problem's index in it.

    Raises:
        ValueError: there are not so many places.
    """
    due = [(np.arange(length) + 0.5) / weight for length, weight in zip(lengths, weights, strict=True)]
    time_N = np.concatenate(due)
    task_N = np.repeat(np.arange(len(lengths)), lengths)
    index_N = np.concatenate([np.arange(length) for length in lengths])
    order_N = np.argsort(time_N, kind="stable")
    end = min((length + 0.5) / weight for length, weight in zip(lengths, weights, strict=True))
    available = int(np.searchsorted(time_N[order_N], end))  # from here on the task that ran out would be due
    if size is not None and not 1 <= size <= available:
        raise ValueError(f"size={size}, but with these weights the tasks give 1 to {available} problems")
    chosen = order_N[: available if size is None else size]
    return task_N[chosen], index_N[chosen]
