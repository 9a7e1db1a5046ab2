"""The OPD objective: what a micro-batch of the student's own tokens contributes to the loss.

``sampled`` weighs every sampled token by its advantage; ``full`` and ``topk`` sum over what could have been sampled at
every prefix. A task reward can be added, or stand alone. What the metrics need is noted per token::

    objective = OPDObjective(config.objective, teacher, chat.vocab_size, temperature=1.0, samples_per_problem=4)
    objective.begin(trajectories)            # the teacher reads them
    updater.update(objective.rows, objective)
    objective.end()
    objective.tokens.kl_N

Test it alone: ``pytest tests/trainer/learn/test_objective.py``
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.trainer.batch import Head, MicroBatch, Row, rows_of
from opd_env.trainer.learn.settings import ObjectiveSettings
from opd_env.trainer.learn.teacher_signal import TeacherSignal, make_source
from opd_env.trainer.learn.token_weights import Scheme, scheme_weights
from opd_env.trainer.math.advantages import advantage, group_relative
from opd_env.trainer.math.divergences import get_divergence
from opd_env.trainer.math.loss import mean_loss, policy_loss, scaled
from opd_env.trainer.math.modes import Baseline, Estimator, RatioPolicy
from opd_env.trainer.teachers.base import Teacher


@dataclass(frozen=True, eq=False)
class TokenValues:
    """Numbers per sampled token, float32 on the CPU, in the order of the trajectories."""

    behaviour_logprobs_N: Tensor
    """As recorded when the token was sampled."""
    logprobs_N: Tensor
    """Of the student as it was at the token's update."""
    log_ratio_N: Tensor
    """log u = teacher - student; with a teacher of another tokenizer, of the whole span that the token is in."""
    kl_N: Tensor
    """KL(student || teacher): exact where the teacher's logits are at hand, else its unbiased estimate -log u (of a
    span, in equal shares)."""
    entropy_N: Tensor
    """Of the student's distribution, in nats."""
    advantages_N: Tensor
    """At the sampled token, the reward's share included. Of the divergence's share, ``full`` and ``topk`` use the sum
    over all outcomes instead."""
    weights_N: Tensor
    """How much the divergence counts at the token, ``divergence_coefficient`` included."""

    @classmethod
    def joined(cls, parts: Sequence[TokenValues]) -> TokenValues:
        """Several in a row."""
        return cls(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(cls)))


