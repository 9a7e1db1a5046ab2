"""opd-env: teaches small language models to use tools by on-policy distillation.

Everything here is loaded when it is first used: ``import opd_env`` imports neither torch nor numpy.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    # isort: off
    from opd_env.episode.env import ToolEnv as ToolEnv
    from opd_env.episode.limits import RolloutLimits as RolloutLimits
    from opd_env.episode.rollouts import rollout as rollout
    from opd_env.episode.trajectory import StopReason as StopReason, Trajectory as Trajectory
    from opd_env.evaluation.run import evaluate as evaluate
    from opd_env.tasks import Example as Example, Grade as Grade, Task as Task
    from opd_env.tasks import list_tasks as list_tasks, load_task as load_task, register_task as register_task
    from opd_env.tools import Tool as Tool, Toolbox as Toolbox, ToolError as ToolError, ToolErrorKind as ToolErrorKind
    from opd_env.tools import get_tool as get_tool, list_tools as list_tools
    from opd_env.tools import register_tool as register_tool, tool as tool
    from opd_env.trainer import OPDConfig as OPDConfig, OPDTrainer as OPDTrainer
    from opd_env.trainer import register_divergence as register_divergence
    # isort: on

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "episode.env": ("ToolEnv",),
        "episode.limits": ("RolloutLimits",),
        "episode.rollouts": ("rollout",),
        "episode.trajectory": ("StopReason", "Trajectory"),
        "evaluation.run": ("evaluate",),
        "tasks": ("Example", "Grade", "Task", "list_tasks", "load_task", "register_task"),
        "tools": (
            "Tool", "ToolError", "ToolErrorKind", "Toolbox", "get_tool", "list_tools", "register_tool", "tool",
        ),
        "trainer": ("OPDConfig", "OPDTrainer", "register_divergence"),
    },
)  # fmt: skip

# Importing gymnasium takes ten times as long as everything here, so it is only told where it is there already. The id
# "opd_env.episode.env:opd_env/ToolUse-v0" works in any order: gymnasium imports the module, which registers itself.
if "gymnasium" in sys.modules:
    from gymnasium.envs.registration import register

    register(id="opd_env/ToolUse-v0", entry_point="opd_env.episode.env:ToolEnv")
