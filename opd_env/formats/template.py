"""A chat format that is derived from the tokenizer's own template, and proved on it when it is made.

Families differ in how calls are written (``parser``, ``write``). What stands between turns is read off the template
(``chat_template``), and what comes of it is proved (``proof``)::

    chat = HermesFormat(tokenizer)          # ValueError, with the first difference, where appending gives other tokens
    chat.not_append_only                    # (): whatever is appended, the template writes the same

Where ``not_append_only`` names cases, ``render_conversation`` gives the prompt that the template writes, and an episode
goes on in a new row.

Test it alone: ``pytest tests/formats/test_formats.py tests/formats/test_families.py``
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, ClassVar

from opd_env.formats.base import ChatFormat, Exchange, Rendered, TokenKind
from opd_env.formats.chat_template import ChatTemplate, Part, Refused
from opd_env.formats.parse import ParsedTurn, Parser
from opd_env.formats.proof import prove
from opd_env.formats.token_text import Decoded, Piece, TokenText
from opd_env.messages import Message, ToolCall, assistant, calls_of, system, user


class TemplateFormat(ChatFormat):
    """The format for one tokenizer; a family is a subclass.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        repair: put small faults of calls right when they are read, see ``opd_env.formats.repairs``.

    Raises:
        ValueError: the tokenizer is of an unsupported kind, has no chat template, its template writes calls
            otherwise, or not the conversation that this format appends to (the first difference is shown).
    """

    parser: ClassVar[Parser]
    """Reads a turn."""
    tool_section: str | None = None
    """Describes tools (``{schemas}``) where the template does not; None: only templates that do are supported."""
    result_block: ClassVar[tuple[str, str]] = ("", "")
    """What encloses a tool result where the template knows no tools."""
    text_beside_calls: ClassVar[bool] = True
    """Whether a turn with calls may hold text; else ``render_assistant`` drops it, as the template does."""
    parallel_calls: ClassVar[bool] = True
    """Whether the template writes several calls in one turn. They are read in any case."""

    def __init__(self, tokenizer: Any, repair: bool = False) -> None:
        self.repair = repair
        self.vocab_size = len(tokenizer)
        self._template = ChatTemplate(tokenizer)
        self._text = TokenText(tokenizer)
        if not self._template.describes_tools and self.tool_section is None:
            raise ValueError(f"the chat template of {self._template.name} describes no tools")
        special = [self._text.special_id(text) for text in (self._template.end, "<|endoftext|>", "<|eom_id|>")]
        stops = [special[0], tokenizer.eos_token_id, *special[1:]]
        self.stop_token_ids = tuple(dict.fromkeys(index for index in stops if index is not None))
        self.markup = self._text.markup
        """Special tokens and tags with their ids: what must never arise from the text of a message."""
        self._scaffold = self._template.scaffold(self.result_block)
        self._user_scaffold = self._template.user_scaffold()
        self.not_append_only = prove(self, self._template, tokenizer)

    @abstractmethod
    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """A turn as the model would write it, without the end-of-turn token."""

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """See ``ChatFormat``. Special tokens written in a message or a tool's schema are plain text to the model."""
        return self.render_anew(messages, (), tools)

    def render_conversation(
        self, messages: Sequence[Message], exchanges: Sequence[Exchange], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int] | None:
        """See ``ChatFormat``. Special tokens are special where the template wrote them or the model sampled them."""
        if not self.not_append_only:
            return super().render_conversation(messages, exchanges, tools)
        try:
            return self.render_anew(messages, exchanges, tools)
        except Refused:
            return None

    def render_anew(
        self, messages: Sequence[Message], exchanges: Sequence[Exchange], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """What the template writes for a conversation, whether or not appending gives the same."""
        conversation = list(map(self._heard, messages))
        schemas = [self._hidden(schema) for schema in tools]
        if schemas and not self._template.describes_tools:  # with special tokens of the kit's own (DeepSeek)
            conversation, schemas = self.describe_tools(conversation, schemas), []
        for sampled, answers in exchanges:
            heard = list(map(self._heard, answers))
            if heard[0]["role"] == "tool" and not self._template.writes_calls:
                heard = [user(self.results_text(heard))]
            conversation += [self._said(sampled), *heard]
        return self._text.encode(self._text.revealed(self._template.render(conversation, schemas))).ids

    def _hidden(self, value: Any) -> Any:
        """A JSON value whose texts are safe to put into the template: a schema may come from a server of strangers."""
        if isinstance(value, str):
            return self._text.hide(value)
        if isinstance(value, Mapping):
            return {self._text.hide(key): self._hidden(one) for key, one in value.items()}
        return [self._hidden(one) for one in value] if isinstance(value, list | tuple) else value

    def _heard(self, message: Message) -> Message:
        """A message whose text is not the model's, safe to put into the template."""
        hidden: Any = {key: self._text.hide(message[key]) for key in ("content", "name") if key in message}
        return {**message, **hidden}

    def _said(self, ids: Sequence[int]) -> Message:
        """A sampled turn as a message for the template."""
        body = ids[:-1] if len(ids) and ids[-1] in self.stop_token_ids else ids
        special = set(self.markup.values())
        runs = [(known, self.decode(list(run))) for known, run in groupby(body, key=special.__contains__)]
        text = "".join(run if known else self._text.hide(run) for known, run in runs)
        opened = "<think>\n" * self._template.opens_thinking
        calls = self.parse_text(text).calls
        if not calls or not self._template.writes_calls or any(call.error for call in calls):
            return assistant(opened + (text if opened else text.removeprefix(self._template.lead)))
        edges = [0, *(edge for call in calls for edge in call.span), len(text)]
        beside = "".join(text[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)).rstrip()
        if beside.endswith("</think>"):
            beside += "\n\n"
        return assistant(opened + beside, [ToolCall(call.name or "", call.arguments or {}) for call in calls])

    def render_assistant(self, message: Message) -> list[int]:
        """See ``ChatFormat``."""
        content, calls = message["content"], calls_of(message)
        if calls and not self.text_beside_calls:
            content = ""
        if "</think>" in content:
            content = content.removeprefix("<think>\n") if self._template.opens_thinking else content
            lead = ""
        else:
            lead = self._template.lead if content or self._template.opens_thinking else ""
        return self.render_turn(lead + self.write(content, calls))

    def tool_results(self, messages: Sequence[Message]) -> Rendered:
        """See ``ChatFormat``. Special tokens written in a result are plain text to the model.

        Raises:
            ValueError: there are no messages.
        """
        if not messages:
            raise ValueError("a turn with calls is answered by at least one tool message")

        around = self._scaffold
        pieces: list[Piece] = []
        for number, message in enumerate(messages):
            pieces += self._pieces(around.between if number else around.before, messages, number)
            pieces.append(Piece(around.quote(message["content"]), trusted=False))
        pieces += self._pieces(around.after, messages, len(messages))
        encoded = self._text.encode(pieces, after=self._template.end)
        kinds = [TokenKind.TOOL_OUTPUT if untrusted else TokenKind.SCAFFOLD for untrusted in encoded.untrusted]
        return Rendered(encoded.ids, kinds)

    def results_text(self, messages: Sequence[Message]) -> str:
        """Tool results as one user message holds them, for a template that knows no tools."""
        return "\n".join(f"{self.result_block[0]}{message['content']}{self.result_block[1]}" for message in messages)

    def user_message(self, message: Message) -> Rendered:
        """See ``ChatFormat``. Special tokens written in the message are plain text to the model."""
        around = self._user_scaffold
        said = Piece(around.quote(message["content"]), trusted=False)
        pieces = [*self._pieces(around.before, [message], 0), said, *self._pieces(around.after, [message], 1)]
        ids = self._text.encode(pieces, after=self._template.end).ids
        return Rendered(ids, [TokenKind.SCAFFOLD] * len(ids))

    def parse(self, ids: Sequence[int]) -> ParsedTurn:
        """See ``ChatFormat``."""
        body = len(ids) - 1 if len(ids) and ids[-1] in self.stop_token_ids else len(ids)
        decoded = self._text.decode(ids[:body])
        turn = self.parse_text(decoded.text)
        return replace(
            turn,
            calls=tuple(replace(call, span=decoded.tokens_of(call.span)) for call in turn.calls),
            thinking=tuple(decoded.tokens_of(span) for span in turn.thinking),
        )

    def parse_text(self, text: str) -> ParsedTurn:
        """See ``ChatFormat``."""
        return type(self).parser(text, self._template.opens_thinking, self.repair)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``ChatFormat``."""
        return self._text.decode(ids).text

    def render_turn(self, text: str) -> list[int]:
        """Tokens of a turn given as text, end-of-turn token included; they continue the generation prompt."""
        return self._text.encode([Piece(text + self._template.end)], after=self._template.prompt).ids

    def decoded(self, ids: Sequence[int]) -> Decoded:
        """Text of any ids, and which bytes of it each of them stands for."""
        return self._text.decode(ids)

    def describe_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with the tools described in the system message, for a template that does not do so.

        Raises:
            ValueError: the format leaves that to its templates.
        """
        if self.tool_section is None:
            raise ValueError(f"the {self.name} format has no text of its own that describes tools")
        schemas = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in tools)
        section = self.tool_section.format(schemas=schemas)
        if messages and messages[0]["role"] == "system":
            return [system(f"{messages[0]['content']}\n\n{section}"), *messages[1:]]
        return [system(section), *messages]

    def _pieces(self, parts: Sequence[Part], messages: Sequence[Message], number: int) -> list[Piece]:
        """What stands before message ``number``, with what it says of messages filled in."""
        pieces = []
        for part in parts:
            if isinstance(part, str):
                pieces.append(Piece(part))
                continue
            name = messages[number + part.offset].get("name", "")
            if part.field == "id":
                text = self._template.call_id(name, number + part.offset + 1)
                pieces.append(Piece(text, trusted=not self._text.holds_special(text)))
            else:
                pieces.append(Piece(name, trusted=False))
        return pieces


def join_calls(content: str, blocks: str) -> str:
    """Text and call blocks on lines of their own; thinking ends with a blank line already."""
    return f"{content}\n{blocks}" if content and blocks and not content.endswith("</think>\n\n") else content + blocks
