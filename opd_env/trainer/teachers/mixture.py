"""Several teachers as one: the weighted mean of their distributions (an arithmetic mixture).

Worked example::

    teacher = Mixture([mathematician, searcher], [0.7, 0.3])    # of log-probs: any teachers
    # of whole distributions: models of this process
    teacher = LocalMixture([mathematician, searcher], [0.7, 0.3], device=device, vocab_size=chat.vocab_size)

With weights w that add up to 1, ``q = Σ_i w_i q_i`` is again a distribution at every prefix, fixed while the student
learns; so every divergence, estimator and proof that holds for one teacher holds for the mixture. (A mean of log-probs,
the geometric mixture, is no distribution before it is normalised over the vocabulary.)

Test it alone: ``pytest tests/trainer/teachers/test_mixture.py``
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce

import torch
from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.trainer.batch import Head, Row
from opd_env.trainer.math.logprobs import log_softmax
from opd_env.trainer.teachers.base import LocalTeacher, LogitsTeacher, Teacher, by_trajectory


class Mixture:
    """Log-probs of the mixture of any teachers; see the module.

    Args:
        members: the teachers; they score in turn.
        weights: positive, with a sum of 1; one per member.

    Raises:
        ValueError: the weights are none.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.name = mixture_name(members, weights)
        self._members = members
        self._log_weights = log_weights(members, weights)

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """See ``Teacher``."""
        parts = []
        for member, log_weight in zip(self._members, self._log_weights, strict=True):
            logprobs_N = member.score(trajectories)
            by_trajectory(member, trajectories, logprobs_N)  # one per sampled token, or an error
            parts.append(logprobs_N.double() + log_weight)
        return torch.logsumexp(torch.stack(parts), 0).float()


class LocalMixture(LogitsTeacher):
    """The mixture's whole distributions, of models of this process; see the module.

    Its hidden states are the members' side by side, and its head gives log-probs of the mixture, times the temperature:
    as logits they give the mixture, with no more positions at a time than those of one model.

    Args:
        members: the models; each reads the rows in turn.
        weights: positive, with a sum of 1; one per member.
        device: where the members compute.
        vocab_size: tokens of the student's tokenizer.
        temperature: divides the members' logits.

    Raises:
        ValueError: the weights are none.
    """

    def __init__(
        self,
        members: Sequence[LocalTeacher],
        weights: Sequence[float],
        *,
        device: torch.device,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(mixture_name(members, weights), device, vocab_size, temperature)
        self._members = members
        self._log_weights = log_weights(members, weights)

    def rows(self, trajectories: Sequence[Trajectory]) -> list[Row]:
        """See ``LogitsTeacher``; all members read the same, and each must have room for it."""
        rows, *_ = [member.rows(trajectories) for member in self._members]
        return rows

    def hidden(self, rows: Sequence[Row]) -> Tensor:
        """See ``LogitsTeacher``."""
        return torch.cat([member.hidden(rows) for member in self._members], dim=1)

    @contextmanager
    def head(self) -> Iterator[Head]:
        """See ``LogitsTeacher``."""
        widths = [member.width for member in self._members]
        with ExitStack() as stack:
            heads = [stack.enter_context(member.head()) for member in self._members]

            def head(hidden_NH: Tensor) -> Tensor:
                weighted = (
                    log_softmax(one(part_NH), self._temperature, None) + log_weight
                    for one, part_NH, log_weight in zip(
                        heads, torch.split(hidden_NH, widths, dim=1), self._log_weights, strict=True
                    )
                )
                return reduce(torch.logaddexp, weighted) * self._temperature

            yield head


def mixture_name(members: Sequence[Teacher], weights: Sequence[float]) -> str:
    """Such as ``0.7 × mathematician + 0.3 × searcher``."""
    return " + ".join(f"{weight:g} × {member.name}" for member, weight in zip(members, weights, strict=True))


def log_weights(members: Sequence[Teacher], weights: Sequence[float]) -> list[float]:
    """Logs of the weights.

    Raises:
        ValueError: a weight is not positive, or they do not add up to 1.
    """
    if not weights or any(not weight > 0 for weight in weights) or abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(f"{mixture_name(members, weights)}: weights must be positive and add up to 1")
    return [math.log(weight) for weight in weights]
