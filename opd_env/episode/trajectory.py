"""One finished episode as flat token arrays, and the turns and tool calls that they hold.

The arrays are the ground truth of training: ``sampled`` says which tokens the student chose. Only those are
scored by the teacher and get a gradient. Everything is checked when a trajectory is made, so that a wrong mask
cannot reach the trainer.

Test it alone: ``pytest tests/episode/test_trajectory.py``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_env.formats.base import SAMPLED_KINDS, TokenKind
from opd_env.tools import ToolErrorKind

Decode = Callable[[list[int]], str]
"""Token ids as text."""
_ARRAYS = {"token_ids": np.int32, "sampled": np.bool_, "kind": np.uint8, "turn": np.int16, "logprobs": np.float32}


class StopReason(StrEnum):
    """Why an episode ended. The first two end the task (``terminated``), the others a budget (``truncated``)."""

    ANSWER = "answer"
    """The student gave a final answer: a turn without a tool call."""
    STOP_TOOL = "stop_tool"
    """The student called a tool that ends the episode."""
    TURN_LENGTH = "turn_length"
    """A turn reached ``max_turn_tokens``; its calls were not run."""
    EPISODE_LENGTH = "episode_length"
    """The episode reached ``max_tokens``."""
    MAX_TURNS = "max_turns"
    MAX_TOOL_CALLS = "max_tool_calls"
    MAX_ERRORS = "max_errors"
    """Too many failed calls in a row."""
    TIME = "time"
    """The episode took longer than ``max_seconds``."""

    @property
    def terminated(self) -> bool:
        """Whether the task ended, rather than a budget."""
        return self in (StopReason.ANSWER, StopReason.STOP_TOOL)


@dataclass(frozen=True)
class CallRecord:
    """One attempted tool call, in the order of the turn."""

    name: str | None
    """As the student wrote it; None when the block held no readable name."""
    arguments: str
    """JSON text of the arguments as parsed; the raw block when it could not be parsed."""
    start: int
    """Index in ``token_ids`` of the block's first token."""
    stop: int
    """One past the block's last token."""
    output: str
    """What the student was told, cut to the tool's limit."""
    error: ToolErrorKind | None = None
    """None when the tool answered."""
    seconds: float = 0.0
    repairs: tuple[str, ...] = ()
    """What was put right before the call could be read; empty unless the format was made with ``repair=True``."""
    retries: int = 0
    """How often the tool tried again by itself."""


