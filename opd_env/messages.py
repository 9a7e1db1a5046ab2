"""Chat messages, in the shape that Hugging Face chat templates read.

Worked example::

    conversation = [
        system("Use the calculator."),
        user("What is 6 * 7?"),
        assistant("", [ToolCall("calculator", {"expression": "6 * 7"})]),
        tool_message("calculator", "42"),
        assistant("The answer is 42."),
    ]

Test it alone: ``pytest tests/formats/test_formats.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One chat message; a plain ``dict``, so that it is JSON and goes straight into a chat template."""

    role: Role
    content: str
    name: NotRequired[str]
    """Role ``tool`` only: the tool that answers."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """Role ``assistant`` only: ``{"type": "function", "function": {"name": …, "arguments": {…}}}``."""


@dataclass(frozen=True)
class ToolCall:
    """A call as the assistant wrote it: nothing in it has been checked against a tool's schema."""

    name: str
    arguments: dict[str, Any]


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: str, calls: Sequence[ToolCall] = ()) -> Message:
    """An assistant turn: text, then any number of tool calls."""
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return message


def tool_message(name: str, content: str) -> Message:
    """What a tool answered, as the model reads it."""
    return {"role": "tool", "name": name, "content": content}


def calls_of(message: Message) -> tuple[ToolCall, ...]:
    """The tool calls of an assistant message, in order; empty for any other message."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return tuple(ToolCall(function["name"], function["arguments"]) for function in functions)
