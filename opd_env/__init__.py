"""opd-env: teaches small language models to use tools by on-policy distillation.

Everything here is loaded when it is first used: ``import opd_env`` imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from opd_env._gymnasium import register_with_gymnasium

if TYPE_CHECKING:
    from opd_env.env import ToolEnv
    from opd_env.evaluation import evaluate
    from opd_env.limits import RolloutLimits
    from opd_env.rollouts import rollout
    from opd_env.tasks import Example, Grade, Task, list_tasks, load_task, register_task
    from opd_env.tools import Tool, Toolbox, ToolError, ToolErrorKind, get_tool, list_tools, register_tool, tool
    from opd_env.trainer import OPDConfig, OPDTrainer, register_divergence
    from opd_env.trajectory import StopReason, Trajectory

__version__ = "0.1.0"

_HOME = {
    "opd_env.env": ("ToolEnv",),
    "opd_env.evaluation": ("evaluate",),
    "opd_env.limits": ("RolloutLimits",),
    "opd_env.rollouts": ("rollout",),
    "opd_env.tasks": ("Example", "Grade", "Task", "list_tasks", "load_task", "register_task"),
    "opd_env.tools": (
        "Tool", "Toolbox", "ToolError", "ToolErrorKind", "get_tool", "list_tools", "register_tool", "tool",
    ),
    "opd_env.trainer": ("OPDConfig", "OPDTrainer", "register_divergence"),
    "opd_env.trajectory": ("StopReason", "Trajectory"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Example",
    "Grade",
    "OPDConfig",
    "OPDTrainer",
    "RolloutLimits",
    "StopReason",
    "Task",
    "Tool",
    "ToolEnv",
    "ToolError",
    "ToolErrorKind",
    "Toolbox",
    "Trajectory",
    "evaluate",
    "get_tool",
    "list_tasks",
    "list_tools",
    "load_task",
    "register_divergence",
    "register_task",
    "register_tool",
    "rollout",
    "tool",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'opd_env' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


register_with_gymnasium()
