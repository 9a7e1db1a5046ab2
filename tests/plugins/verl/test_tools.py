"""The kit's tools as verl makes and calls them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl: make test-verl")

from verl.tools.tool_registry import initialize_tools_from_config


def test_verl_makes_and_calls_our_tools_from_its_configuration(tmp_path: Any) -> None:
    file = tmp_path / "tools.yaml"
    file.write_text(
        "tools:\n  - class_name: opd_env.plugins.verl.VerlTool\n    config: {type: native, name: calculator}\n"
    )
    (tool,) = initialize_tools_from_config(str(file))
    assert tool.tool_schema.function.parameters.required == ["expression"]

    async def play() -> list[Any]:
        episode, _ = await tool.create()
        answers = [await tool.execute(episode, arguments) for arguments in ({"expression": "6*7"}, {"expresion": "1"})]
        await tool.release(episode)
        return answers

    (right, _, metrics), (wrong, _, problem) = asyncio.run(play())
    assert right.text == "42"
    assert metrics == {"error": ""}
    assert problem == {"error": "schema"}
    assert "expression" in wrong.text
