"""What can go wrong with a tool call, as one closed list of kinds and one exception.

Worked example, inside a tool::

    raise ToolError(ToolErrorKind.EXCEPTION, "division by zero")

and what the student reads::

    {"error":"exception","message":"division by zero"}

Test it alone: ``pytest tests/tools/test_box.py``
"""

from __future__ import annotations

import json
from enum import StrEnum


class ToolErrorKind(StrEnum):
    """Why a tool call gave no answer. Set where the error arises, and never guessed from a text."""

    UNTERMINATED = "unterminated"
    """The call block was opened and never closed."""
    INVALID_JSON = "invalid_json"
    """The call block holds no valid JSON."""
    NOT_AN_OBJECT = "not_an_object"
    """The call, or its arguments, is JSON but no object."""
    UNKNOWN_TOOL = "unknown_tool"
    """The episode has no tool of that name."""
    SCHEMA = "schema"
    """The arguments do not fit the tool's parameters."""
    TIMEOUT = "timeout"
    """The tool did not answer within its time limit and was ended."""
    OUTPUT_LIMIT = "output_limit"
    """The tool's answer is far too large to show even in part."""
    EXCEPTION = "exception"
    """The tool raised, died, or returned what is no JSON value."""
    SANDBOX = "sandbox"
    """The sandbox, or the process that a tool runs in, could not work: not the student's doing."""
    BUDGET = "budget"
    """The episode's budget of calls was spent; the call was not run."""


class ToolError(Exception):
    """A tool call that failed. Tools may raise it to choose the kind and the words that the student reads.

    Args:
        kind: what went wrong.
        message: one short sentence for the student, without paths or secrets of the machine.
    """

    def __init__(self, kind: ToolErrorKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind = ToolErrorKind(kind)
        self.message = message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"

    @property
    def content(self) -> str:
        """The text that the student reads: compact JSON with the fields ``error`` and ``message``."""
        fields = {"error": str(self.kind), "message": self.message}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def cut(text: str, max_chars: int) -> str:
    """At most so many characters of a text, the ``…`` that marks a cut included."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
