"""What a turn is once it is read: its text, its calls and its thinking, each with its place in the text.

Every call syntax has a parser (in ``hermes``, ``llama``, ``mistral``, ``pythonic``, ``sections``), built on
``read_turn``. All are pure and total: any text gives a result, in linear time.

Worked example::

    turn = parse_hermes('Well.<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>')
    turn.calls[0].name, turn.calls[0].arguments     # 'calculator', {'expression': '6*7'}
    turn.content                                    # 'Well.'

Rules of every syntax
- A call that cannot be read is a call with a typed error, which the student is told: a malformed call is never
  mistaken for a final answer.
- Nothing is repaired unless ``repair=True``; then every repair is listed in its call (``json_calls`` has the rules).
- ``<think>`` … ``</think>`` (Mistral: ``[THINK]`` … ``[/THINK]``) is thinking; a call inside it is a thought.

Test it alone: ``pytest tests/formats/test_parse.py``
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from opd_env.tools import ToolErrorKind


class Span(NamedTuple):
    """Half-open range ``[start, stop)``: of characters in ``text``, or of tokens once a format has mapped it."""

    start: int
    stop: int


@dataclass(frozen=True)
class ParsedCall:
    """One attempted call. ``error`` is None exactly when ``name`` and ``arguments`` were read."""

    span: Span
    """The whole block, tags included. Calls that share one block divide it among them."""
    raw: str
    """The block without its tags."""
    name: str | None = None
    arguments: dict[str, Any] | None = None
    error: ToolErrorKind | None = None
    message: str = ""
    """What is wrong and how to write it, for the student; empty when nothing is."""
    repairs: tuple[str, ...] = ()
    """What was put right before it could be read; always empty without ``repair=True``."""


@dataclass(frozen=True)
class ParsedTurn:
    """An assistant turn taken apart. Spans are of characters in ``text``, or of tokens when a format says so."""

    text: str
    content: str
    """Text outside thinking and calls, stripped."""
    calls: tuple[ParsedCall, ...] = ()
    thinking: tuple[Span, ...] = ()


class Parser(Protocol):
    """Reads turns of one call syntax."""

    def __call__(self, text: str, thinking: bool = False, repair: bool = False) -> ParsedTurn:
        """Takes a turn apart.

        Args:
            text: the assistant's turn without its end-of-turn token.
            thinking: the text begins inside a thinking block, which the prompt has opened.
            repair: put small faults right, see ``opd_env.formats.json_calls``.
        """
        ...


_THINKING = {"<think>": "</think>", "[THINK]": "[/THINK]"}


def read_turn(
    text: str,
    marks: re.Pattern[str],
    read: Callable[[re.Match[str], bool], Sequence[ParsedCall]],
    *,
    thinking: bool = False,
    think: str = "<think>",
) -> ParsedTurn:
    """Takes a turn apart: the part that all syntaxes share.

    Args:
        text: the assistant's turn without its end-of-turn token.
        marks: what may open a call, or a thinking block.
        read: given a match of ``marks`` and whether nothing but white space and thinking stands before it, reads the
            calls that begin there: they follow each other without a gap. None: the mark is ordinary text.
        thinking: the text begins inside a thinking block, which the prompt has opened.
        think: how that block is opened.
    """
    calls: list[ParsedCall] = []
    thoughts: list[Span] = []
    content: list[str] = []
    position, blank = 0, True

    def skip_thought(start: int, body: int, opening: str) -> int:
        close = _THINKING[opening]
        end = text.find(close, body)
        stop = len(text) if end < 0 else end + len(close)
        if stop > start:
            thoughts.append(Span(start, stop))
        return stop

    if thinking:
        position = skip_thought(0, 0, think)
    while match := marks.search(text, position):
        before = text[position : match.start()]
        content.append(before)
        blank = blank and not before.strip()
        if match.group() in _THINKING:
            position = skip_thought(match.start(), match.end(), match.group())
        elif found := read(match, blank):
            calls += _with_room(found)
            position, blank = found[-1].span.stop, False
        else:
            content.append(match.group())
            position, blank = match.end(), False
    content.append(text[position:])
    return ParsedTurn(text, "".join(content).strip(), tuple(calls), tuple(thoughts))


def _with_room(calls: Sequence[ParsedCall]) -> Sequence[ParsedCall]:
    """A text that ends after a separator leaves nothing for the call that should follow: that gets the separator."""
    *others, last = calls
    if last.span.start < last.span.stop:
        return calls
    *others, before = others
    cut = last.span.start - 1
    return [*others, replace(before, span=Span(before.span.start, cut)), replace(last, span=Span(cut, cut + 1))]
