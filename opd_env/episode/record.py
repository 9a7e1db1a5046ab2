"""Builds a trajectory token by token while an episode is played.

The only place where masks are made: every token enters as prompt, through ``sampled`` or through ``answered``, and
what it is (``TokenKind``) is decided there. So are rows: where the chat template would not write what was appended, the
next turn's prompt begins a new one.

Test it alone: ``pytest tests/episode/test_rollouts.py tests/episode/test_rewritten_prompts.py``
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opd_env.engines.base import Completion, Request, SamplingParams
from opd_env.episode.env import PlayedCall
from opd_env.episode.trajectory import CallRecord, StopReason, Trajectory, TurnRecord
from opd_env.formats import ChatFormat, ParsedTurn
from opd_env.formats.base import SAMPLED_KINDS, Exchange, TokenKind
from opd_env.messages import Message, tool_message, user
from opd_env.tasks import Example, Grade


class Recorder(ABC):
    """Collects the turns of one episode; ``finish`` makes the checked ``Trajectory``."""

    def __init__(self) -> None:
        self.turns: list[TurnRecord] = []

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Tokens that the model reads before it samples the next one."""

    @abstractmethod
    def request(self, key: int, params: SamplingParams, seed: int) -> Request:
        """What an engine is asked for the next turn."""

    @abstractmethod
    def sampled(self, completion: Completion, seconds: float) -> ParsedTurn:
        """Adds a turn that the student sampled; returns it parsed, with its calls' spans in the records."""

    @abstractmethod
    def answered(self, replies: Sequence[Message], max_tokens: int) -> bool:
        """Adds the tool results, or what the user says next.

        Returns:
            Whether a further token then fits into ``max_tokens``; nothing is added otherwise.
        """

    @abstractmethod
    def tokens(self) -> dict[str, Any]:
        """The fields of ``Trajectory`` that tell of tokens."""

    def played(self, parsed: ParsedTurn, calls: Sequence[PlayedCall], seconds: float = 0.0) -> None:
        """Adds the results of the last turn's calls."""
        turn = self.turns[-1]
        records = tuple(
            CallRecord(
                name=call.name,
                arguments=call.raw if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False),
                start=turn.start + call.span.start,
                stop=turn.start + call.span.stop,
                output=played.result.content,
                error=played.result.error,
                seconds=played.result.seconds,
                repairs=call.repairs,
                retries=played.result.retries,
            )
            for call, played in zip(parsed.calls, calls, strict=False)  # a stop tool ends the turn's calls early
        )
        self.turns[-1] = replace(turn, calls=records, tool_seconds=seconds)

    def finish(
        self,
        example: Example,
        grade: Grade,
        stop_reason: StopReason,
        answer: str | None,
        **details: Any,
    ) -> Trajectory:
        """The finished episode. ``details`` are further fields of ``Trajectory``."""
        return Trajectory(
            example_id=example.id,
            turns=tuple(self.turns),
            stop_reason=stop_reason,
            answer=answer,
            correct=grade.correct,
            difficulty=example.difficulty,
            category=str(example.metadata.get("category", "")),
            extracted=grade.extracted,
            grade_reason=grade.reason,
            scores=dict(grade.scores),
            question=example.messages[-1]["content"],
            **self.tokens(),
            **details,
        )


