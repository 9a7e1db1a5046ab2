"""Several teachers, each for the problems that it knows best (multi-teacher on-policy distillation).

Worked example::

    route = NameRoute({"search_countries", "gsm8k"}, ExampleLookup([task, eval_task]))
    teacher = RoutedTeacher(general, {"search_countries": searcher, "gsm8k": mathematician}, route)
    teacher.score(trajectories)                    # every episode by its own teacher, in the order given

A problem's teacher is decided by the problem alone (its task, the tools that it offers), never by what the student did:
then every token is compared with one fixed distribution per prefix, and all that holds for one teacher holds here.

Test it alone: ``pytest tests/trainer/teachers/test_routing.py``
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.errors import TrainingError
from opd_env.tools import Tool
from opd_env.trainer.math.logprobs import TopKScores
from opd_env.trainer.teachers.base import Teacher, TopKTeacher, by_trajectory
from opd_env.trainer.teachers.lookup import ExampleLookup


class NameRoute:
    """The name under which a trajectory's teacher stands: of a tool that its problem offers, else of its task.

    Args:
        names: names of tools and tasks that have a teacher of their own; of two tools the first one offered decides.
        find: gives the problem.
        tools: those of the run, when it does not offer the task's own.
    """

    def __init__(self, names: Collection[str], find: ExampleLookup, tools: Sequence[str | Tool] | None = None) -> None:
        self._names = names
        self._find = find
        self._tools = tools

    def __call__(self, trajectory: Trajectory) -> str | None:
        """A name, or None for the general teacher."""
        task, example = self._find(trajectory)
        offered = task.tools_of(example) if self._tools is None else self._tools
        candidates = [*(tool if isinstance(tool, str) else tool.name for tool in offered), task.name]
        return next((name for name in candidates if name in self._names), None)


class RoutedTeacher:
    """Lets each trajectory be scored by the teacher that ``route`` names.

    Args:
        general: for trajectories without a name.
        others: teachers by name.
        route: from a trajectory to a name or None.
    """

    def __init__(
        self, general: Teacher, others: Mapping[str, Teacher], route: Callable[[Trajectory], str | None]
    ) -> None:
        self.name = " and ".join([general.name, *(f"{other.name} for {name}" for name, other in others.items())])
        self._general = general
        self._others = others
        self._route = route

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """See ``Teacher``."""
        return self._routed(trajectories, lambda teacher, theirs: (teacher.score(theirs),))[0]

    def score_topk(self, trajectories: Sequence[Trajectory], k: int) -> TopKScores:
        """See ``TopKTeacher``.

        Raises:
            TrainingError: one of the teachers gives one log-prob per token only.
        """

        def score(teacher: Teacher, theirs: Sequence[Trajectory]) -> tuple[Tensor, ...]:
            if not isinstance(teacher, TopKTeacher):
                raise TrainingError(f"the teacher {teacher.name} gives one log-prob per token; set estimator=sampled")
            top = teacher.score_topk(theirs, k)
            return top.logprobs_N, top.topk_ids_NK, top.topk_logprobs_NK

        return TopKScores(*self._routed(trajectories, score))

    def _routed(
        self,
        trajectories: Sequence[Trajectory],
        score: Callable[[Teacher, Sequence[Trajectory]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        names = [self._route(one) for one in trajectories]
        parts: dict[int, tuple[Tensor, ...]] = {}
        for name in dict.fromkeys(names) or [None]:
            mine = [place for place, one in enumerate(names) if one == name]
            theirs = [trajectories[place] for place in mine]
            teacher = self._general if name is None else self._others[name]
            columns = [by_trajectory(teacher, theirs, column) for column in score(teacher, theirs)]
            if not mine:
                return tuple(torch.cat(column) for column in columns)
            parts |= dict(zip(mine, zip(*columns, strict=True), strict=True))
        return tuple(torch.cat(column) for column in zip(*(parts[place] for place in sorted(parts)), strict=True))
