"""What a chat format is: how a model family writes a conversation as tokens, and how its turns are read.

A format appends tokens: what the model sampled is not decoded and encoded again, tool results are encoded once, when
they arrive. Only where the template rewrites a conversation that goes on (``not_append_only``) is the next prompt
rendered anew, ``render_conversation``.

Test it alone: ``pytest tests/formats/test_formats.py``
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_env.formats.parse import ParsedTurn
from opd_env.messages import Message


class TokenKind(IntEnum):
    """What a token is. Text, thinking and tool calls the student sampled; all others are context."""

    PROMPT = 0
    """The opening messages and tool schemas, up to the first generation prompt."""
    SCAFFOLD = 1
    """What the kit appends between turns: separators, role headers, generation prompts, and what the user says after
    the opening messages."""
    TEXT = 2
    """Sampled text outside calls and thinking, end-of-turn token included."""
    THINKING = 3
    """Sampled thinking block, its tags included."""
    TOOL_CALL = 4
    """Sampled tool call, its tags included; malformed ones too."""
    TOOL_OUTPUT = 5
    """What a tool answered."""
    HISTORY = 6
    """Where a new row begins: the conversation so far, as the chat template writes it now. The tokens of earlier turns
    in it are context; as sampled they stand in the row before."""


SAMPLED_KINDS = (TokenKind.TEXT, TokenKind.THINKING, TokenKind.TOOL_CALL)


class Rendered(NamedTuple):
    """Token ids that the kit appends, and for each its ``TokenKind``."""

    ids: list[int]
    kinds: list[TokenKind]


Exchange = tuple[Sequence[int], Sequence[Message]]
"""Token ids of a turn that was sampled, and what answered it: tool messages, or what the user said."""


class ChatFormat(ABC):
    """Writes prompts and tool results as tokens, and reads what the student sampled."""

    name: ClassVar[str]
    stop_token_ids: tuple[int, ...]
    """Any of these ends a turn. The first is the one that the format itself writes."""
    vocab_size: int
    """Number of ids of the tokenizer; a model's head may be padded beyond it."""
    repair: bool = False
    """Whether small faults of calls are put right when they are read."""
    not_append_only: tuple[str, ...] = ()
    """When the chat template rewrites earlier tokens as a conversation goes on; empty when it never does."""

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The opening messages and tool schemas, up to and with the generation prompt.

        Args:
            messages: system and user messages.
            tools: schemas as ``Tool.schema`` gives them.
        """

    @abstractmethod
    def render_assistant(self, message: Message) -> list[int]:
        """An assistant turn as the model would sample it, end-of-turn token included. For experts and tests."""

    @abstractmethod
    def tool_results(self, messages: Sequence[Message]) -> Rendered:
        """What follows a sampled turn: separator, tool messages, next generation prompt; with kinds."""

    def render_tool_results(self, messages: Sequence[Message]) -> list[int]:
        """The ids of ``tool_results``."""
        return self.tool_results(messages).ids

    @abstractmethod
    def user_message(self, message: Message) -> Rendered:
        """What follows a turn without calls when the user speaks again, up to and with the generation prompt."""

    def replies(self, messages: Sequence[Message]) -> Rendered:
        """``tool_results``, or ``user_message`` where the user answers."""
        return self.user_message(messages[0]) if messages[0]["role"] == "user" else self.tool_results(messages)

    def render_conversation(
        self, messages: Sequence[Message], exchanges: Sequence[Exchange], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int] | None:
        """The prompt of the next turn, for the whole conversation.

        Args:
            messages, tools: the opening, as for ``render_prompt``.
            exchanges: what came after it.

        Returns:
            What appending gives, where the template is append-only; else what the template writes for the conversation,
            with turns as the parser reads them (a call that cannot be read stays text). None when it refuses that.
        """
        ids = self.render_prompt(messages, tools)
        for sampled, answers in exchanges:
            ids += [*sampled, *self.replies(answers).ids]
        return ids

    @abstractmethod
    def parse(self, ids: Sequence[int]) -> ParsedTurn:
        """Reads a sampled turn; spans are of tokens, indices into ``ids``. Total: any ids give a result."""

    @abstractmethod
    def parse_text(self, text: str) -> ParsedTurn:
        """Reads a turn given as text without its end-of-turn token; spans are of characters."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids, special tokens written out."""

    def kinds(self, ids: Sequence[int], turn: ParsedTurn) -> NDArray[np.uint8]:
        """``TokenKind`` of every sampled token of a turn that ``parse`` read, shape ``[len(ids)]``."""
        kinds = np.full(len(ids), TokenKind.TEXT, dtype=np.uint8)
        for span in turn.thinking:
            kinds[span.start : span.stop] = TokenKind.THINKING
        for call in turn.calls:
            kinds[call.span.start : call.span.stop] = TokenKind.TOOL_CALL
        return kinds
