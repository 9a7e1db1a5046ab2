"""The rules of the Berkeley Function Calling Leaderboard (v4, single turn, Python) for judging tool calls.

Worked example::

    functions = [{"name": "area", "parameters": {"type": "dict", "required": ["base"], "properties": {
        "base": {"type": "integer"}, "unit": {"type": "string"}}}}]
    gold = [{"area": {"base": [10], "unit": ["units", ""]}}]                # accepted values; "" = may be left out

    match_calls(functions, [ToolCall("area", {"base": 10})], gold, "simple_python").valid          # True
    match_calls(functions, [ToolCall("area", {"base": "10"})], gold, "simple_python").errors
    # ("area: argument 'base': '10' is a str, expected int",)

The rules are those of the official checker (``bfcl-eval`` 2026.3.23, ``ast_checker.py``): as many calls as
expected; every required argument there, none that the schema or the gold answer lacks, none missing that the gold
answer does not mark as optional; exact Python types, but an ``int`` may stand for a ``float``, and a value of the
type of the first gold value is compared as it is; texts compared without spaces and ``,./-_*^``, in lower case,
with double quotes; lists in order. It differs in one thing: parallel calls are matched to the gold calls as a whole
(a perfect matching), where the official checker takes the first that fits and so may reject a right answer.

Test it alone: ``pytest tests/tasks/test_bfcl.py``
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from reprlib import Repr
from typing import Any, NamedTuple

from opd_env.errors import unknown
from opd_env.messages import ToolCall

_CALLING = ("simple", "multiple", "parallel", "parallel_multiple")
CATEGORIES = frozenset(
    {"simple_python", *_CALLING, "irrelevance", "live_irrelevance", "live_relevance"}
    | {f"live_{category}" for category in _CALLING}
)

_TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_show = Repr()
_show.maxstring = _show.maxother = 100
_ignored = re.compile(r"[ ,./\-_*^]")


class Verdict(NamedTuple):
    """Whether a model's calls are right, and why not."""

    valid: bool
    errors: tuple[str, ...] = ()
    """What is wrong; empty when the calls are right."""


def match_calls(
    functions: Sequence[Mapping[str, Any]],
    calls: Sequence[ToolCall | Mapping[str, Any]],
    gold: Sequence[Mapping[str, Mapping[str, Any]]],
    category: str,
) -> Verdict:
    """Judges the calls of one turn.

    Args:
        functions: the row's ``function`` documents, in BFCL's own types (``dict``, ``float``, ``tuple``, ``any``).
        calls: what the model called, in order; also as ``{"name": …, "arguments": …}`` or, as the official
            checker takes them, ``{name: arguments}``. A malformed call is not among them: with ``irrelevance``
            that counts as no call, so report malformed calls apart.
        gold: the row's ``ground_truth``: one ``{name: {argument: [accepted values]}}`` a call.
        category: one of ``CATEGORIES``.

    Raises:
        ValueError: an unknown category, or a gold answer that does not fit the functions.
    """
    if category not in CATEGORIES:
        raise ValueError(unknown("category", category, CATEGORIES))
    called = [_as_call(call) for call in calls]
    if "irrelevance" in category:
        return Verdict(False, (f"{_count(len(called))}, expected none",)) if called else Verdict(True)
    if "relevance" in category:
        return Verdict(True) if called else Verdict(False, ("no call, expected at least one",))
    if len(called) != len(gold):
        return Verdict(False, (f"{_count(len(called))}, expected {len(gold)}",))
    expected = [_expected(functions, answer, category) for answer in gold]
    errors = [[list(_errors(call, function, accepted)) for call in called] for function, accepted in expected]
    partner = _matching([[not found for found in row] for row in errors])
    left_over = sorted(set(range(len(called))) - set(partner))
    wrong: list[str] = []
    for row, matched in zip(errors, partner, strict=True):
        if matched is None:  # of the calls that answer nothing, the one that comes nearest says what is wrong
            nearest: list[str] = min([row[index] for index in left_over], key=len)
            wrong += nearest
    return Verdict(not wrong, tuple(wrong))


def _as_call(call: ToolCall | Mapping[str, Any]) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    if set(call) == {"name", "arguments"}:
        return ToolCall(call["name"], call["arguments"])
    ((name, arguments),) = call.items()
    return ToolCall(name, arguments)


