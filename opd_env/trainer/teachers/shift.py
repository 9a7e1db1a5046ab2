"""Before the first step: do the teacher's scores belong to the student's tokens?

A teacher whose scores are shifted by one token, or that is not the model one believes it to be, trains the student
towards noise without any error. Both show on a first batch of episodes.

Worked example::

    require_aligned(teacher.name, trajectories, teacher.score(trajectories), same_model=False)    # or: ValueError

Test it alone: ``pytest tests/trainer/teachers/test_shift.py``
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.trainer.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_env.trainer.teachers.make import Teachers

_EPISODES = 16
_SAME = 0.1
"""Nats: the mean difference that other kernels and half precision leave between two copies of one model."""
_SURE = 5.0
"""Standard errors by which a shifted reading must fit better."""
_CLEARLY = 0.25
"""Correlation by which it must fit better, too."""
_ENOUGH = 100
"""Pairs of tokens below which nothing is concluded."""


def check_teacher(teachers: Teachers, trajectories: Sequence[Trajectory], untrained: str | None = None) -> None:
    """Applies ``require_aligned`` to the first episodes that a run plays, for every teacher that scores them.

    Args:
        teachers: of the run. Scores of a teacher with another tokenizer are sums over spans, and are left alone.
        trajectories: played before the first update of this process.
        untrained: the student's model, if the student is still as it was loaded; a teacher of that name is its copy.

    Raises:
        ValueError: see ``require_aligned``.
    """
    if isinstance(teachers.scorer, CrossTokenizerTeacher):
        return
    first = list(trajectories[:_EPISODES])
    for name, member in teachers.members.items():
        same_model = name == untrained and not teachers.extra_tokens
        require_aligned(name, first, member.score(first), same_model=same_model)
    require_aligned(teachers.scorer.name, first, teachers.scorer.score(first))


def require_aligned(
    name: str, trajectories: Sequence[Trajectory], teacher_logprobs_N: Tensor, *, same_model: bool = False
) -> None:
    """Refuses scores that are shifted against the student's tokens, and a copy of the student that is none.

    Tokens that surprise one language model tend to surprise another. So if the teacher's log-probs follow the student's
    clearly better when they are read one token later or earlier (Fisher's z of the rank correlations, within turns),
    then they are shifted. By ranks, because after a slip of the student the teacher is surprised at what follows, and a
    few such tokens would decide the correlation of the values. Where the student is certain of every token (greedy
    sampling), or there are few tokens, nothing can be told.

    Args:
        name: of the teacher, for messages.
        trajectories: episodes that the student sampled.
        teacher_logprobs_N: of their sampled tokens, as ``Teacher.score`` gives them.
        same_model: the teacher is the student as it sampled, with the same prompt.

    Raises:
        ValueError: the scores do not fit; the message says in which way.
    """
    if not trajectories:
        return
    ours_N = np.concatenate([one.logprobs[one.sampled] for one in trajectories]).astype(np.float64)
    turns = [one.turn[one.sampled].astype(np.int64) + 100_000 * i for i, one in enumerate(trajectories)]
    theirs_N = teacher_logprobs_N.double().numpy().clip(min=-99.0)  # a token that the teacher forbids is -inf
    if same_model and (off := float(np.abs(theirs_N - ours_N).mean())) > _SAME:
        raise ValueError(
            f"the teacher {name} is the student itself, but scores its tokens {off:.3f} nats off on average: the "
            "engine that samples and the teacher do not hold the same weights, or do not read the same tokens"
        )
    follows_N = np.concatenate(turns)
    inside = follows_N[1:] == follows_N[:-1]  # both tokens of a pair are of one turn
    straight, count = _correlation(ours_N, theirs_N)
    for shift, ours, theirs in (("later", ours_N[:-1], theirs_N[1:]), ("earlier", ours_N[1:], theirs_N[:-1])):
        shifted, pairs = _correlation(ours[inside], theirs[inside])
        error = np.sqrt(1 / max(count - 3, 1) + 1 / max(pairs - 3, 1))
        if pairs >= _ENOUGH and shifted > straight + _CLEARLY and _fisher(shifted) > _fisher(straight) + _SURE * error:
            raise ValueError(
                f"the scores of the teacher {name} are shifted by one token: they follow the student's log-probs with "
                f"a rank correlation of {shifted:.2f} when read one token {shift}, of {straight:.2f} as they are "
                f"({pairs} tokens)"
            )


def _correlation(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, int]:
    """Spearman's rank correlation, 0 where one side does not vary; and the number of pairs."""
    if len(ours) < 2 or np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0, len(ours)
    return float(np.corrcoef(_ranks(ours), _ranks(theirs))[0, 1]), len(ours)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place of each value in their order; equal ones share the mean of their places."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = np.cumsum(count) - (count - 1) / 2
    return mean[place]


def _fisher(correlation: float) -> float:
    """Fisher's z, whose standard error is 1/sqrt(n - 3)."""
    return float(np.arctanh(min(0.999999, max(-0.999999, correlation))))
