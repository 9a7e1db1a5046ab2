"""What the teacher says about a micro-batch's tokens: a log-prob each, its top k, or the whole vocabulary.

A source asks the teacher for what it needs, once per update, and compares both models per micro-batch::

    source = make_source(settings.objective, teacher, divergence, vocab_size, temperature)
    source.begin(trajectories)                          # the teacher reads the episodes
    signal = source(batch, hidden_NH, head)
    signal.logprobs_N, signal.teacher_logprobs_N
    source.end()                                        # after the update

Test it alone: ``pytest tests/trainer/learn/test_teacher_signal.py``
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from opd_env.episode.trajectory import Trajectory
from opd_env.trainer.batch import Head, MicroBatch
from opd_env.trainer.learn.settings import ObjectiveSettings
from opd_env.trainer.math.divergences import Divergence
from opd_env.trainer.math.logprobs import full_divergence, positions_per_chunk, token_logprobs, topk_divergence
from opd_env.trainer.math.modes import Baseline, Estimator
from opd_env.trainer.teachers.base import LogitsTeacher, Teacher, TopKTeacher, by_trajectory
from opd_env.trainer.teachers.cross_tokenizer import CrossTokenizerTeacher

AnyTeacher = TypeVar("AnyTeacher", bound=Teacher)


@dataclass(frozen=True, eq=False)
class TeacherSignal:
    """Student and teacher at N sampled tokens. All but ``logprobs_N`` and ``loss_N`` are detached."""

    logprobs_N: Tensor
    """The student's, with gradient."""
    teacher_logprobs_N: Tensor
    entropy_N: Tensor
    """The student's, in nats."""
    kl_N: Tensor | None = None
    """KL(student || teacher) at the prefix, where the teacher's whole distribution is known."""
    loss_N: Tensor | None = None
    """The divergence over all outcomes (all tokens, or top k and tail); its gradient is the update."""
    baseline_N: Tensor | None = None
    """``E_p[w_f(u)]`` over the same outcomes."""
    span_N: Tensor | None = None
    """Tokens of the same span are one outcome, with the sum of their log-ratios; None: every token is one."""


class Source(ABC, Generic[AnyTeacher]):
    """Where the signal comes from.

    Args:
        objective: its mode, ``topk_tokens`` and ``clip_log_ratio`` count.
        teacher: what to ask.
        divergence: between the two models.
        vocab_size: tokens of the student's tokenizer.
        temperature: at which both models are read.
    """

    def __init__(
        self,
        objective: ObjectiveSettings,
        teacher: AnyTeacher,
        divergence: Divergence,
        vocab_size: int,
        temperature: float,
    ) -> None:
        self._objective = objective
        self._teacher = teacher
        self._divergence = divergence
        self._temperature = temperature
        self._chunk_size = positions_per_chunk(vocab_size)

    @abstractmethod
    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        """The teacher reads an update's episodes."""

    def end(self) -> None:
        """Lets go what the teacher holds for the update."""

    @abstractmethod
    def __call__(self, batch: MicroBatch, hidden_NH: Tensor, head: Head) -> TeacherSignal:
        """Compares at a micro-batch's sampled tokens."""


class SampledSource(Source[AnyTeacher]):
    """One log-prob of the teacher per sampled token."""

    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        self._teacher_N = self._teacher.score(trajectories)
        by_trajectory(self._teacher, trajectories, self._teacher_N)  # one per sampled token, or an error

    def __call__(self, batch: MicroBatch, hidden_NH: Tensor, head: Head) -> TeacherSignal:
        scores = token_logprobs(
            hidden_NH, head, batch.targets_N, temperature=self._temperature, chunk_size=self._chunk_size
        )
        teacher_N = self._teacher_N[batch.index_N].to(hidden_NH.device)
        return TeacherSignal(scores.logprobs_N, teacher_N, scores.entropy_N)


class SpanSource(SampledSource[CrossTokenizerTeacher]):
    """One log-prob of a teacher with another tokenizer per span of sampled tokens."""

    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        scores = self._teacher.score_spans(trajectories)
        self._teacher_N, self._span_N = scores.logprobs_N, scores.span_N

    def __call__(self, batch: MicroBatch, hidden_NH: Tensor, head: Head) -> TeacherSignal:
        signal = super().__call__(batch, hidden_NH, head)
        return replace(signal, span_N=self._span_N[batch.index_N].to(hidden_NH.device))


