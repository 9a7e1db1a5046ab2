"""Teachers: what scores the tokens that the student sampled.

Worked example::

    teacher = LocalTeacher(load_model("packaged:teacher"), vocab_size=chat.vocab_size)
    logprobs_N = teacher.score(trajectories)                          # one per sampled token, in order

A teacher reads exactly the token ids that the student read and wrote. With ``prompt`` it reads another opening
prompt (worked demonstrations, say) before the same turns: self-distillation with a privileged context. Its weights
may rest in CPU memory: then the accelerator holds a copy only while it scores (``on_device``).

Test it alone: ``pytest tests/trainer/teachers/test_base.py tests/trainer/teachers/test_offload.py``
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from opd_env.engines.base import Engine
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import LoadedModel
from opd_env.episode.trajectory import Trajectory
from opd_env.errors import TrainingError
from opd_env.formats import ChatFormat
from opd_env.trainer.batch import Head, PolicyModule, Row, num_sampled, pack, rows_of
from opd_env.trainer.math.logprobs import TopKScores, positions_per_chunk, token_logprobs, topk_logprobs
from opd_env.trainer.teachers.fits import context_length

Scores = tuple[Tensor, ...]
"""Log-probs of sampled tokens; with a k also ids and log-probs of the k most likely tokens, as in ``TopKScores``."""
Prompt = Callable[[Trajectory], Sequence[Sequence[int]]]
"""For each row of an episode, the token ids that a teacher reads before the first sampled token, instead of the
student's."""


class Teacher(Protocol):
    """Scores sampled tokens. All that the ``sampled`` estimator needs."""

    name: str

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Natural log-probs of the sampled tokens, float32 on the CPU, shape ``[N]``.

        Their order is that of ``trajectories``, then of the tokens in each. ``-inf`` where the teacher forbids
        the token. Every trajectory gets exactly ``trajectory.num_sampled`` values.
        """
        ...


@runtime_checkable
class TopKTeacher(Teacher, Protocol):
    """A teacher that also tells which tokens it likes most: what the ``topk`` estimator needs."""

    def score_topk(self, trajectories: Sequence[Trajectory], k: int) -> TopKScores:
        """The sampled tokens' log-probs as ``score`` gives them, and the k most likely tokens at each; on the CPU."""
        ...


