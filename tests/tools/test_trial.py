"""``try_tool`` passes sound tools and finds what is wrong with others."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opd_env.tools import Tool, ToolError, ToolErrorKind, get_tool, tool, trial
from opd_env.tools.run import process
from opd_env.tools.trial import Check, try_tool

OBJECT = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 7}}, "required": ["n"]}


def failed(checks: list[Check]) -> list[str]:
    """Names of the checks that failed."""
    return [check.name for check in checks if not check.passed]


def make(function: Any, **options: Any) -> Tool:
    return Tool(**{"name": "t", "description": "T.", "parameters": OBJECT, "function": function, **options})


def test_the_kits_own_tools_pass() -> None:
    checks = try_tool(get_tool("calculator"), [{"expression": "6*7"}, {"expression": "1/3"}])
    assert failed(checks) == []
    assert [check.detail for check in checks if check.name.startswith("answers {")] == ["42", "0.3333333333"]
    search = get_tool("search", passages=[{"text": "a word"}])
    assert failed(try_tool(search, [{"query": "word"}])) == []


def test_arguments_are_made_up_when_there_are_no_examples() -> None:
    seen: list[int] = []
    checks = try_tool(make(lambda n: seen.append(n)))
    assert failed(checks) == []
    assert seen == [7], "the smallest number that the schema allows, once: the tool is not said to be deterministic"


def test_a_tools_own_error_about_made_up_arguments_is_no_failure_but_about_an_example_it_is() -> None:
    def refuse(n: int) -> None:
        raise ToolError(ToolErrorKind.EXCEPTION, "no such record")

    checks = try_tool(make(refuse))
    assert failed(checks) == []
    assert "these arguments are made up: an error is accepted" in checks[2].detail
    assert failed(try_tool(make(refuse), [{"n": 8}])) == ['answers {"n":8}']


@pytest.mark.parametrize(
    ("function", "options", "found"),
    [
        (lambda n: float("nan"), {}, 'answers {"n":7}'),
        (lambda n: {n}, {}, 'answers {"n":7}'),
        (lambda n: time.sleep(5), {"timeout_s": 0.1}, "has time to spare"),
        (lambda n: time.sleep(0.08), {"timeout_s": 0.1}, "has time to spare"),
        (lambda n: time.perf_counter(), {"deterministic": True}, "answers the same in a new episode"),
        (lambda n: n, {"parameters": {**OBJECT, "note": (1, 2)}}, "schema"),
        (lambda n, state: n, {"state": lambda: Unclosable()}, "closes its state"),
        (lambda n: time.sleep(0.4), {"timeout_s": 10.0}, "ends when its time is up"),
    ],
)
def test_what_would_spoil_a_run_is_found(
    function: Any, options: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_MAY_GO_ON_S", 0.1)
    assert found in failed(try_tool(make(function, **options)))


class Unclosable:
    def close(self) -> None:
        raise OSError("busy")


@tool
async def wait(n: int) -> int:
    """Waits.

    Args:
        n: what to answer.
    """
    await asyncio.sleep(0.1)
    return n


@pytest.mark.parametrize(
    "one",
    [
        wait,
        make(lambda n: time.sleep(0.1) or n, isolation="process", deterministic=True),
        make(lambda n, state: state.append(n) or len(state), state=list, mutates_state=True, deterministic=True),
    ],
    ids=["async", "process", "state"],
)
def test_sound_tools_of_every_kind_pass(one: Tool) -> None:
    checks = try_tool(one, [{"n": 8}])
    process._idle.clear()
    assert failed(checks) == []
    names = [check.name for check in checks]
    assert one.injected or "ends when its time is up" in names  # a quick one is slow, too, on a busy machine
    assert ("closes its state" in names) == bool(one.injected)


def test_tools_of_an_mcp_server_pass() -> None:
    pytest.importorskip("mcp", reason="needs the extra mcp")
    from opd_env.tools.mcp.tools import mount_mcp

    rogue = str(Path(__file__).with_name("mcp") / "mcp_rogue.py")
    with mount_mcp([sys.executable, "-S", rogue, ""]) as server:
        for one in server:
            assert failed(try_tool(one, [{"how": "well"}])) == []


@pytest.mark.parametrize("more", [True, {"type": "integer"}])
def test_a_schema_that_is_open_on_purpose_is_not_called_faulty(more: object) -> None:
    schema = {"type": "object", "additionalProperties": more, "properties": {"n": {}}}
    assert failed(try_tool(make(lambda **given: 1, parameters=schema))) == []


class Once:
    used = False


@tool(state=Once, deterministic=True)
def once(state: Once) -> bool:
    """Whether it was used before in this episode."""
    state.used, before = True, state.used
    return before


def test_state_starts_anew_for_each_episode() -> None:
    assert failed(try_tool(once)) == []
