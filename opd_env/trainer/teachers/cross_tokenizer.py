"""A teacher of another model family: it reads the student's text in its own tokens and chat template.

Worked example::

    teacher = CrossTokenizerTeacher(load_model("gemma"), student_chat, ExampleFinder([task, eval_task]))
    teacher.score_spans(trajectories).span_N       # [0, 1, 1, 2, 2, 3, …]: tokens that are judged together

If the two families write calls differently, the teacher's prompt describes the tools as the student's format does,
because it has to judge calls in the student's syntax, and tool results come as user messages. Each turn is then the
student's text, cut by the teacher's tokenizer.
Both cuts share some boundaries; between two of them lies a *span* (``align``). With S and T the sums of the student's
and the teacher's log-probs over a span, log u = T - S, and the span is one outcome for the divergence: all its tokens
get the advantage of its log u. The end-of-turn tokens of the two are a span of their own.

What is approximate: T counts only the teacher's usual way to cut a span, which is a lower bound of its probability;
and where a span ends may depend on what follows it. Both vanish as the tokenizers agree: with equal ones every span is
one token, and the result is that of ``LocalTeacher``.

Test it alone: ``pytest tests/trainer/teachers/test_cross_tokenizer.py tests/trainer/teachers/test_spans.py``
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_env.engines.models import LoadedModel
from opd_env.episode.trajectory import Trajectory, TurnRecord
from opd_env.formats import TemplateFormat, get_format
from opd_env.formats.base import TokenKind
from opd_env.formats.token_text import Decoded
from opd_env.messages import tool_message, user
from opd_env.tools import Tool, Toolbox
from opd_env.trainer.batch import Row
from opd_env.trainer.teachers.base import LocalTeacher
from opd_env.trainer.teachers.prompts import ExampleFinder


class Aligned(NamedTuple):
    """Spans of one text, numbered from 0 in order."""

    student_N: NDArray[np.int64]
    """Span of each of the student's tokens; never falls."""
    teacher_M: NDArray[np.int64]
    """Span of each of the teacher's tokens; never falls."""
    num_spans: int


def align(student: Decoded, teacher: Decoded) -> Aligned:
    """Smallest stretches of a text that both tokenizers cut alike, of at least one token each::

        student  ["The", " answer", " is", " 4", "2", "."]
        teacher  ["The", " ans", "wer is", " 42", "."]
        spans     0      1         1        2     2    3          boundaries that both have: 3, 13, 16, 17

    Args:
        student: a turn as the student's tokens.
        teacher: the same text as the teacher's tokens. A tokenizer may put a space before it; one that changes it
            otherwise (by normalising Unicode, say) makes the whole turn one span.
    """
    ends_N, ends_M = _ends(student), _ends(teacher)
    shift = len(teacher.text) - len(student.text)
    if not teacher.text.endswith(student.text) or teacher.text[:shift].strip():
        return Aligned(np.zeros_like(ends_N), np.zeros_like(ends_M), 1)
    ends_M = np.maximum(ends_M - _WIDEST * shift, 0)
    shared = np.intersect1d(ends_N, ends_M)
    shared = shared[shared > 0]
    return Aligned(np.searchsorted(shared, ends_N), np.searchsorted(shared, ends_M), len(shared))


_WIDEST = 4
"""Bytes of the widest character."""


def _ends(decoded: Decoded) -> NDArray[np.int64]:
    """Where each token ends: the character, times 4, plus the byte within it. A byte that is not UTF-8 is a character
    of one byte here and U+FFFD, of three, in the teacher's text; so bytes alone would not match."""
    stops = decoded.byte_of_token[1:]
    chars = np.searchsorted(decoded.byte_of_char, stops, side="right") - 1
    return _WIDEST * chars + stops - decoded.byte_of_char[chars]


@dataclass(frozen=True, eq=False)
class SpanScores:
    """What a teacher of another tokenizer says about N sampled tokens; on the CPU."""

    logprobs_N: Tensor
    """Shares of the teacher's log-prob of each span, float32. They add up to it, and differ from the student's recorded
    log-probs by the same amount at every token of the span."""
    span_N: Tensor
    """Which span a token belongs to, int64; spans are counted over all trajectories and never cross turns."""


class _Reading(NamedTuple):
    """One trajectory as the teacher reads it."""

    rows: list[Row]
    student_span_N: NDArray[np.int64]
    teacher_span_M: NDArray[np.int64]
    """Span of each of the rows' sampled tokens."""
    num_spans: int


