"""Tries a tool out before a training run does: the checks behind ``opd-env tools test NAME``.

Worked example::

    for check in exercise_tool(get_tool("calculator"), [{"expression": "6*7"}]):
        print(check.passed, check.name, check.detail)
    # True refuses wrong arguments 4 of 4 bad calls refused
    # True answers {"expression":"6*7"} 42
    # True answers the same again in a new episode: {"expression":"6*7"}
    # ...

Calls are real: a tool that changes something outside of this process changes it now.

Test it alone: ``pytest tests/tools/test_exercise.py``
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_env.tools.base import Tool
from opd_env.tools.errors import ToolErrorKind
from opd_env.tools.toolbox import Toolbox, ToolResult

_SHOWN_CHARS = 200
_SAMPLES: dict[str, Any] = {
    "string": "text",
    "integer": 1,
    "number": 1.5,
    "boolean": True,
    "null": None,
    "array": [],
    "object": {},
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str


def exercise_tool(tool: Tool, examples: Sequence[Mapping[str, Any]] = ()) -> list[Check]:
    """Calls a tool with bad arguments, then with good ones in two episodes.

    Args:
        tool: what to try.
        examples: arguments that it must answer. Without any, a call is made up from the schema, and an error
            of the tool's own about it is accepted.

    Returns:
        The checks, in the order in which they were made.
    """
    with Toolbox([tool]) as toolbox:
        checks = [_refusals(toolbox, tool)]
        for arguments in examples or [_made_up(tool.parameters)]:
            toolbox.reset()
            first = toolbox.call(tool.name, arguments)
            checks.append(_answer(first, arguments, bool(examples)))
            if tool.deterministic and first.ok:
                toolbox.reset()
                again = toolbox.call(tool.name, arguments)
                same = again.content == first.content
                detail = _compact(arguments) if same else f"{_cut(first.content)} and then {_cut(again.content)}"
                checks.append(Check("answers the same again in a new episode:", same, detail))
            share = first.seconds / tool.timeout_s
            detail = f"{first.seconds * 1e3:.2f} ms of {tool.timeout_s:g} s ({tool.isolation})"
            checks.append(Check("has time to spare", share < 0.5, detail))
    return checks


def _refusals(toolbox: Toolbox, tool: Tool) -> Check:
    calls = list(_bad_calls(tool.parameters))
    results = [toolbox.call(tool.name, arguments) for arguments in calls]
    kinds = (ToolErrorKind.SCHEMA, ToolErrorKind.NOT_AN_OBJECT)
    accepted = [_compact(call) for call, result in zip(calls, results, strict=True) if result.error not in kinds]
    detail = f"{len(calls) - len(accepted)} of {len(calls)} bad calls refused"
    if accepted:
        detail = f"{detail}; accepted: {', '.join(accepted)}"
    return Check("refuses wrong arguments", not accepted, detail)


def _answer(result: ToolResult, arguments: Mapping[str, Any], must_answer: bool) -> Check:
    own_error = result.error is ToolErrorKind.EXCEPTION and "no JSON value" not in result.content
    cut = " (cut to max_output_chars)" if result.truncated else ""
    passed = result.ok or (own_error and not must_answer)
    return Check(f"answers {_compact(arguments)}", passed, f"{_cut(result.content)}{cut}")


def _bad_calls(parameters: Mapping[str, Any]) -> Iterator[object]:
    """Calls that no tool may accept: no object, a NaN, and each argument missing, misspelled or of a wrong type."""
    good = _made_up(parameters)
    yield [good]
    if not parameters.get("additionalProperties"):
        yield {**good, "no_such_argument": 1}
    for name in parameters.get("required", ()):
        yield {key: value for key, value in good.items() if key != name}
    for name, schema in parameters.get("properties", {}).items():
        yield {**good, name: float("nan")}
        if isinstance(schema.get("type"), str):
            yield {**good, name: "text" if schema["type"] == "object" else {}}


def _made_up(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the required names and plausible values; they may still break a finer rule of the schema."""
    properties = parameters.get("properties", {})
    return {name: _sample(properties.get(name, {})) for name in parameters.get("required", ())}


def _sample(schema: Mapping[str, Any]) -> Any:
    for key in ("default", "const"):
        if key in schema:
            return schema[key]
    for key in ("examples", "enum"):
        if schema.get(key):
            return schema[key][0]
    if schema.get("anyOf"):
        return _sample(schema["anyOf"][0])
    kind = schema.get("type", "string")
    kind = kind if isinstance(kind, str) else kind[0]
    if kind == "object":
        return _made_up(schema)
    return max(_SAMPLES[kind], schema["minimum"]) if "minimum" in schema else _SAMPLES[kind]


def _compact(value: object) -> str:
    return _cut(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"
