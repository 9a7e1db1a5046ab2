"""Chat formats: how model families write conversations and tool calls as tokens.

Worked example::

    chat = get_format(tokenizer)
    ids = chat.render_prompt([user("What is 6 * 7?")], tools=[calculator.schema])
    turn = chat.parse(sampled_ids)          # text, calls with token spans, typed errors
    ids += sampled_ids + chat.render_tool_results([tool_message("calculator", "42")])
"""

from __future__ import annotations

from typing import Any

from opd_env.formats.base import ChatFormat, Rendered
from opd_env.formats.hermes import HermesFormat
from opd_env.formats.parse import ParsedCall, ParsedTurn, Span, parse_hermes

__all__ = [
    "ChatFormat",
    "HermesFormat",
    "ParsedCall",
    "ParsedTurn",
    "Rendered",
    "Span",
    "get_format",
    "parse_hermes",
]


def get_format(tokenizer: Any) -> ChatFormat:
    """The chat format of a tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.

    Raises:
        ValueError: no known format fits; the message says why and what to do.
    """
    template = tokenizer.chat_template or ""
    if "<|im_start|>" in template:
        return HermesFormat(tokenizer)
    found = "has no chat template" if not template else "has a chat template that is not ChatML"
    raise ValueError(
        f"no chat format for {tokenizer.name_or_path!r}: it {found}. Supported: ChatML with Hermes tool calls "
        "(Qwen, Hermes, SmolLM2). Another family needs a subclass of opd_env.formats.ChatFormat"
    )