class CrossTokenizerTeacher:
    """A frozen causal language model in this process with a tokenizer of its own.

    Args:
        loaded: the model and its tokenizer, which needs a chat template.
        student_chat: the student's format.
        find: gives the problem of a trajectory.
        tools: those of the run, when it does not offer the task's own.
        temperature: divides the logits; the temperature at which the student samples.
        tokens_per_microbatch: padded tokens in one forward pass.
        device: where it computes, as for ``LocalTeacher``.

    Raises:
        ValueError: the teacher's tokenizer has no chat template that can be followed, or the families write calls
            differently and the student's format has no text that describes its own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        student_chat: TemplateFormat,
        find: ExampleFinder,
        tools: Sequence[str | Tool] | None = None,
        *,
        temperature: float = 1.0,
        tokens_per_microbatch: int = 16384,
        device: torch.device | None = None,
    ) -> None:
        self.name = loaded.name
        self.chat = get_format(loaded.tokenizer, repair=student_chat.repair)
        self._same_calls = self.chat.name == student_chat.name
        if not self._same_calls:
            student_chat.describe_tools([user("?")], [])
        self.local = LocalTeacher(
            loaded,
            vocab_size=self.chat.vocab_size,
            temperature=temperature,
            tokens_per_microbatch=tokens_per_microbatch,
            device=device,
        )
        self._student_chat = student_chat
        self._find = find
        self._tools = tools

    def score(self, trajectories: Sequence[Trajectory]) -> Tensor:
        # Of tokens that share a span only the sum means something.
        return self.score_spans(trajectories).logprobs_N

    def score_spans(self, trajectories: Sequence[Trajectory]) -> SpanScores:
        """Scores all sampled tokens; a ``ValueError`` if an episode is longer than the teacher's context."""
        readings = [self._read(trajectory) for trajectory in trajectories]
        offsets = np.cumsum([0, *(reading.num_spans for reading in readings)])
        span_N = _joined([reading.student_span_N + offset for reading, offset in zip(readings, offsets, strict=False)])
        span_M = _joined([reading.teacher_span_M + offset for reading, offset in zip(readings, offsets, strict=False)])
        teacher_M = self.local.score_rows([row for reading in readings for row in reading.rows])
        student_N = torch.from_numpy(
            np.concatenate([np.zeros(0, np.float32), *(one.logprobs[one.sampled] for one in trajectories)])
        )
        zeros_S = torch.zeros(int(offsets[-1]))
        log_ratio_S = zeros_S.index_add(0, span_M, teacher_M) - zeros_S.index_add(0, span_N, student_N)
        tokens_S = zeros_S.index_add(0, span_N, torch.ones_like(student_N))
        return SpanScores(student_N + (log_ratio_S / tokens_S)[span_N], span_N)

    def _read(self, trajectory: Trajectory) -> _Reading:
        """The teacher's tokens of an episode, and the spans that they share with the student's."""
        rows, spans_N, spans_M, count = [], [], [], 0
        for row in trajectory.rows:
            turns = [turn for turn in trajectory.turns if row.start < turn.start < row.stop]
            ids = self._history(trajectory, row)
            sampled = [False] * len(ids)
            for number, turn in enumerate(turns):
                if number:
                    between = self._reply(turns[number - 1])
                    ids += between
                    sampled += [False] * len(between)
                own = trajectory.token_ids[turn.start : turn.stop].tolist()
                ends = bool(own) and own[-1] in self._student_chat.stop_token_ids
                decoded = self._student_chat.decoded(own[: len(own) - ends])
                retold = self.chat.render_turn(decoded.text)[: None if ends else -1]
                if decoded.text:
                    aligned = align(decoded, self.chat.decoded(retold[: len(retold) - ends]))
                    spans_N.append(aligned.student_N + count)
                    spans_M.append(aligned.teacher_M + count)
                    count += aligned.num_spans
                if ends:
                    spans_N.append(np.array([count]))
                    spans_M.append(np.array([count]))
                    count += 1
                ids += retold
                sampled += [True] * len(retold)
            rows.append(Row(np.asarray(ids, dtype=np.int32), np.asarray(sampled, dtype=np.bool_)))
            self.local.require_room(rows[-1], trajectory)
        return _Reading(rows, np.concatenate(spans_N), np.concatenate(spans_M), count)

    def _history(self, trajectory: Trajectory, row: slice) -> list[int]:
        """What the teacher reads before a row's turns: the prompt, and the turns of earlier rows without the thinking
        that the student's row leaves out."""
        history = trajectory.token_ids[row][trajectory.kind[row] == TokenKind.HISTORY]
        read = self._student_chat.decode(history.tolist())
        ids = self._prompt(trajectory)
        for turn in trajectory.turns:
            if turn.start < row.start:
                text = turn.text
                for start, stop in reversed(self._student_chat.parse_text(text).thinking):
                    if _THINK_TAG.sub("", text[start:stop]).strip() not in read:
                        text = text[:start] + text[stop:].lstrip()
                ids += [*self.chat.render_turn(text), *self._reply(turn)]
        return ids

    def _prompt(self, trajectory: Trajectory) -> list[int]:
        task, example = self._find(trajectory)
        with Toolbox(task.tools_of(example) if self._tools is None else self._tools) as toolbox:
            schemas = toolbox.schemas
        if self._same_calls or not schemas:
            return self.chat.render_prompt(example.messages, schemas)
        return self.chat.render_prompt(self._student_chat.describe_tools(example.messages, schemas))

    def _reply(self, turn: TurnRecord) -> list[int]:
        """What followed a turn: what the user said, or what the tools answered."""
        if turn.user is not None:
            return self.chat.user_message(user(turn.user)).ids
        results = [tool_message(call.name or "tool_call", call.output) for call in turn.calls]
        if self._same_calls:
            return self.chat.render_tool_results(results)
        return self.chat.user_message(user(self._student_chat.results_text(results))).ids


_THINK_TAG = re.compile(r"</?think>|\[/?THINK\]")


def _joined(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))
