"""The tools of one environment: lookup, results, and the state of an episode."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

import opd_env.tools
from opd_env.tools import Tool, Toolbox, ToolError, ToolErrorKind, ToolResult, tool


@tool
def add(a: int, b: int) -> int:
    """Adds two integers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


class Notebook:
    """State that says when it is closed."""

    closed: list[str] = []

    def __init__(self) -> None:
        self.lines: list[str] = []

    def close(self) -> None:
        Notebook.closed.append("/".join(self.lines))


@tool(state=Notebook, mutates_state=True, timeout_s=0.5)
def note(line: str, state: Notebook) -> list[str]:
    """Notes a line.

    Args:
        line: what to note; 'hang' hangs.
    """
    state.lines.append(line)
    while line == "hang":
        time.sleep(0.001)
    return state.lines


@pytest.fixture(autouse=True)
def _nothing_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Notebook, "closed", [])


def test_a_call_gives_the_answer_and_how_long_it_took() -> None:
    result = Toolbox([add]).call("add", {"a": 1, "b": 2})
    assert result == ToolResult("add", "3", None, result.seconds, False)
    assert result.ok
    assert 0 < result.seconds < 1
    with pytest.raises(FrozenInstanceError):
        result.content = "4"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ad", "no tool named 'ad' (did you mean 'add'?); the tools are: add, note"),
        ("", "no tool named ''; the tools are: add, note"),
        ("x" * 100_000, f"no tool named '{'x' * 100}'; the tools are: add, note"),
        (None, "no tool named 'None'; the tools are: add, note"),
        (["add"], """no tool named "['add']" (did you mean 'add'?); the tools are: add, note"""),
    ],
)
def test_an_unknown_tool_is_a_typed_error_with_advice(name: Any, told: str) -> None:
    result = Toolbox([add, note]).call(name, {})
    assert result.error is ToolErrorKind.UNKNOWN_TOOL
    assert json.loads(result.content)["message"] == told
    assert "there are no tools" in Toolbox([]).call("add", {}).content


def test_tools_are_given_by_name_or_as_they_are_and_keep_their_order() -> None:
    toolbox = Toolbox([note, "calculator", add])
    assert [schema["function"]["name"] for schema in toolbox.schemas] == ["note", "calculator", "add"]
    assert [each.name for each in toolbox] == ["note", "calculator", "add"]
    assert "calculator" in toolbox
    assert "search" not in toolbox
    assert toolbox["add"] is add
    assert len(toolbox) == 3


def test_schemas_are_copies() -> None:
    toolbox = Toolbox([add])
    toolbox.schemas[0]["function"]["parameters"]["properties"].clear()
    assert list(toolbox.schemas[0]["function"]["parameters"]["properties"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("calculator", "expected a list of tools"),
        ([add, add], "two tools are named 'add'"),
        (["calculatr"], r"did you mean 'calculator'\?"),
        ([print], "is no tool; give a registered name, or a function decorated with @tool"),
    ],
)
def test_what_is_no_toolbox_is_refused(tools: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Toolbox(tools)


def test_state_lives_for_one_episode() -> None:
    toolbox = Toolbox([note, add])
    assert toolbox.call("note", {"line": "a"}).content == '["a"]'
    assert toolbox.call("note", {"line": "b"}).content == '["a","b"]'
    toolbox.reset()
    assert Notebook.closed == ["a/b"]
    assert toolbox.call("note", {"line": "c"}).content == '["c"]'
    toolbox.close()
    toolbox.close()
    assert Notebook.closed == ["a/b", "c"]


def test_two_toolboxes_share_no_state() -> None:
    first, second = Toolbox([note]), Toolbox([note])
    first.call("note", {"line": "a"})
    assert second.call("note", {"line": "b"}).content == '["b"]'


def test_an_episode_without_calls_makes_no_state() -> None:
    with Toolbox([note]) as toolbox:
        toolbox.reset()
    assert Notebook.closed == []


def test_the_student_cannot_reach_the_state() -> None:
    result = Toolbox([note]).call("note", {"line": "a", "state": {}})
    assert result.error is ToolErrorKind.SCHEMA
    assert "state" not in json.dumps(Toolbox([note]).schemas)


def test_a_timeout_gives_the_state_up_and_says_so() -> None:
    toolbox = Toolbox([note])
    toolbox.call("note", {"line": "a"})
    result = toolbox.call("note", {"line": "hang"})
    assert result.error is ToolErrorKind.TIMEOUT
    assert "was ended; its state is lost" in result.content
    assert Notebook.closed == ["a/hang"]
    assert toolbox.call("note", {"line": "b"}).content == '["b"]'


def with_state(make: Any) -> Toolbox:
    parameters = {"type": "object"}
    return Toolbox(
        [Tool(name="t", description="T.", parameters=parameters, function=lambda state: 1, state=make, timeout_s=0.5)]
    )


def test_a_state_that_cannot_be_made_is_the_calls_error_and_is_tried_again() -> None:
    attempts = []

    def make() -> object:
        attempts.append(1)
        raise OSError("no server")

    toolbox = with_state(make)
    for _ in range(2):
        result = toolbox.call("t", {})
        assert result.error is ToolErrorKind.EXCEPTION
        assert "OSError: no server" in result.content
    assert len(attempts) == 2


class BadClose:
    def __init__(self, hang: bool) -> None:
        self.hang = hang

    def close(self) -> None:
        while self.hang:
            pass
        raise SystemExit("no")


@pytest.mark.parametrize("hang", [False, True])
def test_a_state_that_cannot_be_closed_is_logged_and_harms_nothing(
    hang: bool, caplog: pytest.LogCaptureFixture
) -> None:
    toolbox = with_state(lambda: BadClose(hang))
    assert toolbox.call("t", {}).ok
    toolbox.reset()
    assert "closing the state of tool t" in caplog.text
    assert toolbox.call("t", {}).ok


def test_an_error_is_compact_json_in_a_fixed_order() -> None:
    error = ToolError(ToolErrorKind.BUDGET, 'no calls left: "é"')
    assert error.content == '{"error":"budget","message":"no calls left: \\"é\\""}'
    assert str(error) == 'budget: no calls left: "é"'
    with pytest.raises(ValueError, match="nonsense"):
        ToolError("nonsense", "x")  # type: ignore[arg-type]


def test_kinds_are_the_documented_ones() -> None:
    kinds = "unterminated invalid_json not_an_object unknown_tool schema timeout output_limit exception sandbox budget"
    assert " ".join(ToolErrorKind) == kinds


def test_the_package_exports_what_it_says() -> None:
    for name in opd_env.tools.__all__:
        assert getattr(opd_env.tools, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        opd_env.tools.no_such_name  # noqa: B018


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys; import opd_env.tools, opd_env.tools.mcp; "
        "print([m for m in ('torch', 'numpy', 'jsonschema', 'bm25s', 'cloudpickle', 'asyncio', 'mcp', 'anyio', "
        "'opd_env.tools.builtin.calculator', 'opd_env.tools.sandbox') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
