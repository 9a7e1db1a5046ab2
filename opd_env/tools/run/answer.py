"""From what a tool returned or raised to the text that the student reads.

Worked example::

    encode_answer({"total": 3, "names": ["a"]}, max_chars=4000)    # Answer('{"total":3,"names":["a"]}')
    encode_answer("x" * 9000, max_chars=4000).truncated            # True; the text ends in a marker

Test it alone: ``pytest tests/tools/run/test_limits.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_env.tools.redaction import redact
from opd_env.tools.tool_error import ToolError, ToolErrorKind, cut

MAX_JSON_CHARS = 1_000_000
"""A longer JSON value is an error: the few characters that the student could see would mean nothing."""
_MAX_ERROR_CHARS = 300
_MAX_NAME_CHARS = 80
_HOST_PATH = re.compile(r"(?<![\w/.:])/(?:[^\s/'\":,]+/)+[^\s/'\":,]*")


@dataclass(frozen=True)
class Answer:
    """What the student reads of a call."""

    content: str
    error: ToolErrorKind | None = None
    truncated: bool = False
    retries: int = 0
    """Attempts that failed before this one."""


def encode_answer(value: object, max_chars: int, secrets: Sequence[str] = ()) -> Answer:
    """Text as it is, any other JSON value as compact JSON; cut to ``max_chars``, marker included, without ``secrets``.

    Raises:
        ToolError: ``exception`` when the value is no JSON value, ``output_limit`` when its JSON is huge.
    """
    if isinstance(value, str):
        text = str.__str__(value)
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            message = f"the tool returned what is no JSON value: {_one_line(error, secrets)}"
            raise ToolError(ToolErrorKind.EXCEPTION, message) from error
        if len(text) > MAX_JSON_CHARS:
            message = f"the tool returned {len(text)} characters of JSON; the limit is {MAX_JSON_CHARS}"
            raise ToolError(ToolErrorKind.OUTPUT_LIMIT, message)
    text = redact(text, secrets)
    return Answer(without_surrogates(_marked(text, max_chars)), truncated=len(text) > max_chars)


def encode_error(error: BaseException, max_chars: int = 4000, secrets: Sequence[str] = ()) -> Answer:
    """The error's fixed-format JSON. There is no traceback, and paths of this machine are taken out.

    A ToolError speaks for itself, in at most ``max_chars``; of any other exception the type and the message are shown.
    """
    try:
        return _encode_error(error, max_chars, secrets)
    except BaseException:  # its __str__ or fields are hostile
        failure = ToolError(ToolErrorKind.EXCEPTION, "the tool raised an exception that cannot be shown")
        return Answer(failure.content, failure.kind)


def _encode_error(error: BaseException, max_chars: int, secrets: Sequence[str]) -> Answer:
    if isinstance(error, ToolError):
        message = redact(str(error.message), secrets)
        shown = ToolError(error.kind, without_surrogates(_marked(message, max_chars)))
        return Answer(shown.content, shown.kind, len(message) > max_chars)
    text = _one_line(error, secrets)
    name = redact(type(error).__name__, secrets)[:_MAX_NAME_CHARS]
    failure = ToolError(ToolErrorKind.EXCEPTION, f"{name}: {text}" if text else name)
    return Answer(failure.content, failure.kind)


def _marked(text: str, max_chars: int) -> str:
    marker = f"\n[cut: the whole output has {len(text)} characters]"
    return text if len(text) <= max_chars else text[: max_chars - len(marker)] + marker


def _one_line(error: BaseException, secrets: Sequence[str] = ()) -> str:
    try:
        text = str(error)
    except BaseException:  # a hostile __str__; the exception's type must do
        return ""
    text = _HOST_PATH.sub("<path>", " ".join(redact(text, secrets)[:4000].split()))
    return without_surrogates(cut(text, _MAX_ERROR_CHARS))


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which no tokenizer and no UTF-8 file accepts."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encodable(value: Any) -> Any:
    """A JSON value without lone surrogates, which UTF-8 has not."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, dict):
        return {without_surrogates(name): encodable(one) for name, one in value.items()}
    return [encodable(one) for one in value] if isinstance(value, list) else value
