"""A chat format that is derived from the tokenizer's own template, and proved on it when it is made.

Families differ in how calls are written (``parser``, ``write``). What stands between turns is read off the template
(``chat_template``). Then the format is proved: a conversation with calls and results is appended piece by piece, as an
episode does it, and compared token by token with the template's text for the whole of it::

    chat = HermesFormat(tokenizer)          # ValueError, with the first difference, where appending gives other tokens
    chat.not_append_only                    # (): whatever is appended, the template writes the same

Two differences are accepted: templates that leave out or add thinking blocks when a conversation is rendered anew
(Qwen 3), and those that move the tools' description to the last question (Mistral). ``not_append_only`` names the cases
in which they change the next prompt. There ``render_conversation`` gives the prompt that the template writes, and an
episode goes on in a new row.

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
from opd_env.formats.chat_template import CALL, OPENING, ChatTemplate, Part, Refused, without_thinking
from opd_env.formats.parse import ParsedTurn, Parser
from opd_env.formats.token_text import Decoded, Piece, TokenText
from opd_env.messages import Message, ToolCall, assistant, calls_of, system, tool_message, user

_THOUGHT = "<think>\nI should compute.\n</think>\n\n"


class TemplateFormat(ChatFormat):
    """The format for one tokenizer; a family is a subclass.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        repair: put small faults of calls right when they are read, see ``opd_env.formats.json_calls``.

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
        self.markup = self._text.markup
        """Special tokens and tags with their ids: what must never arise from the text of a message."""
        end, *others = map(self.markup.get, (self._template.end, "<|endoftext|>", "<|eom_id|>"))
        stops = [end, tokenizer.eos_token_id, *others]
        self.stop_token_ids = tuple(dict.fromkeys(index for index in stops if index is not None))
        self._scaffold = self._template.scaffold(self.result_block)
        self._user_scaffold = self._template.user_scaffold()
        self.not_append_only = _Proof(self, self._template, tokenizer).cases()

    @abstractmethod
    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """A turn as the model would write it, without the end-of-turn token."""

    # In all that follows, special tokens inside a message, a schema or a tool result are plain text to the model.

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return self.render_anew(messages, (), tools)

    def render_conversation(
        self, messages: Sequence[Message], exchanges: Sequence[Exchange], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int] | None:
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
        around = self._user_scaffold
        said = Piece(around.quote(message["content"]), trusted=False)
        pieces = [*self._pieces(around.before, [message], 0), said, *self._pieces(around.after, [message], 1)]
        ids = self._text.encode(pieces, after=self._template.end).ids
        return Rendered(ids, [TokenKind.SCAFFOLD] * len(ids))

    def parse(self, ids: Sequence[int]) -> ParsedTurn:
        body = len(ids) - 1 if len(ids) and ids[-1] in self.stop_token_ids else len(ids)
        decoded = self._text.decode(ids[:body])
        turn = self.parse_text(decoded.text)
        return replace(
            turn,
            calls=tuple(replace(call, span=decoded.tokens_of(call.span)) for call in turn.calls),
            thinking=tuple(decoded.tokens_of(span) for span in turn.thinking),
        )

    def parse_text(self, text: str) -> ParsedTurn:
        return type(self).parser(text, self._template.opens_thinking, self.repair)

    def decode(self, ids: Sequence[int]) -> str:
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


