"""Plays a task's expert through the real tools, and keeps the episode only if it holds.

Worked example::

    trajectory = play_expert(load_task("arithmetic"), 0, chat)      # None: no expert, or it does not hold
    trajectory.sampled                                              # True on what a student should write

Test it alone: ``pytest tests/episode/test_expert.py``
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_env.engines.base import Request, ScriptedEngine
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import rollout
from opd_env.episode.trajectory import Trajectory
from opd_env.formats import ChatFormat
from opd_env.tasks import Task
from opd_env.tools import Tool

_LIMITS = RolloutLimits(max_turns=64, max_tool_calls=256, max_turn_tokens=1 << 16, max_tokens=1 << 18)


def play_expert(
    task: Task, index: int, chat: ChatFormat, tools: Sequence[str | Tool] | None = None
) -> Trajectory | None:
    """The expert's episode for one example, with log-prob 0 for every token it wrote.

    Returns:
        None when the task has no expert for the example, when a tool answers otherwise than the expert expects,
        or when the grade is not correct.
    """
    conversation = task.expert(task[index])
    if conversation is None:
        return None
    turns = [chat.render_assistant(message) for message in conversation if message["role"] == "assistant"]

    def respond(request: Request, turn: int) -> Sequence[int]:
        return turns[turn] if turn < len(turns) else chat.stop_token_ids[:1]

    engine = ScriptedEngine(respond, chat.stop_token_ids)
    result = rollout(task, engine, chat, indices=[index], tools=tools, limits=_LIMITS, tool_workers=0)
    if not result.trajectories:
        raise RuntimeError(f"the expert of {task.name}/{task[index].id} cannot be played: {result.errors[0].message}")
    trajectory = result.trajectories[0]
    answers = [call.output for call in trajectory.calls]
    expected = [message["content"] for message in conversation if message["role"] == "tool"]
    return trajectory if trajectory.correct and answers == expected else None
