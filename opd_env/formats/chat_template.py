"""What a tokenizer's chat template writes, found out by rendering conversations with marks in place of texts.

Worked example, with the template of Qwen 2.5::

    template = ChatTemplate(tokenizer)
    template.end                            # '<|im_end|>'
    template.call_turn                      # '<tool_call>\\n{"name": "calculator", …}\\n</tool_call>'
    template.scaffold().before              # ('\\n<|im_start|>user\\n<tool_response>\\n',)
    template.scaffold().after               # ('\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n',)

Test it alone: ``pytest tests/formats/test_families.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opd_env.formats.token_text import any_of
from opd_env.messages import Message, ToolCall, assistant, system, tool_message, user

CALL_ID = "call{number:05d}"
"""How calls are named, counted from 1 in each turn. Mistral wants nine letters or digits."""
KIMI_CALL_ID = "functions.{name}:{index}"
"""The same where a call's identifier holds its name, counted from 0."""
_KIMI = "<|tool_call_argument_begin|>"
_ID = re.compile(r"functions\.\ue000name(\d)\ue001:\d+|call(\d{5})|\ue000name(\d)\ue001")
OPENING: list[Message] = [system("Be brief."), user("What is 6 * 7?")]
CALL = ToolCall("calculator", {"expression": "6 * 7"})
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "What to compute."}},
            "required": ["expression"],
        },
    },
}
_TEXT = "\ue000text\ue001"  # private-use characters, which no template writes
_THINK_OPENING = re.compile(r"<think>\s*\Z")
_THINK_BLOCK = re.compile(r"<think>(?:(?!<think>).)*?</think>\s*", re.DOTALL)


class Refused(ValueError):
    """The template takes no such conversation."""


class Blank(NamedTuple):
    """A place in the scaffold that a tool message fills in."""

    field: str
    """``name`` or ``id``."""
    offset: int
    """0: of the result that follows, -1: of the one before."""


Part = str | Blank


@dataclass(frozen=True)
class Scaffold:
    """What stands around tool results: ``before`` result (``between`` result)* ``after``; or around a user message."""

    before: tuple[Part, ...]
    between: tuple[Part, ...]
    after: tuple[Part, ...]
    """With the next generation prompt."""
    quote: Callable[[str], str]
    """What the template makes of a result: the text itself, or the text stripped, or as a JSON string."""