class EpisodeRecorder(Recorder):
    """Collects the tokens too, of a student whose tokens are known."""

    def __init__(self, chat: ChatFormat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self._ids: list[int] = chat.render_prompt(messages, tools)
        self._chat = chat
        self._opening = (messages, tools)
        self._kinds: list[int] = [TokenKind.PROMPT] * len(self._ids)
        self._turn_numbers: list[int] = [0] * len(self._ids)
        self._logprobs: list[float] = [0.0] * len(self._ids)
        self._row_starts = [0]
        self._rewritten = 0

    @property
    def context(self) -> list[int]:
        """What the model reads before it samples the next token: the current row."""
        return self._ids[self._row_starts[-1] :]

    @property
    def context_length(self) -> int:
        """Tokens of ``context``."""
        return len(self._ids) - self._row_starts[-1]

    def request(self, key: int, params: SamplingParams, seed: int) -> Request:
        """The current row, to be continued."""
        return Request(key, self.context, params, seed)

    def sampled(self, completion: Completion, seconds: float) -> ParsedTurn:
        """Adds a turn that the student sampled; returns it parsed, with spans of tokens of the turn."""
        ids = completion.token_ids
        turn = self._chat.parse(ids)
        start = len(self._ids)
        self._extend(ids, self._chat.kinds(ids, turn).tolist(), completion.logprobs, len(self.turns) + 1)
        self.turns.append(
            TurnRecord(start, start + len(ids), turn.text, truncated=completion.truncated, generate_seconds=seconds)
        )
        return turn

    def answered(self, replies: Sequence[Message], max_tokens: int) -> bool:
        """Adds the tool results, or what the user says next, and the generation prompt; begins a new row for them where
        the template rewrites what stands before.

        Returns:
            Whether a further token then fits into ``max_tokens`` of the row; nothing is added otherwise.
        """
        spoken = replies[0]["content"] if replies[0]["role"] == "user" else None
        turns = [*self.turns[:-1], replace(self.turns[-1], user=spoken)]
        ids, kinds = self._chat.replies(replies)
        added, row, rewritten = ids, self._row_starts[-1], 0
        if self._chat.not_append_only:
            appended = self.context + ids
            whole = self._rendered_anew(turns)
            if whole is not None and whole != appended:
                added, row, rewritten = whole, len(self._ids), _count_rewritten(appended, whole)
                kept = kinds if whole[-len(ids) :] == ids else []
                kinds = [TokenKind.HISTORY] * (len(whole) - len(kept)) + kept
        if len(self._ids) + len(added) - row >= max_tokens:
            return False
        if row != self._row_starts[-1]:
            self._row_starts.append(row)
        self.turns, self._rewritten = turns, self._rewritten + rewritten
        self._extend(added, kinds, [0.0] * len(added), len(turns))
        return True

    def tokens(self) -> dict[str, Any]:
        """Arrays, rows and drift."""
        kinds = np.asarray(self._kinds, dtype=np.uint8)
        return {
            "token_ids": np.asarray(self._ids, dtype=np.int32),
            "sampled": np.isin(kinds, SAMPLED_KINDS),
            "kind": kinds,
            "turn": np.asarray(self._turn_numbers, dtype=np.int16),
            "logprobs": np.asarray(self._logprobs, dtype=np.float32),
            "row_starts": tuple(self._row_starts),
            "drift": self._rewritten if len(self._row_starts) > 1 else self._count_misrecorded(),
        }

    def _rendered_anew(self, turns: Sequence[TurnRecord]) -> list[int] | None:
        """The prompt after these turns, from their records alone: what a reader of the trajectory would reconstruct."""
        messages, tools = self._opening
        return self._chat.render_conversation(messages, exchanges_of(self._ids, turns), tools)

    def _count_misrecorded(self) -> int:
        """Tokens of an episode of one row that differ when it is rendered anew."""
        whole = self._rendered_anew(self.turns[:-1])
        last = self._ids[self.turns[-1].start :] if self.turns else []
        return 0 if whole is None else _count_rewritten(self._ids, whole + last)

    def _extend(self, ids: Sequence[int], kinds: Sequence[int], logprobs: Sequence[float], turn: int) -> None:
        if not len(ids) == len(kinds) == len(logprobs):
            raise ValueError(f"{len(ids)} tokens with {len(kinds)} kinds and {len(logprobs)} log-probs")
        self._ids += ids
        self._kinds += kinds
        self._logprobs += logprobs
        self._turn_numbers += [turn] * len(ids)


def exchanges_of(token_ids: Sequence[int], turns: Sequence[TurnRecord]) -> list[Exchange]:
    """What was sampled in each turn, and what answered it."""
    return [
        (
            token_ids[turn.start : turn.stop],
            [user(turn.user)]
            if turn.user is not None
            else [tool_message(call.name or "tool_call", call.output) for call in turn.calls],
        )
        for turn in turns
    ]


def _count_rewritten(appended: Sequence[int], whole: Sequence[int]) -> int:
    """Tokens of the longer from the first to the last that differ."""
    shorter = min(len(appended), len(whole))
    before = next((i for i in range(shorter) if appended[i] != whole[i]), shorter)
    after = next((i for i in range(shorter - before) if appended[-1 - i] != whole[-1 - i]), shorter - before)
    return max(len(appended), len(whole)) - before - after