class OPDObjective:
    """The loss of one step's trajectories, micro-batch by micro-batch.

    Args:
        settings: divergence, mode, estimator and their options.
        teacher: scores the tokens; ``full`` needs a ``LogitsTeacher``, ``topk`` a ``TopKTeacher``.
        vocab_size: tokens of the student's tokenizer.
        temperature: at which the tokens were sampled, and both models are read.
        samples_per_problem: episodes whose rewards are compared with each other.

    Raises:
        ValueError: the divergence is unknown, or the teacher cannot do what the estimator needs.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        teacher: Teacher,
        vocab_size: int,
        *,
        temperature: float = 1.0,
        samples_per_problem: int = 1,
    ) -> None:
        self._settings = settings
        self._samples = samples_per_problem
        self._divergence = get_divergence(settings.divergence, **settings.divergence_options)
        self._source = make_source(settings, teacher, self._divergence, vocab_size, temperature)
        self.teacher_seconds = 0.0
        """What the teacher took in ``begin``."""
        self.rows: list[Row] = []

    def begin(self, trajectories: Sequence[Trajectory], progress: float = 1.0) -> None:
        """Takes up the trajectories of an update; the teacher reads them.

        Args:
            trajectories: all samples of a problem together.
            progress: share of the run that is done, 0 to 1.
        """
        started = time.perf_counter()
        # Tokens of an episode bear on each other's weights and advantages, across its rows, or not at all.
        together = self._settings.gamma > 0 or self._settings.weight_scheme is not Scheme.NONE
        self.rows = [
            row
            for number, trajectory in enumerate(trajectories)
            for row in rows_of(trajectory, episode=number if together else None)
        ]
        self._source.begin(trajectories)
        self._progress = progress
        self._rewards_N = self._rewards(trajectories)
        self._weights_N = _joined(np.float32, [self._settings.token_weights.of_tokens(one) for one in trajectories])
        self._turn_N = _joined(np.int64, [one.turn[one.sampled] for one in trajectories])
        behaviour_N = _joined(np.float32, [one.logprobs[one.sampled] for one in trajectories])
        empty = (torch.full_like(behaviour_N, torch.nan) for _ in range(6))
        self.tokens = TokenValues(behaviour_N, *empty)
        self.teacher_seconds = time.perf_counter() - started

    def end(self) -> None:
        """The update is done or has failed: what the teacher holds for it is let go."""
        self._source.end()

    def __call__(self, batch: MicroBatch, hidden_NH: Tensor, head: Head, num_tokens: float) -> Tensor:
        """The micro-batch's share of the loss, a scalar (``update.Objective``)."""
        settings = self._settings
        signal = self._source(batch, hidden_NH, head)
        logprobs_N = signal.logprobs_N
        behaviour_N = self.tokens.behaviour_logprobs_N[batch.index_N].to(logprobs_N.device)
        sums = settings.estimator is not Estimator.SAMPLED
        frozen = settings.ratio_policy is RatioPolicy.ROLLOUT and not sums
        log_ratio_N = signal.teacher_logprobs_N - (behaviour_N if frozen else logprobs_N.detach())
        kl_N = -log_ratio_N if signal.kl_N is None else signal.kl_N
        if signal.span_N is not None:
            log_ratio_N = sums_by_span(log_ratio_N, signal.span_N)
        weights_N = self._weights(batch, log_ratio_N)
        distilled_N = self._advantages(batch, log_ratio_N, signal, weights_N)
        rewarded_N = self._rewards_N[batch.index_N].to(logprobs_N)
        self._note(batch, signal, log_ratio_N, kl_N, distilled_N + rewarded_N, weights_N)
        loss = torch.zeros((), device=logprobs_N.device)
        if not sums or settings.reward_coefficient > 0:
            loss = policy_loss(
                logprobs_N,
                behaviour_N,
                rewarded_N if sums else distilled_N + rewarded_N,
                torch.ones_like(logprobs_N, dtype=torch.bool),
                num_tokens,
                clip_ratio=settings.clip_ratio,
                truncate_weight=settings.truncate_weight,
            )
        if signal.loss_N is not None and sums and settings.divergence_coefficient > 0:
            loss = loss + mean_loss(scaled(signal.loss_N, weights_N), num_tokens)
        return loss

    def _weights(self, batch: MicroBatch, log_ratio_N: Tensor) -> Tensor:
        """How much the divergence at each token counts."""
        settings, device = self._settings, log_ratio_N.device
        log_ratio_BS, mask_BS = batch.by_episode(log_ratio_N)
        turn_BS, _ = batch.by_episode(self._turn_N[batch.index_N].to(device))
        scheme_N = scheme_weights(settings.weight_scheme, log_ratio_BS, turn_BS, mask_BS, self._progress)[mask_BS]
        return settings.divergence_coefficient * self._weights_N[batch.index_N].to(scheme_N) * scheme_N

    def _advantages(self, batch: MicroBatch, log_ratio_N: Tensor, signal: TeacherSignal, weights_N: Tensor) -> Tensor:
        """The divergence's share of every token's advantage."""
        settings = self._settings
        log_ratio_BS, mask_BS = batch.by_episode(log_ratio_N)
        baseline_BS = None
        if settings.baseline is Baseline.VALUE and signal.baseline_N is not None:
            baseline_BS, _ = batch.by_episode(signal.baseline_N)
        advantages_BS = advantage(
            log_ratio_BS,
            self._divergence,
            settings.mode,
            gamma=settings.gamma,
            mask=mask_BS,
            baseline=baseline_BS,
            weights=batch.by_episode(weights_N)[0],
            clip_log_ratio=settings.clip_log_ratio,
        )
        return advantages_BS[mask_BS]

    def _rewards(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """The reward's share of every token's advantage: the same for all tokens of an episode."""
        samples = self._samples
        numbers: dict[tuple[str, int], int] = {}
        groups = [numbers.setdefault((one.example_id, one.sample // samples), len(numbers)) for one in trajectories]
        rewards_E = torch.tensor([float(one.correct) for one in trajectories])
        relative_E = group_relative(rewards_E, torch.tensor(groups, dtype=torch.int64))
        counts_E = torch.tensor([one.num_sampled for one in trajectories], dtype=torch.int64)
        return self._settings.reward_coefficient * relative_E.repeat_interleave(counts_E)

    def _note(self, batch: MicroBatch, signal: TeacherSignal, *others: Tensor) -> None:
        tokens = self.tokens
        for name, value_N in zip(
            ("logprobs_N", "entropy_N", "log_ratio_N", "kl_N", "advantages_N", "weights_N"),
            (signal.logprobs_N, signal.entropy_N, *others),
            strict=True,
        ):
            getattr(tokens, name)[batch.index_N] = value_N.detach().float().cpu()


def sums_by_span(values_N: Tensor, span_N: Tensor) -> Tensor:
    """For each token the sum over its span, whose tokens stand in a row or apart."""
    span_N = torch.unique(span_N, return_inverse=True)[1]
    return values_N.new_zeros(len(values_N)).index_add(0, span_N, values_N)[span_N]


def _joined(dtype: type[Any], parts: Sequence[NDArray[Any]]) -> Tensor:
    """Arrays per trajectory as one tensor, also when there is none."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype))
