"""A state that tools share: one for each episode and toolbox, closed once, lost together, never across processes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Annotated

import pytest

from opd_env.tools import Injected, Shared, Tool, Toolbox, ToolErrorKind, tool

MADE: list[Basket] = []


class Basket:
    """Remembers in which loop it was made, as a client of an async library would."""

    def __init__(self) -> None:
        self.items: list[str] = []
        self.closed = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        MADE.append(self)

    async def close(self) -> None:
        self.closed += 1
        assert asyncio.get_running_loop() is self.loop


async def open_basket() -> Basket:
    basket = Basket()
    basket.loop = asyncio.get_running_loop()
    return basket


basket = Shared(open_basket)


@tool(state=basket, mutates_state=True)
def add(item: str, state: Basket) -> str:
    """Adds something.

    Args:
        item: what.
    """
    state.items.append(item)
    return "ok"


@tool
async def show(shop: Annotated[Basket, Injected(basket)]) -> list[str]:
    """Shows what there is."""
    assert asyncio.get_running_loop() is shop.loop
    return shop.items


@tool(state=basket, timeout_s=0.1)
def hang(state: Basket) -> None:
    """Does not end."""
    time.sleep(5)


@tool(state=list)
def alone(state: list[str]) -> list[str]:
    """Has a list of its own."""
    state.append("mine")
    return state


@pytest.fixture(autouse=True)
def none_made() -> None:
    MADE.clear()


def test_tools_that_name_it_see_one_state_and_each_episode_has_its_own() -> None:
    with Toolbox([add, show, alone]) as toolbox, Toolbox([add, show]) as other:
        assert toolbox.call("add", {"item": "pen"}).ok
        assert toolbox.call("show", {}).content == '["pen"]'
        assert toolbox.shared(basket).items == ["pen"]
        assert other.call("show", {}).content == "[]"
        assert toolbox.call("alone", {}).content == '["mine"]'
        toolbox.reset()
        assert toolbox.call("show", {}).content == "[]"
        assert toolbox.call("add", {"item": "ink"}).ok
        assert toolbox.call("show", {}).content == '["ink"]'
    assert [one.closed for one in MADE] == [1, 1, 1], "each once, in the loop that it was made in"


def test_a_plain_factory_is_no_shared_state() -> None:
    two = [replace(add, injected={}, state=list, function=lambda item, state: state.append(item) or state)]
    two.append(replace(two[0], name="also_add"))
    with Toolbox(two) as toolbox:
        assert toolbox.call("add", {"item": "a"}).content == '["a"]'
        assert toolbox.call("also_add", {"item": "b"}).content == '["b"]'


def test_what_a_time_out_loses_is_lost_for_all_and_told() -> None:
    with Toolbox([add, hang, show, alone]) as toolbox:
        toolbox.call("add", {"item": "pen"})
        toolbox.call("alone", {})
        told = toolbox.call("hang", {})
        assert told.error is ToolErrorKind.TIMEOUT
        assert "its state is lost, and with it that of add, show" in told.content
        assert toolbox.call("show", {}).content == "[]"
        assert toolbox.call("alone", {}).content == '["mine","mine"]', "it shares nothing, and loses nothing"
    assert [one.closed for one in MADE] == [1, 1]


def test_a_state_that_nobody_has_called_for_can_be_read_and_is_closed() -> None:
    with Toolbox([add]) as toolbox:
        assert toolbox.shared(basket).items == []
        assert toolbox.call("add", {"item": "pen"}).ok
        assert toolbox.shared(basket).items == ["pen"]
    assert [one.closed for one in MADE] == [1]
    with pytest.raises(ValueError, match="is named by none of the tools alone"):
        Toolbox([alone]).shared(basket)


def test_a_factory_that_fails_is_an_error_of_the_call_and_tried_again() -> None:
    def broken() -> None:
        raise RuntimeError("closed today")

    state = Shared(broken)
    with Toolbox([replace(add, injected={}, state=state)]) as toolbox:
        for _ in range(2):
            assert "closed today" in toolbox.call("add", {"item": "pen"}).content
        with pytest.raises(RuntimeError, match="closed today"):
            toolbox.shared(state)


def test_secrets_of_one_tool_are_taken_out_of_what_the_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "s3cret-key")
    opens = replace(add, secrets=["SHOP_KEY"], function=lambda item, state: state.items.append("key s3cret-key"))
    with Toolbox([opens, show]) as toolbox:
        toolbox.call("add", {"item": "pen"})
        assert toolbox.call("show", {}).content == '["key [secret]"]'


def test_no_two_processes_share_one() -> None:
    with pytest.raises(ValueError, match="a Shared state is in this process"):
        replace(add, isolation="process")
    assert isinstance(add, Tool)