class _Proof:
    """That what a format appends is what the template writes for the whole conversation."""

    def __init__(self, chat: TemplateFormat, template: ChatTemplate, tokenizer: Any) -> None:
        self._chat = chat
        self._template = template
        self._tokenizer = tokenizer
        calls = 1 + chat.parallel_calls
        self._results = [tool_message(CALL.name, " 42\n"), tool_message(CALL.name, "é€")][:calls]

    def cases(self) -> tuple[str, ...]:
        """The cases in which the next prompt differs, because the template rewrites thinking or moves the tools.

        Raises:
            ValueError: the format appends other tokens than the template writes, or cannot read its calls.
        """
        chat, template = self._chat, self._template
        differences = [self._difference(thought) for thought in ("", _THOUGHT)[: 1 + template.thinks]]
        if all(differences) and not self._differs_in_thinking_alone():
            raise ValueError(
                f"the chat template of {template.name} does not continue what the {chat.name} format appends: "
                f"{differences[0]}"
            )
        notes: dict[str, str] = {}
        for after, thought in {"": "", " after thinking": _THOUGHT * template.thinks}.items():
            turn = self._sample(thought)[1][0]
            if thought and "</think>" not in turn:  # the template drops it at once (DeepSeek R1)
                turn = thought.removeprefix("<think>\n" * template.opens_thinking) + turn
            # The template may write an empty thinking block into its own turn; the student need not.
            call = chat.render_turn(turn if thought or template.opens_thinking else without_thinking(turn))
            answer = chat.render_assistant(assistant(f"{thought}It is 42."))
            further = (answer, [user("And 7 * 8?")])
            for case, exchange in {"tool results": (call, self._results), "a further question": further}.items():
                appended = ChatFormat.render_conversation(chat, OPENING, [exchange], template.tools) or []
                whole = chat.render_anew(OPENING, [exchange], template.tools)
                if difference := self._first_difference(whole, appended):
                    notes.setdefault(difference, f"{case}{after}: {difference}")
        return tuple(notes.values())

    def _sample(self, thought: str) -> tuple[list[Message], list[str]]:
        """A conversation with a call, and its assistant turns as sampled text."""
        chat, template = self._chat, self._template
        first = assistant(thought + "I compute." * chat.text_beside_calls, [CALL, CALL][: 1 + chat.parallel_calls])
        final = assistant(f"{thought}The answer is 42.")
        if template.writes_calls:
            answered = [*OPENING, first, *self._results]
            # How calls are spelled is the model's own affair, so the template's spelling is taken, if it can be read.
            turn = template.turn_of(template.render(answered, template.tools)).partition(template.end)[0]
            conversation = [*answered, final]
        else:  # such a template is asked for the same text, written as ordinary messages
            turn = thought + chat.write("I compute." * chat.text_beside_calls, calls_of(first))
            conversation = [*OPENING, assistant(turn), user(chat.results_text(self._results)), final]
        read = chat.parse_text(turn).calls
        if [(call.name, call.arguments) for call in read] != [(call.name, call.arguments) for call in calls_of(first)]:
            raise ValueError(
                f"the chat template of {template.name} writes calls that the {chat.name} format cannot read: {turn!r}"
            )
        return conversation, [turn, chat.decode(chat.render_assistant(final)[:-1])]

    def _appended(self, turns: Sequence[str]) -> list[int]:
        chat = self._chat
        first, second = map(chat.render_turn, turns)
        prompt = chat.render_prompt(OPENING, self._template.tools)
        return [*prompt, *first, *chat.render_tool_results(self._results), *second]

    def _difference(self, thought: str) -> str:
        """The first difference between what is appended and the template; empty when there is none."""
        conversation, turns = self._sample(thought)
        text = self._template.render(conversation, self._template.tools, prompt=False)
        appended = self._appended(turns)
        whole = self._tokenizer.encode(text, add_special_tokens=False)
        return "" if whole[: len(appended)] == appended else self._first_difference(whole, appended)

    def _first_difference(self, whole: Sequence[int], appended: Sequence[int]) -> str:
        if whole == appended:
            return ""
        decode = self._chat.decode
        same = next(i for i, (a, b) in enumerate(zip([*whole, None], [*appended, None], strict=False)) if a != b)
        return (
            f"after {decode(appended[max(0, same - 8) : same])!r} the template writes "
            f"{decode(whole[same : same + 8])!r}, the format {decode(appended[same : same + 8])!r}"
        )

    def _differs_in_thinking_alone(self) -> bool:
        conversation, turns = self._sample("")
        text = self._template.render(conversation, self._template.tools, prompt=False)
        return without_thinking(text).startswith(without_thinking(self._chat.decode(self._appended(turns))))
