"""Tries a tool out before a training run does: the checks behind ``opd-env tools test NAME``.

Worked example::

    for check in try_tool(get_tool("calculator"), [{"expression": "6*7"}]):
        print(check.passed, check.name, check.detail)
    # True schema 1 parameter, all described; survives JSON
    # True refuses wrong arguments 5 of 5 bad calls refused
    # True answers {"expression":"6*7"} 42
    # True answers the same in a new episode 42
    # ...

Calls are real: a tool that changes something outside of this process changes it now.

Test it alone: ``pytest tests/tools/test_trial.py``
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_env.tools.box import Toolbox, ToolResult
from opd_env.tools.contract import Tool
from opd_env.tools.run.time_limit import threads_left_behind
from opd_env.tools.tool_error import ToolErrorKind, cut

_SHOWN_CHARS = 200
_LONG_ENOUGH_S = 0.02
"""Shorter calls cannot be cut short."""
_MAY_GO_ON_S = 2.0
_SAMPLES: dict[str, Any] = {
    "string": "text", "integer": 1, "number": 1.5, "boolean": True, "null": None, "array": [], "object": {},
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str


def try_tool(tool: Tool, examples: Sequence[Mapping[str, Any]] = ()) -> list[Check]:
    """Looks at a tool's schema, and calls it with bad arguments, then with good ones in two episodes.

    Args:
        tool: what to try.
        examples: arguments that it must answer. Without any, a call is made up from the schema, and an error that the
            tool itself raises about it is accepted.
    """
    checks = [_schema(tool)]
    with Toolbox([tool]) as toolbox:
        checks.append(_refusals(toolbox, tool))
        for arguments in examples or [_made_up(tool.parameters)]:
            toolbox.reset()
            first = toolbox.call(tool.name, arguments)
            checks.append(_answer(first, arguments, bool(examples)))
            if tool.deterministic and first.ok:
                toolbox.reset()
                again = toolbox.call(tool.name, arguments)
                same = again.content == first.content
                detail = _shown(first.content) if same else f"{_shown(first.content)} and then {_shown(again.content)}"
                checks.append(Check("answers the same in a new episode", same, detail))
            share = first.seconds / tool.timeout_s
            detail = f"{first.seconds * 1e3:.2f} ms of {tool.timeout_s:g} s ({tool.isolation})"
            checks.append(Check("has time to spare", share < 0.5, detail))
            if first.seconds > _LONG_ENOUGH_S:
                checks.append(_ends(tool, arguments, first.seconds / 4))
        if tool.injected:
            checks.append(_closes(toolbox))
    return checks


def _schema(tool: Tool) -> Check:
    """The schema as JSON is the schema, and says what each parameter is."""
    properties = tool.parameters.get("properties", {})
    silent = [name for name, about in properties.items() if not (isinstance(about, dict) and about.get("description"))]
    described = f"without a description: {', '.join(silent)}" if silent else "all described"
    counted = f"{len(properties)} parameter{'' if len(properties) == 1 else 's'}"
    try:
        survives = json.loads(json.dumps(tool.schema, allow_nan=False)) == tool.schema
    except (TypeError, ValueError) as error:
        return Check("schema", False, f"is no JSON: {error}")
    return Check("schema", survives, f"{counted}, {described}; {'survives JSON' if survives else 'JSON changes it'}")


def _ends(tool: Tool, arguments: Mapping[str, Any], limit_s: float) -> Check:
    """Whether the tool ends when its time is up, tried with a limit that is too short for the call."""
    before = threads_left_behind()
    with Toolbox([replace(tool, timeout_s=limit_s)]) as hurried:
        start = time.monotonic()
        result = hurried.call(tool.name, arguments)
        late = time.monotonic() - start - limit_s
    if result.error is not ToolErrorKind.TIMEOUT:
        return Check("ends when its time is up", True, "answered sooner this time")
    deadline = time.monotonic() + _MAY_GO_ON_S
    while threads_left_behind() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    if threads_left_behind() > before:
        return Check("ends when its time is up", False, "its thread goes on; give it isolation='process'")
    return Check("ends when its time is up", True, f"{max(late, 0) * 1e3:.1f} ms late at a limit of {limit_s:.3f} s")


def _closes(toolbox: Toolbox) -> Check:
    """Whether the state of the episode can be closed: failures of that are only logged."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage().splitlines()[0])  # type: ignore[method-assign]
    package = logging.getLogger("opd_env.tools")
    package.addHandler(handler)
    try:
        start = time.monotonic()
        toolbox.reset()
        seconds = time.monotonic() - start
    finally:
        package.removeHandler(handler)
    return Check("closes its state", not told, told[0] if told else f"{seconds * 1e3:.1f} ms")


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
    shortened = " (cut to max_output_chars)" if result.truncated else ""
    accepted = own_error and not must_answer
    made_up = " (these arguments are made up: an error is accepted; give an example of yours)" if accepted else ""
    return Check(
        f"answers {_compact(arguments)}", result.ok or accepted, f"{_shown(result.content)}{shortened}{made_up}"
    )


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
    kinds = schema.get("type", "string")
    kind = kinds if isinstance(kinds, str) else kinds[0]
    if kind == "object":
        return _made_up(schema)
    return max(_SAMPLES[kind], schema["minimum"]) if "minimum" in schema else _SAMPLES[kind]


def _compact(value: object) -> str:
    return _shown(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _shown(text: str) -> str:
    return cut(text.strip(), _SHOWN_CHARS)
