"""How answers of ``tooluse68`` are read and judged: exactly, and by the rule of the paper's code.

Worked example::

    gold = read_gold('[{"Action": "listRoles", "Action_Input": "{\\\\"accessToken\\\\": \\\\"abcd\\\\"}"}]')
    calls = read_actions('Thought: I look them up.\\nAction: listRoles\\nAction Input: {"accessToken": "abcd"}')
    match_calls(calls, gold)            # '' (right); otherwise what is wrong

Test it alone: ``pytest tests/tasks/function_calls/test_tooluse68.py``
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_env.messages import ToolCall

_OPTIONAL = "[Optional]"
_MARK = re.compile(r"^[ \t]*Action( Input)?:", re.MULTILINE)
_SPACE = re.compile(r"\s*")
_ORIGINAL_ACTION = re.compile(r"Action:\s*(\w+)")
_ORIGINAL_INPUT = re.compile(r"Action Input:\s*\{")


@dataclass(frozen=True)
class GoldCall:
    """A call that the answer should hold."""

    call: ToolCall
    optional: bool
    """The data mark one call ``[Optional]``: right with it and without it."""


def read_gold(answer: str) -> list[GoldCall]:
    """The gold calls of a row.

    Raises:
        ValueError: the answer is not a list of ``Action`` and ``Action_Input``, a JSON object written as a string.
    """
    try:
        rows = json.loads(answer)
        calls = [(row["Action"], json.loads(row["Action_Input"])) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"'answer' is no JSON list of objects with Action and Action_Input, a JSON object in a string ({error})"
        ) from None
    for name, arguments in calls:
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError(f"the gold call {name!r} has arguments {arguments!r}; expected a name and a JSON object")
    return [
        GoldCall(ToolCall(name.removeprefix(_OPTIONAL), arguments), optional=name.startswith(_OPTIONAL))
        for name, arguments in calls
    ]


def read_actions(text: str) -> tuple[ToolCall, ...]:
    """The calls that a text writes, each as a line ``Action: name`` and a JSON object after ``Action Input:``.

    Markers count where they start a line, outside the JSON. What follows a JSON object on its line is passed over.
    Time is linear in the length of the text.

    Raises:
        ValueError: a marker without its partner, an action without a name, or an input that is no JSON object.
    """
    calls: list[ToolCall] = []
    name, position = "", 0
    while (mark := _MARK.search(text, position)) is not None:
        if not mark[1]:
            if name:
                raise ValueError(f"action {name!r} has no Action Input")
            end = text.find("\n", mark.end())
            position = len(text) if end < 0 else end
            name = text[mark.end() : position].strip()
            if not name:
                raise ValueError("an Action without a name")
        else:
            if not name:
                raise ValueError("an Action Input without an Action before it")
            arguments, position = _json_object(text, mark.end(), name)
            calls.append(ToolCall(name, arguments))
            name = ""
    if name:
        raise ValueError(f"action {name!r} has no Action Input")
    return tuple(calls)


def match_calls(calls: Sequence[ToolCall], gold: Sequence[GoldCall]) -> str:
    """Compares calls as JSON values, in any order; numbers by value, so 1 equals 1.0 but not true.

    Returns:
        An empty string when every required call is made, as often as it is asked for, and no other than optional
        ones; else one sentence on what is missing or too much.
    """
    try:
        made = Counter(_canonical(call) for call in calls)
    except RecursionError:
        return "an argument is nested too deeply"
    required = Counter(_canonical(one.call) for one in gold if not one.optional)
    optional = Counter(_canonical(one.call) for one in gold if one.optional)
    missing, surplus = required - made, made - required - optional
    faults = [f"missing {call}" for call in sorted(missing)] + [f"too much: {call}" for call in sorted(surplus)]
    return "; ".join(faults)


def original_verdict(text: str, answer: str) -> bool:
    r"""The rule of ``verl/utils/reward_score/feedback/tooluse.py`` in github.com/lasgroup/SDPO.

    Names are ``Action:\s*(\w+)`` wherever that stands, compared as a multiset. Inputs are what lies between
    ``Action Input:\s*{`` and the next ``}``; those that are JSON are merged into one object, later keys winning, and
    compared with the merged gold inputs by Python's ``==``. So nested objects are never read.
    """
    gold = json.loads(answer)
    expected: dict[str, Any] = {}
    for row in gold:
        expected |= json.loads(row["Action_Input"])
    merged: dict[str, Any] = {}
    position = 0
    while (mark := _ORIGINAL_INPUT.search(text, position)) is not None:
        end = text.find("}", mark.end())
        if end < 0:
            break
        position = end + 1
        try:
            merged |= json.loads(text[mark.end() - 1 : position])
        except (ValueError, RecursionError):
            continue
    return Counter(_ORIGINAL_ACTION.findall(text)) == Counter(row["Action"] for row in gold) and merged == expected


def written(calls: Sequence[ToolCall]) -> str:
    """Calls as the paper's format writes them; one that cannot be written is left out."""
    lines = []
    for call in calls:
        try:
            lines.append(f"Action: {call.name}\nAction Input: {json.dumps(call.arguments, ensure_ascii=False)}")
        except RecursionError:
            continue
    return "\n".join(lines)


def _json_object(text: str, start: int, name: str) -> tuple[dict[str, Any], int]:
    space = _SPACE.match(text, start)
    begin = start if space is None else space.end()
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"the input of action {name!r} is not JSON: {why}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the input of action {name!r} is a {type(value).__name__}, expected a JSON object")
    return value, end


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _canonical(call: ToolCall) -> str:
    """Equal for equal calls."""
    return f"{call.name}({json.dumps(_plain(call.arguments), sort_keys=True, ensure_ascii=False)})"


def _plain(value: Any) -> Any:
    """Whole floats as ints, at every depth."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
