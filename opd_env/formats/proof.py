"""Proves a chat format on its tokenizer: appending gives the tokens of the template for the whole conversation.

A conversation with calls and results is appended piece by piece, as an episode does it, and compared token by token::

    chat.not_append_only = prove(chat, template, tokenizer)     # ValueError with the first difference where it is wrong

Two differences are accepted: templates that leave out or add thinking blocks when a conversation is rendered anew
(Qwen 3), and those that move the tools' description to the last question (Mistral). What ``prove`` returns names when
that changes the next prompt.

Test it alone: ``pytest tests/formats/test_formats.py tests/formats/test_families.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opd_env.formats.base import ChatFormat
from opd_env.formats.chat_template import CALL, OPENING, ChatTemplate, without_thinking
from opd_env.messages import Message, assistant, calls_of, tool_message, user

if TYPE_CHECKING:
    from opd_env.formats.template import TemplateFormat

_THOUGHT = "<think>\nI should compute.\n</think>\n\n"


def prove(chat: TemplateFormat, template: ChatTemplate, tokenizer: Any) -> tuple[str, ...]:
    """Proves a format that is otherwise whole.

    Args:
        chat: the format.
        template: what it was read off.
        tokenizer: the one of both.

    Returns:
        The cases in which the next prompt differs, because the template rewrites thinking or moves the tools'
        description.

    Raises:
        ValueError: the format appends other tokens than the template writes, or cannot read its calls.
    """
    return _Proof(chat, template, tokenizer).cases()


class _Proof:
    def __init__(self, chat: TemplateFormat, template: ChatTemplate, tokenizer: Any) -> None:
        self._chat = chat
        self._template = template
        self._tokenizer = tokenizer
        calls = 1 + chat.parallel_calls
        self._results = [tool_message(CALL.name, " 42\n"), tool_message(CALL.name, "é€")][:calls]

    def cases(self) -> tuple[str, ...]:
        chat, template = self._chat, self._template
        thoughts = {"a turn without thinking": ""}
        if template.thinks:
            thoughts["a turn with thinking"] = _THOUGHT
        differences = [self._difference(thought) for thought in thoughts.values()]
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
            for case, exchange in {
                "tool results": (call, self._results),
                "a further question": (answer, [user("And 7 * 8?")]),
            }.items():
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
        return [
            *chat.render_prompt(OPENING, self._template.tools),
            *chat.render_turn(turns[0]),
            *chat.render_tool_results(self._results),
            *chat.render_turn(turns[1]),
        ]

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