def _expected(
    functions: Sequence[Mapping[str, Any]], answer: Mapping[str, Mapping[str, Any]], category: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The function that a gold call is about, and the accepted values of its arguments."""
    ((name, accepted),) = answer.items()
    if category in ("simple", "simple_python", "live_simple"):
        return functions[0], accepted
    for function in functions:
        if function["name"] == name:
            return function, accepted
    raise ValueError(unknown("function of this row", name, [function["name"] for function in functions]))


def _errors(call: ToolCall, function: Mapping[str, Any], accepted: Mapping[str, Any]) -> Iterator[str]:
    """All that is wrong with ``call`` as an answer that ``accepted`` describes."""
    name, parameters = function["name"], function["parameters"]
    if call.name != name:
        yield f"{_show.repr(call.name)} called, expected {name!r}"
        return
    required = parameters.get("required", ())
    for argument in dict.fromkeys([*required, *accepted]):
        may_be_left_out = argument not in required and "" in accepted.get(argument, ())
        if argument not in call.arguments and not may_be_left_out:
            yield f"{name}: argument {argument!r} is missing"
    for argument, value in call.arguments.items():
        if argument not in parameters["properties"] or argument not in accepted:
            yield f"{name}: argument {_show.repr(argument)} is not expected"
        elif problem := _problem(value, parameters["properties"][argument], accepted[argument]):
            yield f"{name}: argument {argument!r}: {problem}"


def _problem(value: Any, schema: Mapping[str, Any], accepted: Sequence[Any]) -> str | None:
    """Why ``value`` is not one of the accepted ones; None when it is."""
    expected: type[Any] = _python_type(schema)
    nested = _python_type(schema["items"]) if schema["type"] in ("array", "tuple") else None
    if schema["type"] == "float" and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            return f"{_show.repr(value)} is too large"
    as_it_is = _gold_type(accepted) not in (None, expected)
    if type(value) is not expected:
        if type(value) is not _gold_type(accepted):
            return f"{_show.repr(value)} is a {type(value).__name__}, expected {expected.__name__}"
        as_it_is = True
    elif nested is not None and not any(_items_fit(value, candidate, nested) for candidate in accepted):
        return f"{_show.repr(value)} has items of another type than {nested.__name__}"
    if as_it_is:
        equal = value in accepted
    elif expected is dict:
        equal = any(_equal_objects(value, candidate) for candidate in accepted)
    elif nested is dict:
        equal = any(_equal_object_lists(value, candidate) for candidate in accepted)
    elif expected is str:
        equal = _standard(value) in [_standard(candidate) for candidate in accepted if isinstance(candidate, str)]
    elif expected is list:
        items = [_standard(item) for item in value]
        equal = any(
            items == [_standard(item) for item in candidate]
            for candidate in accepted
            if isinstance(candidate, list | str)
        )
    else:
        equal = value in accepted
    return None if equal else f"{_show.repr(value)} is not among the accepted {accepted!r}"


def _python_type(schema: Mapping[str, Any]) -> type:
    if schema["type"] not in _TYPES:
        raise ValueError(unknown("BFCL type", schema["type"], _TYPES))
    return _TYPES[schema["type"]]


def _gold_type(accepted: Sequence[Any]) -> type | None:
    """The type of the first accepted value that is not the mark of an optional argument."""
    return next((type(value) for value in accepted if value != ""), None)


def _items_fit(value: Sequence[Any], candidate: Any, nested: type) -> bool:
    """Whether every item has the nested type, or the type of the candidate's first item."""
    if not isinstance(candidate, list):
        return True
    return all(type(item) in (nested, _gold_type(candidate)) for item in value)


def _equal_objects(value: Any, candidate: Any) -> bool:
    """``candidate`` lists the accepted values of every key; ``""`` among them marks a key that may be left out."""
    if not isinstance(value, dict) or not isinstance(candidate, dict):
        return False
    return all(
        key in candidate and _standard(item) in [_standard(choice) for choice in candidate[key]]
        for key, item in value.items()
    ) and all(key in value or "" in choices for key, choices in candidate.items())


def _equal_object_lists(value: Sequence[Any], candidate: Sequence[Any]) -> bool:
    return len(value) == len(candidate) and all(map(_equal_objects, value, candidate))


def _standard(value: Any) -> Any:
    """A text as the rules compare it; anything else as it is."""
    return _ignored.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _matching(fits: Sequence[Sequence[bool]]) -> list[int | None]:
    """The largest matching of rows to columns (Kuhn's augmenting paths): each row's column, or None."""
    row_of: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in seen:
                seen.add(column)
                if column not in row_of or place(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    for row in range(len(fits)):
        place(row, set())
    column_of = {row: column for column, row in row_of.items()}
    return [column_of.get(row) for row in range(len(fits))]


def _count(calls: int) -> str:
    return "1 call" if calls == 1 else f"{calls} calls"
