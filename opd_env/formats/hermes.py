"""ChatML with Hermes tool calls: the packaged models, SmolLM2, Qwen 2.5, Hermes.

::

    <|im_start|>user\\nWhat is 6 * 7?<|im_end|>\\n<|im_start|>assistant\\n          prompt
    <tool_call>\\n{"name": "calculator", …}\\n</tool_call><|im_end|>               sampled
    \\n<|im_start|>user\\n<tool_response>\\n42\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n    appended
    The answer is 42.<|im_end|>                                                   sampled

A template that knows tools writes the prompt itself. For one that does not (SmolLM2), the kit adds the tool
section of the Hermes template to the system message.

Test it alone: ``pytest tests/core/test_formats.py``
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from opd_env.formats.base import ChatFormat, Rendered
from opd_env.formats.parse import ParsedTurn, parse_hermes
from opd_env.formats.token_text import Piece, TokenText
from opd_env.messages import Message, ToolCall, assistant, calls_of, system, tool_message, user
from opd_env.trajectory import TokenKind

_TOOL_SECTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class HermesFormat(ChatFormat):
    """The format for one tokenizer.

    Raises:
        ValueError: the tokenizer is not byte-level, has no chat template, or its template does not write the
            conversation that this format appends to (the first difference is shown).
    """

    name: ClassVar[str] = "hermes"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text = TokenText(tokenizer)
        end = self._text.special_id("<|im_end|>")
        if end is None or not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path!r} has no <|im_end|> token or no chat template: not ChatML")
        others = [tokenizer.eos_token_id, self._text.special_id("<|endoftext|>")]
        self.stop_token_ids = tuple(dict.fromkeys([end, *(other for other in others if other is not None)]))
        self.vocab_size = len(tokenizer)
        self._template_knows_tools = "tools" in tokenizer.chat_template
        self._self_test()

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """See ``ChatFormat``. Special tokens written in a message are plain text to the model."""
        if tools and not self._template_knows_tools:
            messages, tools = _with_tool_section(messages, tools), ()
        # Private-use markers stand for messages that hold the text of special tokens, so that the template's own can
        # be told from theirs. All others stay: a template may look at them, to see whether one is empty.
        hostile = {index: one for index, one in enumerate(messages) if self._text.holds_special(one["content"])}
        marked = [
            {**message, "content": f"\ue000{index}\ue001"} if index in hostile else message
            for index, message in enumerate(messages)
        ]
        rest = self._template(marked, tools)
        pieces = []
        for index, message in hostile.items():
            before, marker, rest = rest.partition(f"\ue000{index}\ue001")
            if not marker:
                raise ValueError(f"the chat template of {self._tokenizer.name_or_path!r} drops message {index}")
            pieces += [Piece(before), Piece(message["content"], trusted=False)]
        return self._text.encode([*pieces, Piece(rest)]).ids

    def render_assistant(self, message: Message) -> list[int]:
        """See ``ChatFormat``."""
        calls = "\n".join(
            f'<tool_call>\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, '
            f'"arguments": {json.dumps(call.arguments, ensure_ascii=False)}}}\n</tool_call>'
            for call in calls_of(message)
        )
        content = message["content"]
        separator = "\n" if content and calls else ""
        return self._text.encode([Piece(f"{content}{separator}{calls}<|im_end|>")]).ids

    def tool_results(self, messages: Sequence[Message]) -> Rendered:
        """See ``ChatFormat``. Special tokens written in a result are plain text to the model."""
        pieces = [Piece("\n<|im_start|>user")]
        for message in messages:
            pieces += [
                Piece("\n<tool_response>\n"),
                Piece(message["content"], trusted=False),
                Piece("\n</tool_response>"),
            ]
        encoded = self._text.encode([*pieces, Piece("<|im_end|>\n<|im_start|>assistant\n")])
        kinds = [TokenKind.TOOL_OUTPUT if untrusted else TokenKind.SCAFFOLD for untrusted in encoded.untrusted]
        return Rendered(encoded.ids, kinds)

    def parse(self, ids: Sequence[int]) -> ParsedTurn:
        """See ``ChatFormat``."""
        body = len(ids) - 1 if len(ids) and ids[-1] in self.stop_token_ids else len(ids)
        decoded = self._text.decode(ids[:body])
        turn = parse_hermes(decoded.text)
        return replace(
            turn,
            calls=tuple(replace(call, span=decoded.tokens_of(call.span)) for call in turn.calls),
            thinking=tuple(decoded.tokens_of(span) for span in turn.thinking),
        )

    def parse_text(self, text: str) -> ParsedTurn:
        """See ``ChatFormat``."""
        return parse_hermes(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``ChatFormat``."""
        return self._text.decode(ids).text

    def _template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], prompt: bool = True
    ) -> str:
        rendered = self._tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        return str(rendered)

    def _self_test(self) -> None:
        """Proves on this tokenizer that appending gives the tokens of the whole conversation's template."""
        opening = [system("Be brief."), user("What is 6 * 7?")]
        turn = assistant("I compute.", [ToolCall("calculator", {"expression": "6 * 7"})])
        final = assistant("The answer is 42.")
        if self._template_knows_tools:
            tools = [_SAMPLE_SCHEMA]
            conversation = [
                *opening,
                turn,
                tool_message("calculator", " 42\n"),
                tool_message("calculator", "é€"),
                final,
            ]
        else:  # such a template is asked for the same text, written as ordinary messages
            tools = []
            written = self.decode(self.render_assistant(turn)[:-1])
            results = "<tool_response>\n 42\n\n</tool_response>\n<tool_response>\né€\n</tool_response>"
            conversation = [*opening, assistant(written), user(results), final]
        whole = self._tokenizer.encode(self._template(conversation, tools, prompt=False), add_special_tokens=False)
        appended = [
            *self.render_prompt(opening, tools),
            *self.render_assistant(turn),
            *self.render_tool_results([tool_message("calculator", " 42\n"), tool_message("calculator", "é€")]),
            *self.render_assistant(final),
        ]
        if whole[: len(appended)] != appended:
            same = next(i for i, (a, b) in enumerate(zip([*whole, None], [*appended, None], strict=False)) if a != b)
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path!r} does not continue what the {self.name} format "
                f"appends: after {self.decode(appended[max(0, same - 8) : same])!r} the template writes "
                f"{self.decode(whole[same : same + 8])!r}, the format {self.decode(appended[same : same + 8])!r}"
            )


def _with_tool_section(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    section = _TOOL_SECTION.format(schemas="\n".join(json.dumps(schema, ensure_ascii=False) for schema in tools))
    if messages and messages[0]["role"] == "system":
        return [system(f"{messages[0]['content']}\n\n{section}"), *messages[1:]]
    return [system(section), *messages]


_SAMPLE_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
