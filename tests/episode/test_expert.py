"""An expert's episode is kept only when the real tools and the grader agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from opd_env.episode.expert import play_expert
from opd_env.formats import get_format
from opd_env.formats.base import TokenKind
from opd_env.messages import Message, ToolCall, assistant, tool_message, user
from opd_env.tasks import Example, Grade, Task, grade_number, load_task
from tests.tiny import tiny_tokenizer

CHAT = get_format(tiny_tokenizer())


class Scripted(Task):
    """One problem whose expert says what the test wants."""

    name = "scripted"
    version = "1"
    tools = ("calculator",)

    def __init__(self, expert: list[Message] | None) -> None:
        super().__init__()
        self._expert = expert

    def __len__(self) -> int:
        return 1

    def example(self, index: int) -> Example:
        return Example("0", (user("6*7?"),), "42")

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        return grade_number(answer, example.answer)

    def expert(self, example: Example) -> list[Message] | None:
        return self._expert


CALL = assistant("", [ToolCall("calculator", {"expression": "6*7"})])


def test_a_sound_expert_is_kept_with_its_own_words_sampled() -> None:
    trajectory = play_expert(Scripted([CALL, tool_message("calculator", "42"), assistant("42")]), 0, CHAT)
    assert trajectory is not None
    sampled = CHAT.decode(trajectory.token_ids[trajectory.sampled].tolist())
    assert (
        sampled
        == '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call><|im_end|>42<|im_end|>'
    )
    assert CHAT.decode(trajectory.token_ids[trajectory.kind == TokenKind.TOOL_OUTPUT].tolist()) == "42"


@pytest.mark.parametrize(
    "expert",
    [
        None,
        [CALL, tool_message("calculator", "41"), assistant("42")],
        [CALL, tool_message("calculator", "42"), assistant("41")],
        [CALL, tool_message("calculator", "42")],
        [assistant("42"), tool_message("calculator", "42"), assistant("42")],
        [assistant("", [ToolCall("nobody", {})]), tool_message("nobody", "42"), assistant("42")],
    ],
    ids=["none", "wrong result", "wrong answer", "no answer", "result without call", "unknown tool"],
)
def test_any_other_expert_is_dropped(expert: Any) -> None:
    assert play_expert(Scripted(expert), 0, CHAT) is None


def test_the_built_in_experts_hold() -> None:
    task = load_task("arithmetic")
    assert all(play_expert(task, index, CHAT) is not None for index in range(30))
