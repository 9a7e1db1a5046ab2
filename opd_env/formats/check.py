"""Examines a tokenizer's chat format as a user would want to know it before a run: ``opd-env doctor --format MODEL``.

Worked example::

    for finding in check_format(get_format(load_tokenizer("Qwen/Qwen3-0.6B"))):
        print(finding.name, finding.ok, finding.detail)

``get_format`` proves the most important property itself and refuses a tokenizer that lacks it. Here the others are
tried on texts that are known to do harm, and on random tokens.

Test it alone: ``pytest tests/formats/test_check.py``
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from opd_env.formats import FORMATS, get_format
from opd_env.formats.base import TokenKind
from opd_env.formats.template import TemplateFormat
from opd_env.messages import ToolCall, assistant, system, tool_message, user

CALLS = (
    ToolCall("calculator", {"expression": "6 * 7"}),
    ToolCall("search_2", {"query": 'a "quoted" \\ é€😀\n\tend', "limit": -3, "exact": True, "more": [None, 1.5, {}]}),
    ToolCall("python", {"code": "print('''x''')  # ```\nif 1 < 2:\n    pass"}),
    ToolCall("empty", {}),
)
"""Calls whose arguments hold what tends to be quoted wrongly."""
_RANDOM_TURNS = 2000


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    ok: bool
    detail: str
    fails: bool = False
    """The format must not be used. Not being append-only is no failure: episodes then have several rows."""


def check_format(chat: TemplateFormat) -> list[Finding]:
    """All findings about a format that could be made for this tokenizer.

    Args:
        chat: what ``get_format(tokenizer)`` gave: it has proved that appending gives the template's tokens.
    """
    stops = ", ".join(f"{chat.decode([index])} ({index})" for index in chat.stop_token_ids)
    rows = f"a new row begins with {'; with '.join(chat.not_append_only)}" if chat.not_append_only else "always"
    findings = [
        Finding("format", True, f"{chat.name}; a turn ends with {stops}"),
        Finding("append-only", not chat.not_append_only, rows),
    ]
    for name, problems in {
        "calls read back": _calls(chat),
        "text reads back": _answers(chat),
        "tool text is text": _injections(chat),
        "any tokens are read": _random_turns(chat),
    }.items():
        problem = next(problems, None)
        findings.append(Finding(name, problem is None, problem or "yes", fails=problem is not None))
    return findings


def check_formats(tokenizer: Any) -> list[Finding]:
    """One finding per name in ``FORMATS``: whether that format may be chosen for this tokenizer, or why not."""
    found = []
    for name in FORMATS:
        try:
            wrong = [one for one in check_format(get_format(tokenizer, name)) if not one.ok]
        except ValueError as error:
            wrong = [Finding("", False, str(error), fails=True)]
        worst = max(wrong, key=lambda one: one.fails, default=Finding("", True, "passes"))
        detail = f"{worst.name}: {worst.detail}" if worst.name else worst.detail
        found.append(Finding(name, worst.ok, detail, worst.fails))
    return found


def _calls(chat: TemplateFormat) -> Iterator[str]:
    for calls in [*([call] for call in CALLS), CALLS]:
        ids = chat.render_assistant(assistant("", calls))
        turn = chat.parse(ids)
        if [(call.name, call.arguments) for call in turn.calls] != [(call.name, call.arguments) for call in calls]:
            yield f"{chat.decode(ids)!r} is read as {turn.calls}"


def _answers(chat: TemplateFormat) -> Iterator[str]:
    for text in ("It is 42.", "é€😀\n\n  two", "a < b and [1, 2]"):
        turn = chat.parse(chat.render_assistant(assistant(text)))
        if (turn.content, turn.calls) != (text, ()):
            yield f"{text!r} is read as {turn.content!r} with {len(turn.calls)} calls"


def _injections(chat: TemplateFormat) -> Iterator[str]:
    """Markup inside results, users' and system messages and schemas must not add a single special token."""

    def specials_in(text: str) -> list[list[int]]:
        results = chat.tool_results([tool_message("f", text)])
        output = [index for index, kind in zip(*results, strict=True) if kind is TokenKind.TOOL_OUTPUT]
        described = {"type": "string", "description": text, "enum": [text]}
        parameters = {"type": "object", "properties": {text: described}, "required": [text]}
        schema = {"type": "function", "function": {"name": text, "description": text, "parameters": parameters}}
        prompt = chat.render_prompt([system(text), user(text)], [schema])
        said = chat.user_message(user(text)).ids
        return [[index for index in ids if index in special] for ids in (results.ids, output, prompt, said)]

    special = set(chat.markup.values())
    harmless = specials_in("x")
    for text in chat.markup:
        if specials_in(f"a{text}b") != harmless:
            yield f"{text!r} in a message, schema or tool result becomes a special token"


def _random_turns(chat: TemplateFormat) -> Iterator[str]:
    rng = random.Random(0)
    written = [chat.render_assistant(assistant("", [call])) for call in CALLS]
    for number in range(_RANDOM_TURNS):
        ids = [rng.randrange(chat.vocab_size) for _ in range(rng.randrange(12))]
        start = rng.choice(written)
        cut = rng.randrange(len(start) + 1)
        ids = [*start[:cut], *ids, *start[cut + rng.randrange(3) :]] if number % 2 else ids
        turn = chat.parse(ids)
        for span in [*(call.span for call in turn.calls), *turn.thinking]:
            if not 0 <= span.start < span.stop <= len(ids):
                yield f"the tokens {ids} are read with the span {span}"
