"""A tool of the kit as verl calls it.

Tools go into verl's tool configuration, for its own agent loops; each has a state of its own::

    tools:
      - class_name: opd_env.plugins.verl.VerlTool
        config: {type: native, name: calculator}

The agent loop ``opd_env`` needs none of it: a task brings its tools.

Test it alone: ``pytest tests/plugins/verl/test_tools.py`` (needs verl)
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from opd_env.settings.fields import import_files
from opd_env.tools import Toolbox, get_tool


class VerlTool(BaseTool):  # type: ignore[misc]  # verl has no types
    """A registered tool of the kit as verl calls it: checked arguments, time limits, and errors that are told.

    Args:
        config: ``name`` of the tool; ``imports``, Python files that register it, if it is none of the built-in ones.
        tool_schema: leave it out; the tool has its own.
    """

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        import_files(config.get("imports", ()))
        self._tool = get_tool(config["name"])
        self._episodes: dict[str, Toolbox] = {}
        super().__init__(config, tool_schema or OpenAIFunctionToolSchema.model_validate(self._tool.schema))

    async def create(self, instance_id: str | None = None, **_: Any) -> tuple[str, ToolResponse]:
        """Begins an episode."""
        instance_id = instance_id or str(uuid4())
        self._episodes[instance_id] = Toolbox([self._tool])
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **_: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        """Runs one call, in a thread, so that a slow tool holds no other episode."""
        result = await asyncio.to_thread(self._episodes[instance_id].call, self.name, parameters)
        return ToolResponse(text=result.content), 0.0, {"error": "" if result.error is None else str(result.error)}

    async def release(self, instance_id: str, **_: Any) -> None:
        """Ends an episode."""
        self._episodes.pop(instance_id).close()
