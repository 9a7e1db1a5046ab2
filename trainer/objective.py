"""The OPD objective: what a micro-batch of the student's own tokens contributes to the loss.

``sampled`` weighs every sampled token by its advantage (one teacher log-prob per token); ``full`` sums over the
vocabulary at every prefix (a local teacher's hidden states). Both see the same batches, and note per token what
the metrics need::

    objective = OPDObjective(config, teacher)
    objective.begin(trajectories)            # the teacher scores here (sampled)
    updater.update(objective.rows, objective)
    objective.tokens.kl_N

Test it alone: ``pytest tests/trainer/test_objective.py``
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from opd_env.trainer.advantages import advantage
from opd_env.trainer.batch import Head, MicroBatch, Row, make_batch, row_of
from opd_env.trainer.config import OPDConfig, RatioPolicy
from opd_env.trainer.divergences import get_divergence
from opd_env.trainer.logprobs import full_divergence, positions_per_chunk, token_logprobs
from opd_env.trainer.loss import mean_loss, policy_loss
from opd_env.trainer.modes import Estimator
from opd_env.trainer.teachers import LocalTeacher, Teacher
from opd_env.trainer.update import TrainingError
from opd_env.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class TokenValues:
    """Numbers per sampled token, float32 on the CPU, in the order of the trajectories."""

    behaviour_logprobs_N: Tensor
    """As recorded when the token was sampled."""
    logprobs_N: Tensor
    """Of the student as it was at the token's update."""
    log_ratio_N: Tensor
    """log u = teacher - student."""
    kl_N: Tensor
    """KL(student || teacher): exact with ``full``; with ``sampled`` its unbiased estimate -log u."""
    entropy_N: Tensor
    """Of the student's distribution, in nats."""
    advantages_N: Tensor
    """At the sampled token. With ``full`` they are shown, not used."""

    @classmethod
    def joined(cls, parts: Sequence[TokenValues]) -> TokenValues:
        """Several in a row."""
        return cls(**{one.name: torch.cat([getattr(part, one.name) for part in parts]) for one in fields(cls)})


