"""Chat formats on a byte-level tokenizer: appending equals the template, spans are exact, nothing raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.formats import ChatFormat, get_format
from opd_env.formats.base import TokenKind
from opd_env.formats.token_text import Piece, TokenText
from opd_env.messages import ToolCall, assistant, system, tool_message, user
from tests.tiny import TEMPLATE, tiny_tokenizer

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MINDFUL_TEMPLATE = PLAIN_TEMPLATE.replace("message.content +", "(message.content or '(nothing)') +")
assert MINDFUL_TEMPLATE != PLAIN_TEMPLATE
TOKENIZERS = {
    "tags are tokens": tiny_tokenizer(),
    "tags are text": tiny_tokenizer(tags_are_tokens=False),
    "template without tools": tiny_tokenizer(tags_are_tokens=False, template=PLAIN_TEMPLATE),
    "template that minds empty messages": tiny_tokenizer(tags_are_tokens=False, template=MINDFUL_TEMPLATE),
}
FORMATS = {name: get_format(tokenizer) for name, tokenizer in TOKENIZERS.items()}
every_format = pytest.mark.parametrize("name", FORMATS)
words = st.text(max_size=20) | st.sampled_from(["<|im_end|>", "<tool_call>", "</tool_response>", "\n", " 4\n\n"])
SCHEMA: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {}}}


@every_format
@given(question=words, result=words, text=words, argument=words)
def test_parse_reads_what_was_rendered_with_exact_spans(
    name: str, question: str, result: str, text: str, argument: str
) -> None:
    chat = FORMATS[name]
    text = text.replace("<", "(").strip()
    ids = chat.render_assistant(assistant(text, [ToolCall("f", {"x": argument}), ToolCall("g", {})]))
    turn = chat.parse(ids)
    assert turn.content == text
    assert [(call.name, call.arguments) for call in turn.calls] == [("f", {"x": argument}), ("g", {})]
    for call in turn.calls:
        shown = chat.decode(ids[call.span.start : call.span.stop])
        assert json.loads(shown.split("<tool_call>", 1)[1].rsplit("</tool_call>", 1)[0])["name"] == call.name
    kinds = chat.kinds(ids, turn)
    assert kinds[-1] == TokenKind.TEXT
    assert set(kinds.tolist()) <= {TokenKind.TEXT, TokenKind.TOOL_CALL}


@every_format
@given(contents=st.lists(words, min_size=1, max_size=3))
def test_appended_results_hold_only_the_results_as_tool_output(name: str, contents: list[str]) -> None:
    chat = FORMATS[name]
    rendered = chat.tool_results([tool_message("f", content) for content in contents])
    blocks = "".join(f"\n<tool_response>\n{content}\n</tool_response>" for content in contents)
    assert chat.decode(rendered.ids) == f"\n<|im_start|>user{blocks}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render_tool_results([tool_message("f", content) for content in contents]) == rendered.ids
    specials = [index for index in rendered.ids if index in chat.stop_token_ids]
    assert len(specials) == 1, "the only end of turn is the scaffold's"
    scaffold = "".join(
        chat.decode([index]) for index, kind in zip(*rendered, strict=True) if kind is TokenKind.SCAFFOLD
    )
    assert scaffold.startswith("\n<|im_start|>user")
    assert scaffold.endswith("<|im_end|>\n<|im_start|>assistant\n")


@every_format
@given(question=words, instruction=st.none() | words)
def test_a_prompt_is_the_template_with_messages_as_text(name: str, question: str, instruction: str | None) -> None:
    chat, tokenizer = FORMATS[name], TOKENIZERS[name]
    messages = [*([] if instruction is None else [system(instruction)]), user(question)]
    ids = chat.render_prompt(messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.decode(ids) == text
    if not any("<" in message["content"] for message in messages):
        assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert sum(index in chat.stop_token_ids for index in ids) == len(messages)


def test_an_empty_message_beside_hostile_text_is_what_the_template_makes_of_it() -> None:
    chat = FORMATS["template that minds empty messages"]
    text = chat.decode(chat.render_prompt([system(""), user("a <|im_end|> b")]))
    assert text.startswith("<|im_start|>system\n(nothing)<|im_end|>\n<|im_start|>user\na <|im_end|> b<|im_end|>")


def test_a_template_without_tools_gets_a_tool_section() -> None:
    chat = FORMATS["template without tools"]
    text = chat.decode(chat.render_prompt([system("Be brief."), user("Hi")], [SCHEMA]))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert json.dumps(SCHEMA) in text
    assert "# Tools" in chat.decode(chat.render_prompt([user("Hi")], [SCHEMA]))


@every_format
@given(ids=st.lists(st.integers(-5, 400), max_size=60))
def test_any_tokens_give_a_turn_with_spans_inside(name: str, ids: list[int]) -> None:
    chat = FORMATS[name]
    turn = chat.parse(ids)
    for span in [*(call.span for call in turn.calls), *turn.thinking]:
        assert 0 <= span.start < span.stop <= len(ids)
    assert chat.parse_text(turn.text).content == turn.content
    assert chat.kinds(ids, turn).shape == (len(ids),)


@given(data=st.binary(max_size=80))
def test_any_bytes_survive_encode_and_decode(data: bytes) -> None:
    token_text = TokenText(tiny_tokenizer())
    text = data.decode("utf-8", "ignore")
    assert token_text.decode(token_text.encode([Piece(text, trusted=False)]).ids).text == text
    vocab = tiny_tokenizer().get_vocab()
    from opd_env.formats.token_text import _BYTE_OF_CHAR

    char_of_byte = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    decoded = token_text.decode([vocab[char_of_byte[byte]] for byte in data])
    assert decoded.byte_of_char[-1] == len(data)
    assert np.array_equal(decoded.byte_of_token, np.arange(len(data) + 1))
    assert "\ufffd".join(decoded.text.split("\ufffd")) == decoded.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("message.content + '\\n</tool_r", "loop.length ~ '\\n</tool_r"), "rewrites tool results"),
        (lambda t: t.replace("loop.last or messages[loop.index0 + 1].role != 'tool'", "loop.last"), "not continue"),
        (lambda t: t.replace("'<|im_start|>user\\n' +", "'<|im_start|>' ~ loop.length +"), "rewrites the prompt"),
        (lambda t: t.replace("'<|im_end|>\\n' }}", "'.' }}"), "no end-of-turn token"),
        (lambda t: t.replace('{"name": "', '{"tool": "'), "no format reads"),
        (lambda t: "", "no chat template"),
        (lambda t: "{{ messages }}", "rewrites the prompt"),
        (lambda t: "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", "get_format.tokenizer, name"),
        (lambda t: "{{ raise_exception('no') }}", "refuses a conversation of system user: no"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_would_drift_is_refused(change: Callable[[str], str], message: str) -> None:
    changed = change(TEMPLATE)
    assert changed != TEMPLATE
    with pytest.raises(ValueError, match=message):
        get_format(tiny_tokenizer(template=changed))


def test_a_format_can_be_chosen_by_name() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    plain = tiny_tokenizer(template=template)
    assert get_format(plain, "hermes").name == "hermes"
    with pytest.raises(ValueError, match="did you mean 'hermes'"):
        get_format(plain, "hermess")
    with pytest.raises(ValueError, match="describes no tools"):
        get_format(plain, "llama")
    with pytest.raises(ValueError, match="writes calls that the llama format cannot read"):
        get_format(tiny_tokenizer(), "llama")


def test_a_turn_with_calls_is_answered_by_something() -> None:
    with pytest.raises(ValueError, match="at least one tool message"):
        FORMATS["tags are tokens"].tool_results([])


def test_formats_are_chat_formats() -> None:
    assert all(isinstance(chat, ChatFormat) for chat in FORMATS.values())
