"""The environment: one episode of a task with tools, as a gymnasium environment of plain text.

Worked example, played by hand::

    env = gymnasium.make("opd_env/ToolUse-v0", task="arithmetic", tools=["calculator"])
    observation, info = env.reset(seed=0)              # info["messages"], info["tools"]
    call = '<tool_call>\\n{"name": "calculator", "arguments": {"expression": "6*7"}}\\n</tool_call>'
    observation, reward, terminated, truncated, info = env.step(call)        # observation: '42'
    observation, reward, terminated, truncated, info = env.step("The answer is 42.")

``gymnasium.make`` knows the environment when gymnasium was imported before ``opd_env``, or when this module was. The id
``"opd_env.episode.env:opd_env/ToolUse-v0"`` works always.

There is no tokenizer inside: any model, script or person can play. ``reset`` and ``step`` never raise for
anything that a student or a tool does.

Test it alone: ``pytest tests/episode/test_env.py``
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.envs.registration import register, registry
from gymnasium.spaces import Text

from opd_env.episode.limits import RolloutLimits
from opd_env.episode.trajectory import StopReason
from opd_env.formats.hermes import parse_hermes
from opd_env.formats.parse import ParsedCall, ParsedTurn
from opd_env.messages import Message, ToolCall, assistant, tool_message
from opd_env.tasks import Example, Grade, Task, list_tasks, load_task
from opd_env.tools import Tool, Toolbox, ToolError, ToolErrorKind, ToolResult


class ChatText(Text):
    """A space of any Unicode text up to ``max_length`` characters. Samples are printable."""

    def __init__(self, max_length: int = 1_000_000, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=frozenset(map(chr, range(32, 127))), seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string of acceptable length."""
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A short random text."""
        length = int(self.np_random.integers(0, 40))
        return "".join(map(chr, self.np_random.integers(32, 127, size=length)))

    def __repr__(self) -> str:
        return f"ChatText({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatText) and other.max_length == self.max_length


@dataclass(frozen=True)
class PlayedCall:
    """A call of a turn, and its result."""

    parsed: ParsedCall
    result: ToolResult


class ToolEnv(gymnasium.Env[str, str]):
    """A task's problems, answered in turns that may call tools.

    An action is the text of an assistant turn; an observation is the text that answers it. ``reset`` takes
    ``options={"index": i}`` for a certain example; without it the seed draws one.

    ``info`` holds ``messages`` (the new messages), and after ``reset`` ``tools`` (schemas) and ``example``;
    after ``step`` ``calls`` (``PlayedCall`` records), and at the end ``stop_reason``, ``answer`` and ``grade``.
    The reward is 1 for a correct final answer, else 0.

    Args:
        task: a task, or the name of a registered one. It must be given.
        tools: names or tools; by default those that the task offers for the example.
        limits: budgets, see ``opd_env.episode.limits`` for the order of checks.
        parse: reads a turn; a chat format's ``parse_text``.
        split, task_options: passed to ``load_task`` when ``task`` is a name.
        render_mode: ``"ansi"`` makes ``render`` return the conversation so far.

    Raises:
        ValueError: there is no task.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        task: str | Task | None = None,
        tools: Sequence[str | Tool] | None = None,
        *,
        split: str = "train",
        limits: RolloutLimits | None = None,
        parse: Callable[[str], ParsedTurn] = parse_hermes,
        render_mode: str | None = None,
        **task_options: Any,
    ) -> None:
        if task is None:
            known = ", ".join(list_tasks())
            raise ValueError(
                f"an environment needs a task, such as task='arithmetic' for gymnasium.make; known: {known}"
            )
        self.task = load_task(task, split, **task_options) if isinstance(task, str) else task
        self._tools = self.task.tools if tools is None else tools
        self._tools_per_example = tools is None
        self.toolbox = Toolbox(self._tools)
        self.limits = limits or RolloutLimits()
        self.render_mode = render_mode
        self.observation_space, self.action_space = ChatText(), ChatText()
        self._parse = parse
        self._example: Example | None = None
        self._done = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Opens an example. See the class for ``options`` and ``info``."""
        super().reset(seed=seed)
        index = (options or {}).get("index")
        if index is None:
            index = int(self.np_random.integers(len(self.task)))
        self._example = self.task[index]
        if self._tools_per_example:
            self._offer(self.task.tools_of(self._example))
        self._messages: list[Message] = list(self._example.messages)
        self._turns = self._calls = self._errors = 0
        self._deadline = time.monotonic() + self.limits.max_seconds
        self._done = False
        self.toolbox.reset()
        info = {"messages": list(self._messages), "tools": self.toolbox.schemas, "example": self._example}
        return "\n\n".join(message["content"] for message in self._messages), info

    def step(self, action: str) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]:
        """Plays one assistant turn: runs its calls; without calls it is graded, or the user speaks again.

        Raises:
            RuntimeError: the episode is over or was never reset.
        """
        if self._done:
            raise RuntimeError("the episode is over; call reset() before the next step()")
        turn = self._parse(action)
        self._turns += 1
        self._messages.append(_as_message(turn))
        if not turn.calls:
            return self._answered(turn.content)
        if self.overdue():
            return self._end(StopReason.TIME, None)

        played: list[PlayedCall] = []
        over_budget, stop_answer = False, None
        for call in turn.calls:
            if self.overdue():
                break
            if self._calls >= self.limits.max_tool_calls:
                over_budget = True
                message = f"no call is left of {self.limits.max_tool_calls}"
                played.append(PlayedCall(call, _failure(call, ToolErrorKind.BUDGET, message)))
                continue
            self._calls += 1
            result = self._run(call)
            played.append(PlayedCall(call, result))
            if result.error is not ToolErrorKind.SANDBOX:  # a failure of the kit, not the student's
                self._errors = 0 if result.ok else self._errors + 1
            if result.ok and self.toolbox[result.name].ends_episode:
                stop_answer = result.content
                break
        replies = [tool_message(one.result.name, one.result.content) for one in played]
        self._messages += replies
        details = {"messages": replies, "calls": played}
        reason = self._spent(over_budget) if stop_answer is None else StopReason.STOP_TOOL
        if reason is not None:
            return self._end(reason, stop_answer, details)
        return "\n".join(reply["content"] for reply in replies), 0.0, False, False, details

    def _answered(self, content: str) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]:
        """Ends the episode with this answer, unless the user has more to say."""
        later = None if self._example is None else self.task.next_user(self._example, self._own_turns())
        if later is None:
            return self._end(StopReason.ANSWER, content)
        reason = self._spent()
        if reason is not None:
            return self._end(reason, None)
        self._messages.append(later)
        return later["content"], 0.0, False, False, {"messages": [later], "calls": []}

    def _spent(self, over_budget: bool = False) -> StopReason | None:
        """6 to 9 of ``opd_env.episode.limits``. After an answer the errors in a row are always fewer than allowed."""
        if self.overdue():
            return StopReason.TIME
        if over_budget:
            return StopReason.MAX_TOOL_CALLS
        if self._errors >= self.limits.max_errors:
            return StopReason.MAX_ERRORS
        return StopReason.MAX_TURNS if self._turns >= self.limits.max_turns else None

    def _own_turns(self) -> list[Message]:
        opening = 0 if self._example is None else len(self._example.messages)
        return [message for message in self._messages[opening:] if message["role"] != "tool"]

    def overdue(self) -> bool:
        """Whether the episode's time is up."""
        return time.monotonic() >= self._deadline

    def extend(self, seconds: float) -> None:
        """Gives the episode more time, for a pause that was not the student's."""
        self._deadline += seconds

    def truncate(self, reason: StopReason) -> Grade:
        """Ends the episode from outside, because a budget that the caller watches ran out."""
        grade: Grade = self._end(reason, None)[-1]["grade"]
        return grade

    def render(self) -> Any:
        """The conversation so far as text (``render_mode="ansi"``)."""
        if self.render_mode is None:
            return None
        return "\n".join(f"[{message['role']}] {_shown(message)}" for message in self._messages)

    def close(self) -> None:
        """Ends the tools."""
        self.toolbox.close()

    def _offer(self, tools: Sequence[str | Tool]) -> None:
        """Replaces the toolbox when this example comes with other tools than the one before."""
        if tools is not self._tools and list(tools) != list(self._tools):
            self.toolbox.close()
            self._tools, self.toolbox = tools, Toolbox(tools)

    def _run(self, call: ParsedCall) -> ToolResult:
        if call.error is not None:
            return _failure(call, call.error, call.message)
        return self.toolbox.call(call.name or "", call.arguments)

    def _end(
        self, reason: StopReason, answer: str | None, details: dict[str, Any] | None = None
    ) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]:
        if self._example is None:
            raise RuntimeError("call reset() before the episode can end")
        self._done = True
        self.toolbox.reset()
        grade = self.task.grade(self._example, answer, self._own_turns())
        if not reason.terminated:
            grade = replace(grade, correct=False, reason=grade.reason or f"the episode was cut: {reason}")
        info = {"messages": [], "calls": [], **(details or {})}
        info |= {"stop_reason": reason, "answer": answer, "grade": grade}
        return "", float(grade.correct), reason.terminated, not reason.terminated, info


def _failure(call: ParsedCall, kind: ToolErrorKind, message: str) -> ToolResult:
    return ToolResult(call.name or "tool_call", ToolError(kind, message).content, kind)


def _as_message(turn: ParsedTurn) -> Message:
    """The turn as a grader sees it: calls that could not be read are no calls."""
    readable = (call for call in turn.calls if call.error is None)
    calls = [ToolCall(call.name or "", call.arguments or {}) for call in readable]
    return assistant(turn.content, calls)


def _shown(message: Message) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return " ".join([message["content"], *calls]).strip()


if "opd_env/ToolUse-v0" not in registry:
    register(id="opd_env/ToolUse-v0", entry_point="opd_env.episode.env:ToolEnv")