@dataclass(frozen=True)
class TurnRecord:
    """One assistant turn."""

    start: int
    """Index in ``token_ids`` of the first sampled token."""
    stop: int
    """One past the last sampled token, the end-of-turn token included."""
    text: str
    """The decoded turn without its end-of-turn token."""
    truncated: bool = False
    """The turn hit a length limit before its end-of-turn token."""
    calls: tuple[CallRecord, ...] = ()
    generate_seconds: float = 0.0
    tool_seconds: float = 0.0
    user: str | None = None
    """What the user said next, where the user spoke again."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A finished episode. Arrays have one entry per token, shape ``[T]``.

    They hold one or more rows end to end. A row is a sequence that a model reads from its first token: every sampled
    token was drawn given the tokens before it in its own row. Most episodes are one row, to which tokens were only
    appended; where the chat template rewrites a conversation that goes on, the next turn begins a new one.

    An episode that was played as text (a chat server, which tells neither tokens nor log-probs) has empty arrays, and
    its turns and calls span nothing: it can be graded and compared, and never trained on.

    Raises:
        ValueError: an invariant does not hold; the message names it, the example and the first bad index.
    """

    task: str
    example_id: str
    sample: int
    """Which of the k episodes of this example."""
    token_ids: NDArray[np.int32]
    sampled: NDArray[np.bool_]
    """True exactly where the student chose the token."""
    kind: NDArray[np.uint8]
    """``TokenKind`` values."""
    turn: NDArray[np.int16]
    """0 for the prompt; n for the n-th assistant turn and for the scaffold, tool output and history that answer it."""
    logprobs: NDArray[np.float32]
    """Log-prob under the policy that sampled, natural log; 0 where not sampled (the mask is ``sampled``, not this)."""
    turns: tuple[TurnRecord, ...]
    stop_reason: StopReason
    answer: str | None
    """Text of the final turn; None when there was none."""
    correct: bool
    difficulty: int = 0
    category: str = ""
    """Kind of problem, for tables per category: the example's ``metadata["category"]``."""
    seed: int = 0
    row_starts: tuple[int, ...] = (0,)
    """Index in ``token_ids`` of each row's first token."""
    drift: int = 0
    """How many tokens the chat template rewrote, summed over the rows after the first: of the tokens that appending
    would have given and those of the new row, from the first to the last that differ, in the longer of the two. An
    episode of one row is likewise compared with what its records give when rendered anew: 0 unless the kit errs."""
    extracted: str | None = None
    grade_reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    question: str = ""
    """Text of the last opening message, for reports."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        where = f"trajectory of {self.task}/{self.example_id}"
        length = len(self.token_ids)
        for name, dtype in _ARRAYS.items():
            array = getattr(self, name)
            if array.shape != (length,) or array.dtype != dtype:
                got, expected = f"{array.dtype}{array.shape}", f"{np.dtype(dtype)}({length},)"
                raise ValueError(f"{where}: {name} is {got}, expected {expected}")

        def refuse(bad: NDArray[np.bool_], rule: str) -> None:
            if bad.any():
                index = int(np.argmax(bad))
                raise ValueError(f"{where}: {rule}; broken first at token {index} of {length}")

        refuse(self.token_ids < 0, "token ids are not negative")
        refuse(
            self.sampled != np.isin(self.kind, SAMPLED_KINDS),
            "sampled is true exactly for text, thinking and tool calls",
        )
        refuse(~self.sampled & (self.logprobs != 0), "a token that was not sampled has log-prob 0")
        # Rounding may lift the log-prob of a certain token a little above 0.
        refuse(~np.isfinite(self.logprobs) | (self.logprobs > 1e-4), "a log-prob is finite and not positive")
        refuse((self.kind == TokenKind.PROMPT) != (self.turn == 0), "turn is 0 exactly for the prompt")
        refuse(np.diff(self.turn, prepend=self.turn[:1]) < 0, "turns never go back")
        self._check_rows(where)
        refuse(self.sampled & (np.arange(length) == 0), "the first token is not sampled: nothing predicts it")
        begins = np.zeros(length, dtype=np.bool_)
        begins[list(self.row_starts[1:])] = True
        history = (self.kind == TokenKind.HISTORY).astype(np.int8)
        refuse((np.diff(history, prepend=0) > 0) != begins, "history begins every row but the first, and nothing else")
        spans = np.zeros(length, dtype=np.bool_)
        for number, turn in enumerate(self.turns, start=1):
            if not 0 <= turn.start <= turn.stop <= length:
                raise ValueError(f"{where}: turn {number} spans [{turn.start}, {turn.stop}) of {length} tokens")
            spans[turn.start : turn.stop] = True
            refuse(spans & (self.turn > number), f"turn {number} holds tokens of a later turn")
            for call in turn.calls:
                if length and not turn.start <= call.start < call.stop <= turn.stop:
                    raise ValueError(
                        f"{where}: a call of turn {number} spans [{call.start}, {call.stop}), outside its turn"
                    )
        refuse(spans != self.sampled, "the turns' spans hold exactly the sampled tokens")

    def _check_rows(self, where: str) -> None:
        """Row starts rise from 0, and every row but the last holds a sampled token."""
        length = len(self.token_ids)
        if self.row_starts[:1] != (0,) or (np.diff([*self.row_starts, max(length, 1)]) < 1).any():
            raise ValueError(f"{where}: row_starts={self.row_starts} must rise from 0 and stay below {length}")
        for number, row in enumerate(self.rows[:-1]):
            if not self.sampled[row].any():
                raise ValueError(f"{where}: row {number} of {len(self.rows)} holds no sampled token")

    @property
    def rows(self) -> list[slice]:
        """Where each row stands in the arrays."""
        return [slice(*ends) for ends in pairwise([*self.row_starts, len(self.token_ids)])]

    @property
    def num_sampled(self) -> int:
        """Tokens that the student chose."""
        return int(self.sampled.sum())

    @property
    def calls(self) -> tuple[CallRecord, ...]:
        """All attempted calls, in order."""
        return tuple(call for turn in self.turns for call in turn.calls)

    def to_row(self) -> dict[str, Any]:
        """A row of plain lists and scalars, for Arrow, Parquet and JSON. ``from_row`` is the inverse."""
        row = asdict(self)
        for name in _ARRAYS:
            row[name] = getattr(self, name).tolist()
        row["stop_reason"] = str(self.stop_reason)
        row["scores"] = [{"name": name, "value": float(value)} for name, value in self.scores.items()]
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Trajectory:
        """Rebuilds (and checks again) what ``to_row`` wrote."""
        values = dict(row)
        for name, dtype in _ARRAYS.items():
            values[name] = np.asarray(row[name], dtype=dtype)
        values["row_starts"] = tuple(row.get("row_starts") or (0,))  # earlier versions knew one row
        values["stop_reason"] = StopReason(row["stop_reason"])
        values["scores"] = {entry["name"]: entry["value"] for entry in row["scores"]}
        values["turns"] = tuple(
            TurnRecord(**{**turn, "calls": tuple(map(_call_from_row, turn["calls"]))}) for turn in row["turns"]
        )
        return cls(**values)


def _call_from_row(call: Mapping[str, Any]) -> CallRecord:
    error = call["error"]
    error = None if error is None else ToolErrorKind(error)
    later = {"repairs": tuple(call.get("repairs") or ()), "retries": call.get("retries") or 0}  # older files lack them
    return CallRecord(**{**call, "error": error, **later})
