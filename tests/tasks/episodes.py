"""Plays written turns in a task's real environment."""

from __future__ import annotations

from opd_env.episode.env import ToolEnv
from opd_env.tasks import Grade, Task


def play(task: Task, *texts: str) -> Grade | None:
    """The grade of the first example's episode; None when it is not over after these turns."""
    env = ToolEnv(task, task.tools_of(task[0]))
    env.reset(options={"index": 0})
    for text in texts:
        *_, terminated, truncated, info = env.step(text)
        if terminated or truncated:
            return info["grade"]
    return None
