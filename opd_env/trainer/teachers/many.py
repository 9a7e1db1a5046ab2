"""Several teachers: each for its own problems (routes), or all as one (a mixture).

Worked example::

    route = NameRoute({"search_countries", "gsm8k"}, ExampleFinder([task, eval_task]))
    teacher = RoutedTeacher(general, {"search_countries": searcher, "gsm8k": mathematician}, route)
    teacher = TeacherMixture([mathematician, searcher], [0.7, 0.3])     # of log-probs: any teachers
    # of whole distributions: models of this process
    teacher = LocalMixture([mathematician, searcher], [0.7, 0.3], device=device, vocab_size=chat.vocab_size)

A problem's route is decided by the problem alone (its task, the tools that it offers), never by what the student did.
With shares s that add up to 1, a mixture ``q = Σ_i s_i q_i`` is again a distribution. So with both, every token is
compared with one distribution that its prefix fixes, and every divergence, estimator and proof that holds for one
teacher holds for many. (A mean of log-probs, the geometric mixture, is no distribution before it is normalised over
the vocabulary.)

Test it alone: ``pytest tests/trainer/teachers/test_routing.py tests/trainer/teachers/test_mixture.py``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce

import torch
from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.tools import Tool
from opd_env.trainer.batch import Head, Row
from opd_env.trainer.math.logprobs import TopKScores, log_softmax
from opd_env.trainer.teachers.base import (
    LocalTeacher,
    LogitsTeacher,
    Scores,
    Teacher,
    by_trajectory,
    joined,
    scores_by_trajectory,
)
from opd_env.trainer.teachers.prompts import ExampleFinder


class NameRoute:
    """The name under which a trajectory's teacher stands: of a tool that its problem offers, else of its task.

    Args:
        names: tools and tasks that have a special teacher; of two tools the first one offered decides.
        find: gives the problem.
        tools: those of the run, when it does not offer the task's own.
    """

    def __init__(self, names: Collection[str], find: ExampleFinder, tools: Sequence[str | Tool] | None = None) -> None:
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
    """A ``TopKTeacher`` that lets each trajectory be scored by the teacher that ``route`` names.

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
        return self._routed(trajectories, None)[0]

    def score_topk(self, trajectories: Sequence[Trajectory], k: int) -> TopKScores:
        return TopKScores(*self._routed(trajectories, k))

    def _routed(self, trajectories: Sequence[Trajectory], k: int | None) -> Scores:
        if not trajectories:  # the general teacher knows the shapes of no scores
            return joined(scores_by_trajectory(self._general, trajectories, k))
        names = [self._route(trajectory) for trajectory in trajectories]
        scores: dict[int, Scores] = {}
        for name in dict.fromkeys(names):
            teacher = self._general if name is None else self._others[name]
            places = [place for place, other in enumerate(names) if other == name]
            found = scores_by_trajectory(teacher, [trajectories[place] for place in places], k)
            scores |= dict(zip(places, found, strict=True))
        return joined([scores[place] for place in range(len(trajectories))])


class TeacherMixture:
    """Log-probs of the mixture of any teachers; see the module.

    Args:
        members: the teachers; they score in turn.
        shares: positive, with a sum of 1; one per member.

    Raises:
        ValueError: the shares are none.
    """

    def __init__(self, members: Sequence[Teacher], shares: Sequence[float]) -> None:
        self.name = _mixture_name(members, shares)
        self._members = members
        self._log_shares = _log_shares(members, shares)

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        parts = []
        for member, log_share in zip(self._members, self._log_shares, strict=True):
            logprobs_N = member.score(trajectories)
            by_trajectory(member, trajectories, logprobs_N)  # one per sampled token, or an error
            parts.append(logprobs_N.double() + log_share)
        return torch.logsumexp(torch.stack(parts), 0).float()


class LocalMixture(LogitsTeacher):
    """The mixture's whole distributions, of models of this process; see the module.

    Its hidden states are the members' side by side, and its head gives log-probs of the mixture, times the temperature:
    as logits they give the mixture, with no more positions at a time than those of one model.

    Args:
        members: the models; each reads the rows in turn.
        shares: positive, with a sum of 1; one per member.
        device: where the members compute.
        vocab_size: tokens of the student's tokenizer.
        temperature: divides the members' logits.

    Raises:
        ValueError: the shares are none.
    """

    def __init__(
        self,
        members: Sequence[LocalTeacher],
        shares: Sequence[float],
        *,
        device: torch.device,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(_mixture_name(members, shares), device, vocab_size, temperature)
        self._members = members
        self._log_shares = _log_shares(members, shares)

    def rows(self, trajectories: Sequence[Trajectory]) -> list[Row]:
        # All members read the same, but each must have room for it.
        rows, *_ = [member.rows(trajectories) for member in self._members]
        return rows

    def hidden(self, rows: Sequence[Row]) -> Tensor:
        return torch.cat([member.hidden(rows) for member in self._members], dim=1)

    @contextmanager
    def head(self) -> Iterator[Head]:
        widths = [member.width for member in self._members]
        with ExitStack() as stack:
            heads = [stack.enter_context(member.head()) for member in self._members]

            def head(hidden_NH: Tensor) -> Tensor:
                parts = zip(heads, torch.split(hidden_NH, widths, dim=1), self._log_shares, strict=True)
                weighted = (
                    log_softmax(member_head(part_NH), self._temperature, None) + log_share
                    for member_head, part_NH, log_share in parts
                )
                return reduce(torch.logaddexp, weighted) * self._temperature

            yield head


def _mixture_name(members: Sequence[Teacher], shares: Sequence[float]) -> str:
    """Such as ``0.7 × mathematician + 0.3 × searcher``."""
    return " + ".join(f"{share:g} × {member.name}" for member, share in zip(members, shares, strict=True))


def _log_shares(members: Sequence[Teacher], shares: Sequence[float]) -> list[float]:
    if not shares or any(not share > 0 for share in shares) or abs(math.fsum(shares) - 1) > 1e-6:
        raise ValueError(f"{_mixture_name(members, shares)}: weights must be positive and add up to 1")
    return [math.log(share) for share in shares]