class OPDObjective:
    """The loss of one step's trajectories, micro-batch by micro-batch.

    Args:
        config: divergence, mode, estimator and their options.
        teacher: scores the tokens; the ``full`` estimator needs a ``LocalTeacher``.
        vocab_size: tokens of the student's tokenizer.

    Raises:
        ValueError: the divergence is unknown, or the teacher cannot do what the estimator needs.
    """

    def __init__(self, config: OPDConfig, teacher: Teacher, vocab_size: int) -> None:
        self._config = config
        self._divergence = get_divergence(config.divergence, **config.divergence_options)
        self._teacher = teacher
        if config.estimator is Estimator.FULL and not isinstance(teacher, LocalTeacher):
            raise ValueError(
                f"estimator=full needs a teacher in this process, {teacher.name} gives one log-prob per token; set "
                "estimator=sampled"
            )
        self._chunk_size = positions_per_chunk(vocab_size)
        self.teacher_seconds = 0.0
        self.rows: list[Row] = []

    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        """Takes up the trajectories of a step; with ``sampled`` the teacher scores them now."""
        started = time.perf_counter()
        self.rows = [row_of(trajectory) for trajectory in trajectories]
        behaviour = [trajectory.logprobs[trajectory.sampled] for trajectory in trajectories]
        behaviour_N = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *behaviour]))
        if isinstance(self._teacher, LocalTeacher) and self._config.estimator is Estimator.FULL:
            self._teacher_rows = self._teacher.rows(trajectories)
            teacher_N = torch.zeros_like(behaviour_N)
        else:
            teacher_N = self._teacher.score(trajectories)
            if teacher_N.shape != behaviour_N.shape:
                raise TrainingError(
                    f"the teacher {self._teacher.name} gave {tuple(teacher_N.shape)} log-probs for "
                    f"{len(behaviour_N)} sampled tokens"
                )
        self._teacher_N = teacher_N
        empty = (torch.full_like(behaviour_N, torch.nan) for _ in range(5))
        self.tokens = TokenValues(behaviour_N, *empty)
        self.teacher_seconds = time.perf_counter() - started

    def __call__(self, batch: MicroBatch, hidden_NH: Tensor, head: Head, num_tokens: float) -> Tensor:
        """The micro-batch's share of the loss, a scalar; see ``Objective``."""
        if self._config.estimator is Estimator.FULL:
            return self._full(batch, hidden_NH, head, num_tokens)
        return self._sampled(batch, hidden_NH, head, num_tokens)

    def _sampled(self, batch: MicroBatch, hidden_NH: Tensor, head: Head, num_tokens: float) -> Tensor:
        config = self._config
        scores = token_logprobs(
            hidden_NH, head, batch.targets_N, temperature=config.temperature, chunk_size=self._chunk_size
        )
        logprobs_N = scores.logprobs_N
        behaviour_N = self.tokens.behaviour_logprobs_N[batch.index_N].to(logprobs_N.device)
        student_N = behaviour_N if config.ratio_policy is RatioPolicy.ROLLOUT else logprobs_N.detach()
        log_ratio_N = self._teacher_N[batch.index_N].to(logprobs_N.device) - student_N
        advantages_N = self._advantages(batch, log_ratio_N)
        self._note(batch, logprobs_N, log_ratio_N, -log_ratio_N, scores.entropy_N, advantages_N)
        return policy_loss(
            logprobs_N,
            behaviour_N,
            advantages_N,
            torch.ones_like(advantages_N, dtype=torch.bool),
            num_tokens,
            clip_ratio=config.clip_ratio,
            truncate_weight=config.truncate_weight,
        )

    def _full(self, batch: MicroBatch, hidden_NH: Tensor, head: Head, num_tokens: float) -> Tensor:
        config, teacher = self._config, self._teacher
        if not isinstance(teacher, LocalTeacher):
            raise TypeError(f"estimator=full needs a LocalTeacher, got {type(teacher).__name__}")
        started = time.perf_counter()
        teacher_hidden_NH = teacher.hidden(make_batch(self._teacher_rows, batch.rows)).to(hidden_NH.device)
        self.teacher_seconds += time.perf_counter() - started
        scores = full_divergence(
            hidden_NH,
            head,
            teacher_hidden_NH,
            teacher.head,
            self._divergence,
            config.mode,
            token_ids_N=batch.targets_N,
            temperature=config.temperature,
            clip_log_ratio=config.clip_log_ratio,
            chunk_size=self._chunk_size,
        )
        if scores.logprobs_N is None or scores.log_ratio_N is None:
            raise TypeError("full_divergence gave no scores of the sampled tokens")
        advantages_N = self._advantages(batch, scores.log_ratio_N)
        self._note(batch, scores.logprobs_N, scores.log_ratio_N, scores.teacher_kl_N, scores.entropy_N, advantages_N)
        return mean_loss(scores.loss_N, num_tokens)

    def _advantages(self, batch: MicroBatch, log_ratio_N: Tensor) -> Tensor:
        config = self._config
        log_ratio_BS, mask_BS = batch.by_row(log_ratio_N)
        advantages_BS = advantage(
            log_ratio_BS,
            self._divergence,
            config.mode,
            gamma=config.gamma,
            mask=mask_BS,
            clip_log_ratio=config.clip_log_ratio,
        )
        return advantages_BS[mask_BS]

    def _note(self, batch: MicroBatch, *values: Tensor) -> None:
        tokens = self.tokens
        places = (tokens.logprobs_N, tokens.log_ratio_N, tokens.kl_N, tokens.entropy_N, tokens.advantages_N)
        for place_N, value_N in zip(places, values, strict=True):
            place_N[batch.index_N] = value_N.detach().float().cpu()