class TopKSource(Source[TopKTeacher]):
    """The teacher's k most likely tokens and a bucket for the rest."""

    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        self._top = self._teacher.score_topk(trajectories, self._objective.topk_tokens)
        by_trajectory(self._teacher, trajectories, self._top.logprobs_N)  # one per sampled token, or an error

    def __call__(self, batch: MicroBatch, hidden_NH: Tensor, head: Head) -> TeacherSignal:
        objective, top, device = self._objective, self._top, hidden_NH.device
        scores = topk_divergence(
            hidden_NH,
            head,
            top.topk_ids_NK[batch.index_N].to(device),
            top.topk_logprobs_NK[batch.index_N].to(device),
            self._divergence,
            objective.mode,
            token_ids_N=batch.targets_N,
            temperature=self._temperature,
            clip_log_ratio=objective.clip_log_ratio,
            chunk_size=self._chunk_size,
        )
        if scores.logprobs_N is None:
            raise TypeError("topk_divergence gave no scores of the sampled tokens")
        return TeacherSignal(
            scores.logprobs_N,
            top.logprobs_N[batch.index_N].to(device),
            scores.entropy_N,
            loss_N=scores.loss_N,
            baseline_N=scores.baseline_N,
        )


class FullSource(Source[LogitsTeacher]):
    """The whole vocabulary: the teacher's hidden states of an update are kept, its logits made beside the student's."""

    _open = ExitStack()  # nothing is held before the first ``begin``

    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        self.end()
        self._hidden_NH = self._teacher.hidden(self._teacher.rows(trajectories))
        self._open = ExitStack()
        self._head = self._open.enter_context(self._teacher.head())  # its weights stay at hand until ``end``

    def end(self) -> None:
        self._open.close()

    def __call__(self, batch: MicroBatch, hidden_NH: Tensor, head: Head) -> TeacherSignal:
        objective = self._objective
        scores = full_divergence(
            hidden_NH,
            head,
            self._hidden_NH[batch.index_N].to(hidden_NH.device),
            self._head,
            self._divergence,
            objective.mode,
            token_ids_N=batch.targets_N,
            temperature=self._temperature,
            clip_log_ratio=objective.clip_log_ratio,
            chunk_size=self._chunk_size,
        )
        if scores.logprobs_N is None or scores.log_ratio_N is None:
            raise TypeError("full_divergence gave no scores of the sampled tokens")
        return TeacherSignal(
            scores.logprobs_N,
            scores.logprobs_N.detach() + scores.log_ratio_N,
            scores.entropy_N,
            scores.teacher_kl_N,
            scores.loss_N,
            scores.baseline_N,
        )


def make_source(
    objective: ObjectiveSettings, teacher: Teacher, divergence: Divergence, vocab_size: int, temperature: float
) -> Source[Any]:
    """The cheapest source that gives what the estimator and the baseline need.

    Raises:
        ValueError: the teacher cannot give it.
    """
    if isinstance(teacher, CrossTokenizerTeacher):
        return SpanSource(objective, teacher, divergence, vocab_size, temperature)
    if objective.estimator is Estimator.SAMPLED and objective.baseline is Baseline.NONE:
        return SampledSource(objective, teacher, divergence, vocab_size, temperature)
    if isinstance(teacher, LogitsTeacher) and objective.estimator is not Estimator.TOPK:
        return FullSource(objective, teacher, divergence, vocab_size, temperature)
    if isinstance(teacher, TopKTeacher) and objective.estimator is not Estimator.FULL:
        if objective.topk_tokens > vocab_size:
            raise ValueError(f"topk_tokens={objective.topk_tokens} is more than the vocabulary of {vocab_size} tokens")
        return TopKSource(objective, teacher, divergence, vocab_size, temperature)
    if objective.estimator is Estimator.FULL:
        raise ValueError(
            f"estimator=full needs a teacher in this process, {teacher.name} does not give its logits; set "
            "estimator=sampled, or estimator=topk if it gives its most likely tokens"
        )
    option = "estimator=topk" if objective.estimator is Estimator.TOPK else "baseline=value"
    raise ValueError(
        f"{option} needs a teacher that gives its most likely tokens, {teacher.name} gives one log-prob per token; "
        "set estimator=sampled and baseline=none"
    )