class LogitsTeacher(ABC):
    """A teacher in this process that knows its whole distribution at every prefix: what the ``full`` estimator needs.

    Its hidden states are computed first, for all rows; then its head makes logits of a few positions at a time.

    Args:
        name: of the teacher, for messages.
        device: where it computes.
        vocab_size: tokens of the student's tokenizer.
        temperature: divides the logits; the temperature at which the student samples.
    """

    def __init__(self, name: str, device: torch.device, vocab_size: int, temperature: float) -> None:
        self.name = name
        self._device = device
        self._temperature = temperature
        self._chunk_size = positions_per_chunk(vocab_size)

    @abstractmethod
    def rows(self, trajectories: Sequence[Trajectory]) -> list[Row]:
        """The trajectories as this teacher reads them.

        Raises:
            ValueError: a row is longer than the teacher's context.
        """

    @abstractmethod
    def hidden(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states ``[N, H]`` that predict the rows' sampled tokens, on the CPU."""

    @abstractmethod
    def head(self) -> AbstractContextManager[Head]:
        """Hidden states ``[N, H]`` to logits ``[N, vocab_size]``; within, its weights are where it computes."""

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        return self.score_rows(self.rows(trajectories))

    def score_rows(self, rows: Sequence[Row]) -> Tensor:
        """Log-probs of the tokens that rows mark as sampled, as ``score`` gives them."""

        def score(hidden_CH: Tensor, ids_C: Tensor, head: Head) -> Scores:
            scores = token_logprobs(hidden_CH, head, ids_C, temperature=self._temperature, chunk_size=len(ids_C))
            return (scores.logprobs_N.float(),)

        return self._in_chunks(rows, score, torch.empty(0))[0]

    def score_topk(self, trajectories: Sequence[Trajectory], k: int) -> TopKScores:

        def score(hidden_CH: Tensor, ids_C: Tensor, head: Head) -> Scores:
            top = topk_logprobs(hidden_CH, head, ids_C, k, temperature=self._temperature, chunk_size=len(ids_C))
            return top.logprobs_N.float(), top.topk_ids_NK, top.topk_logprobs_NK.float()

        none = torch.empty(0), torch.empty(0, k, dtype=torch.int64), torch.empty(0, k)
        return TopKScores(*self._in_chunks(self.rows(trajectories), score, *none))

    @torch.no_grad()
    def _in_chunks(self, rows: Sequence[Row], score: Callable[[Tensor, Tensor, Head], Scores], *none: Tensor) -> Scores:
        """What ``score`` makes of a few positions at a time, joined on the CPU; ``none`` if there are no positions."""
        if not num_sampled(rows):
            return none
        targets_N = torch.from_numpy(np.concatenate([row.token_ids_T[row.sampled_T] for row in rows])).long()
        chunks = zip(*(torch.split(column, self._chunk_size) for column in (self.hidden(rows), targets_N)), strict=True)
        with self.head() as head:
            parts = [
                tuple(column.cpu() for column in score(hidden_CH.to(self._device), ids_C.to(self._device), head))
                for hidden_CH, ids_C in chunks
            ]
        return joined(parts)


class LocalTeacher(LogitsTeacher):
    """A frozen causal language model in this process.

    Args:
        loaded: the model and its tokenizer. Its parameters are frozen.
        vocab_size: tokens of the student's tokenizer; the head's padding beyond it gets no probability.
        temperature: divides the logits; the temperature at which the student samples.
        tokens_per_microbatch: padded tokens in one forward pass.
        prompt: gives the prompt to read instead of the student's own; None keeps that.
        device: where it computes; None: where its weights are. If they are elsewhere, they are copied there when it
            scores, and the copy is then let go.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        tokens_per_microbatch: int = 16384,
        prompt: Prompt | None = None,
        device: torch.device | None = None,
    ) -> None:
        device = device or next(loaded.model.parameters()).device
        super().__init__(loaded.name, device, vocab_size, temperature)
        self.loaded = loaded
        self._tokens_per_microbatch = tokens_per_microbatch
        self._prompt = prompt
        loaded.model.requires_grad_(False)
        self._policy = PolicyModule(loaded.model, vocab_size).eval()
        self._output = loaded.model.get_output_embeddings()
        self._context = context_length(loaded)
        _pin(loaded.model, device)

    @property
    def width(self) -> int:
        """Size H of a hidden state."""
        return int(self._output.weight.shape[1])

    def rows(self, trajectories: Sequence[Trajectory]) -> list[Row]:
        rows = []
        for trajectory in trajectories:
            for row in rows_of(trajectory, None if self._prompt is None else self._prompt(trajectory)):
                self.require_room(row, trajectory)
                rows.append(row)
        return rows

    def require_room(self, row: Row, trajectory: Trajectory) -> None:
        """Refuses a row that is longer than the model's context, with a ``ValueError``."""
        if len(row.token_ids_T) > self._context:
            raise ValueError(
                f"the teacher {self.name} reads {self._context} tokens at most, but the episode of "
                f"{trajectory.task}/{trajectory.example_id} has {len(row.token_ids_T)} with the teacher's "
                "prompt; lower sampling.limits.max_tokens or teacher.demonstrations"
            )

    @torch.no_grad()
    def hidden(self, rows: Sequence[Row]) -> Tensor:
        found_NH = torch.empty(num_sampled(rows), self.width, dtype=self._output.weight.dtype)
        with on_device(self.loaded.model, self._device):
            for batch in pack(rows, self._tokens_per_microbatch):
                hidden_NH: Tensor = self._policy(batch.to(self._device), lambda hidden_NH, head: hidden_NH)
                found_NH[batch.index_N] = hidden_NH.to(found_NH)
        return found_NH

    @contextmanager
    def head(self) -> Iterator[Head]:
        with on_device(self._output, self._device):
            yield self._policy.head

    @contextmanager
    def player(self, chat: ChatFormat, capacity: int) -> Iterator[Engine]:
        """An engine with which the teacher plays episodes itself."""
        with on_device(self.loaded.model, self._device):
            yield LocalEngine(self.loaded.model, chat.stop_token_ids, chat.vocab_size, capacity)


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, all parameters and buffers are on ``device``; then they are again what they were, also after an error.

    Frozen weights do not change, so the ones that rested are simply taken up again; nothing is copied back. Weights
    that are there already stay, so that contexts may be nested.
    """
    resting = [(tensor, tensor.data) for tensor in _tensors(module)]
    try:
        for tensor, data in resting:
            tensor.data = _copied(data, device)
        yield
    finally:
        for tensor, data in resting:
            tensor.data = data


def _pin(module: nn.Module, device: torch.device) -> None:
    """Moves weights in CPU memory to pages from which a GPU copies without a detour."""
    if device.type == "cuda":
        for tensor in _tensors(module):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.pin_memory()


def _copied(data: Tensor, device: torch.device) -> Tensor:
    return data.to(device, non_blocking=True)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Each once, also where weights are tied."""
    return list({id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}.values())


def by_trajectory(teacher: Teacher, trajectories: Sequence[Trajectory], values_N: Tensor) -> tuple[Tensor, ...]:
    """Values of sampled tokens, split by the trajectories that they are of.

    Raises:
        TrainingError: the teacher did not give one per sampled token.
    """
    counts = [trajectory.num_sampled for trajectory in trajectories]
    if len(values_N) != sum(counts):
        raise TrainingError(
            f"the teacher {teacher.name} gave {len(values_N)} log-probs for {sum(counts)} sampled tokens"
        )
    return torch.split(values_N, counts) if counts else (values_N,)


def scores_by_trajectory(teacher: Teacher, trajectories: Sequence[Trajectory], k: int | None) -> list[Scores]:
    """What a teacher says of each trajectory; of no trajectory: one entry without tokens, which shows the shapes.

    Args:
        teacher, trajectories: who scores what.
        k: asks for that many of the most likely tokens; None for log-probs of the sampled ones alone.

    Raises:
        TrainingError: k is given and the teacher gives one log-prob per token, or it lost tokens.
    """
    if k is None:
        columns: Scores = (teacher.score(trajectories),)
    elif isinstance(teacher, TopKTeacher):
        top = teacher.score_topk(trajectories, k)
        columns = (top.logprobs_N, top.topk_ids_NK, top.topk_logprobs_NK)
    else:
        raise TrainingError(f"the teacher {teacher.name} gives one log-prob per token; set estimator=sampled")
    return list(zip(*(by_trajectory(teacher, trajectories, column) for column in columns), strict=True))


def joined(scores: Iterable[Scores]) -> Scores:
    """The scores of several, in a row."""
    return tuple(torch.cat(column) for column in zip(*scores, strict=True))


def log_ratios(teacher: Teacher, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """Teacher minus student log-prob of every sampled token, by ``example_id/sample``, at most 99 either way."""
    scores = by_trajectory(teacher, trajectories, teacher.score(trajectories)) if trajectories else ()
    return {
        f"{played.example_id}/{played.sample}": [
            round(max(-99.0, min(99.0, ratio)), 4)
            for ratio in (score_N.numpy() - played.logprobs[played.sampled]).tolist()
        ]
        for played, score_N in zip(trajectories, scores, strict=True)
    }
