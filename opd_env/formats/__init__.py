"""Chat formats: how model families write conversations and tool calls as tokens.

Worked example::

    chat = get_format(tokenizer)
    ids = chat.render_prompt([user("What is 6 * 7?")], tools=[calculator.schema])
    turn = chat.parse(sampled_ids)          # text, calls with token spans, typed errors
    ids += sampled_ids + chat.render_tool_results([tool_message("calculator", "42")])

Stands on: ``messages`` and the kinds of ``tools``' errors; knows nothing of tasks, engines and episodes.
Read first: ``base`` (what a format is), then ``template`` (how one is derived and proved) and ``hermes`` (a family).
Who may change it: anyone may add a family (docs/formats.md); the rest with the properties of ``tests/formats``.
"""

from __future__ import annotations

from typing import Any

from opd_env.errors import unknown
from opd_env.formats.base import ChatFormat, Rendered
from opd_env.formats.chat_template import CALL, ChatTemplate
from opd_env.formats.hermes import HermesFormat, parse_hermes
from opd_env.formats.llama import LlamaFormat
from opd_env.formats.mistral import MistralFormat
from opd_env.formats.parse import ParsedCall, ParsedTurn, Span
from opd_env.formats.pythonic import PythonicFormat, ToolCodeFormat
from opd_env.formats.sections import DeepSeekFormat, KimiFormat
from opd_env.formats.template import TemplateFormat

__all__ = [
    "FORMATS",
    "ChatFormat",
    "ParsedCall",
    "ParsedTurn",
    "Rendered",
    "Span",
    "TemplateFormat",
    "format_named",
    "get_format",
    "parse_hermes",
]

_FAMILIES: list[type[TemplateFormat]] = [
    HermesFormat, MistralFormat, LlamaFormat, PythonicFormat, ToolCodeFormat, DeepSeekFormat, KimiFormat,
]  # fmt: skip
FORMATS = {family.name: family for family in _FAMILIES}
"""Every format by its name, in the order in which they are tried."""

_OF_TOKENS = {"<|im_start|>": "hermes", "<start_of_turn>": "tool_code"}


def get_format(tokenizer: Any, name: str | None = None, *, repair: bool = False) -> TemplateFormat:
    """The chat format of a tokenizer.

    A template is asked to write a call, and the first format that reads it is taken. For one that writes none, its
    markup decides: ChatML gets the tools section of Hermes, Gemma the one of ``tool_code``.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        name: a key of ``FORMATS``, to choose another than that.
        repair: put small faults of calls right when they are read, see ``opd_env.formats.json_calls``. Each is listed
            in its ``ParsedCall``; by default nothing is repaired.

    Raises:
        ValueError: no known format fits; the message says why and what to do.
    """
    if name is None:
        name = _name_for(ChatTemplate(tokenizer), str(tokenizer.chat_template))
    return format_named(name)(tokenizer, repair)


def format_named(name: str) -> type[TemplateFormat]:
    """The class of a format, so that a wrong name is found before a model is loaded.

    Raises:
        ValueError: there is none; the message suggests one.
    """
    if name not in FORMATS:
        raise ValueError(unknown("chat format", name, FORMATS))
    return FORMATS[name]


def _name_for(template: ChatTemplate, source: str) -> str:
    if template.describes_tools or template.writes_calls:
        for name, family in FORMATS.items():
            calls = family.parser(template.call_turn, template.opens_thinking, False).calls
            if [(call.name, call.arguments) for call in calls] == [(CALL.name, CALL.arguments)]:
                return name
        found = f"writes a call as {template.call_turn!r}, which no format reads"
    else:
        for token, name in _OF_TOKENS.items():
            if token in source:
                return name
        found = f"describes no tools and has no markup of {', '.join(_OF_TOKENS)}"
    raise ValueError(
        f"no chat format for {template.name}: its chat template {found}. Choose one with chat_format, or "
        f"get_format(tokenizer, name), of {', '.join(FORMATS)}, or write a subclass of "
        "opd_env.formats.TemplateFormat (parser and write) and add it to opd_env.formats.FORMATS"
    )