class ChatTemplate:
    """Reads one tokenizer's template.

    Raises:
        ValueError: there is none, or it cannot be followed; the message says what it writes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.name = f"{tokenizer.name_or_path!r}"
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {self.name} has no chat template (base models have none); take the instruction-tuned "
                "model of its family, or save a chat_template.jinja beside the tokenizer"
            )
        self._id = KIMI_CALL_ID if _KIMI in str(tokenizer.chat_template) else CALL_ID
        self._arguments_as_text = False
        self.describes_tools = CALL.name in self.render(OPENING, [SCHEMA])
        """Whether it tells the model of its tools. Where it does not, the kit adds a section to the system message."""
        self.tools = [SCHEMA] if self.describes_tools else []
        """The sample's tools, as this template can take them."""
        self.prompt = self.render(OPENING, self.tools)
        """The sample's prompt."""
        self.thinks = "think>" in str(tokenizer.chat_template) and not self.prompt.rstrip().endswith("</think>")
        """The model may think; not when the generation prompt closes a thinking block."""
        self.opens_thinking = _THINK_OPENING.search(self.prompt) is not None
        """The generation prompt opens a thinking block, so that sampled turns begin inside it."""
        turn = self.turn_of(self.render([*OPENING, assistant(_TEXT)], self.tools, prompt=False))
        lead, found, rest = turn.partition(_TEXT)
        special = any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip())
        ending = special.match(rest) if found else None
        if ending is None:
            raise ValueError(f"the chat template of {self.name} writes no end-of-turn token: {turn!r} for a turn")
        self.end = ending.group()
        """Text of the end-of-turn token."""
        self.lead = "\n</think>\n\n" if self.opens_thinking else "" if lead.strip() else lead
        """What stands before a turn without thinking: a space (Mistral), or the end of an opened thinking block."""
        self.call_turn = self._call_turn()
        """How the template writes a turn with one call, without the end-of-turn token; empty when it cannot."""
        self.writes_calls = CALL.name in self.call_turn
        """Whether it writes calls and results. Else they are ordinary messages, in the spelling of the format."""

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), prompt: bool = True) -> str:
        """The template's text. Calls and results of each turn get identifiers.

        Raises:
            Refused: by the template.
        """
        from jinja2 import TemplateError  # here, because importing the kit must stay light

        try:
            text = self._tokenizer.apply_chat_template(
                self._completed(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError) as error:
            roles = " ".join(message["role"] for message in messages)
            raise Refused(f"the chat template of {self.name} refuses a conversation of {roles}: {error}") from error
        return str(text)

    def turn_of(self, rendered: str) -> str:
        """What a rendered conversation that begins with the sample's prompt writes after it.

        A template may leave out a thinking block which the generation prompt opens.
        """
        for prompt in (self.prompt, without_thinking(_THINK_OPENING.sub("", self.prompt))):
            if rendered.startswith(prompt):
                return rendered[len(prompt) :]
        raise ValueError(
            f"the chat template of {self.name} rewrites the prompt when a turn follows: {self.prompt[-80:]!r} became "
            f"{rendered[max(0, len(self.prompt) - 80) : len(self.prompt) + 20]!r}"
        )

    def scaffold(self, block: tuple[str, str] = ("", "")) -> Scaffold:
        """What stands around tool results.

        Args:
            block: what encloses a result in a user message, for a template that knows no tools.
        """
        if not self.writes_calls:
            around = self.user_scaffold()
            return Scaffold((*around.before, block[0]), (f"{block[1]}\n{block[0]}",), (block[1], *around.after), str)
        raw = [_result(1), _result(2)]
        rest = self._rest(raw)
        quotes = (str, _as_json, str.strip)
        quote = next((quote for quote in quotes if quote(raw[0]["content"]) in rest), None)
        if quote is None:
            raise ValueError(f"the chat template of {self.name} rewrites tool results: {rest!r}")
        first, second = (quote(message["content"]) for message in raw)
        before, _, others = rest.partition(first)
        between, found, after = others.partition(second)
        if not found:
            raise ValueError(f"the chat template of {self.name} leaves out a tool result: {rest!r}")
        return Scaffold(_parts(before, 1), _parts(between, 2), _parts(after, 3), quote)

    def user_scaffold(self) -> Scaffold:
        """What stands around a user message that follows a turn."""
        said = _result(1)["content"]
        _, found, rest = self.render([*OPENING, assistant(_TEXT), user(said)]).rpartition(_TEXT + self.end)
        quote = next((quote for quote in (str, str.strip) if quote(said) in rest), None)
        if not found or quote is None:
            raise ValueError(f"the chat template of {self.name} does not follow a turn by a user message")
        before, _, after = rest.partition(quote(said))
        return Scaffold((before,), (), (after,), quote)

    def _rest(self, results: Sequence[Message]) -> str:
        """What follows the end-of-turn token of a turn with calls."""
        calls = [ToolCall(result["name"], CALL.arguments) for result in results]
        try:
            rendered = self.render([*OPENING, assistant("", calls), *results], self.tools)
        except Refused:  # Llama's writes one call in a turn
            rendered = self.render([*OPENING, assistant("", calls[:1]), *results], self.tools)
        return self.turn_of(rendered).partition(self.end)[2]

    def _call_turn(self) -> str:
        conversation = [*OPENING, assistant("", [CALL]), _result(1)]
        try:
            rendered = self.render(conversation, self.tools)
        except Refused:
            self._arguments_as_text = True  # DeepSeek's joins them to other text
            try:
                rendered = self.render(conversation, self.tools)
            except Refused:
                if self.describes_tools:
                    raise
                return ""  # Gemma's knows no role of tools
        return self.turn_of(rendered).partition(self.end)[0]

    def call_id(self, name: str, number: int) -> str:
        """The identifier of a turn's call ``number``, counted from 1."""
        return self._id.format(name=name, number=number, index=number - 1)

    def _completed(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Copies of the messages with identifiers of calls and results, and arguments as the template takes them."""
        completed: list[dict[str, Any]] = []
        results = 0
        for message in messages:
            copy: dict[str, Any] = dict(message)
            results = results + 1 if message["role"] == "tool" else 0
            if results:
                copy["tool_call_id"] = self.call_id(message.get("name", ""), results)
            if "tool_calls" in message:
                copy["tool_calls"] = [
                    {**call, "id": self.call_id(call["function"]["name"], number), "function": self._function(call)}
                    for number, call in enumerate(message["tool_calls"], start=1)
                ]
            completed.append(copy)
        return completed

    def _function(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function: dict[str, Any] = call["function"]
        return {**function, "arguments": _as_json(function["arguments"])} if self._arguments_as_text else function


def without_thinking(text: str) -> str:
    """The text without thinking blocks and the space that follows them."""
    return _THINK_BLOCK.sub("", text)


def _result(number: int) -> Message:
    """A tool message with marks; its content tells what the template does to quotes and to space around."""
    return tool_message(f"\ue000name{number}\ue001", f' \ue000content{number}\ue001"\n')


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parts(text: str, next_number: int) -> tuple[Part, ...]:
    """The text with blanks for names and identifiers; ``next_number`` is that of the result which follows."""
    parts: list[Part] = []
    position = 0
    for match in _ID.finditer(text):
        if position < match.start():
            parts.append(text[position : match.start()])
        number = int(match[1] or match[2] or match[3])
        parts.append(Blank("name" if match[3] else "id", number - next_number))
        position = match.end()
    return (*parts, text[position:]) if position < len(text) else tuple(parts)
